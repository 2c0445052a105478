"""How far a student's next-token distribution is from its teacher's on text that neither was trained on.

The text is the teacher's own greedy answers to the evaluation's questions, so the number needs no reference answers and
says what accuracy cannot: whether the student imitates the teacher also where both are right, or both wrong.
"""

from collections.abc import Sequence
from typing import Any

from distill_pipeline.errors import VocabularyMismatchError
from distill_pipeline.evaluation.forcing import IGNORED, Row, batches_of, completion_logits
from distill_pipeline.losses import forward_kl
from distill_pipeline.rendering import ChatRenderer

MAX_ROWS = 16
"""Sequences of a forward pass; the logits' size limits it further."""


def held_out_divergence(
    student: Any,
    teacher: Any,
    renderer: ChatRenderer,
    samples: Sequence[dict[str, Any]],
    device: str,
    *,
    teacher_renderer: ChatRenderer | None = None,
) -> dict[str, Any]:
    """Mean KL(teacher || student) in nats per token, and how often both find the same token likeliest.

    Every token of the teacher's answers counts once, and the end token of an answer that the teacher ended.

    Args:
        student, teacher: causal language models in evaluation mode on ``device``; computed in float32.
        renderer: renders the questions, for both.
        samples: the **teacher's** samples of :func:`~distill_pipeline.evaluation.stage.evaluate_model`; those with a
            generated answer are used.
        teacher_renderer: the teacher's own; where its token ids mean something else, both numbers are unknown.
    Returns:
        ``{"forward_kl", "top1_agreement", "tokens", "answers", "reason"}``; the first two are None, and ``reason`` says
        why, where they cannot be known. A student equal to its teacher gives 0 and 1.
    """
    vocabulary = renderer.vocab_size
    unknown = {"forward_kl": None, "top1_agreement": None, "tokens": 0, "answers": 0}
    try:
        _check_vocabularies(student, teacher, renderer, teacher_renderer)
    except VocabularyMismatchError as err:
        return {**unknown, "reason": str(err)}
    rows = _answered_rows(renderer, samples)
    if not rows:
        return {**unknown, "reason": "the evaluation has no task in which the teacher writes an answer"}
    kl_sum, agreed, tokens = 0.0, 0, 0
    for batch in batches_of(rows, vocab_size=vocabulary, max_rows=MAX_ROWS):
        chosen = [rows[index] for index in batch]
        teacher_logits, labels = completion_logits(teacher, chosen, device=device)
        student_logits, _ = completion_logits(student, chosen, device=device)
        kept = labels != IGNORED
        teacher_rows = teacher_logits[..., :vocabulary][kept].float()
        student_rows = student_logits[..., :vocabulary][kept].float()
        count = len(teacher_rows)
        kl_sum += float(forward_kl(student_rows[None], teacher_rows[None], labels[kept][None])) * count
        agreed += int((teacher_rows.argmax(dim=-1) == student_rows.argmax(dim=-1)).sum())
        tokens += count
    means = {"forward_kl": kl_sum / tokens, "top1_agreement": agreed / tokens}
    return {**means, "tokens": tokens, "answers": len(rows), "reason": None}


def _answered_rows(renderer: ChatRenderer, samples: Sequence[dict[str, Any]]) -> list[Row]:
    """Prompt and answer of each sample in which the teacher wrote one; an answer cut by the task is not ended."""
    rows: list[Row] = []
    for sample in samples:
        if sample.get("messages") is None or sample.get("finish_reason") in (None, "error"):
            continue
        answer = renderer.completion_ids(sample["answer"], finished=sample["finish_reason"] == "stop")
        if answer:
            rows.append((renderer.prompt_ids(sample["messages"]), answer))
    return rows


def _check_vocabularies(student: Any, teacher: Any, renderer: ChatRenderer, teacher_renderer: ChatRenderer | None) -> None:
    """Raises VocabularyMismatchError where the two models do not give the same meaning to the same ids."""
    if teacher_renderer is not None:
        ours, theirs = renderer.tokenizer.get_vocab(), teacher_renderer.tokenizer.get_vocab()
        if ours != theirs:
            moved = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise VocabularyMismatchError(
                f"student and teacher do not share a vocabulary: {len(moved):,} tokens have another id or exist in one only, "
                f"for instance {moved[0]!r}"
            )
    for who, model in (("student", student), ("teacher", teacher)):
        columns = model.get_output_embeddings().weight.shape[0]
        if columns < renderer.vocab_size:
            raise VocabularyMismatchError(
                f"the {who} has {columns:,} logits a token, the tokenizer {renderer.vocab_size:,} ids"
            )
