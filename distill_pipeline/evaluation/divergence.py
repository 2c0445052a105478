"""How far a student's next-token distribution is from its teacher's on text that neither was trained on.

The text is the teacher's own greedy answers to the evaluation's questions, so the number needs no reference answers and
says what accuracy cannot: whether the student imitates the teacher also where both are right, or both wrong.
"""

from collections.abc import Sequence
from typing import Any

from distill_pipeline.errors import VocabularyMismatchError
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.training.examples import Example
from distill_pipeline.training.held_out import teacher_agreement
from distill_pipeline.training.layout import choose_layout


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
    try:
        _check_vocabularies(student, teacher, renderer, teacher_renderer)
    except VocabularyMismatchError as err:
        return unknown_divergence(str(err))
    examples = _answered_examples(renderer, samples)
    if not examples:
        return unknown_divergence("the evaluation has no task in which the teacher writes an answer")
    layout, _ = choose_layout([student, teacher], max(len(example.prompt) + example.num_tokens for example in examples))
    found = teacher_agreement(
        student, teacher, examples, layout=layout, pad_id=renderer.end_token_id, vocab_size=renderer.vocab_size, device=device
    )
    means = {"forward_kl": found.forward_kl, "top1_agreement": found.top1_agreement}
    return {**means, "tokens": found.num_tokens, "answers": len(examples), "reason": None}


def unknown_divergence(reason: str) -> dict[str, Any]:
    """The result of :func:`held_out_divergence` where there is none."""
    return {"forward_kl": None, "top1_agreement": None, "tokens": 0, "answers": 0, "reason": reason}


def _answered_examples(renderer: ChatRenderer, samples: Sequence[dict[str, Any]]) -> list[Example]:
    """Prompt and answer of each sample in which the teacher wrote one; an answer cut by the task is not ended."""
    examples: list[Example] = []
    for index, sample in enumerate(samples):
        if sample.get("messages") is None or sample.get("finish_reason") in (None, "error"):
            continue
        answer = renderer.completion_ids(sample.get("raw_text", sample["answer"]), finished=sample["finish_reason"] == "stop")
        if answer:
            examples.append(Example(str(index), tuple(renderer.prompt_ids(sample["messages"])), (tuple(answer),)))
    return examples


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
