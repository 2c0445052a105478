"""What a student reads and writes of training rows: the system prompt of each row, and the trace, the answer or both.

Decided: a teacher that reads along reads the student's tokens, whatever they are. ``answer`` leaves the reasoning out and
ends as the completion ended. ``both`` is distilling step-by-step (Hsieh et al. 2023, arXiv:2305.02301): the prompt as it is
asks for the answer, the same prompt with a request behind it for the reasoning, so that reasoning is learnt and never has to
be written. Its loss is ``answer_weight`` x the mean over the answers' tokens + (1 - ``answer_weight``) x the mean over the
reasonings'; the paper prefixes the two inputs, chat templates have a last user turn instead.
Given up: a completion without reasoning has no second task.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal

import pyarrow as pa

from distill_pipeline.reasoning import THINK_TAGS, split_reasoning
from distill_pipeline.records import TRAINING_SCHEMA
from distill_pipeline.system_prompts import SystemPrompts
from distill_pipeline.training.examples import ExampleSet

Target = Literal["trace", "answer", "both"]
Row = dict[str, Any]

REASONING_REQUEST = "Explain step by step how to get to the answer."
"""What the reasoning task has behind the last user's turn."""

REASONING_TASK = " (reasoning)"
"""What its rows have behind their prompt's id."""


def rows_under_prompts(
    sets: Iterable[tuple[Iterable[pa.RecordBatch], SystemPrompts]],
) -> tuple[str | None, Iterator[pa.RecordBatch]]:
    """Training rows of several sets, and the system prompt that all of them share.

    Args:
        sets: rows of TRAINING_SCHEMA, and the system prompts under which they are read.
    Returns:
        The system prompt for the renderer, and the rows. Where they share none it is None, and each conversation begins with
        its own.
    """
    listed = list(sets)
    distinct = {system for _, prompts in listed for system in prompts.distinct()}
    if len(distinct) == 1:
        return distinct.pop(), chain.from_iterable(batches for batches, _ in listed)
    return None, chain.from_iterable(_carried(batches, prompts) for batches, prompts in listed)


def _carried(batches: Iterable[pa.RecordBatch], prompts: SystemPrompts) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        rows = batch.to_pylist()
        told = [row | {"messages": prompts.told(row["messages"], row["domain"])} for row in rows]
        yield pa.RecordBatch.from_pylist(told, schema=TRAINING_SCHEMA)


def rows_for_target(batches: Iterable[pa.RecordBatch], target: Target, *, opened: str = "") -> Iterator[pa.RecordBatch]:
    """Training rows with what the student learns to write in the place of what the teacher wrote.

    Args:
        opened: the tag with which the student's chat template opens every completion's reasoning, if it does.
    """
    if target == "trace":
        yield from batches
        return
    for batch in batches:
        rows = [made for row in batch.to_pylist() for made in _rows_for(row, target, opened)]
        yield pa.RecordBatch.from_pylist(rows, schema=TRAINING_SCHEMA)


def _rows_for(row: Row, target: Target, opened: str) -> Iterator[Row]:
    answers, reasonings = [], []
    for completion in row["completions"]:
        reasoning, answer = split_reasoning(completion["raw_text"], opened=opened)
        # Where the template opened a thought, the answer alone has to close it.
        text = f"{THINK_TAGS[opened]}\n\n{answer}" if opened and answer else answer
        answers.append(completion | {"raw_text": text})
        if reasoning:
            # A thought that was cut has no answer, and no end either.
            finish_reason = "stop" if answer else completion["finish_reason"]
            reasonings.append(completion | {"raw_text": reasoning, "finish_reason": finish_reason})
    yield row | {"completions": answers}
    if target == "both" and reasonings:
        yield row | {
            "prompt_id": row["prompt_id"] + REASONING_TASK, "messages": _asked_to_explain(row["messages"]),
            "completions": reasonings,
        }  # fmt: skip


def _asked_to_explain(messages: list[Mapping[str, str]]) -> list[Mapping[str, str]]:
    *earlier, last = messages
    return [*earlier, {"role": last["role"], "content": f"{last['content']}\n\n{REASONING_REQUEST}"}]


def weigh_tasks(examples: ExampleSet, answer_weight: float) -> dict[str, int]:
    """Weigh the two tasks of target ``both`` so that each task's share of the loss is its own; the mean weight of a token is 1.

    Returns:
        Tokens of each task. Where one task has none, the other is the whole loss.
    """
    tokens = {"answer": 0, "reasoning": 0}
    tasks = ["reasoning" if name.endswith(REASONING_TASK) else "answer" for name in examples.prompt_ids]
    for index, task in enumerate(tasks):
        tokens[task] += examples[index].num_tokens
    if all(tokens.values()):
        share = {"answer": answer_weight, "reasoning": 1.0 - answer_weight}
        whole = sum(tokens.values())
        examples.weights = [share[task] * whole / tokens[task] for task in tasks]
    return tokens
