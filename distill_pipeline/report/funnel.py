"""What a filter decided, as rows for tables and charts: the funnel by domain, reasons, pass rates, and samples of each reason.

Everything comes from the facts that filtering wrote into its manifest (``funnel``, ``domain_reasons``, ``pass_at``,
``accepted_per_prompt``, ``samples``); a set made before they were written has none of them, and gives empty tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distill_pipeline.records import FUNNEL
from distill_pipeline.report.text import number, percent

FACTS = ("funnel", "domain_reasons", "pass_at", "accepted_per_prompt", "samples")
EVERY_DOMAIN = "all domains"
MAX_DOMAINS = 24
"""Domains with a line of their own, the largest first; the others are one line."""


def filter_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of a filtered set's facts those that are shown."""
    return {name: facts.get(name) or {} for name in FACTS}


def totals(facts: Mapping[str, Any]) -> dict[str, int]:
    """The funnel over all domains."""
    return _summed(facts["funnel"].values())


def largest_domains(facts: Mapping[str, Any], most: int) -> tuple[list[tuple[str, dict[str, int]]], int, dict[str, int]]:
    """The funnels of the largest domains, at most so many; how many others there are, and theirs together."""
    domains = sorted(facts["funnel"].items(), key=lambda item: (-item[1]["completions"], item[0]))
    rest = [found for _, found in domains[most:]]
    return domains[:most], len(rest), _summed(rest)


def _summed(funnels: Iterable[Mapping[str, int]]) -> dict[str, int]:
    funnels = list(funnels)
    return {stage: sum(found[stage] for found in funnels) for stage in FUNNEL}


def funnel_rows(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The funnel's stages by domain, largest first, and of all domains where there are several; with the share accepted."""
    domains, num_others, others = largest_domains(facts, MAX_DOMAINS)
    rows: list[dict[str, Any]] = [{"domain": domain, **found} for domain, found in domains]
    if num_others:
        rows.append({"domain": f"{num_others} other domains", **others})
    if len(facts["funnel"]) > 1:
        rows.append({"domain": EVERY_DOMAIN, **totals(facts)})
    return [{**row, "accepted_frac": row["accepted"] / row["completions"] if row["completions"] else None} for row in rows]


def reason_rows(facts: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[int]]]]:
    """The domains in order, and for each reason the completions it took as the first one: of all domains, and of each."""
    by_domain = facts["domain_reasons"]
    domains = sorted(by_domain, key=lambda domain: (-sum(by_domain[domain].values()), domain))[:MAX_DOMAINS]
    taken: dict[str, int] = {}
    for found in by_domain.values():
        for reason, count in found.items():
            taken[reason] = taken.get(reason, 0) + count
    ordered = sorted(taken.items(), key=lambda item: (-item[1], item[0]))
    return domains, [(reason, [count, *(by_domain[d].get(reason, 0) for d in domains)]) for reason, count in ordered]


def pass_rows(facts: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """(pass@k, its mean, prompts with k samples and more), by k."""
    return [(f"pass@{k}", found["mean"], found["prompts"]) for k, found in sorted(_by_number(facts["pass_at"]))]


def pass_text(facts: Mapping[str, Any]) -> str:
    """``pass@1 58.3 %, pass@2 70.1 %``, or that no prompt has known scores."""
    said = [f"{name} {percent(mean)}" for name, mean, _ in pass_rows(facts)]
    return ", ".join(said) or "pass rates unknown: no completion has all its scores"


def histogram_rows(facts: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(accepted completions, prompts with so many), from none on."""
    return [(number(accepted), prompts) for accepted, prompts in sorted(_by_number(facts["accepted_per_prompt"]))]


def sample_rows(facts: Mapping[str, Any], most: int | None = None) -> list[dict[str, str]]:
    """Sample rows with their first reason, the largest reason first; at most so many of each."""
    samples: Mapping[str, Sequence[Mapping[str, str]]] = facts["samples"]
    order = [reason for reason, _ in reason_rows(facts)[1]]
    listed = sorted(samples, key=lambda reason: (order.index(reason) if reason in order else len(order), reason))
    names = ("prompt", "answer", "detail")
    return [{"reason": reason, **{n: sample[n] for n in names}} for reason in listed for sample in samples[reason][:most]]


def filter_row(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """One line about a filtered set, to stand beside those of others."""
    found = totals(facts)
    rates = {name: mean for name, mean, _ in pass_rows(facts)}
    reasons = {reason: counts[0] for reason, counts in reason_rows(facts)[1]}
    return {
        "name": name, **found, "accepted_frac": found["accepted"] / found["completions"] if found["completions"] else None,
        "per_prompt": found["accepted"] / found["prompts"] if found["prompts"] else None, "pass_at": rates, "reasons": reasons,
    }  # fmt: skip


def largest_reasons(reasons: Mapping[str, int], most: int = 3) -> str:
    """``below min score 890, truncated 813``: the first few of reasons that are in order."""
    return ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in list(reasons.items())[:most])


def _by_number(found: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """The items of a mapping whose keys are numbers as text, as JSON has them."""
    return [(int(key), value) for key, value in found.items()]
