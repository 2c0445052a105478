"""What Dagster's pages show of an artifact: counts, costs, sample rows, curves and lineage.

Text from models and prompts is shown in table cells, which the UI does not interpret, or escaped. Counts are plain numbers,
so that the UI plots them over the materialisations of an asset.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import dagster as dg

from distill_pipeline.hashing import VERSION_CHARS, canonical_json
from distill_pipeline.report.text import markdown_text, visible_text

if TYPE_CHECKING:
    from distill_pipeline.storage.artifacts import Artifact

SAMPLE_ROWS = 8
MAX_REASON_SAMPLES = 60
MAX_DOMAIN_ROWS = 24
CELL_CHARS = 300
FACT_CHARS = 20_000
"""Metadata lies in every event of Dagster's history: a fact of more characters as JSON is not copied there."""

Metadata = dict[str, Any]


def artifact_metadata(artifact: "Artifact") -> Metadata:
    """What is known of every artifact: where it is, what it counted, what it cost, and where it comes from."""
    manifest = artifact.manifest
    rows = [entry.rows for entry in manifest.files if entry.rows is not None and entry.path.startswith("part-")]
    return {
        "reused": dg.MetadataValue.bool(artifact.reused),
        "version": artifact.version,
        "dagster/uri": artifact.uri,
        **({"dagster/row_count": sum(rows)} if rows else {}),
        **{f"count_{name}": number for name, number in manifest.counts.items()},
        "wall_seconds": manifest.made.wall_seconds,
        "lineage": dg.MetadataValue.md(lineage_markdown(artifact)),
        "manifest": dg.MetadataValue.path(f"{artifact.uri}/manifest.json"),
    }


def news(artifact: "Artifact") -> str:
    """What the run did for the artifact, in a few words."""
    return "nothing to do: the manifest matches" if artifact.reused else f"made in {artifact.manifest.made.wall_seconds:.1f} s"


def prompt_pool_metadata(artifact: "Artifact") -> Metadata:
    """Prompts by domain and split, and a few of them."""
    rows = (
        {
            "domain": row["domain"],
            "split": row["split"],
            "prompt": row["messages"][-1]["content"],
            "reference": row["reference"],
            "licence": row["license"],
        }
        for row in artifact.rows()
    )
    return {"sample_prompts": sample_table(rows), **facts_metadata(artifact)}


def teacher_outputs_metadata(artifact: "Artifact") -> Metadata:
    """Who answered, under which terms, how much, tokens and dollars of the largest domains, and a few answers."""
    columns = ["finish_reason", "completion_tokens", "answer"]
    domains = artifact.manifest.facts.get("domains") or {}
    largest = sorted(domains.items(), key=lambda item: (-item[1]["completions"], item[0]))
    return {
        "tokens_by_domain": sample_table(({"domain": name, **found} for name, found in largest), MAX_DOMAIN_ROWS),
        "sample_completions": sample_table(artifact.rows(columns)), **facts_metadata(artifact),
    }  # fmt: skip


def scored_outputs_metadata(artifact: "Artifact") -> Metadata:
    """How the scores are spread, and a few of them."""
    return {"sample_scores": sample_table(artifact.rows(["scorer", "score", "detail"])), **facts_metadata(artifact)}


def filtered_set_metadata(artifact: "Artifact") -> Metadata:
    """The funnel as tables and picture, the yield and pass rates, and a few completions of either kind and of each reason."""
    from distill_pipeline.report.charts import funnel_png
    from distill_pipeline.report.funnel import filter_facts, pass_rows, sample_rows
    from distill_pipeline.report.markdown import funnel_markdown

    counts, facts = artifact.manifest.counts, filter_facts(artifact.manifest.facts)
    kept, dropped = counts.get("accepted", 0), counts.get("rejected", 0)
    columns = ["accepted", "reject_reason", "answer"]
    return {
        **({"yield_frac": kept / (kept + dropped)} if kept + dropped else {}),
        **{name.replace("@", "_at_"): mean for name, mean, _ in pass_rows(facts)},
        "funnel": dg.MetadataValue.md(funnel_markdown(facts)),
        "funnel_chart": picture("stages, reasons and accepted completions a prompt", funnel_png(facts)),
        "sample_accepted": sample_table(row for row in artifact.rows(columns) if row["accepted"]),
        "samples_by_reason": sample_table(sample_rows(facts), MAX_REASON_SAMPLES),
        **facts_metadata(artifact),
    }


