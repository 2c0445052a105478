"""Law 5: a verifier that fails or takes too long says unknown, never wrong, and its neighbours are not touched."""

import os
import threading
import time
from pathlib import Path

import pytest

from distill_pipeline.errors import ConfigError
from distill_pipeline.scoring import score_answers

MODULE = """
import os, subprocess, sys, time
def score(reference, answer, **options):
    print("noise on standard output")
    if answer == "sleep": time.sleep(600)
    if answer == "exit": os._exit(1)
    if answer == "kill": os.kill(os.getpid(), 9)
    if answer == "raise": raise ValueError("no")
    if answer == "quit": raise SystemExit(0)
    if answer == "recursion": return score(reference, answer)
    if answer == "seven": return 7
    if answer == "negative": return -0.1
    if answer == "nan": return float("nan")
    if answer == "text": return "1.0"
    if answer == "none": return None
    if answer == "pair": return 0.5, "half"
    if answer == "close": os.closerange(3, 50)
    if answer == "child":
        child = subprocess.Popen(["sleep", "600"])
        open(options["pid_file"], "w").write(str(child.pid))
        time.sleep(600)
    return answer == reference
"""
UNKNOWN = ("sleep", "exit", "kill", "raise", "quit", "recursion", "seven", "negative", "nan", "text", "none", "close")


def rows_of(*pairs: tuple[str | None, str]) -> list[dict[str, str | None]]:
    return [{"reference": reference, "answer": answer} for reference, answer in pairs]


@pytest.fixture
def kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "scorer_of_tests.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "scorer_of_tests:score"


@pytest.mark.parametrize("bad", UNKNOWN)
def test_a_failing_row_is_unknown_and_its_neighbours_are_not_touched(bad: str, kind: str) -> None:
    rows = rows_of(("a", "a"), ("a", bad), ("a", "b"), ("a", bad), ("a", "a"))
    values = score_answers(kind, rows, timeout_seconds=0.5 if bad == "sleep" else 20)
    assert [value.score for value in values] == [1.0, None, 0.0, None, 1.0]
    assert values[1].detail


def test_details_tell_timeouts_crashes_and_exceptions_apart(kind: str) -> None:
    rows = [{"answer": bad} for bad in ("sleep", "exit", "kill", "raise", "seven", "pair")]
    details = [value.detail for value in score_answers(kind, rows, timeout_seconds=0.5)]
    assert details == [
        "timeout: no score within 0.5 s",
        "crash: the scorer's process ended (exit code 1)",
        "crash: the scorer's process ended (signal 9)",
        "the scorer raised ValueError: no",
        "the scorer returned 7, which is no number in [0, 1]",
        "half",
    ]


def test_what_a_scorer_started_ends_with_it(kind: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    score_answers(kind, [{"answer": "child"}], timeout_seconds=2, pid_file=str(pid_file))
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _is_running(int(pid_file.read_text())):
        time.sleep(0.05)
    assert not _is_running(int(pid_file.read_text()))


def _is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def test_it_works_in_a_thread_and_leaves_no_file_open(kind: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    found: list[float | None] = []
    thread = threading.Thread(
        target=lambda: found.extend(v.score for v in score_answers(kind, rows_of(("a", "a"), ("a", "exit"))))
    )
    thread.start()
    thread.join()
    assert found == [1.0, None]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_pattern_that_never_ends_is_unknown() -> None:
    rows = [{"answer": "aaa"}, {"answer": "a" * 60 + "!"}, {"answer": "b"}]
    values = score_answers("regex", rows, timeout_seconds=1, pattern=r"^(a+)+$")
    assert [value.score for value in values] == [1.0, None, 0.0]


def test_very_long_answers_and_broken_characters_pass(kind: str) -> None:
    long = "x" * 3_000_000
    rows = rows_of((long, long), ("\ud800", "\ud800"), ("\n", "\n"))
    assert [v.score for v in score_answers(kind, rows)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("content", "reason"), [("import nosuchmodule", "ModuleNotFoundError"), ("x = 1", "has no attribute")])
def test_a_scorer_that_cannot_be_loaded_stops_before_the_first_row(
    content: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_scorer_of_tests.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        score_answers("broken_scorer_of_tests:score", [{"answer": "a"}])
