"""No scorer accepts a wrong answer of its golden set, rejects a right one, or leaves many undecided."""

import importlib.util
from collections import Counter

import pytest

from benchmarks.verifiers import KINDS, golden, judge
from distill_pipeline.scoring.registry import BUILT_INS

MAX_UNKNOWN_FRAC = 0.08
QUICK = [kind for kind in KINDS if kind not in ("python_tests", "reasoning_gym")]


def test_every_row_level_scorer_has_a_golden_set_and_math_has_sixty_right_forms() -> None:
    assert set(KINDS) <= set(BUILT_INS)
    assert {"contains_answer", "exact", "json_schema", "math", "multiple_choice", "numeric", "python_tests", "regex"} <= set(
        KINDS
    )
    for kind in KINDS:
        assert len(golden(kind)) >= 25
    assert sum(row["label"] == "right" for row in golden("math")) >= 60


@pytest.mark.parametrize("kind", QUICK)
def test_golden_answers_are_judged_as_labelled(kind: str) -> None:
    check(kind)


def test_golden_programs_are_judged_as_labelled() -> None:
    check("python_tests")


def test_golden_tasks_are_judged_as_labelled() -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed: pip install 'distill-pipeline[reasoning-gym]'")
    check("reasoning_gym")


def check(kind: str) -> None:
    judged, _ = judge(kind)
    bad = [one for one in judged if one.verdict in ("false_accept", "false_reject")]
    assert not bad, [(one.row["reference"], one.row["answer"][:80], one.value) for one in bad]
    counts = Counter(one.verdict for one in judged)
    undecided = [(one.row["answer"][:80], one.value.detail) for one in judged if one.verdict == "unknown"]
    assert counts["unknown"] <= MAX_UNKNOWN_FRAC * len(judged) + 2, undecided
    if kind == "math":
        assert not [text for one in judged if one.row["label"] == "right" and one.value.score is None for text in [one.row]]
