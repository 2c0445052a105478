"""A student's model card: whose outputs made it, under which terms, from which data, and how it was trained."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pipeline.cards.pieces import (
    CARD,
    Facts,
    cell_text,
    front_matter,
    given,
    hub_datasets,
    license_fields,
    notices,
    prompt_sources,
    table,
    teachers_section,
    unique,
)
from distill_pipeline.storage.artifacts import Artifact

if TYPE_CHECKING:
    from distill_pipeline.models.resolve import ModelFolder

_COMMIT = re.compile(r"[0-9a-f]{40}")


def student_name(experiment: str, student: str, teachers: Sequence[Facts]) -> str:
    """What a student is called where it is shown or published: as its teachers' licences ask."""
    prefixes = unique(str(facts["name_prefix"]) for facts in teachers if facts.get("name_prefix"))
    return "-".join([*prefixes, experiment, student])


def write_model_card(
    out_dir: Path,
    *,
    experiment: str,
    student: str,
    init: Mapping[str, Any],
    base: "ModelFolder | None",
    teachers: Sequence[Facts],
    sets: Sequence[Artifact],
    counts: Mapping[str, int],
    facts: Mapping[str, Any],
    seed: int,
) -> None:
    """Write ``README.md`` into a student's folder.

    Args:
        init: the recipe's ``init``.
        base: the model whose weights the student began with; None where they were random.
        teachers: licence facts of every teacher whose outputs it was trained on, the one it imitates first.
        sets: the filtered sets it was trained on.
        counts, facts: what training said.
    """
    pools = [ancestor for data in sets for ancestor in data.manifest.lineage if ancestor.name == "prompt_pool"]
    sources = list(dict.fromkeys(source for pool in pools for source in prompt_sources(pool.spec)))
    name, stages = student_name(experiment, student, teachers), facts["stages"]
    methods = unique(stage["method"] for stage in stages)
    fields = _license(base, init, teachers) | {
        "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": _hub_id(base, teachers),
        "datasets": hub_datasets(sources), "tags": ["distillation", *methods, "distill-pipeline"], "model_name": name,
    }  # fmt: skip
    who = ", ".join(unique(f"{facts['name']} ({facts['model']})" for facts in teachers))
    share = "" if facts["share"] is None else f" ({facts['share']:.0%} of its teacher's)"
    parts = [
        f"# {cell_text(name)}",
        notices(teachers),
        f"A student of {cell_text(who)}, {facts['parameters']:,} parameters{share}, made by "
        f"distill-pipeline: experiment {cell_text(experiment)}, student {cell_text(student)}.",
        teachers_section(teachers),
        _data_section(sets, sources),
        _training_section(init, base, stages, counts, facts, seed),
        "## Where every row came from\n\n`manifest.json` in this folder names every artifact that this one was made from, with "
        "versions and counts. `distill lineage FOLDER` prints the story and checks the files.",
    ]
    (out_dir / CARD).write_text("\n\n".join([front_matter(fields), *filter(None, parts)]) + "\n", encoding="utf-8")


def _license(base: "ModelFolder | None", init: Mapping[str, Any], teachers: Sequence[Facts]) -> dict[str, str]:
    """The licences of the weights it began with and of its teachers; a provider's terms license no weights."""
    keys = [facts["license"] for facts in teachers if facts["license"] != facts.get("provider")]
    return license_fields([*([base.license] if base is not None and init.get("model") else []), *keys])


def _hub_id(base: "ModelFolder | None", teachers: Sequence[Facts]) -> str | None:
    """The reference of a Hub model; other places mean nothing to a reader of the card's metadata."""
    if base is None:
        return None
    corrected = next((facts.get("correction") for facts in teachers if facts.get("identity") == base.identity), None)
    model, revision = (corrected["model"], corrected["revision"]) if corrected else (base.reference, base.revision)
    return model if _COMMIT.fullmatch(revision or "") else None


def _data_section(sets: Sequence[Artifact], sources: Sequence[tuple[str, str]]) -> str:
    rows = [
        [data.name.removeprefix("filtered_set/"), data.version, counts["accepted"], counts["completions"],
         counts["prompts_with_accepted"], _rules(data.manifest.made.spec)]
        for data in sets
        for counts in [data.manifest.counts]
    ]  # fmt: skip
    return "\n\n".join([
        "## Training data",
        table(["teacher/filter", "version", "accepted", "of completions", "prompts", "rules"], rows),
        table(["prompts from", "licence"], sources),
    ])  # fmt: skip


def _rules(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A filter's rules by domain, without those that are off."""
    return {domain: given(rule) for domain, rule in spec.get("filter", {}).items() if isinstance(rule, Mapping)}


def _training_section(
    init: Mapping[str, Any], base: "ModelFolder | None", stages: Sequence[Mapping[str, Any]], counts: Mapping[str, int],
    facts: Mapping[str, Any], seed: int,
) -> str:  # fmt: skip
    told: list[list[Any]] = [
        ["began with", "random weights" if base is None else base.reference],
        ["init", given(init)],
        ["steps", counts["steps"]],
        ["trained tokens", counts["trained_tokens"]],
        ["loss, first and last", f"{facts['initial_loss']:.3f}, {facts['final_loss']:.3f}"],
        ["tokenizer and template of the", facts["tokenizer"]],
        ["precision", facts["dtype"]],
        ["seed", seed],
    ]
    listed = [[number, stage["method"], {k: v for k, v in given(stage).items() if k != "method"}]
              for number, stage in enumerate(stages)]  # fmt: skip
    return "\n\n".join(["## Training", table(["", ""], told), table(["stage", "method", "settings"], listed)])