def teacher_signals_metadata(artifact: "Artifact") -> Metadata:
    """Bytes a token, how much of the teacher the stored tokens hold, and what the files say of themselves."""
    facts = artifact.manifest.facts
    numbers = {
        f"{name}_{key}".replace(".", "_").replace("-", "_"): float(value)
        for name in ("bytes_a_token", "kept_mass_by_temperature", "distinct_draws_by_temperature")
        for key, value in facts.get(name, {}).items()
    }
    return {**numbers, **facts_metadata(artifact)}


def trained_model_metadata(artifact: "Artifact") -> Metadata:
    """First weights, size, speed, and the training curve as a picture."""
    from distill_pipeline.report.charts import loss_curve_png

    curve = list(artifact.rows(prefix="curve"))
    final_loss = artifact.manifest.facts.get("final_loss")
    return {
        "training_curve": picture("loss by step", loss_curve_png(curve)),
        **({"final_loss": float(final_loss)} if final_loss is not None else {}),
        **facts_metadata(artifact),
    }


def eval_report_metadata(artifact: "Artifact") -> Metadata:
    """The report beside its baselines with a few answers, the headline as numbers to plot, and where the page is."""
    from distill_pipeline.report.charts import accuracy_png
    from distill_pipeline.report.markdown import student_markdown

    report = artifact.read_json("report.json")
    models = report["headline"]["models"]
    values = {"student_score": models["student"]["value"], "gap_recovered": report["gap_recovered"]["value"]}
    return {
        "report": dg.MetadataValue.md(student_markdown(report)),
        "chart": picture("headline by model", accuracy_png(report)),
        **{name: float(value) for name, value in values.items() if value is not None},
        "page": dg.MetadataValue.path(f"{artifact.uri}/report.html"),
    }


def comparison_metadata(artifact: "Artifact") -> Metadata:
    """The leaderboard, what each change bought, and where the page is."""
    from distill_pipeline.report.markdown import comparison_markdown

    return {
        "leaderboard": dg.MetadataValue.md(comparison_markdown(artifact.read_json("leaderboard.json"))),
        "page": dg.MetadataValue.path(f"{artifact.uri}/comparison.html"),
    }


def picture(alternative: str, png: bytes) -> dg.MarkdownMetadataValue:
    """A small picture that travels inside the event."""
    return dg.MetadataValue.md(f"![{alternative}](data:image/png;base64,{base64.b64encode(png).decode('ascii')})")


def facts_metadata(artifact: "Artifact") -> Metadata:
    """The stage's own facts as one JSON tree, which the UI folds and does not interpret; long ones stay in the manifest."""
    facts = artifact.manifest.facts
    shown = {
        name: fact if len(canonical_json(fact)) <= FACT_CHARS else "long: see the manifest" for name, fact in facts.items()
    }
    return {"facts": dg.MetadataValue.json(shown)} if facts else {}


def sample_table(rows: Iterable[Mapping[str, Any]], most: int = SAMPLE_ROWS) -> dg.TableMetadataValue:
    """The first few rows as a table of short cells."""
    records = [dg.TableRecord({column: cell(value) for column, value in row.items()}) for row in islice(rows, most)]
    names = list(records[0].data) if records else ["no rows"]
    return dg.MetadataValue.table(records, schema=dg.TableSchema([dg.TableColumn(name, "string") for name in names]))


def cell(value: Any) -> str | int | float | bool:
    """A value as a table cell: numbers as they are, text with every character visible and cut, nothing for a null."""
    if isinstance(value, bool | int | float):
        return value
    return "" if value is None else visible_text(value, CELL_CHARS)


def lineage_markdown(artifact: "Artifact") -> str:
    """Everything the artifact was made from, nearest first, as a table."""
    lines = ["| made from | version | counts |", "|---|---|---|"]
    lines += [_lineage_line(a.name, a.version, a.counts) for a in artifact.manifest.lineage]
    externals = {name: version for inputs in _all_inputs(artifact) for name, version in inputs.items() if ":" in name}
    lines += [_lineage_line(name, version, {}) for name, version in sorted(externals.items())]
    return "\n".join(lines) if len(lines) > 2 else "made from nothing that is stored"


def _all_inputs(artifact: "Artifact") -> Iterator[Mapping[str, str]]:
    yield artifact.manifest.made.inputs
    yield from (ancestor.inputs for ancestor in artifact.manifest.lineage)


def _lineage_line(name: str, version: str, counts: Mapping[str, int]) -> str:
    said = ", ".join(f"{count} {number:,}" for count, number in counts.items() if number)
    return f"| {escaped(name)} | {escaped(version[:VERSION_CHARS])} | {escaped(said)} |"


def escaped(value: Any) -> str:
    """Text for markdown that no renderer takes for anything but text."""
    return markdown_text(value, CELL_CHARS)
