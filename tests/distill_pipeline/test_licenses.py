"""Laws of the licence gate: what is refused, unknown or contradictory stops a teacher unless a reason is recorded."""

from pathlib import Path

import pytest

from distill_pipeline.errors import LicenseError
from distill_pipeline.licenses import Terms, check_license, known_terms, license_table, provider_of
from distill_pipeline.models.declared import DeclaredLicense

ALL = list(dict.fromkeys(license_table().by_key.values()))


def says(key: str | None) -> DeclaredLicense:
    return DeclaredLicense(key, "the card README.md of m")


def test_a_free_licence_passes_without_duties() -> None:
    facts = check_license("t", "Apache 2.0", None)
    assert (facts["license"], facts["verdict"], facts["obligations"]) == ("apache-2.0", "allowed", [])
    assert facts["table_date"] == license_table().date


@pytest.mark.parametrize("terms", ALL, ids=lambda terms: terms.key)
def test_every_line_of_the_table_says_what_it_rests_on(terms: Terms) -> None:
    assert terms.verdict in {"allowed", "obliged", "refused"}
    assert all((terms.clause, terms.source, terms.read))
    assert terms.url.startswith("https://")
    assert terms.verdict != "obliged" or terms.obligations


@pytest.mark.parametrize("terms", [terms for terms in ALL if not terms.verify], ids=lambda terms: terms.key)
def test_a_line_that_counts_as_read_rests_on_no_hearsay(terms: Terms) -> None:
    hearsay = ("by others", "from memory", "nothing read", "not read", "taken to be")
    assert not [words for words in hearsay if words in terms.source]
    assert terms.read <= license_table().date


@pytest.mark.parametrize("terms", [terms for terms in ALL if terms.verdict == "refused"], ids=lambda terms: terms.key)
def test_a_refused_licence_stops_the_teacher_and_names_the_clause_and_its_source(terms: Terms) -> None:
    with pytest.raises(LicenseError) as caught:
        check_license("t", terms.key, None)
    assert str(caught.value).startswith(f"teacher t: licence {terms.key} ")
    assert all(part in str(caught.value) for part in (terms.clause, terms.url, terms.read, "set accept:"))
    assert check_license("t", terms.key, "we have a written permission")["accepted_because"] == "we have a written permission"


def test_obligations_come_with_what_cards_need() -> None:
    facts = check_license("t", "llama3.1", None)
    assert facts["verdict"] == "obliged"
    assert "the student's name begins with Llama" in facts["obligations"]
    assert facts["name_prefix"] == "Llama"
    assert facts["notices"][0].startswith("Built with Llama. Llama 3.1 is licensed under")
    assert check_license("t", "qwen", None)["notices"] == ["Built with Qwen"]
    assert check_license("t", "cc-by-nc-4.0", "only for a paper")["non_commercial"] is True


@pytest.mark.parametrize(
    ("key", "declared", "said"),
    [
        (None, None, "no licence is known, so"),
        (None, says(None), "no licence is known (the card README.md of m), so"),
        ("other", None, "licence 'other' is not in the table of"),
        (None, says("my-own"), "licence 'my-own' is not in the table of"),
    ],
)
def test_a_missing_or_unknown_licence_is_refused_and_says_what_to_do(
    key: str | None, declared: DeclaredLicense | None, said: str
) -> None:
    with pytest.raises(LicenseError) as caught:
        check_license("t", key, None, declared=declared)
    assert all(part in str(caught.value) for part in (said, "Read the licence", "apache-2.0", "llama3.1", "set accept:"))
    assert check_license("t", key, "it is our own model", declared=declared)["verdict"] == "unknown"


def test_the_experiment_goes_before_the_model_and_the_model_before_the_address() -> None:
    url = ["https://api.deepseek.com/v1"]
    assert check_license("t", "mit", None, declared=says("mit"), base_urls=url)["license_from"] == "the experiment"
    found = check_license("t", None, None, declared=says("mit"), base_urls=url)
    assert (found["license"], found["license_from"]) == ("mit", "the card README.md of m")
    found = check_license("t", None, None, base_urls=url)
    assert (found["license"], found["license_from"]) == ("deepseek-platform", "the address")


def test_experiment_and_card_that_contradict_each_other_are_an_error_with_both() -> None:
    said = (
        r"the experiment says license mit, and the card README\.md of m says llama3\.1\. Correct license:, or take it out and"
    )
    with pytest.raises(LicenseError, match=said):
        check_license("t", "mit", None, declared=says("llama3.1"))
    found = check_license("t", "mit", "relicensed to us by letter", declared=says("llama3.1"))
    assert (found["license"], found["declared_license"]) == ("mit", "llama3.1")
    assert check_license("t", "Qwen License", None, declared=says("qwen"))["license"] == "qwen"  # two spellings


def test_qwens_older_licence_is_not_its_newer_one() -> None:
    assert check_license("t", None, None, declared=says("qwen"))["verdict"] == "obliged"
    for key in ("tongyi-qianwen", "Tongyi Qianwen License"):
        with pytest.raises(
            LicenseError, match=r"licence tongyi-qianwen forbids training on its outputs \(5\.b: .*, read 2026-"
        ):
            check_license("t", None, None, declared=says(key))
    with pytest.raises(LicenseError, match=r"says license qwen, and the card README\.md of m says tongyi-qianwen"):
        check_license("t", "qwen", None, declared=says("tongyi-qianwen"))


def test_a_providers_terms_hold_whatever_licence_is_stated() -> None:
    with pytest.raises(LicenseError, match=r"licence openai forbids training on its outputs"):
        check_license("t", "apache-2.0", None, base_urls=["http://127.0.0.1:1/v1", "https://api.openai.com/v1"])
    groq = ["https://api.groq.com/openai/v1"]
    with pytest.raises(LicenseError, match=r"groq serves models of others, whose licence counts"):
        check_license("t", None, None, base_urls=groq)
    found = check_license("t", "llama3.3", None, base_urls=groq)
    assert (found["provider"], found["name_prefix"], found["verdict"]) == ("groq", "Llama", "obliged")
    assert "keep to Groq's services agreement" in found["obligations"]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://mine.openai.azure.com/openai/v1", "azure-openai"),
        ("https://api.openai.com.evil.example/v1", None),
        ("https://notapi.openai.com/v1", None),
        ("https://bedrock-runtime.eu-west-1.amazonaws.com/openai/v1", "amazon-bedrock"),
        ("http://ec2-1-2-3-4.compute-1.amazonaws.com:8000/v1", None),
        ("http://localhost:8000/v1", None),
    ],
)
def test_a_provider_is_known_by_its_own_hosts_only(url: str, name: str | None) -> None:
    found = provider_of([url])
    assert (found.key if found else None) == name


def test_the_table_is_part_of_the_package() -> None:
    import distill_pipeline

    assert (Path(distill_pipeline.__file__).parent / "licenses.toml").is_file()
    assert known_terms("google-gemini-api") is known_terms("google")
