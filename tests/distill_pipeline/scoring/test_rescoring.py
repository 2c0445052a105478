"""In a whole experiment: a changed filter scores nothing, and a changed scorer scores only itself. All counted."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from distill_pipeline.errors import ConfigError, EmptyResultError
from distill_pipeline.experiment import parse_experiment
from distill_pipeline.pipeline import Pipeline
from distill_pipeline.storage.artifacts import Artifact, ArtifactStore


class World:
    """An experiment up to its filtered set, with two counting scorers."""

    def __init__(self, folder: Path, teacher: Path, kinds: list[str]) -> None:
        self.folder = folder
        self.document: dict[str, Any] = {
            "name": "tiny",
            "prompt_pool": {
                "sources": [{"path": str(folder / "prompts.jsonl"), "domain": "words", "license": "cc0-1.0"}],
                "holdout_fraction": 0.0, "decontaminate": {"against": None},
            },
            "teachers": {"small": {"model": str(teacher), "license": "mit",
                                   "sampling": {"n": 3, "temperature": 1.0, "max_tokens": 4}}},
            "scorers": {"words": [{"kind": kind} for kind in kinds]},
            "filters": {"kept": {"min_score": 0.0}},
            "students": {"s": {"data": ["small/kept"], "init": {"scratch": {"layers": 2}}, "stages": [{"method": "sft"}]}},
            "evaluation": {"tasks": ["none"]},
        }  # fmt: skip
        self.add_prompts(range(8))

    def add_prompts(self, numbers: range) -> None:
        with (self.folder / "prompts.jsonl").open("a") as file:
            file.writelines(json.dumps({"prompt": f"say the word {n}", "reference": "e"}) + "\n" for n in numbers)

    def scored(self) -> Artifact:
        for name in ("prompt_pool", "teacher_outputs/small", "scored_outputs/small"):
            artifact = self._pipeline.make(name)
        return artifact

    def filtered(self) -> Artifact | None:
        """The filtered set as it is made now, or None where it is empty: its rows are stored all the same."""
        with suppress(EmptyResultError):
            return self._pipeline.make("filtered_set/small/kept")
        return None

    @property
    def _pipeline(self) -> Pipeline:
        return Pipeline(parse_experiment(self.document), ArtifactStore(self.folder / "data"), progress=lambda line: None)


def test_a_misspelt_domain_of_a_filter_is_found_before_the_teacher_is_asked(tmp_path: Path, tiny_teacher_dir: Path) -> None:
    world = World(tmp_path, tiny_teacher_dir, ["exact"])
    world.document["filters"]["kept"]["domains"] = {"word": {"preset": "chat"}}
    with pytest.raises(ConfigError, match=r"filters\.kept\.domains\.word: no prompt is in this domain.*in: words"):
        world.scored()
    assert [path.name for path in (tmp_path / "data").iterdir() if path.name == "teacher_outputs"] == []


def test_only_what_changed_is_scored(tmp_path: Path, tiny_teacher_dir: Path, counting: Callable[[str], Any]) -> None:
    one, two = counting("one"), counting("two")
    world = World(tmp_path, tiny_teacher_dir, [one.kind, two.kind])
    world.scored()
    assert len(one.calls()) == len(two.calls()) > 8
    world.filtered()
    rules: list[dict[str, Any]] = [
        {"min_score": 1.0},
        {"min_score": 0.0, "keep": "best_of_n"},
        {"min_score": 0.0, "keep": "shortest", "max_per_prompt": 2},
        {"min_score": 0.0, "drop": ["truncated", "refusal", "repetition", "empty", "duplicate"]},
        {"preset": "short_answer"},
        {"preset": "chat"},
        {"preset": "chat", "domains": {"words": {"preset": "math"}}},
        {"preset": "chat", "domains": {"words": {"preset": "code"}}},
        {},
    ]
    for rule in rules:
        world.document["filters"]["kept"] = rule
        assert world.scored().reused
        after = world.filtered()
        assert after is None or not after.reused
        assert (one.calls(), two.calls()) == ([], [])

    one.change()
    scored = world.scored()
    assert not scored.reused
    assert len(one.calls()) > 8
    assert two.calls() == []
    reuse = scored.manifest.facts["reuse"]["words"]
    assert reuse == {one.kind: {"reused": 0, "scored_anew": 24}, two.kind: {"reused": 24, "scored_anew": 0}}

    world.document["scorers"]["words"].append({"kind": "majority_vote", "options": {"min_share": 0.6}})
    counts = world.scored().manifest.counts
    assert (counts["reused"], counts["scored_anew"]) == (48, 24)
    assert (one.calls(), two.calls()) == ([], [])

    world.add_prompts(range(100, 102))
    counts = world.scored().manifest.counts
    assert (counts["reused"], counts["scored_anew"]) == (72, 18)
    assert 0 < len(one.calls()) <= 6


def test_a_scorers_model_is_named_as_a_teacher_or_by_reference_and_its_content_counts(
    tmp_path: Path, tiny_teacher_dir: Path, classifier_of: Callable[..., Path]
) -> None:
    reward = classifier_of(tmp_path / "reward", seed=0)
    world = World(tmp_path, tiny_teacher_dir, [])
    judge = {"kind": "judge", "options": {"model": "small", "max_tokens": 4}}
    world.document["scorers"]["words"] = [judge, {"kind": "reward_model", "options": {"model": str(reward)}}]
    scored = world.scored()
    versions = scored.manifest.made.inputs
    assert {f"model:{reward}", "model:small", "scorer:judge", "scorer:reward_model"} <= set(versions)
    facts = scored.manifest.facts
    assert facts["scores"]["words"]["reward_model"]["known"] == 24
    assert world.scored().reused
    classifier_of(reward, seed=1)
    reuse = world.scored().manifest.facts["reuse"]["words"]
    assert reuse["reward_model"] == {"reused": 0, "scored_anew": 24}
    assert reuse["judge"] == {"reused": 24, "scored_anew": 0}
