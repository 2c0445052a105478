"""Scores depend neither on who scores nor on batches, chunks and order, and no process stays behind. All counted."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.compute.spec import ComputeSpec
from distill_pipeline.errors import ConfigError, IntegrityError
from distill_pipeline.outcome import Outcome
from distill_pipeline.records import COMPLETION_SCHEMA, PROMPT_SCHEMA, prompt_id
from distill_pipeline.scoring import chunks, stage
from distill_pipeline.scoring.opening import open_scorers
from distill_pipeline.scoring.pieces import PieceScorer
from distill_pipeline.scoring.rows import ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec

ONE, TWO, RAY = ComputeSpec(workers=1), ComputeSpec(workers=2), ComputeSpec(engine="ray", workers=2)
SCORERS = {
    "words": [ScorerSpec(kind="exact"), ScorerSpec(kind="majority_vote"), ScorerSpec(kind="teacher_logprob")],
    "bare": [],
    "*": [ScorerSpec(kind="numeric"), ScorerSpec(kind="exact")],
}
Prompt = tuple[str, str | None, Sequence[tuple[str, str, float | None]]]
"""Domain, reference, and samples: answer, finish reason, log-probability."""

ANSWERS = st.tuples(
    st.sampled_from(["7", "8", "seven", "", "7 or 8", "|"]), st.sampled_from(["stop", "stop", "length", "error"]),
    st.sampled_from([None, -0.5]),
)  # fmt: skip
PROMPTS = st.lists(
    st.tuples(st.sampled_from(["words", "bare", "other"]), st.sampled_from([None, "7", "x"]), st.lists(ANSWERS, max_size=5)),
    max_size=6,
)


def mixed(number: int) -> list[Prompt]:
    chance = random.Random(0)
    samples = [("7", "stop", -0.5), ("8", "length", None), ("seven", "stop", -1.0), ("", "error", None)]
    return [
        (chance.choice(["words", "bare", "other"]), chance.choice([None, "7"]), chance.choices(samples, k=chance.randint(0, 4)))
        for _ in range(number)
    ]


def rows_of(prompts: Sequence[Prompt]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each prompt's row and those of its completions."""
    found = []
    for number, (domain, reference, samples) in enumerate(prompts):
        messages = [{"role": "user", "content": f"q{number}"}]
        name = prompt_id(messages)
        prompt = {
            "prompt_id": name, "messages": messages, "reference": reference, "domain": domain, "source": "s", "license": "l",
            "split": "train", "metadata": "{}",
        }  # fmt: skip
        completions = [
            {
                "completion_id": f"{number}/{sample}", "prompt_id": name, "teacher": "t", "sample_index": sample,
                "answer": answer, "raw_text": answer, "finish_reason": finish, "prompt_tokens": 1, "completion_tokens": 2,
                "logprob": logprob, "request_key": "k",
            }
            for sample, (answer, finish, logprob) in enumerate(samples)
        ]  # fmt: skip
        found.append((prompt, completions))
    return found


def scored(
    rows: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]], folder: Path, compute: ComputeSpec = ONE, *,
    size: int = 1000, scorers: Mapping[str, Sequence[ScorerSpec]] = SCORERS, scores_dir: Path | None = None,
) -> tuple[Outcome, bytes]:  # fmt: skip
    folder.mkdir(parents=True)
    prompts = pa.Table.from_pylist([dict(prompt) for prompt, _ in rows], schema=PROMPT_SCHEMA)
    completions = pa.Table.from_pylist([dict(row) for _, group in rows for row in group], schema=COMPLETION_SCHEMA)
    outcome = stage.score_outputs(
        prompts.to_batches(max_chunksize=size), completions.to_batches(max_chunksize=size), folder, scorers=scorers,
        context=ScoringContext(scores_dir=scores_dir), compute=compute,
    )  # fmt: skip
    return outcome, (folder / "part-00000.parquet").read_bytes()


def cut(monkeypatch: pytest.MonkeyPatch, *, max_rows: int, piece_rows: int) -> None:
    """Have the stage work in chunks and pieces of so many rows."""
    monkeypatch.setattr(stage, "answer_chunks", partial(chunks.answer_chunks, max_rows=max_rows))
    monkeypatch.setattr(stage, "ChunkAtWork", partial(chunks.ChunkAtWork, piece_rows=piece_rows))


