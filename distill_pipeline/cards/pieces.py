"""What both cards are made of. Everything that comes from outside is escaped: it stays one value, or one cell of text.

A card holds no times and no costs: equal work leaves equal cards. It does not count for its artifact's version.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from distill_pipeline.licenses import known_terms, normal_key
from distill_pipeline.report.text import UNKNOWN, markdown_text, one_line

CARD = "README.md"
"""Its name in an artifact's folder, where the Hub and its tools look for it."""

_VALUE_CHARS = 400
_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")

Facts = Mapping[str, Any]
"""A teacher's facts in a manifest: who it is and what :func:`distill_pipeline.licenses.check_license` said."""


def front_matter(fields: Mapping[str, Any]) -> str:
    """The metadata of a card as YAML between two lines of dashes; empty fields are left out."""
    kept = {name: _plain(value) for name, value in fields.items() if value not in (None, "", [], {})}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=4096)}---\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return one_line(value, _VALUE_CHARS) if isinstance(value, str) else value


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table of values from anywhere."""
    lines = [[cell_text(cell) for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell_text(value: Any) -> str:
    """A value as one cell: numbers with separators, settings as JSON, nothing as a dash."""
    if value is None or value == "":
        return UNKNOWN
    if isinstance(value, Mapping | list | tuple):
        value = json.dumps(value, ensure_ascii=False, sort_keys=True)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return markdown_text(value, _VALUE_CHARS)


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that are off."""
    return {name: value for name, value in settings.items() if value not in (None, False, [], (), {}, "")}


def teachers_section(teachers: Sequence[Facts]) -> str:
    """Who answered, under which terms, what follows from them, and what was accepted with which reason."""
    rows = [
        [facts.get("name"), facts.get("model"), facts.get("revision"), facts.get("engine"), facts.get("license") or "unknown",
         facts.get("verdict"), facts.get("license_from")]
        for facts in teachers
    ]  # fmt: skip
    parts = [
        "## Teachers and their terms",
        table(["teacher", "model", "revision", "engine", "licence", "outputs", "from"], rows),
    ]
    parts += [
        f"- {cell_text(facts['name'])}: {markdown_text(facts['clause'], 1200)}" for facts in teachers if facts.get("clause")
    ]
    duties = unique(duty for facts in teachers for duty in facts.get("obligations", ()))
    parts += ["### Obligations", "\n".join(f"- {cell_text(duty)}" for duty in duties) or "None."]
    accepted = [facts for facts in teachers if facts.get("accepted_because")]
    if accepted:
        parts.append("### Accepted with a reason")
        parts += [
            f"- The terms of {cell_text(facts['name'])} ({cell_text(facts.get('license') or 'unknown')}, "
            f"{cell_text(facts.get('verdict'))}) were accepted because: {markdown_text(facts['accepted_because'], 1200)}"
            for facts in accepted
        ]
    dates = ", ".join(unique(str(facts["table_date"]) for facts in teachers if facts.get("table_date")))
    parts.append(f"The terms are plain readings from the pipeline's table of {cell_text(dates)}, and no legal advice.")
    return "\n\n".join(parts)


def notices(teachers: Sequence[Facts]) -> str:
    """What the teachers' licences want shown, and the limit to non-commercial use."""
    lines = [f"**{markdown_text(text, 600)}**" for text in unique(n for facts in teachers for n in facts.get("notices", ()))]
    if any(facts.get("non_commercial") for facts in teachers):
        lines.append("**For non-commercial use only.**")
    return "\n\n".join(lines)


def license_fields(keys: Iterable[str | None]) -> dict[str, str]:
    """The Hub's ``license`` (and ``license_name`` where it knows none) of something that all these licences apply to."""
    found = unique(key or "unknown" for key in keys)
    if len(found) == 1 and (terms := known_terms(found[0])) is not None and terms.on_hub:
        return {"license": terms.key}
    name = "-and-".join(sorted(re.sub(r"[^a-z0-9.+]+", "-", normal_key(key)).strip("-") for key in found))
    return {"license": "other", "license_name": name or "not-chosen"}


def prompt_sources(pool_spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(path, licence) of each source of a prompt pool's spec."""
    sources = pool_spec.get("prompt_pool", {}).get("sources", [])
    return [(str(source["path"]), str(source["license"])) for source in sources]


def hub_datasets(sources: Iterable[tuple[str, str]]) -> list[str]:
    """The Hub's data sets among prompt sources."""
    return unique(match[1] for path, _ in sources if (match := _DATASET.match(path)))


def unique(values: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(values))
