"""The scorers an experiment can name, without loading what they need: checking an experiment file stays fast.

Most scorers are pure functions ``(reference, answer, **options)`` of one row. One that has a parameter ``metadata`` is also
given the prompt's other columns, and one with a parameter ``prompt`` the last user message. A user's own is written
``package.module:function`` and always runs in a process that can be killed. Scorers that read all answers of a prompt, or ask a
model, are classes that score many rows at once.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from distill_pipeline.errors import ConfigError
from distill_pipeline.scoring import rubrics
from distill_pipeline.scoring.schemas import require_jsonschema, schema_fault
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.scoring.worker import load

SCORING = "distill_pipeline.scoring"

_USER_KIND = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class ScoreValue:
    """A score in [0, 1], or None for unknown, and in few words why. Unknown is never the same as wrong.

    ``lost`` names what kept the scorer from answering (``timeout``, ``crash``, ``error``); such a row is tried again next time.
    """

    score: float | None
    detail: str = ""
    lost: str = ""


@dataclass(frozen=True)
class BuiltIn:
    """What a built-in kind is called and takes. Raise ``version`` when it would score some answer otherwise.

    ``module`` is one of this package; ``function`` scores one row, or where it is no ``is_row_function`` is the class of a
    scorer of many rows at once. ``start`` is ``module:function`` of it: a worker calls it before the first row, and it raises
    ConfigError where the scorer cannot work on this machine, MissingExtraError where its package is missing.
    """

    function: str
    version: str
    options: Mapping[str, type | tuple[type, ...]] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    is_isolated: bool = False
    module: str = "scorers"
    is_row_function: bool = True
    uses_model: bool = False
    start: str | None = None

    @property
    def target(self) -> str:
        return f"{SCORING}.{self.module}:{self.function}"


BUILT_INS: Mapping[str, BuiltIn] = {
    "contains_answer": BuiltIn("contains_answer", "1"),
    "exact": BuiltIn("exact", "1", {"case_sensitive": bool}),
    "json_schema": BuiltIn(
        "json_schema", "1", {"schema": (dict, str)}, is_isolated=True, module="json_answers", start="schemas:require_jsonschema"
    ),
    "math": BuiltIn("math", "1", is_isolated=True, module="math_answers", start="math_answers:require_math_verify"),
    "multiple_choice": BuiltIn("multiple_choice", "1", {"letters": str}),
    "numeric": BuiltIn("numeric", "2", {"relative_tolerance": (int, float), "pick": str}),
    "python_tests": BuiltIn(
        "python_tests",
        "1",
        {"cpu_seconds": int, "wall_seconds": (int, float), "memory_mb": int, "max_processes": int},
        is_isolated=True,
        module="python_tests",
        start="python_tests:require_sandbox",
    ),
    "reasoning_gym": BuiltIn(
        "reasoning_gym",
        "1",
        {"threshold": (int, float)},
        is_isolated=True,
        module="generated_tasks",
        start="generated_tasks:require_reasoning_gym",
    ),
    "regex": BuiltIn(
        "regex", "1", {"pattern": str, "group": int, "ignore_case": bool}, frozenset({"pattern"}), is_isolated=True
    ),
    "majority_vote": BuiltIn(
        "MajorityVote", "1", {"by": str, "by_options": dict, "min_votes": int, "min_share": (int, float)},
        module="votes", is_row_function=False,
    ),
    "teacher_logprob": BuiltIn("TeacherLogprob", "1", module="logprobs", is_row_function=False),
    "reward_model": BuiltIn(
        "RewardModel", "1", {"model": str, "revision": str, "scale": str}, frozenset({"model"}),
        module="reward", is_row_function=False, uses_model=True,
    ),
    "judge": BuiltIn(
        "Judge", "1",
        {"model": str, "revision": str, "rubric": str, "scale": int, "max_tokens": int, "compare": bool}, frozenset({"model"}),
        module="judge", is_row_function=False, uses_model=True,
    ),
}  # fmt: skip
"""Built-in kinds. Those that can hang or crash on some answer are isolated: patterns, algebra, schemas, programs."""


@dataclass(frozen=True)
class Scorer:
    """A scorer ready to be used. ``target`` is ``module:function``, and so is ``start`` (what to call before the first row);
    ``is_isolated`` asks for a process of its own."""

    kind: str
    version: str
    target: str
    options: Mapping[str, Any]
    timeout_seconds: float
    is_isolated: bool
    search_path: tuple[str, ...] = ()
    start: str | None = None

    @property
    def is_row_function(self) -> bool:
        """Whether it scores one row at a time; the others are opened by :mod:`distill_pipeline.scoring.opening`."""
        return self.kind not in BUILT_INS or BUILT_INS[self.kind].is_row_function

    def function(self) -> Callable[..., ScoreValue]:
        """The function itself, for scorers that are not isolated."""
        assert not self.is_isolated, f"{self.kind} runs in a worker only"
        found: Callable[..., ScoreValue] = load(self.target)
        return found


def scorer_fault(kind: str, options: Mapping[str, Any]) -> str | None:
    """What is wrong with a scorer's name or options, or None.

    Raises:
        MissingExtraError: the package that must tell is not installed.
    """
    if ":" in kind:
        if _USER_KIND.fullmatch(kind):
            return None
        return f"{kind!r} is no function: write package.module:function"
    if kind not in BUILT_INS:
        known = ", ".join(sorted(BUILT_INS))
        return f"unknown scorer {kind!r}; known: {known}; your own is written package.module:function"
    built_in = BUILT_INS[kind]
    for name, value in options.items():
        if name not in built_in.options:
            takes = ", ".join(sorted(built_in.options)) or "no options"
            return f"{kind} does not take the option {name!r}; it takes: {takes}"
        expected = built_in.options[name]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            return f"{kind} cannot use {value!r} as {name}"
    missing = sorted(built_in.required - set(options))
    if missing:
        return f"{kind} needs the option {missing[0]!r}"
    return _value_fault(kind, options) or _batch_fault(kind, options)


def _value_fault(kind: str, options: Mapping[str, Any]) -> str | None:
    if kind == "numeric" and options.get("pick", "last") not in {"last", "first", "any"}:
        return f"numeric picks the last, first or any number of an answer, not {options['pick']!r}"
    if kind == "numeric" and not 0 <= options.get("relative_tolerance", 0) < 1:
        return f"numeric needs a relative_tolerance in [0, 1), not {options['relative_tolerance']!r}"
    if kind == "multiple_choice" and not re.fullmatch(r"[A-Z]{2,26}", options.get("letters", "AB")):
        return f"multiple_choice needs letters such as ABCD, not {options['letters']!r}"
    if kind == "python_tests":
        low = next(
            (name for name in ("cpu_seconds", "wall_seconds", "memory_mb", "max_processes") if options.get(name, 1) <= 0), None
        )
        return low and f"python_tests needs a {low} above 0, not {options[low]!r}"
    if kind == "reasoning_gym" and not 0 < options.get("threshold", 1) <= 1:
        return f"reasoning_gym needs a threshold in (0, 1], not {options['threshold']!r}"
    if kind == "json_schema" and "schema" in options:
        return _schema_fault(options["schema"])
    if kind == "regex":
        try:
            groups = re.compile(options["pattern"]).groups
        except (re.error, RecursionError, OverflowError) as err:
            return f"regex cannot use the pattern {options['pattern']!r}: {err}"
        if not 0 <= options.get("group", 0) <= groups:
            return f"the pattern {options['pattern']!r} has {groups} groups, not {options['group']}"
    return None


EQUALITIES = ("exact", "numeric", "multiple_choice", "math")
"""Built-in kinds by which answers can be told equal."""


def _batch_fault(kind: str, options: Mapping[str, Any]) -> str | None:
    if kind == "majority_vote":
        by = options.get("by", "exact")
        if ":" not in by and by not in EQUALITIES:
            return f"majority_vote cannot tell answers equal by {by!r}; it can by: {', '.join(EQUALITIES)} or your own function"
        if (fault := scorer_fault(by, options.get("by_options", {}))) is not None:
            return f"majority_vote by {fault}"
        if options.get("min_votes", 2) < 1 or not 0 <= options.get("min_share", 0.5) <= 1:
            return "majority_vote needs min_votes of at least 1 and a min_share in [0, 1]"
    if kind == "reward_model" and options.get("scale", "sigmoid") not in {"sigmoid", "identity"}:
        return f"reward_model has the scales sigmoid and identity, not {options['scale']!r}"
    return rubrics.judge_fault(options) if kind == "judge" else None


def _schema_fault(schema: Mapping[str, Any] | str) -> str | None:
    """What is wrong with a schema, written in the experiment or in a file it names. Raises MissingExtraError."""
    require_jsonschema()
    try:
        text = Path(schema).read_text("utf-8") if isinstance(schema, str) else json.dumps(schema)
        json.loads(text)
    except (OSError, ValueError, TypeError) as err:
        return f"json_schema cannot read the schema {str(schema)[:80]!r}: {err}"
    fault = schema_fault(text)
    return fault and f"json_schema cannot use the schema: {fault}"


def resolve_scorer(spec: ScorerSpec) -> Scorer:
    """A scorer from its part of the experiment.

    Raises:
        ConfigError: the kind or an option is wrong, or the user's module is not found (nothing of it is run here).
    """
    fault = scorer_fault(spec.kind, spec.options)
    if fault is not None:
        raise ConfigError(f"scorers: {fault}")
    if ":" not in spec.kind:
        built_in = BUILT_INS[spec.kind]
        start = built_in.start and f"{SCORING}.{built_in.start}"
        options, version = dict(spec.options), built_in.version
        if spec.kind == "json_schema" and isinstance(options.get("schema"), str):
            text = Path(options["schema"]).read_text("utf-8")
            options["schema"] = json.loads(text)
            version += "-" + hashlib.sha256(text.encode()).hexdigest()[:16]
        if spec.kind == "majority_vote":
            version = f"{version}.{resolve_scorer(equality_of(spec)).version}"
        return Scorer(spec.kind, version, built_in.target, options, spec.timeout_seconds, built_in.is_isolated, start=start)
    search_path = tuple(dict.fromkeys([*filter(None, sys.path), os.getcwd()]))
    file = _module_file(spec.kind.split(":")[0], search_path)
    version = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return Scorer(spec.kind, version, spec.kind, spec.options, spec.timeout_seconds, True, search_path)


def equality_of(spec: ScorerSpec) -> ScorerSpec:
    """The scorer by which a majority vote tells answers equal."""
    return ScorerSpec(
        kind=spec.options.get("by", "exact"), options=spec.options.get("by_options", {}), timeout_seconds=spec.timeout_seconds
    )


def scorer_models(scorers: Mapping[str, tuple[ScorerSpec, ...]]) -> list[tuple[str, str | None]]:
    """(model, revision) of each model that an experiment's scorers ask, as it is written there."""
    return sorted(
        {
            (spec.options["model"], spec.options.get("revision"))
            for listed in scorers.values()
            for spec in listed
            if spec.kind in BUILT_INS and BUILT_INS[spec.kind].uses_model
        },
        key=str,
    )


def scorer_versions(scorers: Mapping[str, tuple[ScorerSpec, ...]]) -> dict[str, str]:
    """The version of each kind that an experiment's scorers name: a stage's inputs, so that edited functions score anew."""
    return {spec.kind: resolve_scorer(spec).version for listed in scorers.values() for spec in listed}


def _module_file(module: str, search_path: tuple[str, ...]) -> Path:
    """The source file of a module, found without importing it or its packages."""
    path: list[str] | None = list(search_path)
    found = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        found = PathFinder.find_spec(".".join(parts[:depth]), path) if path else None
        if found is None:
            raise ConfigError(
                f"scorers: there is no module {'.'.join(parts[:depth])} for the scorer module {module}. Start from the folder "
                f"that holds it, or put that folder on PYTHONPATH."
            )
        path = list(found.submodule_search_locations or ())
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise ConfigError(f"scorers: the module {module} has no source file, so a change in it would go unnoticed.")
    return Path(found.origin)
