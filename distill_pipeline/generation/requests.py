"""What an answer of a teacher depends on, as a name: answers are kept under it and never paid for twice.

A *family* is everything but the prompt and the sample's number: the model's content, how it is run, the system prompt, the
rendering, the sampling and the seed. ``n`` and ``max_tokens`` are not part of it: more samples, or room for longer ones,
leave the answers that ended by themselves as they are.
"""

from collections.abc import Mapping
from typing import Any

from distill_pipeline.generation.spec import SamplingSpec
from distill_pipeline.hashing import sha256_of

LOCAL_ENGINE = "transformers/1"
VLLM_ENGINE = "vllm/1"
SERVER_ENGINE = "openai/1"
"""Engine kinds and versions; raise one when the same request would draw other tokens."""


def family_settings(
    *, identity: str, revision: str | None, engine: str, dtype: str | None, system: str | None, rendering: str,
    sampling: SamplingSpec, seed: int, top_logprobs: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The settings of a family by name, flat, so that two families can be compared line by line.

    Answers with their tokens are a family of their own: those without have nothing to add them from.
    """
    return {
        "model": identity, "revision": revision, "engine": engine, "dtype": dtype, "system": system, "rendering": rendering,
        "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p, "seed": seed,
    } | ({} if top_logprobs is None else {"top_logprobs": top_logprobs})  # fmt: skip


def family_of(settings: Mapping[str, Any]) -> str:
    """The family's name: 32 hexadecimal characters."""
    return sha256_of(dict(settings))[:32]


def request_key(family: str, prompt_id: str, sample_index: int) -> str:
    """The name of one request: SHA-256 of family, prompt (its id is the hash of its messages) and sample index."""
    return sha256_of([family, prompt_id, sample_index])
