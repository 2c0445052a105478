"""One stream of results whoever works, bounded work under way, and no process that stays behind."""

import json
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distill_pipeline.compute.ordered import CHUNKS_PER_WORKER, SMALL_CHUNKS, ordered_map
from distill_pipeline.compute.spec import ComputeSpec
from distill_pipeline.errors import ComputeError, DistillError, MissingExtraError

REPOSITORY = Path(__file__).resolve().parents[3]
TRIPLE: Callable[[], Callable[[Any], Any]] = partial(partial, operator.mul, 3)
QUOTIENT: Callable[[], Callable[[Any], Any]] = partial(partial, operator.truediv, 1)
TWO = ComputeSpec(workers=2)


def children() -> set[str]:
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def run_script(text: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {json.dumps(str(REPOSITORY))})\n{text}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("workers", "count"), [(1, 5), (2, 0), (2, 1), (2, 9), (3, 13)])
def test_results_come_in_the_chunks_order_with_any_number_of_workers(workers: int, count: int) -> None:
    found = list(ordered_map(TRIPLE, range(count), ComputeSpec(workers=workers)))
    assert found == [(number, 3 * number) for number in range(count)]


def test_a_few_chunks_a_worker_are_under_way_and_no_more() -> None:
    given = 0

    def chunks() -> Iterator[int]:
        nonlocal given
        while given < 20:
            given += 1
            yield given

    with closing(ordered_map(TRIPLE, chunks(), TWO)) as results:
        for number, _ in enumerate(results, 1):
            assert given <= number + 2 * CHUNKS_PER_WORKER


def test_auto_starts_no_process_for_a_small_input() -> None:
    before = children()
    found = list(ordered_map(lambda: lambda chunk: os.getpid(), range(SMALL_CHUNKS - 1), ComputeSpec()))
    assert {pid for _, pid in found} == {os.getpid()}
    assert children() == before


def test_an_error_of_the_function_comes_out_as_it_is_and_leaves_no_process() -> None:
    before = children()
    with pytest.raises(ZeroDivisionError) as caught, closing(ordered_map(QUOTIENT, [2, 0, 1, 1, 1, 1], TWO)) as results:
        list(results)
    assert "raised in a worker process" in caught.value.__notes__[0]
    assert children() == before


def test_an_error_in_preparing_the_function_comes_out() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(ordered_map(partial(int, "x"), [1, 2], TWO))  # type: ignore[arg-type]


def test_a_dead_worker_is_a_clear_error_and_leaves_no_process() -> None:
    before = children()
    with pytest.raises(ComputeError, match=r"ended by exit code 3 .* compute: \{workers: 1\}"):
        list(ordered_map(partial(partial, os._exit), [3, 3, 3], TWO))
    with pytest.raises(ComputeError, match=r"signal 9 \(SIGKILL\).*run out of memory"):
        list(ordered_map(partial(partial, signal.raise_signal), [signal.SIGKILL] * 3, TWO))
    assert children() == before


def test_a_consumer_that_stops_leaves_no_process() -> None:
    before = children()
    with closing(ordered_map(TRIPLE, range(100), TWO)) as results:
        assert next(results) == (0, 0)
        assert len(children() - before) == 2
    assert children() == before


def test_workers_of_a_killed_parent_end_by_themselves() -> None:
    script = (
        "import os, time, threading\nfrom functools import partial\n"
        "from distill_pipeline.compute.processes import ProcessWorker\n"
        "worker = ProcessWorker(partial(partial, abs)); worker.submit(-1); assert worker.result() == 1\n"
        "print(worker.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    pid = int(run_script(script).stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def test_the_callers_main_module_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\nprint('run')\nfrom functools import partial\n"
        "from distill_pipeline.compute.ordered import ordered_map\nfrom distill_pipeline.compute.spec import ComputeSpec\n"
        "print([r for _, r in ordered_map(partial(partial, abs), [-1, -2], ComputeSpec(workers=2))])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "run\n[1, 2]\n"


def test_what_a_function_prints_does_not_reach_the_results() -> None:
    assert [result for _, result in ordered_map(partial(partial, print), ["noise", "more"], TWO)] == [None, None]


def test_an_address_needs_the_engine_ray() -> None:
    with pytest.raises(ValueError, match="set engine: ray"):
        ComputeSpec(address="ray://head:10001")


def test_ray_gives_the_same_stream_and_the_functions_own_errors(ray_cluster: None) -> None:
    compute = ComputeSpec(engine="ray", workers=2)
    assert list(ordered_map(TRIPLE, range(7), compute)) == [(number, 3 * number) for number in range(7)]
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(QUOTIENT, [1, 0], compute))


def test_ray_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        MissingExtraError, match=r"^compute: \{engine: ray\} needs the package ray\. Install it: pip install 'distill-p"
    ):
        list(ordered_map(TRIPLE, [1], ComputeSpec(engine="ray")))
    assert issubclass(ComputeError, DistillError)
