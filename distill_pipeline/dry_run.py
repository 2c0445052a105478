"""A dry run: a few evenly spaced prompts through a teacher, the experiment's scorers and its filters, before the whole run.

Decided: what a model here answers is not stored, because in other batches it would answer otherwise by rounding, and a plan
must not change a result. What a server answers was paid for, so it goes into the generation store (verdicts of a served judge
too), and the run that follows takes it from there.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_pipeline.evaluation.statistics import Interval, mean_interval, wilson_interval
from distill_pipeline.generation.served import ServedModel
from distill_pipeline.generation.spec import TeacherSpec
from distill_pipeline.outcome import silent
from distill_pipeline.records import PROMPT_SCHEMA
from distill_pipeline.runners import scoring_context
from distill_pipeline.work import Work, protected_index

DRY_RUN_PROMPTS = 20


@dataclass(frozen=True)
class TeacherProbe:
    """What a teacher did with a few prompts: its speed, lengths, yields, and the rows a training probe can use.

    ``rows_per_second`` is None where everything was stored already. ``samples`` and ``accepted`` (by filter) have a number per
    prompt, ``lengths`` the mean tokens of its completions where it has any; ``accepted`` is empty where nothing was scored.
    """

    rows_per_second: float | None
    tokens_per_row: float
    prompt_tokens: float
    training_rows: list[dict[str, Any]]
    samples: list[int]
    lengths: list[float]
    accepted: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def num_prompts(self) -> int:
        """Prompts of the dry run."""
        return len(self.samples)


def evenly(rows: Sequence[dict[str, Any]], most: int = DRY_RUN_PROMPTS) -> list[dict[str, Any]]:
    """At most so many of the rows, evenly spaced over all of them."""
    number = min(most, len(rows))
    return [rows[place * len(rows) // number] for place in range(number)]


def mean_a_prompt(values: Sequence[float], most: int) -> Interval:
    """The mean with its 95 % interval over prompts, for numbers between 0 and ``most``.

    By bootstrap. Where all prompts have the same number resampling says nothing, so the share of ``most`` has its Wilson
    interval, as if each prompt were one drawing: that is wide enough also where a prompt's completions are all alike.
    """
    shares = [value / most for value in values]
    found = mean_interval(shares)
    if len(set(values)) == 1:
        found["low"], found["high"] = wilson_interval(sum(shares), len(shares))
    return {name: end if name == "n" else end * most for name, end in found.items()}


def asks_servers(work: Work) -> bool:
    """Whether scoring this experiment's answers asks a served model, which costs money."""
    return any(isinstance(model, ServedModel) for model in work.scoring_models().values())


def dry_run(work: Work, prompts: Sequence[dict[str, Any]], *, with_scores: bool) -> TeacherProbe:
    """Have the node's teacher answer a few of the prompts, and judge the answers by every filter.

    Args:
        prompts: rows of the pool (``PROMPT_SCHEMA``) that the teacher answers, at least one.
        with_scores: also score and filter; without it a teacher with ``accept_target`` gives ``n`` completions a prompt.
    Raises:
        BudgetError: the teacher's budget does not hold it; what it did hold is stored.
        GenerationError: no request was answered.
    """
    from distill_pipeline.acceptance import accepted_by_scores
    from distill_pipeline.generation.stage import generate_outputs

    name, experiment, chosen = work.teacher_name, work.experiment, evenly(prompts)
    teacher, model = experiment.teachers[name], work.answering_model(name)
    if not with_scores:
        teacher = _without_target(teacher)
    pool = pa.RecordBatch.from_pylist(chosen, schema=PROMPT_SCHEMA)
    work.progress(f"dry run: {name} answers {len(chosen)} prompts")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        is_paid = with_scores and asks_servers(work)
        context = scoring_context(work, None if is_paid else folder / "kept")
        outcome = generate_outputs(
            [pool], _made(folder / "outputs"), teacher_name=name, teacher=teacher, model=model, device=work.teacher_device,
            generations_dir=work.store.shared_folder("generations") if isinstance(model, ServedModel) else folder / "kept",
            seed=experiment.seed, progress=silent, is_trial=True,
            count_accepted=accepted_by_scores(experiment.scorers, context, experiment.compute),
        )  # fmt: skip
        answers = {key: list(rows) for key, rows in groupby(_rows(folder / "outputs"), key=lambda row: row["prompt_id"])}
        accepted = _judged(work, pool, folder, context) if with_scores else {}
    return _probe_of(chosen, answers, outcome.facts, accepted)


def _probe_of(
    chosen: Sequence[dict[str, Any]], answers: Mapping[str, list[dict[str, Any]]], facts: Mapping[str, Any],
    accepted: Mapping[str, list[int]],
) -> TeacherProbe:  # fmt: skip
    whole = [answers[prompt["prompt_id"]] for prompt in chosen]
    given = [[row for row in rows if row["finish_reason"] != "error"] for rows in whole]
    generated = sum(domain["generated"] for domain in facts["domains"].values())
    return TeacherProbe(
        rows_per_second=generated / max(facts["seconds"], 1e-6) if generated else None,
        tokens_per_row=facts["completion_tokens"] / max(1, sum(map(len, given))),
        prompt_tokens=facts["prompt_tokens"] / len(chosen),
        training_rows=[{**prompt, "completions": rows} for prompt, rows in zip(chosen, given, strict=True) if rows],
        samples=[len(rows) for rows in whole],
        lengths=[sum(row["completion_tokens"] for row in rows) / len(rows) for rows in given if rows],
        accepted=accepted,
    )


def _judged(work: Work, pool: pa.RecordBatch, folder: Path, context: Any) -> dict[str, list[int]]:
    """By filter how many completions of each prompt are accepted."""
    from distill_pipeline.filtering.lengths import ModelTokenCounter
    from distill_pipeline.filtering.stage import filter_outputs
    from distill_pipeline.scoring.stage import score_outputs

    experiment = work.experiment
    score_outputs(
        [pool], _batches(folder / "outputs"), _made(folder / "scores"), scorers=experiment.scorers, context=context,
        compute=experiment.compute,
    )  # fmt: skip
    found = {}
    for name, rule in experiment.filters.items():
        filter_outputs(
            [pool], _batches(folder / "outputs"), _batches(folder / "scores"), _made(folder / name), rule=rule,
            filter_name=f"filtered_set/{work.teacher_name}/{name}", progress=silent,
            protected=protected_index(experiment) if rule.drops("contaminated") else None,
            counters={reference: ModelTokenCounter(work.model(reference).path) for reference in rule.tokenizers()},
        )  # fmt: skip
        rows = groupby(_rows(folder / name), key=lambda row: row["prompt_id"])
        found[name] = [sum(row["accepted"] for row in of_prompt) for _, of_prompt in rows]
    return found


def _without_target(teacher: TeacherSpec) -> TeacherSpec:
    budget = teacher.budget and teacher.budget.model_copy(update={"accept_target": None})
    return teacher.model_copy(update={"budget": budget})


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _batches(folder: Path) -> Iterator[pa.RecordBatch]:
    for part in sorted(folder.glob("part-*.parquet")):
        yield from pq.ParquetFile(part).iter_batches()


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for batch in _batches(folder):
        yield from batch.to_pylist()
