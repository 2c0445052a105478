"""The stage ``teacher_outputs``: n completions of every training prompt, asking the teacher only for those it never gave.

The pool is read once and spooled to disk, then worked on in windows of prompts, so memory does not grow with it. What is
missing goes to an engine, which may be a model here or a server anywhere; answers are stored as they come, in any order, and
a run that was killed asks for the rest and ends with the same rows.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill_pipeline.compute.spec import ComputeSpec
from distill_pipeline.errors import EmptyResultError
from distill_pipeline.generation.accepting import AcceptRounds, CountAccepted
from distill_pipeline.generation.answering import AnsweringRun
from distill_pipeline.generation.budget import Spending
from distill_pipeline.generation.families import Families
from distill_pipeline.generation.opening import HERE, TeacherModel, open_engine
from distill_pipeline.generation.protocol import Engine
from distill_pipeline.generation.served import ServedModel
from distill_pipeline.generation.spec import TeacherSpec
from distill_pipeline.generation.spool import prompts_in, spooled, windows
from distill_pipeline.generation.store import GenerationStore
from distill_pipeline.outcome import Outcome, Progress
from distill_pipeline.reasoning import opening_of
from distill_pipeline.storage.files import text_of, write_whole
from distill_pipeline.storage.places import Place


def generate_outputs(
    prompt_batches: Iterable[pa.RecordBatch],
    out_dir: Path,
    *,
    teacher_name: str,
    teacher: TeacherSpec,
    model: TeacherModel,
    generations_dir: Place,
    device: str,
    seed: int,
    progress: Progress,
    compute: ComputeSpec = HERE,
    count_accepted: CountAccepted | None = None,
    is_trial: bool = False,
    flush_rows: int = 2048,
    flush_seconds: float | None = None,
) -> Outcome:
    """Write ``part-*.parquet`` (COMPLETION_SCHEMA) with n rows a training prompt, in the pool's order, then by sample.

    With ``accept_target`` a prompt has as many rows as it took to have enough accepted ones, see
    :mod:`distill_pipeline.generation.accepting`.

    Args:
        prompt_batches: the prompt pool; only training prompts of the teacher's domains are answered.
        model: the folder of a model that runs here, or a model that a server has.
        generations_dir: where the answers of all runs are kept; the next run takes from there.
        device: a torch device or ``auto``.
        compute: with ``engine: ray`` a model that runs here runs on the cluster instead; the rows are the same.
        count_accepted: says what is accepted; needed where the budget has an ``accept_target``.
        is_trial: the next run still says which settings differ from those of the run before this one.
        flush_rows, flush_seconds: how much a crash can lose, see :class:`PartWriter`; batches in flight come on top.
    Returns:
        counts with ``expected == stopped + truncated + failed``, of which ``reused`` cost nothing; facts say the family, what
        differs from this teacher's last run, tokens, speed and cost, these by domain too, and what an ``accept_target`` saved.
    Raises:
        ComputeError: a machine of the cluster was lost again and again, or does not fit; what was answered is stored.
        BudgetError: the teacher's budget does not hold what is missing; what it did hold is stored.
        EmptyResultError: the teacher answers no prompt of the pool.
        GenerationError: every single request failed, or a server is dead; the message gives the reason.
        StorageError: the store of answers cannot be read or written.
    """
    engine = open_engine(teacher_name, teacher, model, device=device, seed=seed, progress=progress, compute=compute)
    store = _families(
        teacher, model, engine, generations_dir, device=device, seed=seed, compute=compute, flush_rows=flush_rows,
        flush_seconds=flush_seconds,
    )  # fmt: skip
    with spooled(prompt_batches, teacher.domains, out_dir) as (spool, num_prompts, domains):
        if num_prompts == 0:
            raise EmptyResultError(
                f"teacher {teacher_name} answers the domains {', '.join(teacher.domains)}, and no training prompt is in them; "
                f"the pool's training prompts are in: {', '.join(sorted(domains)) or 'none'}. Mend "
                f"teachers.{teacher_name}.domains, or the domain of a source."
            )
        target, changed = teacher.accept_target, _changed_settings(generations_dir, teacher_name, store.settings)
        run = AnsweringRun(
            teacher_name, teacher.sampling.n, store, engine, Spending(teacher.budget, before=store.paid),
            num_prompts * teacher.sampling.n if target is None else 0, progress, _opening_tag(model, teacher),
        )  # fmt: skip
        facts: dict[str, Any] = {"settings_changed": changed}
        if target is None:
            run.missing = sum(len(asked.keys) for window in windows(prompts_in(spool)) for asked in run.missing_of(window))
            _announce(run, changed)
            run.answer(windows(prompts_in(spool)), out_dir)
        else:
            assert count_accepted is not None, "accept_target needs somebody who says what is accepted"
            rounds = AcceptRounds(run, spool, num_prompts, target, count_accepted)
            rounds.answer(out_dir, lambda: _announce(run, changed))
            facts["accept_target"] = rounds.facts()
    counts = run.final_counts(num_prompts)
    if not is_trial:
        write_whole(_last_settings_file(generations_dir, teacher_name), json.dumps(store.settings))
    return Outcome(counts, run.facts() | store.facts() | facts)


def missing_requests(
    prompts: Iterable[Mapping[str, Any]],
    *,
    teacher: TeacherSpec,
    model: TeacherModel,
    generations_dir: Place,
    device: str,
    seed: int,
    compute: ComputeSpec = HERE,
) -> int:
    """How many completions of these prompts (``prompt_id``, ``domain``) :func:`generate_outputs` would ask for, with
    ``accept_target`` at most; writes nothing."""
    engine = open_engine("", teacher, model, device=device, seed=seed, compute=compute)
    store = _families(teacher, model, engine, generations_dir, device=device, seed=seed, compute=compute)
    keys = [key for prompt in prompts for key in store.keys_of(prompt, range(teacher.most_samples))]
    return len(keys) - int(store.has(keys).sum())


def settings_changes(
    teacher_name: str, *, teacher: TeacherSpec, model: TeacherModel, generations_dir: Place, device: str, seed: int,
    compute: ComputeSpec = HERE,
) -> str:  # fmt: skip
    """Settings that differ from this teacher's last finished run here (``temperature 0.8 -> 0.5``); empty where none do."""
    engine = open_engine("", teacher, model, device=device, seed=seed, compute=compute)
    store = _families(teacher, model, engine, generations_dir, device=device, seed=seed, compute=compute)
    return _changes_text(_changed_settings(generations_dir, teacher_name, store.settings))


