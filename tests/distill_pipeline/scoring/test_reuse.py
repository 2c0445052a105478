"""Scores are kept by content: a scorer that did not change is not run again on a row that did not change. All counted."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_pipeline.errors import IntegrityError
from distill_pipeline.outcome import Outcome
from distill_pipeline.records import COMPLETION_SCHEMA, PROMPT_SCHEMA
from distill_pipeline.scoring import registry
from distill_pipeline.scoring.kept import KeptScores
from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.scoring.rows import ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.scoring.stage import score_outputs

Prompts = Mapping[str, Mapping[str, Any]]
NO_CHANGE: Prompts = {}


def tables(
    answers: Mapping[str, Sequence[str]], prompts: Prompts = NO_CHANGE
) -> tuple[list[pa.RecordBatch], list[pa.RecordBatch]]:
    """A pool and a teacher's outputs from answers by prompt."""
    pool, rows = [], []
    for name, texts in answers.items():
        pool.append(
            {
                "prompt_id": name, "messages": [{"role": "user", "content": name}], "reference": None, "domain": "d",
                "source": "s", "license": "l", "split": "train", "metadata": "{}",
            } | dict(prompts.get(name, {}))
        )  # fmt: skip
        rows += [
            {
                "completion_id": f"{name}/{number}", "prompt_id": name, "teacher": "t", "sample_index": number, "answer": text,
                "raw_text": text, "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1, "request_key": "k",
            }
            for number, text in enumerate(texts)
        ]  # fmt: skip
    return (
        pa.Table.from_pylist(pool, schema=PROMPT_SCHEMA).to_batches(),
        pa.Table.from_pylist(rows, schema=COMPLETION_SCHEMA).to_batches(),
    )


