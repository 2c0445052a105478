"""The filter stage on a million completions: speed, memory, and whether every planted fault is found.

    python benchmarks/data_plane.py                                  # 1,000,000 rows of 1.7 KB on 2 processes
    python benchmarks/data_plane.py --rows 100000 --peer-python PATH # and datatrove's filters, from its own environment

Rows are made with a seed and faults planted in them (``made_rows.py``). Ours is the stage as the pipeline runs it, from Parquet
to Parquet, with near duplicates, decontamination, repetition, refusal, self-reference, truncation, duplicates and empty
answers asked for. Beside it, in one run: the same rules row by row in plain pandas, and datatrove's filters.
Rates are rows per second of CPU time, all processes together, so that a busy machine disturbs them little.
"""

import argparse
import datetime as dt
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq
from made_rows import FAULTS, SAMPLES, Made, evaluation_items, make_rows

from distill_pipeline.filtering.spec import FilterSpec

ROOT = Path(__file__).resolve().parent.parent
RULE = FilterSpec(
    drop=("empty", "truncated", "refusal", "self_reference", "repetition", "contaminated", "duplicate", "near_duplicate")
)
LEAST_ROWS_PER_SECOND = 2_000
MOST_PEAK_GB = 1.5
MOST_TIMES_AS_LONG = 11.0


@dataclass
class Measured:
    """One program's run: seconds by the clock and of CPU, its own and its workers', and their largest memory at one time."""

    rows: int
    wall_seconds: float
    cpu_seconds: float
    peak_gb: float
    output: str

    @property
    def rows_per_cpu_second(self) -> float:
        return self.rows / self.cpu_seconds


