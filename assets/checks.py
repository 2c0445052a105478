"""What must hold of every artifact before the next stage may use it, as asset checks. Names of checks are claims.

A check reads the manifest of the version that was just made, in the step that made it: there is no second step to start
and no other version to look at by mistake. A blocking claim that fails ends the step, so that nothing downstream runs;
in a later run the library refuses the artifact itself, because its manifest says that it failed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dagster as dg

from assets.naming import asset_key
from distill_pipeline.nodes import Node, Stage

if TYPE_CHECKING:
    from distill_pipeline.storage.artifacts import Artifact

Finding = tuple[bool, str]
"""Whether a claim holds, and what was seen."""


@dataclass(frozen=True)
class Claim:
    """One thing that is checked. A claim that does not block only warns."""

    name: str
    description: str
    look: Callable[[Node, "Artifact"], Finding]
    blocking: bool = True


CONSERVED: Mapping[Stage, tuple[str, tuple[str, ...]]] = {
    "prompt_pool": ("seen", ("kept", "malformed", "duplicate", "near_duplicate", "contaminated")),
    "corrected_teacher": (
        "prompts",
        ("used", "too_long", "no_tokens", "held_out", "other_domain", "without_reference"),
    ),
    "teacher_outputs": ("expected", ("stopped", "truncated", "failed", "pending")),
    "scored_outputs": ("completions", ("scored", "unknown", "unscored", "failed")),
    "filtered_set": ("completions", ("accepted", "rejected", "failed")),
    "teacher_signals": ("completions", ("captured", "too_long", "no_tokens")),
    "student_checkpoint": ("completions", ("trained_completions", "too_long", "no_tokens")),
}
"""For each stage that handles rows: the count that comes in, and the counts it must be the sum of."""


def _rows_are_conserved(node: Node, artifact: "Artifact") -> Finding:
    whole, parts = CONSERVED[node.stage]
    counts = artifact.manifest.counts
    if whole not in counts:
        return False, f"the manifest has no count {whole!r}; it has: {', '.join(counts) or 'none'}"
    total = sum(counts.get(part, 0) for part in parts)
    sum_text = " + ".join(f"{part} {counts.get(part, 0):,}" for part in parts)
    by_reason = [number for name, number in counts.items() if name.startswith("rejected_")]
    if by_reason and sum(by_reason) != counts.get("rejected", 0):
        return False, f"rejected {counts.get('rejected', 0):,} is not the sum of its first reasons, {sum(by_reason):,}"
    return counts[whole] == total, f"{whole} {counts[whole]:,} {'=' if counts[whole] == total else 'is not'} {sum_text}"


def _gate_is_passed(node: Node, artifact: "Artifact") -> Finding:
    return artifact.manifest.status == "ok", artifact.manifest.reason or "its manifest says ok"


def _accepted_rows_exist(node: Node, artifact: "Artifact") -> Finding:
    counts = artifact.manifest.counts
    seen = f"{counts.get('accepted', 0):,} of {counts.get('completions', 0):,} completions were accepted"
    return counts.get("accepted", 0) > 0, artifact.manifest.reason or seen


def _licence_is_recorded(node: Node, artifact: "Artifact") -> Finding:
    facts = artifact.manifest.facts
    teachers = facts.get("teachers") or [facts.get("teacher") or {}]
    lacking = [
        teacher.get("name", "?") for teacher in teachers if not (teacher.get("license") or teacher.get("accepted_because"))
    ]
    said = "; ".join(
        f"{t.get('name')}: {t.get('license') or 'no licence'} ({t.get('verdict')})"
        + "".join(f", {duty}" for duty in t.get("obligations", []))
        for t in teachers
    )
    return not lacking, said if not lacking else f"no licence and no reason for doing without: {', '.join(lacking)}"


def _teacher_is_unchanged(node: Node, artifact: "Artifact") -> Finding:
    before, after = (artifact.manifest.facts.get(f"teacher_sha256_{when}") for when in ("before", "after"))
    if all(stage["method"] == "sft" or stage["signal"] != "online" for stage in node.spec["student"]["stages"]):
        return before == after, "the student trained on the teacher's text or stored signals; the teacher itself took no part"
    return before is not None and before == after, f"SHA-256 of the teacher's parameters before {before}, after {after}"


def _baselines_are_named(node: Node, artifact: "Artifact") -> Finding:
    results = [roles for metrics in artifact.read_json("report.json")["tasks"].values() for roles in metrics.values()]
    wanted = [name for name in node.spec["evaluation"]["baselines"] if name != node.student]
    lacking = [name for name in wanted if not results or any(name not in roles for roles in results)]
    said = (
        f"not beside every result: {', '.join(lacking)}"
        if lacking
        else f"every result stands beside: {', '.join(wanted) or 'none'}"
    )
    return not lacking, said


def _student_beats_untrained(node: Node, artifact: "Artifact") -> Finding:
    headline = artifact.read_json("report.json")["headline"]
    student, untrained = (headline["models"].get(name, {}).get("value") for name in ("student", "untrained"))
    if student is None or untrained is None:
        return False, f"unknown: student {student}, untrained {untrained}"
    return student > untrained, f"{headline['label']}: student {student:.4f}, untrained {untrained:.4f}"


def _every_student_is_compared(node: Node, artifact: "Artifact") -> Finding:
    compared = artifact.manifest.counts.get("students", 0)
    return compared == len(node.inputs), f"{compared} of {len(node.inputs)} students are in the comparison"


_CONSERVED = Claim("rows_are_conserved", "Every row that came in is kept, rejected, failed or pending.", _rows_are_conserved)
_GATE = Claim("quality_gate_is_passed", "The stage found its own result fit for use.", _gate_is_passed)
_LICENCE = Claim("licence_is_recorded", "The teacher's terms, or the reason to go on without, are known.", _licence_is_recorded)

CLAIMS: Mapping[Stage, tuple[Claim, ...]] = {
    "prompt_pool": (_CONSERVED, _GATE),
    "corrected_teacher": (_CONSERVED, _GATE, _LICENCE),
    "teacher_outputs": (_CONSERVED, _GATE, _LICENCE),
    "scored_outputs": (_CONSERVED,),
    "filtered_set": (_CONSERVED, Claim("accepted_rows_exist", "There is something to train on.", _accepted_rows_exist)),
    "teacher_signals": (_CONSERVED, _GATE, _LICENCE),
    "student_checkpoint": (
        _CONSERVED, _GATE, _LICENCE,
        Claim("teacher_is_unchanged", "Training moved the student's parameters only.", _teacher_is_unchanged),
    ),
    "eval_report": (
        Claim("student_names_its_baselines", "Every result stands beside its baselines.", _baselines_are_named),
        Claim("student_beats_untrained", "Training bought something.", _student_beats_untrained, blocking=False),
    ),
    "comparison": (Claim("every_student_is_compared", "No student is missing.", _every_student_is_compared),),
}  # fmt: skip


def check_specs(node: Node) -> list[dg.AssetCheckSpec]:
    """The checks of a node's asset."""
    return [
        dg.AssetCheckSpec(claim.name, asset=asset_key(node.name), description=claim.description, blocking=claim.blocking)
        for claim in CLAIMS[node.stage]
    ]


def check_results(node: Node, artifact: "Artifact") -> list[dg.AssetCheckResult]:
    """What the checks found on the artifact that was just made."""
    return [_result(claim, node, artifact) for claim in CLAIMS[node.stage]]


def _result(claim: Claim, node: Node, artifact: "Artifact") -> dg.AssetCheckResult:
    passed, said = claim.look(node, artifact)
    return dg.AssetCheckResult(
        passed=passed,
        asset_key=asset_key(node.name),
        check_name=claim.name,
        severity=dg.AssetCheckSeverity.ERROR if claim.blocking else dg.AssetCheckSeverity.WARN,
        description=said,
        metadata={"version": artifact.version},
    )
