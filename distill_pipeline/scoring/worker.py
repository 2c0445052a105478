"""The process a scorer runs in when it may hang, crash or print: one JSON line in, one JSON line out.

Started by :mod:`distill_pipeline.scoring.isolation`, which kills it with everything it started when a row takes too long.
On Linux the kernel ends it when its caller dies, whatever the scorer is doing; elsewhere a row's alarm does. What the scorer
prints goes to standard error, so that it cannot be taken for an answer.
"""

import importlib
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from distill_pipeline.errors import ConfigError, MissingExtraError


def answer_of(value: Any) -> tuple[float | None, str]:
    """What a scorer returned, as (score or None, detail). Anything but a number in [0, 1] is unknown.

    A scorer may return a number, a truth value, None, or one of these with a text; or an object with ``score`` and ``detail``.
    """
    detail = ""
    if hasattr(value, "score") and hasattr(value, "detail"):
        value, detail = value.score, str(value.detail)
    elif isinstance(value, tuple) and len(value) == 2:
        value, detail = value[0], str(value[1])
    if value is None:
        return None, detail or "the scorer could not tell"
    try:
        score = float(value) if not isinstance(value, str | bytes) else float("nan")
    except (TypeError, ValueError, OverflowError):
        score = float("nan")
    if not 0.0 <= score <= 1.0:
        return None, f"the scorer returned {repr(value)[:80]}, which is no number in [0, 1]"
    return score, detail


def extras_of(function: Callable[..., Any]) -> frozenset[str]:
    """Which of ``metadata`` and ``prompt`` a scorer has as parameters, and so is given."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function written in C that does not say
        return frozenset()
    return frozenset(name for name in ("metadata", "prompt") if name in parameters)


def score_once(
    function: Callable[..., Any], request: dict[str, Any], extras: frozenset[str] = frozenset()
) -> tuple[float | None, str]:
    """One row's score; whatever the scorer raises makes it unknown."""
    try:
        given = {name: request[name] for name in extras}
        return answer_of(function(request["reference"], request["answer"], **given, **request["options"]))
    except BaseException as err:  # the scorer's own SystemExit must not end the worker either
        return None, f"the scorer raised {type(err).__name__}: {str(err)[:200]}"


def load(target: str) -> Callable[..., Any]:
    """The function named ``module:function``."""
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise TypeError(f"{target} is no function")
    return found


def main() -> None:
    """Answer requests until the input ends."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    setup = json.loads(source.readline())
    sys.path[:] = [*sys.path, *(path for path in setup["search_path"] if path not in sys.path)]
    try:
        _end_with_caller()
        function = load(setup["target"])
        if setup["start"]:
            load(setup["start"])()
            _end_with_caller()  # a process that gave up its rights has lost the tie as well
    except MissingExtraError as err:
        _reply(sink, {"missing": str(err)})
        return
    except ConfigError as err:
        _reply(sink, {"refusal": str(err)})
        return
    except BaseException as err:
        _reply(sink, {"error": f"{type(err).__name__}: {err}"})
        return
    extras = extras_of(function)
    _reply(sink, {"ready": True, "extras": sorted(extras)})
    for line in source:
        request = json.loads(line)
        # Should the caller die, nobody is left to end a row that hangs: the system does, whatever the scorer is doing.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2 * setup["timeout_seconds"] + 5)
        score, detail = score_once(function, request, extras)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(sink, {"row": request["row"], "score": score, "detail": detail})


def _end_with_caller() -> None:
    if sys.platform == "linux":
        from distill_pipeline.scoring.namespaces import end_with_parent

        end_with_parent()


def _reply(sink: Any, message: dict[str, Any]) -> None:
    sink.write(json.dumps(message).encode("ascii") + b"\n")
    sink.flush()


if __name__ == "__main__":
    main()
