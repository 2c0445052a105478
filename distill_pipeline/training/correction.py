"""Correct a teacher: a short ``sft`` of its own weights on gold answers, before it answers anything.

A prompt's reference is the assistant's whole answer, under the teacher's system prompt of that domain, and ends as an answer
that was finished; where the chat template opens a thought, the answer closes it first. Held-out prompts, other teachers'
domains and prompts without a reference train nothing and are counted. The trainer is the students': checkpoints, curve,
precision and adapters are theirs.

Decided: the model keeps the dtype that its configuration names, while its files hold float32: it runs elsewhere in what the
original ran in, and a small learning rate is not lost to rounding. Given up: reasoning before the answer.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill_pipeline.errors import TrainingError
from distill_pipeline.learning import CorrectionSpec, FittingSpec, LearningSpec
from distill_pipeline.models.load import load_tokenizer
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.outcome import Outcome, Progress
from distill_pipeline.reasoning import THINK_TAGS, opening_of
from distill_pipeline.records import TRAINING_SCHEMA
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.system_prompts import SystemPrompts
from distill_pipeline.training.parallel import ALONE, Processes
from distill_pipeline.training.reading import rows_under_prompts
from distill_pipeline.training.spec import StudentSpec
from distill_pipeline.training.stage import train_student

NOT_USED = ("held_out", "other_domain", "without_reference")
"""Counts of prompts that train nothing, in the order in which the reasons are looked for."""


def correct_teacher(
    prompt_batches: Iterable[pa.RecordBatch],
    out_dir: Path,
    work_dir: Path,
    *,
    name: str,
    correction: CorrectionSpec,
    model: ModelFolder,
    answers: Callable[[str], bool],
    prompts: SystemPrompts,
    device: str,
    seed: int,
    progress: Progress,
    processes: Processes = ALONE,
) -> Outcome:
    """Train a teacher on its references and write it to ``out_dir``, as :func:`train_student` writes a student.

    Args:
        prompt_batches: the prompt pool (PROMPT_SCHEMA).
        work_dir: keeps checkpoints between runs.
        name: the teacher's, for messages.
        model: the teacher as it is.
        answers: whether it answers the prompts of a domain.
        prompts: its system prompts.
        processes: see :func:`train_student`.
    Returns:
        counts with ``prompts == used + too_long + no_tokens + held_out + other_domain + without_reference``; facts as a
        student's, of which ``untrained_loss`` and ``final_loss`` say what the correction bought.
    Raises:
        TrainingError: no prompt has a reference to train on; or what :func:`train_student` raises.
    """
    counts = dict.fromkeys(("prompts", "used", "too_long", "no_tokens", *NOT_USED), 0)
    rows = reference_rows(prompt_batches, counts, correction, model, answers, prompts)
    first = next(rows, None)
    if first is None:
        told = ", ".join(f"{counts[reason]:,} are {reason.replace('_', ' ')}" for reason in NOT_USED)
        raise TrainingError(
            f"the correction of teacher {name} has nothing to train on: of {counts['prompts']:,} prompts {told}. Give "
            "prompts of its domains a reference, or leave correction out."
        )
    system, rows = rows_under_prompts([(chain([first], rows), prompts)])
    recipe = recipe_of(name, correction, model.reference)
    outcome = train_student(
        rows, out_dir, work_dir, student=recipe, teacher=None, init_model=model, system=system, device=device, seed=seed,
        progress=progress, processes=processes,
    )  # fmt: skip
    if processes.is_first:
        _keep_dtype(model.path, out_dir)
    found = outcome.counts
    counts |= {key: found[key] for key in ("too_long", "no_tokens", "data_tokens", "steps", "trained_tokens")}
    return Outcome(counts | {"used": found["trained_completions"]}, outcome.facts)


def recipe_of(name: str, correction: CorrectionSpec, model: str) -> StudentSpec:
    """A teacher's correction as the recipe of a student that begins as the teacher, a model of this reference."""
    document = correction.document()
    stage = {field: value for field, value in document.items() if field in LearningSpec.model_fields}
    fitting = {field: value for field, value in document.items() if field in FittingSpec.model_fields}
    recipe = {"data": [f"{name}/references"], "init": {"model": model}, "stages": [{"method": "sft", **stage}]}
    return StudentSpec.model_validate(recipe | fitting)


def reference_rows(
    prompt_batches: Iterable[pa.RecordBatch], counts: dict[str, int], correction: CorrectionSpec, model: ModelFolder,
    answers: Callable[[str], bool], prompts: SystemPrompts,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """The references as training rows (TRAINING_SCHEMA); prompts, and those that are left out, are added to ``counts``."""
    opened = opening_of(ChatRenderer(load_tokenizer(model.path), system=prompts.default))
    before = f"{THINK_TAGS[opened]}\n\n" if opened else ""
    for batch in prompt_batches:
        rows = []
        for prompt in batch.to_pylist():
            counts["prompts"] += 1
            reason = _unused(prompt, answers)
            if reason is not None:
                counts[reason] += 1
                continue
            answer = before + gold_answer(prompt["reference"], alternatives=correction.alternatives)
            completion = {"completion_id": prompt["prompt_id"], "raw_text": answer, "finish_reason": "stop"}
            kept = {key: prompt[key] for key in ("prompt_id", "messages", "reference", "domain")}
            rows.append(kept | {"completions": [completion]})
        if rows:
            yield pa.RecordBatch.from_pylist(rows, schema=TRAINING_SCHEMA)


def gold_answer(reference: str, *, alternatives: bool) -> str:
    """What a reference teaches.

    >>> gold_answer("cacti|cactuses", alternatives=True)
    'cacti'
    >>> gold_answer("|x| < 2", alternatives=False)
    '|x| < 2'
    """
    parts = [part.strip() for part in reference.split("|")] if alternatives else [reference]
    return next(filter(None, parts), reference)


def _unused(prompt: dict[str, Any], answers: Callable[[str], bool]) -> str | None:
    """Why a prompt does not train, as one of NOT_USED."""
    if prompt["split"] != "train":
        return "held_out"
    if not answers(prompt["domain"]):
        return "other_domain"
    return None if (prompt["reference"] or "").strip() else "without_reference"


def _keep_dtype(original: Path, corrected: Path) -> None:
    """Have a corrected model's configuration name the dtype that the original's does."""
    config, before = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (corrected, original))
    dtype = before.get("dtype") or before.get("torch_dtype")
    if dtype is not None:
        (corrected / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2), encoding="utf-8")
