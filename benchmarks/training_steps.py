"""A few optimizer steps of this project's trainer in a process of its own; prints one line of JSON.

    python benchmarks/training_steps.py METHOD FOLDER --batch-prompts 16 --completions 1 --steps 8

``FOLDER`` holds ``teacher``, ``student`` and ``rows.jsonl``, as benchmarks/training.py made them.
"""

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa

from distill_pipeline.models.resolve import resolve_model
from distill_pipeline.outcome import silent
from distill_pipeline.records import TRAINING_SCHEMA, prompt_id
from distill_pipeline.signals.spec import SignalsSpec
from distill_pipeline.signals.table import SignalSource
from distill_pipeline.training.capture import capture_signals
from distill_pipeline.training.spec import StudentSpec
from distill_pipeline.training.stage import train_student

METHODS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft"},
    "kl": {"method": "logit_kd"},
    "topk": {"method": "logit_kd", "signal": "topk"},
    "sampled": {"method": "logit_kd", "signal": "sampled"},
}


def training_rows(folder: Path, num_prompts: int, completions: int) -> pa.RecordBatch:
    """The first prompts, each with its first completions."""
    rows = []
    for line in folder.joinpath("rows.jsonl").read_text(encoding="utf-8").splitlines()[:num_prompts]:
        given = json.loads(line)
        messages = [{"role": "user", "content": given["prompt"]}]
        answers = [
            {"completion_id": f"{len(rows)}/{index}", "raw_text": text, "finish_reason": "stop"}
            for index, text in enumerate(given["completions"][:completions])
        ]
        rows.append(
            {"prompt_id": prompt_id(messages), "messages": messages, "reference": None, "domain": "-", "completions": answers}
        )
    return pa.RecordBatch.from_pylist(rows, schema=TRAINING_SCHEMA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch-prompts", type=int, required=True)
    parser.add_argument("--completions", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--capture-only", action="store_true", help="store the teacher's signals and stop")
    options = parser.parse_args()
    stage = METHODS[options.method] | {"batch_prompts": options.batch_prompts, "epochs": 1.0, "lr": 1e-4}
    student = StudentSpec.model_validate({"data": ["t/f"], "init": {"model": "student"}, "stages": [stage]})
    rows = training_rows(options.folder, options.batch_prompts * options.steps, options.completions)
    models = {
        name: resolve_model(str(options.folder / name), models_dir=options.folder / "models", progress=silent)
        for name in ("teacher", "student")
    }
    signals, sources = SignalsSpec(), []
    signal_dir = options.folder / f"signals_{options.completions}"
    if student.signal_kinds():
        if options.capture_only:
            signal_dir.mkdir(exist_ok=True)
            capture_signals(
                [rows], signal_dir, options.folder / "capture", signals=signals, kinds=("topk", "sampled"),
                max_length=student.max_length, teacher=models["teacher"], system=None, device="cpu", seed=0, progress=silent,
            )  # fmt: skip
            return
        sources = [SignalSource("the benchmark's", signal_dir, models["teacher"].identity)]
    with tempfile.TemporaryDirectory() as out:
        outcome = train_student(
            [rows], Path(out, "out"), Path(out, "work"), student=student, teacher=models["teacher"],
            init_model=models["student"], system=None, device="cpu", seed=0, progress=silent, signals=signals,
            signal_sources=sources,
        )  # fmt: skip
    samples = outcome.counts["trained_completions"]
    found = {
        "samples_per_second": samples / outcome.facts["stage_seconds"][0],
        "samples": samples,
        "completion_tokens": outcome.counts["trained_tokens"],
        "peak_mib": peak_mib(),
    }
    print(json.dumps(found))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
