"""Apart from the answer: what a model thought aloud between think tags."""

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"


def split_reasoning(raw_text: str) -> tuple[str | None, str]:
    """Reasoning (None where there is none) and answer of a completion, both without white space around them.

    Reasoning is the text before the first closing tag, whether or not an opening one is there (templates may write it into
    the prompt); the answer is the text after the last closing tag. A completion that opens its reasoning and never closes it
    has an empty answer.

    >>> split_reasoning("<think>2 and 2</think>4")
    ('2 and 2', '4')
    >>> split_reasoning(" Paris. ")
    (None, 'Paris.')
    """
    text = raw_text.strip()
    if CLOSE_TAG in text:
        reasoning = text.partition(CLOSE_TAG)[0].strip().removeprefix(OPEN_TAG)
        return reasoning.strip(), text.rpartition(CLOSE_TAG)[2].strip()
    if text.startswith(OPEN_TAG):
        return text.removeprefix(OPEN_TAG).strip(), ""
    return None, text
