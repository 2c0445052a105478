"""What a teacher and its filters will need and give: counted from the generation store, measured by a dry run.

A teacher behind a server, or one whose answers a served model judges, costs money: it is asked only where the caller says so,
and never past its budget. Without that the plan gives upper bounds and says what is unknown.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distill_pipeline.dry_run import TeacherProbe, asks_servers, dry_run, mean_a_prompt
from distill_pipeline.errors import BudgetError
from distill_pipeline.generation.budget import Usage
from distill_pipeline.generation.spec import TeacherSpec
from distill_pipeline.plan_lines import PlanLine
from distill_pipeline.work import Work

ROW_OVERHEAD_BYTES = 300
"""Ids, counts and keys of a stored completion beside its text, compressed."""
BYTES_A_TOKEN = 4.5

_HOW = "--dry-run-served asks it for a few prompts"


def plan_teacher(
    work: Work, prompts: Sequence[dict[str, Any]], *, probe: bool, dry_run_served: bool, waits_for_correction: bool = False
) -> tuple[list[PlanLine], TeacherProbe | None]:
    """A line for the teacher's outputs and one for each of its filtered sets, and what the dry run found.

    Args:
        prompts: the training prompts that the teacher answers.
        probe: answer a few of them; without it nothing is loaded and no server is asked.
        dry_run_served: ask servers too.
        waits_for_correction: the teacher of ``work`` is the one before its correction, whose answers will not serve.
    """
    teacher = work.experiment.teachers[work.teacher_name]
    if not prompts:
        return [PlanLine(work.node.name, 0, 0, 0, None, "no training prompt is in its domains")], None
    if not probe and teacher.server is None:
        line = _at_most(work, teacher, len(prompts) * teacher.most_samples, "tokens at most; stored answers not looked up")
        return [line, *_filter_lines(work, prompts, None)], None
    missing, note = _missing(work, prompts, teacher, waits_for_correction)
    found: TeacherProbe | None = None
    unknown = f"; lengths, time and yield unknown: {_HOW}"
    if probe and (teacher.server is None or dry_run_served):
        work.teacher_terms(work.teacher_name)
        try:
            found = dry_run(work, prompts, with_scores=dry_run_served or not asks_servers(work))
        except BudgetError as err:
            unknown = f"; the dry run ended early: {err}"
    if found is None:
        line = _at_most(work, teacher, missing, f"{note}; tokens at most{unknown}")
    else:
        line = _measured(work, teacher, prompts, missing, note, found)
    return [line, *_filter_lines(work, prompts, found)], found


def _missing(work: Work, prompts: Sequence[dict[str, Any]], teacher: TeacherSpec, waits: bool) -> tuple[int, str]:
    """Requests that the teacher may still be sent, and what is stored, or why it does not serve any more."""
    from distill_pipeline.generation.stage import missing_requests, settings_changes

    most = len(prompts) * teacher.most_samples
    if waits:
        return most, f"its correction is not made yet: 0 of {most:,} stored, {most:,} made anew; measured as it is before"
    how: dict[str, Any] = {
        "teacher": teacher, "model": work.answering_model(work.teacher_name), "device": work.teacher_device,
        "generations_dir": work.store.shared_folder("generations"), "seed": work.experiment.seed,
        "compute": work.experiment.compute,
    }  # fmt: skip
    missing = missing_requests(prompts, **how)
    changes = settings_changes(work.teacher_name, **how)
    note = f"{most - missing:,} of {most:,} stored"
    return missing, f"other settings than in its last run ({changes}): {note}, {missing:,} made anew" if changes else note


def _at_most(work: Work, teacher: TeacherSpec, rows: int, note: str) -> PlanLine:
    """The line of a teacher of whom nothing was measured."""
    tokens = rows * teacher.sampling.max_tokens
    usd = None
    if teacher.budget is not None and teacher.budget.has_prices:
        usd = Usage(completion_tokens=tokens).usd(teacher.budget)
        note += f", {usd:,.2f} USD for them at most, prompts not counted"
    return PlanLine(work.node.name, rows, tokens, int(tokens * BYTES_A_TOKEN), None, note, usd)


def _measured(
    work: Work, teacher: TeacherSpec, prompts: Sequence[dict[str, Any]], missing: int, note: str, found: TeacherProbe
) -> PlanLine:
    """The line of a teacher from its dry run. With ``accept_target`` the number of its completions is an estimate too."""
    rows, interval = missing, None
    if teacher.accept_target is not None and found.accepted:
        stored = len(prompts) * teacher.most_samples - missing
        samples = mean_a_prompt(found.samples, teacher.most_samples)
        rows, low, high = (
            max(0, round(len(prompts) * min(samples[end], teacher.most_samples)) - stored) for end in ("value", "low", "high")
        )
        interval = low, high
        note += f", but {samples['value']:.1f} a prompt are enough in a dry run of {found.num_prompts}"
    tokens = int(rows * found.tokens_per_row)
    note += f"; {found.tokens_per_row:.1f} tokens a completion{_range_of_lengths(teacher, found)}"
    size = int(rows * (found.tokens_per_row * BYTES_A_TOKEN + ROW_OVERHEAD_BYTES))
    usd = None
    if teacher.budget is not None and teacher.budget.has_prices:
        requests = -(-rows // teacher.sampling.n)
        usd = Usage(int(requests * found.prompt_tokens), tokens).usd(teacher.budget)
    seconds = None if found.rows_per_second is None else rows / found.rows_per_second
    if teacher.server is not None and seconds is not None:
        note += f"; time as with {found.num_prompts} prompts at once"
    return PlanLine(work.node.name, rows, tokens, size, seconds, note, usd, interval)


def _range_of_lengths(teacher: TeacherSpec, found: TeacherProbe) -> str:
    """How far the mean length may be off."""
    ends = mean_a_prompt(found.lengths, teacher.sampling.max_tokens)
    return "" if ends["low"] is None else f" ({ends['low']:.1f} to {ends['high']:.1f})"


def _filter_lines(work: Work, prompts: Sequence[dict[str, Any]], found: TeacherProbe | None) -> list[PlanLine]:
    """How many completions each filter accepts: expected with its interval, or at most."""
    return [_filter_line(work, name, prompts, found) for name in work.experiment.filters]


def _filter_line(work: Work, name: str, prompts: Sequence[dict[str, Any]], found: TeacherProbe | None) -> PlanLine:
    most = most_a_prompt(work.experiment.teachers[work.teacher_name], work.experiment.filters[name].rules())
    line = PlanLine(f"filtered_set/{work.teacher_name}/{name}", len(prompts) * most, 0, 0, None, "at most; yield unknown")
    if found is None or name not in found.accepted:
        return line
    values = found.accepted[name]
    mean = mean_a_prompt(values, most)
    share = f"{sum(values):,} of {sum(found.samples):,} accepted in a dry run of {len(values)} prompts"
    if mean["low"] is None:
        return replace(line, rows=round(len(prompts) * mean["value"]), note=share)
    rows, low, high = (round(len(prompts) * mean[end]) for end in ("value", "low", "high"))
    return replace(line, rows=rows, interval=(low, high), note=f"{mean['value']:.2f} a prompt: {share}")


def most_a_prompt(teacher: TeacherSpec, rules: Any) -> int:
    """Completions a prompt that a filter of these rules keeps at most."""
    n = teacher.most_samples
    return max(min(n, rule.most_per_prompt or n) for rule in rules)
