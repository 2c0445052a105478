"""What ``score_answers`` gives a scorer outside an experiment: rows from plain mappings, and models in the user's cache."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from distill_pipeline.outcome import silent
from distill_pipeline.records import prompt_id
from distill_pipeline.scoring.registry import resolve_scorer, scorer_models
from distill_pipeline.scoring.rows import AnswerRow, ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.storage.files import user_cache


def notebook_rows(rows: Iterable[Mapping[str, Any]]) -> list[AnswerRow]:
    """Rows with what the mappings say, and with defaults for the rest."""
    found = []
    for number, row in enumerate(rows):
        prompt = row.get("prompt")
        messages = row.get("messages") or ([] if prompt is None else [{"role": "user", "content": prompt}])
        metadata = row.get("metadata") or {}
        found.append(
            AnswerRow(
                completion_id=str(row.get("completion_id", number)), prompt_id=prompt_id(messages), domain="",
                messages=messages, reference=row.get("reference"),
                metadata=metadata if isinstance(metadata, str) else json.dumps(metadata), answer=row["answer"],
                raw_text=row.get("raw_text", row["answer"]), finish_reason=row.get("finish_reason", "stop"),
                completion_tokens=row.get("completion_tokens", 0), logprob=row.get("logprob"),
            )
        )  # fmt: skip
    return found


def notebook_context(spec: ScorerSpec) -> ScoringContext:
    """The surroundings of one scorer; its model is found or fetched. Keeps no scores."""
    resolve_scorer(spec)
    cache, models = user_cache(), {}
    for reference, revision in scorer_models({"": (spec,)}):
        from distill_pipeline.models.resolve import resolve_model

        folder = resolve_model(reference, models_dir=cache / "models", revision=revision, progress=silent)
        models[reference, revision] = folder
    return ScoringContext(models=models, generations_dir=cache / "generations")
