"""Law 7: peak memory does not grow with the number of rows."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FEW, MANY = 20_000, 80_000
MAX_GROWTH_MB = 24
"""A list of the rows that come on top would take at least twice as much."""

FILTER = """
import pyarrow as pa
from distill_pipeline.filtering.spec import FilterSpec
from distill_pipeline.filtering.stage import filter_outputs
from distill_pipeline.prompts.contamination import ContaminationIndex
from distill_pipeline.records import COMPLETION_SCHEMA, PROMPT_SCHEMA, SCORE_SCHEMA

def batches(schema, row):
    for start in range(0, num_rows, 2000):
        yield pa.RecordBatch.from_pylist([row(number) for number in range(start, start + 2000)], schema=schema)

def prompt(n):
    return {"prompt_id": f"{n:064d}", "messages": [{"role": "user", "content": f"q {n}"}], "domain": "d", "source": "s",
            "license": "l", "split": "train", "metadata": "{}"}

def completion(n):
    text = f"answer {n} " + "of some words " * (n % 3)
    return {"completion_id": f"{n:064d}-0", "prompt_id": f"{n:064d}", "teacher": "t", "sample_index": 0, "answer": text,
            "raw_text": text, "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 4, "request_key": ""}

def score(n):
    return {"completion_id": f"{n:064d}-0", "scorer": "s", "scorer_version": "1", "score": 1.0, "detail": ""}

rule = FilterSpec(min_score=1.0, drop=("truncated", "refusal", "repetition", "contaminated", "near_duplicate"))
outcome = filter_outputs(
    batches(PROMPT_SCHEMA, prompt), batches(COMPLETION_SCHEMA, completion), batches(SCORE_SCHEMA, score), folder, rule=rule,
    filter_name="f", protected=ContaminationIndex.build([("t:0", "an item of a few words")]), progress=lambda line: None,
)
assert outcome.counts["accepted"] == num_rows
"""

POOL = """
from distill_pipeline.prompts.pool import build_pool
from distill_pipeline.prompts.spec import DedupSpec, SourceSpec

source = folder / "rows.jsonl"
with source.open("w") as file:
    for n in range(num_rows):
        file.write('{"prompt": "what comes after %d and before %d in this row?", "reference": "%d"}\\n' % (n, n + 2, n + 1))
(folder / "pool").mkdir()
outcome = build_pool(
    [SourceSpec(path=str(source), domain="d", license="cc0-1.0")], folder / "pool", resolve_path=str, holdout_frac=0.1,
    dedup=DedupSpec(), protected=None, progress=lambda line: None,
)
assert outcome.counts["kept"] == num_rows
"""


def peak_mb(program: str, num_rows: int, folder: Path) -> float:
    """The largest resident memory of a process that runs a stage on so many rows."""
    folder.mkdir()
    code = (
        f"import resource, sys\nfrom pathlib import Path\nfolder, num_rows = Path({str(folder)!r}), {num_rows}\n{program}"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout) / 1024


def test_the_filter_stage_takes_no_more_memory_for_four_times_the_rows(tmp_path: Path) -> None:
    growth = peak_mb(FILTER, MANY, tmp_path / "many") - peak_mb(FILTER, FEW, tmp_path / "few")
    assert growth < MAX_GROWTH_MB


def test_the_prompt_pool_keeps_a_few_numbers_a_row_and_no_text(tmp_path: Path) -> None:
    growth = peak_mb(POOL, MANY // 2, tmp_path / "many") - peak_mb(POOL, FEW // 2, tmp_path / "few")
    assert growth < MAX_GROWTH_MB