def _families(
    teacher: TeacherSpec, model: TeacherModel, engine: Engine, generations_dir: Place, *, device: str, seed: int,
    compute: ComputeSpec = HERE, **flush: Any,
) -> Families:  # fmt: skip
    """Where a teacher's answers are. Raises ConfigError for a chat template that takes no system prompt where one is set."""

    def settings_under(system: str | None) -> dict[str, Any]:
        if len(teacher.system_prompts.distinct()) == 1:
            return engine.settings
        told = teacher.model_copy(update={"system": system, "systems": {}, "chain_of_thought": False})
        return open_engine("", told, model, device=device, seed=seed, compute=compute).settings

    def open_store(family: str, settings: dict[str, Any]) -> GenerationStore:
        return GenerationStore(generations_dir, family, settings, max_tokens=teacher.sampling.max_tokens, **flush)

    return Families(teacher.system_prompts, settings_under, open_store)


def _opening_tag(model: TeacherModel, teacher: TeacherSpec) -> str:
    """What :func:`opening_of` says of a model that is here; nobody can look at a server's template."""
    if isinstance(model, ServedModel):
        return ""
    from distill_pipeline.models.load import load_tokenizer
    from distill_pipeline.rendering import ChatRenderer

    tokenizer = load_tokenizer(model.path, trust_remote_code=teacher.trust_remote_code)
    return opening_of(ChatRenderer(tokenizer, system=teacher.system_prompts.default))


def _last_settings_file(generations_dir: Place, teacher_name: str) -> Place:
    return generations_dir / "last" / f"{teacher_name}.json"


def _changed_settings(generations_dir: Place, teacher_name: str, settings: dict[str, Any]) -> dict[str, list[Any]]:
    """Settings that differ from this teacher's last finished run here: name, then old and new value."""
    text = text_of(_last_settings_file(generations_dir, teacher_name))
    if text is None:
        return {}
    last = json.loads(text)
    return {name: [last.get(name), value] for name, value in settings.items() if last.get(name) != value}


def _announce(run: AnsweringRun, changed: dict[str, list[Any]]) -> None:
    if changed:
        run.progress(
            f"{run.teacher_name}: other settings than in its last run ({_changes_text(changed)}), so its earlier answers do "
            f"not serve; {run.missing:,} of {run.expected:,} completions are made anew"
        )
    else:
        stored = run.expected - run.missing
        run.progress(f"{run.teacher_name}: {stored:,} of {run.expected:,} completions are stored, {run.missing:,} to make")


def _changes_text(changed: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(f"{name} {_brief(old)} -> {_brief(new)}" for name, (old, new) in changed.items())


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
