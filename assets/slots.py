"""``python -m assets.slots``: give back what runs hold whose process is dead.

A run that was started from a shell and killed with -9 (or by the memory killer) stays "started" for ever and keeps its
place in a pool, so that every later run on that GPU waits without end. This command looks at each unfinished run and at
each run that holds a place, and asks the operating system whether any process of the run is alive. Only runs of this
machine can be judged, so it does nothing where Dagster's storage is shared by several.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, EventLogEntry

from distill_pipeline.doctor import process_exists

REPOSITORY = Path(__file__).resolve().parent.parent
UNFINISHED = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]
CLOCK_SLACK_SECONDS = 5.0


def free_dead_slots(instance: DagsterInstance) -> Iterator[str]:
    """Mark dead runs as failed and free their places; yields one line of news a run."""
    if "sqlite" not in type(instance.run_storage).__module__:
        yield "Dagster's storage is shared; only run monitoring can tell which of its runs are dead."
        return
    held = instance.event_log_storage.get_concurrency_run_ids()
    unfinished = {run.run_id for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED))}
    for run_id in sorted(held | unfinished):
        yield from _examine(instance, run_id, instance.get_run_by_id(run_id), holds_slot=run_id in held)


def _examine(instance: DagsterInstance, run_id: str, run: DagsterRun | None, *, holds_slot: bool) -> Iterator[str]:
    """Judge one run."""
    if run is not None and not run.is_finished:
        if run.status not in UNFINISHED:
            return
        processes = run_processes(instance.all_logs(run_id))
        if not processes:
            yield f"run {run_id[:8]}: no process of it is known, left alone"
            return
        if alive := sorted(pid for pid, last_seen in processes.items() if is_alive(pid, last_seen)):
            yield f"run {run_id[:8]}: at work in process {', '.join(map(str, alive))}, left alone"
            return
        instance.report_run_failed(run, "The run's processes are gone: it was killed. Found by python -m assets.slots.")
        yield f"run {run_id[:8]}: its process {', '.join(map(str, sorted(processes)))} is dead, marked as failed"
    if holds_slot:
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)
        yield f"run {run_id[:8]}: its places in pools are free again"


def run_processes(events: list[EventLogEntry]) -> dict[int, float]:
    """Processes that worked for a run, with the time (Unix seconds) of the last sign of each."""
    seen: dict[int, float] = {}
    for event in events:
        if (logged := event.dagster_event) is None:
            continue
        metadata = getattr(logged.event_specific_data, "metadata", None) or {}
        announced = metadata.get("pid") if logged.is_engine_event else None
        pid = int(str(announced.value)) if announced is not None else logged.pid if logged.step_key else None
        if pid is not None:
            seen[pid] = max(event.timestamp, seen.get(pid, 0.0))
    return seen


def is_alive(pid: int, last_seen: float) -> bool:
    """Whether a process still runs. One that started after ``last_seen`` is another that got the same number."""
    if not process_exists(pid):
        return False
    started = _start_time(pid)
    return started is None or started <= last_seen + CLOCK_SLACK_SECONDS


def _start_time(pid: int) -> float | None:
    """When a process started, in Unix seconds; None where the system has no /proc. A zombie counts as never started."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = next(line for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines() if line.startswith("btime"))
    except (OSError, StopIteration):
        return None
    return float("inf") if fields[0] == "Z" else int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Look at the instance that ``dagster`` itself would use from this folder."""
    os.chdir(REPOSITORY)
    with DagsterInstance.from_config(os.environ.get("DAGSTER_HOME") or str(REPOSITORY)) as instance:
        for line in free_dead_slots(instance):
            print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
