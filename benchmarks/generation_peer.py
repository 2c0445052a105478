"""vLLM's offline engine as the other side of benchmarks/generation.py, which runs this in vLLM's own environment.

    python benchmarks/generation_peer.py FOLDER --dtype float32     # then JSON lines: what to draw in, what it took out

A line in: ``{"prompts": [[id, ...], ...], "samples": 4, "max_tokens": 32, "stop": [id, ...], "sampling": {...}}``; a line out:
``{"tokens": drawn up to and with the end token, "seconds": ...}``. Nothing of an earlier line is kept: its cache is emptied.
"""

import argparse
import json
import os
import sys
import time

import vllm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    options = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own words go elsewhere
    engine = vllm.LLM(
        options.folder, dtype=options.dtype, max_model_len=1024, enforce_eager=options.eager, skip_tokenizer_init=True,
        generation_config="vllm", kv_cache_memory_bytes=2 << 30, disable_log_stats=True,
    )  # fmt: skip
    print(json.dumps({"vllm": vllm.__version__}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        params = vllm.SamplingParams(
            n=asked["samples"], max_tokens=asked["max_tokens"], stop_token_ids=asked["stop"], detokenize=False,
            **asked["sampling"],
        )  # fmt: skip
        engine.reset_prefix_cache()
        started = time.perf_counter()
        done = engine.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], params, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(each.token_ids) for one in done for each in one.outputs)
        print(json.dumps({"tokens": tokens, "seconds": seconds}), file=out, flush=True)


if __name__ == "__main__":
    main()
