"""Measures one model on the experiment's lm-eval tasks, and keeps what it answered.

Decided: greedy or sampled as the task says, fixed seeds, no request cache, no bootstrap inside lm-eval (intervals are made
from the documents' scores, see ``statistics.py``), and no task that runs model-written code. A document appears once with
the metrics of all filters; a metric is called ``exact_match`` where its task has one filter, ``exact_match,strict-match``
where it has several.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from distill_pipeline.errors import ConfigError
from distill_pipeline.evaluation.divergence import held_out_divergence
from distill_pipeline.evaluation.tasks import hints_off, open_tasks
from distill_pipeline.hashing import sha256_of
from distill_pipeline.outcome import Progress
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.system_prompts import with_system

SEED = 1234
"""Of few-shot examples and sampled answers: lm-eval's own default, so that numbers compare with published ones."""


_BY_TASK = ("tasks", "primary", "subtasks")


def evaluate_model(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Sequence[str],
    include_path: str | None,
    system: str | None,
    limit: int | None,
    batch_size: int,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Answers and metrics of one model.

    Args:
        model: a causal language model in evaluation mode on ``device``.
        tasks: lm-eval names of tasks, groups or tags; ``include_path`` is a folder with local ones.
        system: system prompt, as in training.
        limit: documents a task; None is all of them.
        batch_size: most sequences of a forward pass over given text.
    Returns:
        JSON-able: ``tasks`` {task: {metric: {"value", "stderr", "n", "higher_is_better"}}}, where a group with an aggregate is
        a task with ``subtasks``; ``primary`` {task: metric}; ``requested``, the tasks and groups that were asked for;
        ``subtasks`` {group: [task]}; ``samples``, one a document: ``task``, ``doc_id``, ``prompt`` (the last user message),
        ``messages`` (null for tasks without a prompt), ``target``, ``answer``, ``finish_reason`` (stop, until, length, error;
        null where nothing was generated), ``metrics`` {metric: number} and, where it reasoned, ``raw_text``; ``renderer``,
        ``limit`` and ``lm_eval_version``.
    Raises:
        ConfigError: a task is unknown, cannot be loaded, or runs model-written code.
    """
    from distill_pipeline.evaluation.language_model import EvaluatedModel

    renderer = ChatRenderer(tokenizer, system=system)
    subject = EvaluatedModel(model, renderer, batch_size=batch_size, device=device, progress=progress)
    return evaluate_subject(
        subject, tasks=tasks, include_path=include_path, limit=limit, has_template=tokenizer.chat_template is not None,
        renderer=renderer.fingerprint,
    )  # fmt: skip


def evaluate_subject(
    subject: Any, *, tasks: Sequence[str], include_path: str | None, limit: int | None, has_template: bool, renderer: str
) -> dict[str, Any]:
    """What :func:`evaluate_model` returns, of any model that lm-eval can ask.

    Args:
        subject: an ``lm_eval.api.model.LM`` whose prompts and answers are those of
            :mod:`distill_pipeline.evaluation.language_model`.
        has_template: whether prompts are conversations.
        renderer: the fingerprint of how they are rendered.
    Raises:
        ConfigError: as :func:`evaluate_model`.
    """
    import lm_eval

    with _random_state_kept(), hints_off():
        manager, opened = open_tasks(tasks, include_path)
        _refuse_unsafe(opened["tasks"])
        results = lm_eval.simple_evaluate(
            model=subject, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0,
            log_samples=True, fewshot_as_multiturn=True, apply_chat_template=has_template,
            random_seed=SEED, numpy_random_seed=SEED, torch_random_seed=SEED, fewshot_random_seed=SEED,
        )  # fmt: skip
    samples = [sample for name in results["samples"] for sample in _samples_of(name, results["samples"][name])]
    metrics = {name: _metrics_of(name, results, samples) for name in results["results"]}
    metrics = {name: found for name, found in metrics.items() if found}
    return {
        "tasks": metrics,
        "primary": {name: _primary_metric(found) for name, found in metrics.items()},
        "requested": [name for name in _requested(tasks, results) if name in metrics],
        "subtasks": {group: _leaves(group, results["group_subtasks"]) for group in results["group_subtasks"]},
        "samples": samples,
        "renderer": renderer,
        "limit": limit,
        "lm_eval_version": lm_eval.__version__,
    }


def evaluate_by_system(model: Any, tokenizer: Any, *, systems: Mapping[str, str | None], **options: Any) -> dict[str, Any]:
    """As :func:`evaluate_model`, each task under its own system prompt; where there are several, ``messages`` begin with them.

    Args:
        systems: the system prompt of each task, in the order of the tasks.
        options: the other keywords of :func:`evaluate_model`.
    """
    return by_system(partial(evaluate_model, model, tokenizer, **options), systems)


def by_system(evaluate: Callable[..., dict[str, Any]], systems: Mapping[str, str | None]) -> dict[str, Any]:
    """The results of ``evaluate(tasks=..., system=...)`` for each system prompt's tasks, as one."""
    groups: dict[str | None, list[str]] = {}
    for task, system in systems.items():
        groups.setdefault(system, []).append(task)
    parts = [evaluate(tasks=tasks, system=system) for system, tasks in groups.items()]
    if len(parts) == 1:
        return parts[0]
    for system, part in zip(groups, parts, strict=True):
        for sample in part["samples"]:
            sample["messages"] = sample["messages"] and with_system(sample["messages"], system)
    joined = {name: {key: value for part in parts for key, value in part[name].items()} for name in _BY_TASK}
    listed = {name: [item for part in parts for item in part[name]] for name in ("requested", "samples")}
    return parts[0] | joined | listed | {"renderer": sha256_of([part["renderer"] for part in parts])}


def _refuse_unsafe(tasks: Mapping[str, Any]) -> None:
    """Raises ConfigError for tasks that would run what a model wrote."""
    if unsafe := sorted(name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)):
        raise ConfigError(f"evaluation.tasks: {', '.join(unsafe)} would run code that the model wrote; leave such tasks out.")


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """lm-eval seeds every global generator; afterwards they are as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _samples_of(task: str, logged: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One sample a document, in the documents' order; lm-eval logs one for each filter."""
    filters = list(dict.fromkeys(row["filter"] for row in logged))
    by_document: dict[int, dict[str, Any]] = {}
    for row in logged:
        if row["doc_id"] not in by_document:
            by_document[row["doc_id"]] = _sample(task, row)
        for metric in row["metrics"]:
            if (number := _number(row[metric])) is not None:
                by_document[row["doc_id"]]["metrics"][_metric_name(metric, row["filter"], filters)] = number
    yield from (by_document[index] for index in sorted(by_document))


