"""A filtered set's data card: what lies in it, whose outputs they are, under which terms, and what was left out and why."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_pipeline.cards.pieces import (
    CARD,
    Facts,
    cell_text,
    front_matter,
    hub_datasets,
    license_fields,
    notices,
    prompt_sources,
    table,
    teachers_section,
)

_FILES = {
    "training": ("train-*.parquet", "one row a prompt that keeps completions: its messages, and the accepted completions"),
    "verdicts": ("part-*.parquet", "every completion with its scores, accepted or rejected, and the reasons"),
    "passes": ("passes-*.parquet", "how often the teacher was right on each prompt"),
}


def write_data_card(
    out_dir: Path,
    *,
    experiment: str,
    name: str,
    teacher: Facts,
    rules: Mapping[str, Any],
    pool_spec: Mapping[str, Any],
    counts: Mapping[str, int],
) -> None:
    """Write ``README.md`` into a filtered set's folder.

    Args:
        name: ``teacher/filter``.
        teacher: its facts, with those of its licence.
        rules: the filter's part of the experiment, by domain.
        pool_spec: the prompt pool's part of the experiment.
        counts: what filtering counted.
    """
    sources = prompt_sources(pool_spec)
    terms = [teacher["license"]] if teacher.get("verdict") != "allowed" else []
    fields = license_fields([*(key for _, key in sources), *terms]) | {
        "pretty_name": f"{experiment}: {name}", "task_categories": ["text-generation"],
        "tags": ["distillation", "synthetic", "distill-pipeline"], "source_datasets": hub_datasets(sources),
        "configs": [
            {"config_name": config, "data_files": pattern} | ({"default": True} if config == "training" else {})
            for config, (pattern, _) in _FILES.items()
        ],
    }  # fmt: skip
    reasons = sorted(
        ((number, reason.removeprefix("rejected_")) for reason, number in counts.items() if reason.startswith("rejected_")),
        key=lambda pair: (-pair[0], pair[1]),
    )
    told = [["accepted", counts["accepted"]], ["failed", counts["failed"]]]
    told += [[f"rejected: {reason}", number] for number, reason in reasons if number]
    parts = [
        f"# {cell_text(experiment)}: {cell_text(name)}",
        notices([teacher]),
        f"{counts['completions']:,} completions of {counts['prompts']:,} prompts by {cell_text(teacher['model'])}, of which "
        f"{counts['accepted']:,} were accepted, made by distill-pipeline. The completions are a model's, not people's.",
        "## Files\n\n" + table(["configuration", "files", "rows"], [[name, *said] for name, said in _FILES.items()]),
        "## What became of the completions\n\n" + table(["", "completions"], told),
        "## The filter\n\n" + table(["domain", "rules"], list(rules.items())),
        "## Prompts\n\n" + table(["from", "licence"], sources),
        teachers_section([teacher]),
    ]
    (out_dir / CARD).write_text("\n\n".join([front_matter(fields), *filter(None, parts)]) + "\n", encoding="utf-8")
