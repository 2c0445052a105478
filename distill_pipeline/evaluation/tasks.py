"""The evaluation's tasks as lm-eval knows them: whether they exist, and the documents they hold.

The prompt pool and the filters are decontaminated against exactly these documents. lm-eval's own 14,000 names take nine
seconds to read, so the user's ``include_path`` is looked at first and lm-eval's folder only when a name is not there.
"""

import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from distill_pipeline.errors import ConfigError


def task_fault(tasks: str | Sequence[str], include_path: str | None) -> str | None:
    """What is wrong with the names of evaluation tasks, or None: the message lists the local ones and the closest others."""
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    local = _known(include_path, False)
    missing = [name for name in names if name not in local]
    if missing:
        known = _known(include_path, True)
        missing = [name for name in missing if name not in known]
    faults = [_unknown(name, sorted(local), sorted(known - local), include_path) for name in missing]
    return "; ".join(faults) or None


def load_tasks(tasks: Sequence[str], include_path: str | None) -> dict[str, dict[str, Any]]:
    """What lm-eval makes of these names: ``tasks`` by name, with groups and tags expanded, ``groups`` and ``group_map``.

    Raises:
        ConfigError: a name is unknown, or a task's data set cannot be read; the message names the task.
    """
    return open_tasks(tasks, include_path)[1]


def open_tasks(tasks: Sequence[str], include_path: str | None) -> tuple[Any, dict[str, dict[str, Any]]]:
    """lm-eval's task manager that knows these names, and what it made of them. Raises as :func:`load_tasks`."""
    if fault := task_fault(tasks, include_path):
        raise ConfigError(f"evaluation.tasks: {fault}")
    local_only = all(name in _known(include_path, False) for name in tasks)
    manager = _manager(include_path, not local_only)
    try:
        return manager, _load(tasks, manager)
    except KeyError:
        if not local_only:
            raise
    manager = _manager(include_path, True)  # a local group that names lm-eval's own tasks
    return manager, _load(tasks, manager)


def evaluation_documents(tasks: Sequence[str], include_path: str | None) -> list[tuple[str, str]]:
    """Every document the tasks ask about, as (``task:document id``, question and target), in the tasks' order.

    Raises:
        ConfigError: a name is unknown, or a task's data set cannot be read; the message names the task.
    """
    return [
        (f"{name}:{index}", _document_text(task, document))
        for name, task in load_tasks(tasks, include_path)["tasks"].items()
        for index, document in task.doc_iterator()
    ]


def _load(tasks: Sequence[str], manager: Any) -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in tasks:
        try:
            with hints_off():
                found = manager.load([name])
            for part in loaded:
                loaded[part].update(found[part])
        except (OSError, ValueError, RuntimeError, ImportError) as err:
            reason = " ".join(str(err).split())[:400]
            raise ConfigError(
                f"evaluation.tasks: task {name} cannot be loaded: {type(err).__name__}: {reason}. If its data set must be "
                "downloaded, connect to the network once (and unset HF_HUB_OFFLINE), or name a task of evaluation.include_path."
            ) from err
    return loaded


@contextmanager
def hints_off() -> Iterator[None]:
    """Without lm-eval's advice on its own command line, which it logs as warnings while a task loads."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@lru_cache(maxsize=8)
def _manager(include_path: str | None, with_lm_eval: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=with_lm_eval)


def _known(include_path: str | None, with_lm_eval: bool) -> frozenset[str]:
    if not with_lm_eval and include_path is None:
        return frozenset()
    return frozenset(_manager(include_path, with_lm_eval).all_tasks)


def _unknown(name: str, local: Sequence[str], known: Sequence[str], include_path: str | None) -> str:
    here = f"tasks of {include_path}: {', '.join(local) or 'none'}" if include_path else "no include_path is set"
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
    return f"unknown task {name!r}; {here}; closest of lm-eval: {', '.join(close) or 'none'}"


def _document_text(task: Any, document: Any) -> str:
    """Question, choices and target: whatever of them a task can give as text."""
    parts: list[str] = []
    has_choices = getattr(getattr(task, "config", None), "doc_to_choice", None) is not None
    for method in ("doc_to_text", *(["doc_to_choice"] if has_choices else []), "doc_to_target"):
        try:
            parts += _texts(getattr(task, method)(document))
        except (AttributeError, NotImplementedError, TypeError, KeyError, ValueError):
            continue  # a task without a question or a target
    return "\n".join(dict.fromkeys(parts))


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return [value] if value.strip() else []
    return [item for item in value if isinstance(item, str)] if isinstance(value, list | tuple) else []
