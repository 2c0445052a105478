"""Laws of telling reasoning from answer."""

import pytest

from distill_pipeline.generation.reasoning import split_reasoning


@pytest.mark.parametrize(
    ("raw_text", "expected"),
    [
        ("  Paris. ", (None, "Paris.")),
        ("<think>\nFrance, so\n</think>\n\nParis", ("France, so", "Paris")),
        ("France, so</think>Paris", ("France, so", "Paris")),
        ("<think>a</think>b<think>c</think>d", ("a", "d")),
        ("<think></think>Paris", ("", "Paris")),
        ("<think>never ends", ("never ends", "")),
        ("write <think> in front", (None, "write <think> in front")),
    ],
)
def test_reasoning_ends_at_the_first_closing_tag_and_the_answer_starts_after_the_last(
    raw_text: str, expected: tuple[str | None, str]
) -> None:
    assert split_reasoning(raw_text) == expected