@settings(max_examples=60, deadline=None)
@given(
    prompts=PROMPTS, size=st.integers(1, 9), max_rows=st.integers(1, 9), piece_rows=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_scores_depend_neither_on_batches_nor_on_chunks_nor_on_the_order_of_rows(
    prompts: list[Prompt], size: int, max_rows: int, piece_rows: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("order")
    rows = rows_of(prompts)
    whole = scored(rows, folder / "whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut(monkeypatch, max_rows=max_rows, piece_rows=piece_rows)
        assert scored(rows, folder / "cut", size=size) == whole
        chance = random.Random(seed)
        shuffled = chance.sample([(prompt, chance.sample(group, len(group))) for prompt, group in rows], len(rows))
        outcome, _ = scored(shuffled, folder / "shuffled", size=size)
    assert outcome == whole[0]
    kept = [pq.read_table(folder / name).sort_by([("completion_id", "ascending"), ("scorer", "ascending")])
            for name in ("whole", "shuffled")]  # fmt: skip
    assert kept[0].equals(kept[1])


@pytest.mark.parametrize(("max_rows", "piece_rows"), [(1, 1), (20, 3), (1000, 64)])
def test_files_and_counts_are_the_same_with_processes(
    max_rows: int, piece_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(mixed(60))
    alone = scored(rows, tmp_path / "alone")
    cut(monkeypatch, max_rows=max_rows, piece_rows=piece_rows)
    assert scored(rows, tmp_path / "two", TWO, size=7) == alone
    assert {"scored", "unknown", "unscored", "failed"} <= {name for name, count in alone[0].counts.items() if count}


def test_files_and_counts_are_the_same_on_a_ray_cluster_and_its_scorers_can_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    rows = rows_of([*mixed(40), ("slow", None, [("a" * 60 + "!", "stop", None), ("aaa", "stop", None)])])
    hanging = ScorerSpec(kind="regex", options={"pattern": r"^(a+)+$"}, timeout_seconds=0.5)
    scorers = {**SCORERS, "slow": [hanging]}
    alone = scored(rows, tmp_path / "alone", scorers=scorers)
    assert alone[0].facts["lost"] == {"slow/regex": {"timeouts": 1}}
    cut(monkeypatch, max_rows=30, piece_rows=4)
    assert scored(rows, tmp_path / "ray", RAY, scorers=scorers) == alone


@pytest.mark.parametrize("compute", [ONE, TWO])
def test_a_second_run_asks_nobody_and_a_new_row_asks_alone(
    compute: ComputeSpec, tmp_path: Path, counting: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = counting("one")
    cut(monkeypatch, max_rows=10, piece_rows=2)
    run = partial(scored, scorers={"*": [ScorerSpec(kind=scorer.kind)]}, scores_dir=tmp_path / "scores")
    prompts: list[Prompt] = [("d", None, [(f"answer {n}", "stop", None)]) for n in range(25)]
    first, content = run(rows_of(prompts), tmp_path / "first", compute)
    assert len(scorer.calls()) == first.counts["scored_anew"] == 25
    again, content_again = run(rows_of(prompts), tmp_path / "again", compute)
    assert (scorer.calls(), again.counts["reused"], content_again) == ([], 25, content)
    more, _ = run(rows_of([*prompts, ("d", None, [("new", "stop", None)])]), tmp_path / "more", compute)
    assert (scorer.calls(), more.counts["reused"]) == (["new"], 25)


def test_an_error_in_the_middle_keeps_the_scores_of_every_whole_chunk_before_it(
    tmp_path: Path, counting: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = counting("one")
    cut(monkeypatch, max_rows=4, piece_rows=2)
    run = partial(scored, scorers={"*": [ScorerSpec(kind=scorer.kind)]}, scores_dir=tmp_path / "scores")
    prompts: list[Prompt] = [("d", None, [(f"answer {n}", "stop", None)]) for n in range(40)]
    rows = rows_of(prompts)
    with pytest.raises(IntegrityError):
        run([*rows, ({**rows[0][0], "prompt_id": "other"}, rows[0][1])], tmp_path / "broken", TWO)
    scorer.calls()
    outcome, _ = run(rows, tmp_path / "mended", TWO)
    assert len(scorer.calls()) == outcome.counts["scored_anew"] <= 3 * 4


def test_what_travels_holds_no_store_and_what_asks_a_model_stays(tmp_path: Path) -> None:
    opened = open_scorers(SCORERS, ScoringContext(scores_dir=tmp_path))
    assert [name for name, scorer in opened["words"].items() if scorer.is_movable] == ["exact", "majority_vote"]
    assert opened["words"]["exact"].kept is not None
    moved = pickle.loads(pickle.dumps(PieceScorer({("words", "exact"): opened["words"]["exact"]})))
    assert moved._scorers["words", "exact"].kept is None


def test_a_scorer_that_cannot_be_loaded_is_the_same_error_from_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_scorer_of_processes.py").write_text("import nosuchmodule")
    monkeypatch.syspath_prepend(tmp_path)
    scorers = {"*": [ScorerSpec(kind="broken_scorer_of_processes:score")]}
    for compute in (ONE, TWO):
        with pytest.raises(ConfigError, match=r"cannot be loaded: ModuleNotFoundError.*Mend its module"):
            scored(rows_of(mixed(30)), tmp_path / str(compute.workers), compute, scorers=scorers)


# --- no process stays behind ----------------------------------------------------------------------------------------

HANGING = """
import os, subprocess, time
def score(reference, answer, **options):
    if answer == "start":
        subprocess.Popen(["sleep", "600"])
    if answer == "hang":
        open(os.environ["STARTED_FILE"], "a").write("x")
        time.sleep(600)
    return 1.0
"""
PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_scoring_compute import TWO, ScorerSpec, rows_of, scored, stage, chunks, partial
stage.ChunkAtWork = partial(chunks.ChunkAtWork, piece_rows=1)
prompts = [("d", "assert True", [({answer!r}, "stop", None)])] * 4
scorer = ScorerSpec(kind={kind!r}, timeout_seconds=300, options={options!r})
scored(rows_of(prompts), Path({folder!r}) / "out", TWO, scorers={{"*": [scorer]}})
"""
SLEEPING_TESTS = "import time\ndef f(): pass\ntime.sleep(600)"


def family(pid: int) -> set[int]:
    """The processes below one, however deep."""
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = {int(child) for child in path.read_text().split()}
        except (FileNotFoundError, ProcessLookupError):
            continue
        found |= below.union(*map(family, below))
    return found


def living(pids: set[int]) -> set[int]:
    def lives(pid: int) -> bool:
        try:
            return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False

    return {pid for pid in pids if lives(pid)}


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize("victim", ["parent", "worker"])
@pytest.mark.parametrize("scorer", ["their own", "python_tests", "regex"])
def test_nothing_is_left_when_the_parent_or_a_worker_is_killed_in_the_middle_of_a_row(
    scorer: str, victim: str, tmp_path: Path
) -> None:
    (tmp_path / "hanging_scorer.py").write_text(HANGING)
    kind, options, answer, depth = {
        "their own": ("hanging_scorer:score", {}, "hang", 4),
        "python_tests": ("python_tests", {"wall_seconds": 200, "cpu_seconds": 200}, SLEEPING_TESTS, 10),
        "regex": ("regex", {"pattern": r"^(a+)+$"}, "a" * 60 + "!", 4),
    }[scorer]
    text = PROGRAM.format(tests=str(Path(__file__).parent), folder=str(tmp_path), kind=kind, options=options, answer=answer)
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    env = {**os.environ, "PYTHONPATH": path, "STARTED_FILE": str(tmp_path / "started")}
    process = subprocess.Popen([sys.executable, "-c", text], env=env, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(family(process.pid)) >= depth, "the scorers' processes never came", 60)
        time.sleep(1.0)
        below = family(process.pid)
        workers = {int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()}
        os.kill(process.pid if victim == "parent" else workers.pop(), signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        wait_until(lambda: not living(below), f"still there: {living(below)}", 10)
        assert victim == "parent" or "ComputeError: a worker process ended by signal 9" in said
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("compute", [ONE, TWO])
def test_what_a_scorer_started_ends_with_the_run(compute: ComputeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hanging_scorer.py").write_text(HANGING)
    monkeypatch.syspath_prepend(tmp_path)
    cut(monkeypatch, max_rows=2, piece_rows=1)
    before, pids = family(os.getpid()), set[int]()
    monkeypatch.setattr(stage, "keep_new", lambda done, scorers: pids.update(family(os.getpid()) - before))
    rows = rows_of([("d", None, [("start", "stop", None)])] * 6)
    scored(rows, tmp_path / "out", compute, scorers={"*": [ScorerSpec(kind="hanging_scorer:score")]})
    assert len(pids) >= 4
    wait_until(lambda: not living(pids), f"still there: {living(pids)}", 5)


def isolated_scorers() -> set[int]:
    """Processes of this machine in which a scorer runs."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if b"distill_pipeline.scoring.worker" in path.read_bytes():
                found.add(int(path.parent.name))
    return found


@pytest.mark.parametrize("compute", [TWO, RAY])
def test_rows_that_hang_end_at_once_when_the_run_fails_elsewhere(
    compute: ComputeSpec, tmp_path: Path, ray_cluster: None
) -> None:
    rows = rows_of([("d", None, [("a" * 60 + "!", "stop", None)])] * 3)
    before, begun = isolated_scorers(), set[int]()

    def completions() -> Iterator[pa.RecordBatch]:
        for _, group in rows:
            yield pa.RecordBatch.from_pylist(group, schema=COMPLETION_SCHEMA)
        wait_until(lambda: len(isolated_scorers() - before) == 2, "the scorers' processes never came")
        time.sleep(1.0)
        begun.update(isolated_scorers() - before)
        raise OSError("the disk is gone")

    prompts = [pa.RecordBatch.from_pylist([prompt for prompt, _ in rows], schema=PROMPT_SCHEMA)]
    scorer = ScorerSpec(kind="regex", options={"pattern": r"^(a+)+$"}, timeout_seconds=300)
    with pytest.raises(OSError, match="the disk is gone"):
        stage.score_outputs(
            prompts, completions(), tmp_path, scorers={"*": [scorer]}, context=ScoringContext(), compute=compute
        )
    wait_until(lambda: not living(begun), f"still there: {living(begun)}", 5)
