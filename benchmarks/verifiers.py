"""How often each scorer is wrong, on answers whose verdict is known, and how fast it is.

The answers are ``benchmarks/verifiers/<kind>.jsonl``, written by hand: ``label`` is ``right``, ``wrong`` or ``unknown`` (no
verdict but unknown or wrong is good). Run from the root: ``python benchmarks/verifiers.py [--write]``.

false accepts: scored 1.0 and not right. false rejects: right and scored 0.0. unknown: a right or wrong answer without a score.
rows/s: with the scorer's process started, on this set; it holds far more answers that hang than real ones do.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from distill_pipeline.errors import ConfigError  # noqa: E402
from distill_pipeline.scoring.isolation import Bench  # noqa: E402
from distill_pipeline.scoring.registry import ScoreValue, resolve_scorer  # noqa: E402
from distill_pipeline.scoring.spec import ScorerSpec  # noqa: E402

GOLDEN_DIR = ROOT / "benchmarks" / "verifiers"
TABLE = ROOT / "benchmarks" / "verifiers.md"
TIMEOUT_SECONDS = 20.0
KINDS = sorted(path.stem for path in GOLDEN_DIR.glob("*.jsonl"))


@dataclass(frozen=True)
class Judged:
    """A golden answer and what the scorer said."""

    row: dict[str, Any]
    value: ScoreValue

    @property
    def verdict(self) -> str:
        """``false_accept``, ``false_reject``, ``unknown`` (where the label is not) or ``good``."""
        label, score = self.row["label"], self.value.score
        if score is None:
            return "good" if label == "unknown" else "unknown"
        if score == 1.0:
            return "good" if label == "right" else "false_accept"
        return "false_reject" if label == "right" else "good"


def golden(kind: str) -> list[dict[str, Any]]:
    """The golden answers of a scorer."""
    return [json.loads(line) for line in (GOLDEN_DIR / f"{kind}.jsonl").read_text("utf-8").splitlines()]


def judge(kind: str) -> tuple[list[Judged], float]:
    """All golden answers of a scorer, judged, and the seconds it took without starting."""
    judged: list[Judged] = []
    seconds = 0.0
    for options, rows in groupby(golden(kind), key=lambda row: row.get("options", {})):
        with Bench(resolve_scorer(ScorerSpec(kind=kind, options=options, timeout_seconds=TIMEOUT_SECONDS))) as bench:
            started = time.perf_counter()
            judged += [
                Judged(row, bench.score(row["reference"], row["answer"], row.get("metadata"), row.get("prompt")))
                for row in rows
            ]
            seconds += time.perf_counter() - started
    return judged, seconds


def lines() -> Iterator[str]:
    """The table, line by line."""
    yield "| scorer | right | wrong | unknown | false accepts | false rejects | left unknown | rows/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for kind in KINDS:
        try:
            judged, seconds = judge(kind)
        except ConfigError as err:
            yield f"| `{kind}` | not run: {str(err).split('.')[0]} | | | | | | |"
            continue
        labels = Counter(one.row["label"] for one in judged)
        found = Counter(one.verdict for one in judged)
        not_right, decidable = len(judged) - labels["right"], labels["right"] + labels["wrong"]
        yield (
            f"| `{kind}` | {labels['right']} | {labels['wrong']} | {labels['unknown']} "
            f"| {found['false_accept'] / not_right:.1%} | {found['false_reject'] / labels['right']:.1%} "
            f"| {found['unknown'] / decidable:.1%} | {len(judged) / seconds:,.0f} |"
        )


def main() -> None:
    """Print the table; with ``--write`` commit it to ``benchmarks/verifiers.md`` too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores, {platform.machine()}")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    arguments = parser.parse_args()
    table = []
    for line in lines():
        print(line, flush=True)
        table.append(line)
    if arguments.write:
        about = (__doc__ or "").split("\n\n", 2)[2].strip()
        TABLE.write_text(
            f"# Verifiers on golden answers\n\n{arguments.machine}; {arguments.date}.\n\n" + "\n".join(table) + f"\n\n{about}\n"
        )


if __name__ == "__main__":
    main()
