"""Laws of the licence gate: refused and unknown terms stop a teacher unless a reason is recorded."""

import pytest

from distill_pipeline.errors import LicenseError
from distill_pipeline.licenses import TERMS, check_license


def test_a_free_licence_passes_without_duties() -> None:
    facts = check_license("t", "Apache-2.0", None)
    assert facts["verdict"] == "free"
    assert facts["obligations"] == []


def test_conditional_licences_carry_their_duties() -> None:
    assert "the student's name begins with Llama" in check_license("t", "llama3.1", None)["obligations"]  # type: ignore[operator]


@pytest.mark.parametrize("key", [key for key, terms in TERMS.items() if terms.verdict == "refused"])
def test_refused_licences_stop_the_teacher_and_name_the_clause(key: str) -> None:
    with pytest.raises(LicenseError, match=f"teacher t: licence {key} forbids training on its outputs"):
        check_license("t", key, None)
    assert check_license("t", key, "we have a written permission")["accepted_because"] == "we have a written permission"


@pytest.mark.parametrize(("key", "said"), [(None, "no licence is known"), ("other", "licence 'other' is not in the table")])
def test_a_missing_or_unknown_licence_is_refused_and_lists_the_known_ones(key: str | None, said: str) -> None:
    with pytest.raises(LicenseError, match=f"{said}.*apache-2.0.*accept"):
        check_license("t", key, None)