def main() -> None:
    options = parse_options()
    if options.run:
        {"ours": run_ours, "pandas": run_pandas}[options.run](Path(options.folder), options.workers)
        return
    with tempfile.TemporaryDirectory(prefix="distill-data-plane-", dir=options.scratch) as scratch:
        result = compare(options, Path(scratch))
    text = as_markdown(result)
    print(text)
    if options.write:
        (ROOT / "benchmarks/data_plane.md").write_text(text, encoding="utf-8")
    sys.exit(0 if all(result["lines"].values()) else 1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sample", type=int, default=2_000, help="rows that datatrove's filters get")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peer-python", help="Python of an environment with datatrove, spacy and xxhash")
    parser.add_argument("--scratch", help="folder for the rows, some 2 KB each, and the results")
    parser.add_argument("--write", action="store_true", help="write benchmarks/data_plane.md")
    parser.add_argument("--run", choices=("ours", "pandas"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Everything, the large set first and a tenth of it after."""
    made = {}
    for name, rows in (("all", options.rows), ("tenth", options.rows // 10)):
        say(f"making {rows:,} rows")
        made[name] = make_rows(scratch / name, rows // SAMPLES)
    ours = {}
    for name in ("tenth", "all"):
        say(f"our stage on {made[name].num_completions:,} rows")
        ours[name] = measured("ours", made[name], options.workers)
    found = {name: check_planted(made[name]) for name in ours}
    say(f"plain pandas on {made['tenth'].num_completions:,} rows")
    plain = measured("pandas", made["tenth"], 1)
    peer = run_peer(options.peer_python, made["tenth"], options.sample, scratch) if options.peer_python else None
    large, tenth = ours["all"], ours["tenth"]
    planted, unplanted = found["all"]["planted"], found["all"]["unplanted_rejected"]
    times = {"clock": large.wall_seconds / tenth.wall_seconds, "cpu": large.cpu_seconds / tenth.cpu_seconds}
    lines = {
        f"peak memory at most {MOST_PEAK_GB} GB": large.peak_gb <= MOST_PEAK_GB,
        f"at least {LEAST_ROWS_PER_SECOND:,} rows per CPU second": large.rows_per_cpu_second >= LEAST_ROWS_PER_SECOND,
        f"10 times the rows take at most {MOST_TIMES_AS_LONG:g} times the CPU time": times["cpu"] <= MOST_TIMES_AS_LONG,
        "every planted row found with its reason": all(found == number for found, number in planted.values()),
    }
    return {
        "ours": ours, "pandas": plain, "peer": peer, "planted": planted, "unplanted_rejected": unplanted, "times": times,
        "lines": lines, "workers": options.workers, "sample": options.sample,
    }  # fmt: skip


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- one program, measured from outside ----------------------------------------------------------------------------


def measured(program: str, made: Made, workers: int) -> Measured:
    """Run this file as a program of its own and watch it and its workers."""
    command = [sys.executable, __file__, "--run", program, "--folder", str(made.folder), "--workers", str(workers)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    peaks = [0]
    done = threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(process.pid, peaks, done))
    watcher.start()
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    done.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{program} ended with {process.returncode}: {output}")
    return Measured(made.num_completions, wall, usage.ru_utime + usage.ru_stime, peaks[0] / 1e9, output)


def watch_memory(pid: int, peaks: list[int], done: threading.Event) -> None:
    """Note the largest sum of the resident memory of a process and its children."""
    page = os.sysconf("SC_PAGE_SIZE")
    while not done.wait(0.05):
        total = 0
        for each in (pid, *children_of(pid)):
            try:
                total += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * page
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
        peaks[0] = max(peaks[0], total)


def children_of(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


# --- the programs --------------------------------------------------------------------------------------------------


def batches(folder: Path, prefix: str) -> Iterator[pa.RecordBatch]:
    for path in sorted(folder.glob(f"{prefix}-*.parquet")):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=4096)


def run_ours(folder: Path, workers: int) -> None:
    from distill_pipeline.compute.spec import ComputeSpec
    from distill_pipeline.filtering.stage import filter_outputs
    from distill_pipeline.prompts.contamination import ContaminationIndex

    out = folder / "filtered"
    out.mkdir()
    inputs = (batches(folder, prefix) for prefix in ("prompts", "completions", "scores"))
    filter_outputs(
        *inputs, out, rule=RULE, filter_name="benchmark", protected=ContaminationIndex.build(evaluation_items()), progress=say,
        compute=ComputeSpec(workers=workers),
    )  # fmt: skip


def run_pandas(folder: Path, workers: int) -> None:
    """What one would write in an afternoon: everything in memory, and each rule applied to each row."""
    import pandas as pd

    from distill_pipeline.filtering.repetition import repetition_fault
    from distill_pipeline.filtering.rules import is_empty, is_refusal, is_self_reference, is_truncated
    from distill_pipeline.prompts.contamination import ContaminationIndex

    index = ContaminationIndex.build(evaluation_items())

    def is_contaminated(text: str) -> bool:
        match = index.match(text)
        return match is not None and not match.is_flag

    rows = pd.concat(pd.read_parquet(path) for path in sorted(folder.glob("completions-*.parquet")))
    scores = pd.concat(pd.read_parquet(path) for path in sorted(folder.glob("scores-*.parquet")))
    rows = rows.merge(scores, on="completion_id")
    rows["key"] = rows["answer"].map(lambda text: " ".join(text.split()).casefold())
    rows["truncated"] = rows.apply(lambda row: is_truncated(row["finish_reason"], row["raw_text"]), axis=1)
    for name, rule in {
        "empty": is_empty, "refusal": is_refusal, "self_reference": is_self_reference, "contaminated": is_contaminated,
        "repetition": lambda text: repetition_fault(text) is not None,
    }.items():  # fmt: skip
        rows[name] = rows["answer"].map(rule)
    kept = rows[~rows[["truncated", "empty", "refusal", "self_reference", "contaminated", "repetition"]].any(axis=1)]
    kept = kept.drop_duplicates(["prompt_id", "key"])
    kept.to_parquet(folder / "pandas.parquet")
    print(len(kept))


def run_peer(python: str, made: Made, sample: int, scratch: Path) -> dict[str, Any]:
    """datatrove's filters on the first rows: seconds, and how many of the planted faults and of other rows they remove."""
    say(f"datatrove on {sample:,} rows")
    rows = [row for batch in batches(made.folder, "completions") for row in batch.slice(0, sample).to_pylist()][:sample]
    files = (scratch / "peer.jsonl", scratch / "items.jsonl")
    files[0].write_text("".join(json.dumps({"id": r["completion_id"], "text": r["answer"]}) + "\n" for r in rows))
    files[1].write_text("".join(json.dumps({"text": text}) + "\n" for _, text in evaluation_items()))
    command = [python, str(ROOT / "benchmarks/data_plane_peer.py"), *map(str, files), str(scratch / "peer")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    fault_of = {row["completion_id"]: row["request_key"].removeprefix("planted:") for row in rows}
    planted = Counter(fault_of.values())
    for part in result.values():
        part["removed"] = Counter(fault_of[name] for name in part["removed"])
        part["planted"] = planted
    return result


# --- what was found ------------------------------------------------------------------------------------------------


def check_planted(made: Made) -> dict[str, Any]:
    """By kind of fault how many planted rows have it among their reasons, of how many; and other rows that were rejected."""
    found: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for path in sorted((made.folder / "filtered").glob("part-*.parquet")):
        table = pq.read_table(path, columns=["request_key", "reject_reason", "reject_reasons"])
        for key, first, reasons in zip(*(column.to_pylist() for column in table.columns), strict=True):
            fault = key.removeprefix("planted:")
            found[fault] += fault in reasons
            if not fault and first is not None:
                others[first] += 1
    shutil.rmtree(made.folder / "filtered")
    return {"planted": {fault: (found[fault], made.planted[fault]) for fault in FAULTS}, "unplanted_rejected": dict(others)}


def as_markdown(result: dict[str, Any]) -> str:
    large, tenth, plain = result["ours"]["all"], result["ours"]["tenth"], result["pandas"]
    times, slower = result["times"], large.rows_per_cpu_second / plain.rows_per_cpu_second
    out = [
        "# The filter stage on a million completions",
        "",
        f"`python benchmarks/data_plane.py {' '.join(sys.argv[1:])}`, {dt.date.today().isoformat()}, {machine()}.",
        "",
        f"{large.rows:,} completions of 1.7 KB, four a prompt, Parquet to Parquet on {result['workers']} processes, with near",
        "duplicates, decontamination, repetition, refusal, self-reference, truncation, duplicates and empty answers",
        "asked for.",
        "",
        "| program | rows | seconds | CPU seconds | rows per CPU second | peak memory, GB |",
        "|---|---|---|---|---|---|",
        *(table_row(name, run) for name, run in (("this stage", large), ("this stage", tenth), ("plain pandas", plain))),
        "",
        f"Ten times the rows take {times['clock']:.1f} times as long and {times['cpu']:.1f} times the CPU time. Plain pandas,",
        f"without near duplicates, takes {slower:.1f} times the CPU time a row, and at {plain.rows:,} rows",
        f"{plain.peak_gb / tenth.peak_gb:.1f} times the memory, which grows with the rows.",
        "",
        "| planted fault | rows | found with its reason |",
        "|---|---|---|",
        *(f"| {name} | {number:,} | {found:,} |" for name, (found, number) in result["planted"].items()),
        "",
        f"Other rows rejected: {sum(result['unplanted_rejected'].values())} {result['unplanted_rejected'] or ''}".rstrip()
        + ".",
        "",
        *peer_lines(result),
        "| line to meet | met |",
        "|---|---|",
        *(f"| {line} | {'yes' if is_met else 'NO'} |" for line, is_met in result["lines"].items()),
    ]
    return "\n".join(out) + "\n"


def table_row(name: str, run: Measured) -> str:
    return (
        f"| {name} | {run.rows:,} | {run.wall_seconds:.0f} | {run.cpu_seconds:.0f} | {run.rows_per_cpu_second:,.0f} "
        f"| {run.peak_gb:.2f} |"
    )


def peer_lines(result: dict[str, Any]) -> list[str]:
    if result["peer"] is None:
        return []
    rate = result["ours"]["all"].rows_per_cpu_second
    seconds = sum(part["seconds"] for part in result["peer"].values())
    lines = [
        f"datatrove's filters, its defaults, on the first {result['sample']:,} of these rows, one process, files not counted:",
        "",
        "| filter | rows per CPU second | planted rows removed | other rows removed |",
        "|---|---|---|---|",
    ]
    for name, part in result["peer"].items():
        kinds = ("duplicate", "near_duplicate") if name == "near_duplicate" else (name,)
        removed, planted = (sum(part[key][kind] for kind in kinds) for key in ("removed", "planted"))
        others = part["removed"].total() - removed
        lines.append(f"| {name} | {result['sample'] / part['seconds']:,.0f} | {removed} of {planted} | {others} |")
    together = result["sample"] / seconds
    return [
        *lines,
        "",
        f"All three: {together:,.0f} rows per CPU second; this stage with all its rules is {rate / together:.1f} times as",
        "fast. Its MinHash compares all rows with all, ours the answers of one prompt.",
        "",
    ]


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor() or "CPU"
    return f"{len(os.sched_getaffinity(0))} cores {name}, no GPU, Python {platform.python_version()}, pyarrow {pa.__version__}"


if __name__ == "__main__":
    main()
