"""Laws of the cards: what must be said is said, nothing from outside becomes markup, and equal work leaves equal cards."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_pipeline.cards.data_card import write_data_card
from distill_pipeline.cards.model_card import student_name, write_model_card
from distill_pipeline.cards.pieces import license_fields
from distill_pipeline.licenses import check_license
from distill_pipeline.models.declared import card_license
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.storage.artifacts import Ancestor, Artifact, ArtifactStore, Making, Manifest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
POOL = {"prompt_pool": {"sources": [{"path": "hf://datasets/us/asked/train.jsonl", "license": "cc0-1.0"}]}}
COUNTS = {"completions": 8, "accepted": 3, "failed": 1, "rejected": 4, "rejected_truncated": 4, "rejected_refusal": 0,
          "prompts": 2, "prompts_with_accepted": 1}  # fmt: skip
FACTS = {"parameters": 1234, "share": 0.5, "initial_loss": 2.0, "final_loss": 1.5, "tokenizer": "teacher", "dtype": "float32",
         "stages": [{"method": "logit_kd", "divergence": "forward_kl", "lr": 0.001, "max_steps": None}]}  # fmt: skip
NASTY = "x\n---\nlicense: mit\n# <script>alert(1)</script> | [a](http://evil) `b`\u202e\x00"


def teacher(license_key: str | None, accept: str | None = None, **who: Any) -> dict[str, Any]:
    named = {"name": "big", "model": "meta-llama/Big", "revision": COMMIT, "engine": "transformers"}
    return named | check_license("big", license_key, accept) | who


def model_card(folder: Path, facts: dict[str, Any], **other: Any) -> str:
    spec = {"filter": {"*": {"min_score": 1.0, "length": None}}}
    made = Making(experiment="e", spec=spec, code_version="c", inputs={})
    pool = Ancestor(name="prompt_pool", version="p" * 16, spec=POOL, inputs={}, counts={})
    manifest = Manifest(name="filtered_set/big/good", version="v" * 16, made=made, counts=COUNTS, lineage=[pool])
    options: dict[str, Any] = {
        "experiment": "trial", "student": "kl", "init": {"prune": {"layers": 2}, "model": None}, "teachers": [facts],
        "base": ModelFolder(folder, "meta-llama/Big", COMMIT, "i", facts["license"]), "seed": 0,
        "sets": [Artifact(ArtifactStore(folder), manifest)], "counts": {"steps": 4, "trained_tokens": 900}, "facts": FACTS,
    }  # fmt: skip
    write_model_card(folder, **options | other)
    return (folder / "README.md").read_text(encoding="utf-8")


def data_card(folder: Path, facts: dict[str, Any]) -> str:
    write_data_card(
        folder, experiment="trial", name="big/good", teacher=facts, rules={"*": {"min_score": 1.0}}, pool_spec=POOL,
        counts=COUNTS,
    )  # fmt: skip
    return (folder / "README.md").read_text(encoding="utf-8")


def metadata(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_a_model_card_gives_the_hub_what_it_asks_for(tmp_path: Path) -> None:
    model_card(tmp_path, teacher("llama3.1"))
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["license"] == "llama3.1"
    assert data["base_model"] == "meta-llama/Big"
    assert data["datasets"] == ["us/asked"]
    assert {"distillation", "logit_kd"} <= set(data["tags"])
    assert card_license(tmp_path) == "llama3.1", "a student that teaches in turn is under the same gate"


def test_obligations_reach_both_cards_and_the_students_name(tmp_path: Path) -> None:
    for text in (model_card(tmp_path, teacher("llama3.1")), data_card(tmp_path, teacher("llama3.1"))):
        assert "**Built with Llama\\. Llama 3\\.1 is licensed under" in text
        assert "- the student's name begins with Llama" in text
    assert "# Llama\\-trial\\-kl\n" in model_card(tmp_path, teacher("llama3.1"))
    assert student_name("trial", "kl", [teacher("mit"), teacher("llama3.3")]) == "Llama-trial-kl"
    assert student_name("trial", "kl", [teacher("mit")]) == "trial-kl"


def test_an_accepted_licence_stands_in_both_cards_with_its_reason(tmp_path: Path) -> None:
    facts = teacher("cc-by-nc-4.0", "a thesis, never sold")
    for text in (model_card(tmp_path, facts), data_card(tmp_path, facts)):
        assert "were accepted because: a thesis, never sold" in text
        assert "**For non-commercial use only.**" in text
        assert "cc-by-nc-4.0" in str(metadata(text)["license"]) + metadata(text).get("license_name", "")


def test_a_student_of_corrected_weights_has_their_original_as_its_base(tmp_path: Path) -> None:
    original = {"model": "meta-llama/Big", "revision": COMMIT, "identity": "o"}
    facts = teacher("mit", model="meta-llama/Big (corrected)", identity="corrected", correction=original)
    text = model_card(tmp_path, facts, base=ModelFolder(tmp_path, "meta-llama/Big (corrected)", None, "corrected", None))
    assert metadata(text)["base_model"] == "meta-llama/Big"
    assert "meta\\-llama\\/Big \\(corrected\\)" in text
    other = model_card(tmp_path, facts, base=ModelFolder(tmp_path, "org/student", COMMIT, "its own", None))
    assert metadata(other)["base_model"] == "org/student"


def test_a_data_card_tells_what_was_left_out_and_why(tmp_path: Path) -> None:
    text = data_card(tmp_path, teacher("mit"))
    assert "| rejected: truncated | 4 |".replace(":", "\\:") in text
    assert "refusal" not in text
    assert metadata(text)["license"] == "cc0-1.0", "an allowed teacher adds no terms to the prompts' licence"
    assert metadata(text)["configs"][0] == {"config_name": "training", "data_files": "train-*.parquet", "default": True}


@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        (["apache-2.0", "apache-2.0"], {"license": "apache-2.0"}),
        (["qwen"], {"license": "other", "license_name": "qwen"}),
        (["mit", "llama3.1"], {"license": "other", "license_name": "llama3.1-and-mit"}),
        ([None], {"license": "other", "license_name": "unknown"}),
        ([], {"license": "other", "license_name": "not-chosen"}),
    ],
)
def test_a_licence_field_is_one_that_the_hub_knows(keys: list[str | None], fields: dict[str, str]) -> None:
    assert license_fields(keys) == fields


def test_weights_at_random_and_a_providers_terms_license_no_weights(tmp_path: Path) -> None:
    facts = teacher("openai", "written permission", provider="openai", license="openai")
    text = model_card(tmp_path, facts, base=None, init={"scratch": {"layers": 2}, "model": None})
    assert metadata(text)["license_name"] == "not-chosen"
    assert "base_model" not in metadata(text)
    assert "random weights" in text


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.just(NASTY), st.text(min_size=1)))
def test_nothing_from_outside_becomes_markup_or_metadata(tmp_path: Path, text: str) -> None:
    harmless, outside = (teacher("llama3.1", said, name=said, model=said, engine=said) for said in ("x", text))
    for write in (model_card, data_card):
        plain, card = write(tmp_path, harmless), write(tmp_path, outside)
        assert len(card.splitlines()) == len(plain.splitlines())
        assert metadata(card) == metadata(plain)
        assert "<script" not in card
        assert "](http" not in card
