"""Scorers of an experiment are checked before anything runs, and without importing anybody's code."""

import sys
from pathlib import Path

import pytest

from distill_pipeline.errors import ConfigError
from distill_pipeline.scoring.registry import BUILT_INS, SCORING, resolve_scorer, scorer_fault, scorer_versions
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.scoring.worker import load


def test_an_unknown_scorer_names_the_known_ones() -> None:
    fault = scorer_fault("contains", {})
    assert fault == (
        "unknown scorer 'contains'; known: contains_answer, exact, json_schema, judge, majority_vote, math, multiple_choice, "
        "numeric, python_tests, reasoning_gym, regex, reward_model, teacher_logprob; "
        "your own is written package.module:function"
    )


@pytest.mark.parametrize(
    ("kind", "options", "fault"),
    [
        ("contains_answer", {"x": 1}, "contains_answer does not take the option 'x'; it takes: no options"),
        ("numeric", {"tolerance": 1}, "it takes: pick, relative_tolerance"),
        ("numeric", {"pick": "best"}, "last, first or any"),
        ("numeric", {"relative_tolerance": True}, "cannot use True as relative_tolerance"),
        ("numeric", {"relative_tolerance": -1}, r"\[0, 1\)"),
        ("regex", {}, "regex needs the option 'pattern'"),
        ("regex", {"pattern": "("}, "cannot use the pattern"),
        ("regex", {"pattern": "a", "group": 1}, "has 0 groups"),
        ("multiple_choice", {"letters": "a-z"}, "letters such as ABCD"),
        ("teacher_logprob", {"scale": "sigmoid"}, "it takes: no options"),
        (
            "majority_vote",
            {"by": "contains_answer"},
            "cannot tell answers equal by 'contains_answer'; it can by: exact, numeric",
        ),
        ("majority_vote", {"by": "majority_vote"}, "cannot tell answers equal by 'majority_vote'"),
        ("majority_vote", {"by": "numeric", "by_options": {"x": 1}}, "majority_vote by numeric does not take the option 'x'"),
        ("majority_vote", {"min_share": 1.5}, r"min_share in \[0, 1\]"),
        ("majority_vote", {"min_votes": 0}, "min_votes of at least 1"),
        ("reward_model", {}, "reward_model needs the option 'model'"),
        ("reward_model", {"model": "m", "scale": "tanh"}, "the scales sigmoid and identity, not 'tanh'"),
        ("judge", {"rubric": "helpful"}, "judge needs the option 'model'"),
        ("judge", {"model": "m", "rubric": "helpfull"}, "no rubric 'helpfull'; it has: correct, helpful, reasoning"),
        ("judge", {"model": "m", "scale": 7}, "the scales 5 and 10"),
        ("judge", {"model": "m", "scale": 5, "compare": True}, "takes no scale where it compares"),
        ("judge", {"model": "m", "max_tokens": 0}, "max_tokens from 1"),
        ("my.module:", {}, "write package.module:function"),
        ("../x:f", {}, "write package.module:function"),
    ],
)
def test_a_wrong_option_is_named(kind: str, options: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        resolve_scorer(ScorerSpec(kind=kind, options=options))


def test_a_users_function_is_versioned_by_its_source_and_never_imported_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "their_scorers"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "rules.py").write_text("def score(reference, answer):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    scorers = {"*": (ScorerSpec(kind="their_scorers.rules:score"), ScorerSpec(kind="exact"))}
    before = scorer_versions(scorers)
    assert before["exact"] == "1"
    (package / "rules.py").write_text("def score(reference, answer):\n    return 0\n")
    assert scorer_versions(scorers)["their_scorers.rules:score"] != before["their_scorers.rules:score"]
    assert "their_scorers" not in sys.modules


def test_every_built_in_names_functions_that_exist() -> None:
    for kind, built_in in BUILT_INS.items():
        assert callable(load(built_in.target)), kind
        assert built_in.start is None or callable(load(f"{SCORING}.{built_in.start}")), kind


def test_a_missing_module_is_an_error_that_says_where_to_start() -> None:
    with pytest.raises(ConfigError, match=r"no module nowhere for the scorer module nowhere\.at\.all.*PYTHONPATH"):
        resolve_scorer(ScorerSpec(kind="nowhere.at.all:score"))
