"""A few documents with every model's answer side by side, right and wrong ones mixed; chosen by content, never by chance."""

from collections.abc import Mapping
from typing import Any

from distill_pipeline.hashing import unit_interval
from distill_pipeline.report.scores import Evaluation
from distill_pipeline.report.text import visible_text

NUM_SAMPLES = 20


def side_by_side(evaluations: Mapping[str, Evaluation], *, limit: int = NUM_SAMPLES) -> list[dict[str, Any]]:
    """Rows ``{"task", "doc_id", "prompt", "reference", "answers": {model: {"text", "score", "right", "finish_reason"}}}``.

    Documents where student and teacher differ come first in turn with those they both got right, and both wrong, so that
    no kind crowds out another. ``right`` is None where the task's main metric is not simply right or wrong.
    """
    tables = {name: {(s["task"], s["doc_id"]): s for s in evaluation["samples"]} for name, evaluation in evaluations.items()}
    primary = evaluations["student"]["primary"]
    kinds: dict[tuple[bool | None, bool | None], list[dict[str, Any]]] = {}
    for key in sorted(tables["student"], key=lambda key: unit_interval(f"{key[0]}:{key[1]}")):
        row = _row(key, tables, primary.get(key[0]))
        verdicts = {name: answer["right"] for name, answer in row["answers"].items()}
        kinds.setdefault((verdicts.get("teacher"), verdicts["student"]), []).append(row)
    order = sorted(kinds, key=lambda kind: (kind[0] == kind[1], str(kind)))
    chosen: list[dict[str, Any]] = []
    while len(chosen) < limit and any(kinds.values()):
        chosen += [kinds[kind].pop(0) for kind in order if kinds[kind]]
    return chosen[:limit]


def _row(key: tuple[str, int], tables: Mapping[str, Mapping[tuple[str, int], Any]], metric: str | None) -> dict[str, Any]:
    asked = tables["student"][key]
    answers = {}
    for name, table in tables.items():
        sample = table.get(key)
        if sample is not None:
            score = sample["metrics"].get(metric) if metric else None
            answers[name] = {
                "text": visible_text(sample["answer"]), "score": score, "right": _is_right(score),
                "finish_reason": sample["finish_reason"],
            }  # fmt: skip
    return {
        "task": key[0], "doc_id": key[1], "prompt": visible_text(asked["prompt"]), "reference": visible_text(asked["target"]),
        "answers": answers,
    }  # fmt: skip


def _is_right(score: float | None) -> bool | None:
    return None if score not in (0.0, 1.0) else score == 1.0
