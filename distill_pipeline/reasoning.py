"""Apart from the answer: what a model thought aloud between think tags.

Decided: a tag pair counts where the completion begins with its opening tag; of ``<think>`` the opening tag may also be
missing, because many templates write it into the prompt. Nothing is ever lost: ``raw_text`` beside the two parts is whole.
"""

from typing import Any

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"

THINK_TAGS = {OPEN_TAG: CLOSE_TAG, "<thinking>": "</thinking>", "<|begin_of_thought|>": "<|end_of_thought|>"}
"""Closing tags by opening tag."""


def split_reasoning(raw_text: str, *, opened: str = "") -> tuple[str | None, str]:
    """Reasoning (None where there is none) and answer of a completion, both without white space around them.

    Reasoning is the text before the first closing tag, whether or not an opening one is there; the answer is the text after
    the last closing tag. A completion that opens its reasoning and never closes it has an empty answer.

    Args:
        opened: the opening tag with which the prompt ends, if it does: without a closing one everything is then reasoning.

    >>> split_reasoning("<think>2 and 2</think>4")
    ('2 and 2', '4')
    >>> split_reasoning(" Paris. ")
    (None, 'Paris.')
    """
    text = raw_text.strip()
    opening = next((tag for tag in THINK_TAGS if text.startswith(tag)), "")
    closing = THINK_TAGS.get(opening or opened, CLOSE_TAG)
    if closing in text:
        reasoning = text.partition(closing)[0].strip().removeprefix(opening)
        return reasoning.strip(), text.rpartition(closing)[2].strip()
    if opening or opened:
        return text.removeprefix(opening).strip(), ""
    return None, text


def opening_of(renderer: Any) -> str:
    """The opening tag with which a chat template ends its prompts, so that completions begin inside the reasoning; else empty.

    Args:
        renderer: a :class:`~distill_pipeline.rendering.ChatRenderer`.
    """
    ids = renderer.prompt_ids([{"role": "user", "content": "question"}])
    prompt: str = renderer.tokenizer.decode(ids, skip_special_tokens=False).rstrip()
    return next((tag for tag in THINK_TAGS if prompt.endswith(tag)), "")