class Runs:
    """Runs of the stage over one store of scores."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scores_dir = folder / "scores"

    def run(self, answers: Mapping[str, Sequence[str]], *specs: ScorerSpec | str, prompts: Prompts = NO_CHANGE) -> Outcome:
        self.out_dir = self.folder / f"out{len(list(self.folder.glob('out*')))}"
        self.out_dir.mkdir()
        listed = [ScorerSpec(kind=spec) if isinstance(spec, str) else spec for spec in specs]
        context = ScoringContext(scores_dir=self.scores_dir)
        return score_outputs(*tables(answers, prompts), self.out_dir, scorers={"*": listed}, context=context)

    def content(self) -> bytes:
        return (self.out_dir / "part-00000.parquet").read_bytes()


ANSWERS = {"a": ["one", "two"], "b": ["three", "four"], "c": ["raise", ""]}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_a_second_run_scores_nothing_and_gives_the_same_rows(runs: Runs, counting: Callable[..., Any]) -> None:
    scorer = counting("one")
    outcome = runs.run(ANSWERS, scorer.kind)
    assert len(scorer.calls()) == 6
    assert (outcome.counts["reused"], outcome.counts["scored_anew"]) == (0, 6)
    first = runs.content()
    outcome = runs.run(ANSWERS, scorer.kind)
    assert scorer.calls() == []
    assert (outcome.counts["reused"], outcome.counts["scored_anew"]) == (6, 0)
    assert outcome.facts["reuse"] == {"d": {scorer.kind: {"reused": 6, "scored_anew": 0}}}
    assert runs.content() == first


def test_new_prompts_and_new_samples_score_only_themselves_in_any_order(runs: Runs, counting: Callable[..., Any]) -> None:
    scorer = counting("one")
    runs.run(ANSWERS, scorer.kind)
    scorer.calls()
    more = {"new": ["x", "y"], "c": ["raise", "", "third"], "a": ANSWERS["a"]}
    outcome = runs.run(more, scorer.kind)
    assert scorer.calls() == ["x", "y", "third"]
    assert outcome.counts["reused"] == 4


def test_equal_answers_to_one_prompt_are_scored_once(runs: Runs, counting: Callable[..., Any]) -> None:
    scorer = counting("one")
    outcome = runs.run({"a": ["same", "same", "other"], "b": ["same"]}, scorer.kind)
    assert scorer.calls() == ["same", "other", "same"]
    assert outcome.counts["scored_anew"] == 4


def test_one_more_sample_has_its_prompt_vote_again_and_no_other(runs: Runs) -> None:
    before = {"a": ["x", "x", "y"], "b": ["z", "z"]}
    runs.run(before, "majority_vote")
    outcome = runs.run({**before, "a": ["x", "x", "y", "y", "y"]}, "majority_vote")
    assert (outcome.counts["reused"], outcome.counts["scored_anew"]) == (2, 5)
    rows = pq.read_table(runs.out_dir / "part-00000.parquet")
    assert rows["score"].to_pylist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_another_scorer_scores_alone(runs: Runs, counting: Callable[..., Any]) -> None:
    one, two = counting("one"), counting("two")
    runs.run(ANSWERS, one.kind)
    one.calls()
    outcome = runs.run(ANSWERS, two.kind, one.kind)
    assert (len(one.calls()), len(two.calls())) == (0, 6)
    assert outcome.facts["reuse"]["d"][one.kind] == {"reused": 6, "scored_anew": 0}


def test_a_changed_function_is_run_again_and_its_neighbour_is_not(runs: Runs, counting: Callable[..., Any]) -> None:
    one, two = counting("one"), counting("two")
    runs.run(ANSWERS, one.kind, two.kind)
    one.calls(), two.calls()
    one.change()
    runs.run(ANSWERS, one.kind, two.kind)
    assert (len(one.calls()), len(two.calls())) == (6, 0)


def test_a_raised_version_of_a_built_in_rescored_only_that_scorer(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {name: {"reference": "one"} for name in ANSWERS}
    runs.run(ANSWERS, "exact", "contains_answer", prompts=prompts)
    changed = {**registry.BUILT_INS, "exact": registry.BuiltIn("exact", "2", {"case_sensitive": bool})}
    monkeypatch.setattr(registry, "BUILT_INS", changed)
    outcome = runs.run(ANSWERS, "exact", "contains_answer", prompts=prompts)
    assert outcome.facts["reuse"]["d"] == {
        "exact": {"reused": 0, "scored_anew": 6}, "contains_answer": {"reused": 6, "scored_anew": 0},
    }  # fmt: skip


@pytest.mark.parametrize("field", ["reference", "metadata"])
def test_a_changed_reference_or_metadata_scores_that_prompt_again(field: str, runs: Runs, counting: Callable[..., Any]) -> None:
    scorer = counting("one")
    runs.run(ANSWERS, scorer.kind)
    scorer.calls()
    runs.run(ANSWERS, scorer.kind, prompts={"b": {field: '{"x": 1}'}})
    assert scorer.calls() == ["three", "four"]


def test_other_options_score_again_and_another_timeout_does_not(runs: Runs, counting: Callable[..., Any]) -> None:
    scorer = counting("one")
    runs.run(ANSWERS, scorer.kind)
    scorer.calls()
    runs.run(ANSWERS, ScorerSpec(kind=scorer.kind, timeout_seconds=3))
    assert scorer.calls() == []
    runs.run(ANSWERS, ScorerSpec(kind=scorer.kind, options={"strict": True}))
    assert len(scorer.calls()) == 6


def test_a_timeout_is_tried_again_and_other_unknowns_are_not(
    runs: Runs, counting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = counting("one")
    answers = {"a": ["hang", "raise", "fine"]}
    monkeypatch.setenv("HANGS", "1")
    outcome = runs.run(answers, ScorerSpec(kind=scorer.kind, timeout_seconds=0.5))
    assert outcome.facts["lost"] == {f"d/{scorer.kind}": {"timeouts": 1}}
    assert outcome.counts["unknown"] == 2
    scorer.calls()
    monkeypatch.delenv("HANGS")
    outcome = runs.run(answers, ScorerSpec(kind=scorer.kind, timeout_seconds=0.5))
    assert scorer.calls() == ["hang"]
    assert outcome.facts["lost"] == {}
    assert outcome.counts["unknown"] == 1


def test_an_error_in_the_middle_of_a_run_loses_no_score(runs: Runs, counting: Callable[..., Any]) -> None:
    scorer = counting("one")
    stray = tables(ANSWERS)[1][0].to_pylist()[:1]
    stray[0]["prompt_id"] = "nowhere"
    many = tables({f"p{number}": ["x"] * 10 for number in range(300)})
    (rows,) = many[1]
    broken = [rows.slice(0, 2500), pa.RecordBatch.from_pylist(stray, schema=COMPLETION_SCHEMA), rows.slice(2500)]
    (runs.folder / "broken").mkdir()
    context, scorers = ScoringContext(scores_dir=runs.scores_dir), {"*": [ScorerSpec(kind=scorer.kind)]}
    with pytest.raises(IntegrityError):
        score_outputs(many[0], broken, runs.folder / "broken", scorers=scorers, context=context)
    before = len(scorer.calls())
    assert 0 < before < 300
    runs.run({f"p{number}": ["x"] * 10 for number in range(300)}, scorer.kind)
    assert len(scorer.calls()) == 300 - before


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from functools import partial
from pathlib import Path
from distill_pipeline.scoring import chunks, stage
from distill_pipeline.storage import parts
stage.answer_chunks = partial(chunks.answer_chunks, max_rows=5)
parts.FLUSH_SECONDS = 0.0
from test_reuse import Runs
Runs(Path({folder!r})).run({{f"p{{n}}": [f"answer {{n}}"] for n in range(400)}}, {kind!r})
"""


