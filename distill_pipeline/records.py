"""The rows that travel between stages: Arrow schemas, and the ids that name them.

A stage reads the previous stage's records and never its module. Text columns are UTF-8; nullable columns say so; every
other column always holds a value. The column contract is tested.

prompt
    ``prompt_id`` SHA-256 of the canonical messages; ``reference`` the gold answer where the source has one; ``split`` is
    ``train`` or ``heldout``; ``metadata`` the source's other columns as JSON. Written by the prompt pool.
completion
    One text a teacher returned for a prompt. ``finish_reason`` is ``stop``, ``length`` (cut at max_tokens) or ``error``
    (then ``error`` says why and the text is empty). ``logprob`` is the summed log-probability, in nats, of the completion's
    tokens under the sampling distribution. Written by generation.
score
    One scorer's opinion of one completion: ``score`` in [0, 1], null where the scorer cannot tell. ``scorer_version`` is its
    code's version and, behind a plus, a hash of its options and its model where it has any. Written by scoring.
verdict
    A completion with all its scores and what the filter decided. ``rank`` orders a prompt's accepted completions from 0.
    ``reject_reason`` is the first reason, ``reject_reasons`` all of them. Written by filtering; no row is ever dropped.
training row
    A prompt with all its accepted completions: the training set, one row a prompt. Written by filtering.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import pyarrow as pa

from distill_pipeline.hashing import sha256_of

FinishReason = Literal["stop", "length", "error"]
Split = Literal["train", "heldout"]


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


MESSAGE = pa.struct([_required("role", pa.string()), _required("content", pa.string())])

PROMPT_SCHEMA = pa.schema(
    [
        _required("prompt_id", pa.string()),
        _required("messages", pa.list_(pa.field("element", MESSAGE, nullable=False))),
        pa.field("reference", pa.string()),
        _required("domain", pa.string()),
        _required("source", pa.string()),
        _required("license", pa.string()),
        _required("split", pa.string()),
        _required("metadata", pa.string()),
    ]
)

COMPLETION_SCHEMA = pa.schema(
    [
        _required("completion_id", pa.string()),
        _required("prompt_id", pa.string()),
        _required("teacher", pa.string()),
        _required("sample_index", pa.int32()),
        pa.field("reasoning", pa.string()),
        _required("answer", pa.string()),
        _required("raw_text", pa.string()),
        _required("finish_reason", pa.string()),
        pa.field("error", pa.string()),
        _required("prompt_tokens", pa.int32()),
        _required("completion_tokens", pa.int32()),
        pa.field("logprob", pa.float64()),
        _required("request_key", pa.string()),
    ]
)

SCORE_SCHEMA = pa.schema(
    [
        _required("completion_id", pa.string()),
        _required("scorer", pa.string()),
        _required("scorer_version", pa.string()),
        pa.field("score", pa.float64()),
        _required("detail", pa.string()),
    ]
)

SCORE_VALUE = pa.struct([_required("scorer", pa.string()), pa.field("score", pa.float64()), _required("detail", pa.string())])

VERDICT_SCHEMA = pa.schema(
    [
        *COMPLETION_SCHEMA,
        _required("scores", pa.list_(pa.field("element", SCORE_VALUE, nullable=False))),
        _required("accepted", pa.bool_()),
        pa.field("reject_reason", pa.string()),
        _required("reject_reasons", pa.list_(pa.field("element", pa.string(), nullable=False))),
        pa.field("rank", pa.int32()),
    ]
)


TRAINING_COMPLETION = pa.struct(
    [_required("completion_id", pa.string()), _required("raw_text", pa.string()), _required("finish_reason", pa.string())]
)

TRAINING_SCHEMA = pa.schema(
    [
        _required("prompt_id", pa.string()),
        _required("messages", pa.list_(pa.field("element", MESSAGE, nullable=False))),
        pa.field("reference", pa.string()),
        _required("domain", pa.string()),
        _required("completions", pa.list_(pa.field("element", TRAINING_COMPLETION, nullable=False))),
    ]
)


FUNNEL = ("prompts", "completions", "finished", "scored", "accepted")
"""What a filtered set's manifest counts by domain, from all prompts to what trains a student."""


def prompt_id(messages: Sequence[Mapping[str, str]]) -> str:
    """The id of a prompt: SHA-256 of its messages (role and content only), so that equal prompts are one prompt."""
    return sha256_of([{"role": message["role"], "content": message["content"]} for message in messages])