def _sample(task: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked and answered; of a multiple-choice document, the answer is the likeliest choice."""
    prompt = row["arguments"][0][0]
    messages = getattr(prompt, "messages", None)
    if messages is None and len(row["arguments"][0]) > 1 and prompt:
        messages = ({"role": "user", "content": str(prompt)},)
    users = [message["content"] for message in messages or () if message["role"] == "user"]
    prefix = getattr(prompt, "prefix", "")
    first = row["resps"][0][0]
    finish_reason = getattr(first, "finish_reason", None)
    choices = _choices(row)
    if finish_reason is not None:
        answer = prefix + str(first)
    elif choices:
        answer = choices[int(np.argmax([repeats[0][0] for repeats in row["resps"][: len(choices)]]))]
    else:
        answer = ""
    raw_text = getattr(first, "raw_text", None)
    thought = {} if raw_text is None or raw_text == str(first) else {"raw_text": prefix + raw_text}
    return {
        "task": task, "doc_id": row["doc_id"], "prompt": users[-1] if users else str(prompt),
        "messages": [dict(message) for message in messages] if messages else None, "target": _target_text(row),
        "answer": answer, "finish_reason": finish_reason, "metrics": {}, **thought,
    }  # fmt: skip


def _choices(row: Mapping[str, Any]) -> list[str]:
    """The choices of a multiple-choice document, without those asked again without a prompt; else none."""
    asked = [arguments for arguments in row["arguments"] if len(arguments) > 1 and arguments[0]]
    texts = [str(arguments[1]).strip() for arguments in asked]
    if len(texts) < 2:
        return []
    return texts if len(set(texts)) > 1 else [f"choice {number}" for number in range(1, len(texts) + 1)]


def _target_text(row: Mapping[str, Any]) -> str:
    """The reference answer as text: a choice's index becomes the choice."""
    target, choices = row["target"], _choices(row)
    if isinstance(target, int) and 0 <= target < len(choices):
        return choices[target]
    return "; ".join(str(part) for part in target) if isinstance(target, list | tuple) else str(target)


def _number(value: Any) -> float | None:
    """A document's score, where a metric has one: perplexities and F1 are made of pairs instead."""
    if isinstance(value, bool | int | float | np.number) and math.isfinite(value):
        return float(value)
    return None


def _metric_name(metric: str, filter_name: str, filters: Sequence[str]) -> str:
    return metric if len(filters) == 1 else f"{metric},{filter_name}"


def _metrics_of(name: str, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """lm-eval's ``{"acc,none": value}`` as one entry a metric, with the standard error of a mean over documents."""
    row = results["results"][name]
    keys = [key for key in row if "," in key and "_stderr," not in key and _number(row[key]) is not None]
    filters = list(dict.fromkeys(key.split(",", 1)[1] for key in keys))
    found: dict[str, dict[str, Any]] = {}
    for key in keys:
        metric, filter_name = key.split(",", 1)
        called = _metric_name(metric, filter_name, filters)
        scores = [sample["metrics"][called] for sample in samples if sample["task"] == name and called in sample["metrics"]]
        is_mean = len(scores) > 1 and math.isclose(float(np.mean(scores)), row[key], abs_tol=1e-9)
        found[called] = {
            "value": float(row[key]),
            "stderr": float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if is_mean else None,
            "n": int(row.get("sample_len", len(scores))),
            "higher_is_better": results["higher_is_better"].get(name, {}).get(metric) is not False,
        }
    return found


def _primary_metric(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The metric that speaks for a task: the first one listed of which more is better, else the first one."""
    return next((name for name, metric in metrics.items() if metric["higher_is_better"]), next(iter(metrics)))


def _requested(tasks: Sequence[str], results: Mapping[str, Any]) -> list[str]:
    """What was asked for, tags and groups without an aggregate replaced by their tasks."""
    groups = results["group_subtasks"]
    scored = set(results["results"])
    names: list[str] = []
    for task in tasks:
        if task in groups and not any("," in key for key in results["results"].get(task, {})):
            names += _leaves(task, groups)
        elif task in scored:
            names.append(task)
    covered = {leaf for name in names for leaf in _leaves(name, groups)} | set(names)
    return names + [task for task in results["samples"] if task not in covered]


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    return [leaf for child in groups[name] for leaf in _leaves(child, groups)] if name in groups else [name]


__all__ = ["evaluate_by_system", "evaluate_model", "held_out_divergence"]