def test_after_kill_9_only_what_was_not_written_is_scored_again(tmp_path: Path, counting: Callable[..., Any]) -> None:
    scorer = counting("one")
    text = PROGRAM.format(tests=str(Path(__file__).parent), folder=str(tmp_path), kind=scorer.kind)
    path = os.pathsep.join([str(scorer.module.parent), os.getcwd()])
    process = subprocess.Popen([sys.executable, "-c", text], env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("scores/*/part-*.parquet"))) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.2)
    first = scorer.calls()
    kept = sum(pq.read_metadata(part).num_rows for part in tmp_path.glob("scores/*/part-*.parquet"))
    assert 25 <= kept < 400
    assert len(first) - kept <= 6
    outcome = Runs(tmp_path).run({f"p{number}": [f"answer {number}"] for number in range(400)}, scorer.kind)
    assert outcome.counts["reused"] == kept
    assert len(scorer.calls()) == 400 - kept


def test_several_writers_and_a_torn_file_do_no_harm(tmp_path: Path) -> None:
    keys = [f"{number:032x}" for number in range(1, 4001)]
    keys = [key[::-1] for key in keys]

    def write(start: int) -> None:
        store = KeptScores(tmp_path, {"kind": "x"}, flush_rows=100)
        for number in range(start, start + 2000, 50):
            store.add((key, ScoreValue(int(key[::-1], 16) / 10_000, key)) for key in keys[number : number + 50])
        store.flush()

    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    (folder / ".tmp-torn.parquet").write_bytes(b"PAR1 torn")
    found = KeptScores(tmp_path, {"kind": "x"}).read([*keys, "f" * 32])
    assert found == {key: ScoreValue(number / 10_000, key) for number, key in enumerate(keys, 1)}


def test_keys_that_share_their_first_half_are_told_apart(tmp_path: Path) -> None:
    store = KeptScores(tmp_path, {})
    store.add([("a" * 16 + "1" * 16, ScoreValue(1.0))])
    store.flush()
    assert KeptScores(tmp_path, {}).read(["a" * 16 + "2" * 16]) == {}


def test_an_unreadable_part_is_named(tmp_path: Path) -> None:
    store = KeptScores(tmp_path, {})
    store.add([("a" * 32, ScoreValue(1.0))])
    store.flush()
    part = next(store.folder.glob("part-*"))
    part.write_bytes(b"nonsense")
    with pytest.raises(IntegrityError, match=f"{part.name} of the store of scores cannot be read"):
        KeptScores(tmp_path, {}).read(["a" * 32])
