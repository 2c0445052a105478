"""Laws of telling reasoning from answer."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.filtering.rules import is_truncated
from distill_pipeline.generation.server.replies import read_reply, with_reasoning
from distill_pipeline.hashing import canonical_json
from distill_pipeline.reasoning import CLOSE_TAG, OPEN_TAG, THINK_TAGS, opening_of, split_reasoning

PIECES = st.lists(st.sampled_from(["a", " b ", "\n", "<", *THINK_TAGS, *THINK_TAGS.values()]), max_size=8).map("".join)
PLAIN = st.text(st.sampled_from("ab 4\n<>/"), min_size=1).map(str.strip).filter(bool)


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
        ("<thinking>France, so</thinking>Paris", ("France, so", "Paris")),
        ("<|begin_of_thought|>so<|end_of_thought|>Paris", ("so", "Paris")),
        ("write </thinking> behind", (None, "write </thinking> behind")),
    ],
)
def test_reasoning_ends_at_the_first_closing_tag_and_the_answer_starts_after_the_last(
    raw_text: str, expected: tuple[str | None, str]
) -> None:
    assert split_reasoning(raw_text) == expected


@given(PIECES)
@settings(deadline=None)
def test_whatever_a_model_writes_the_parts_are_beginning_and_end_of_it_and_the_answer_is_never_reasoning(raw_text: str) -> None:
    reasoning, answer = split_reasoning(raw_text)
    assert raw_text.rstrip().endswith(answer)
    if reasoning is None:
        assert answer == raw_text.strip()
        assert CLOSE_TAG not in answer
        return
    opening = next((tag for tag in THINK_TAGS if raw_text.lstrip().startswith(tag)), "")
    assert raw_text.strip().removeprefix(opening).lstrip().startswith(reasoning)
    assert THINK_TAGS.get(opening, CLOSE_TAG) not in reasoning + answer


@given(PIECES)
@settings(deadline=None)
def test_a_thought_that_never_closes_is_truncated_and_has_no_answer(raw_text: str) -> None:
    opening = next((tag for tag in THINK_TAGS if raw_text.lstrip().startswith(tag)), None)
    is_cut = opening is not None and THINK_TAGS[opening] not in raw_text
    assert is_truncated("stop", raw_text) == is_cut
    assert is_truncated("length", raw_text)
    if is_cut:
        assert split_reasoning(raw_text)[1] == ""


@pytest.mark.parametrize(
    ("raw_text", "expected"),
    [("so it is</think>4", ("so it is", "4")), ("so it", ("so it", "")), ("<think>so it", ("so it", ""))],
)
def test_where_the_template_opened_the_thought_a_completion_without_closing_tag_is_all_reasoning(
    raw_text: str, expected: tuple[str, str]
) -> None:
    assert split_reasoning(raw_text, opened=OPEN_TAG) == expected
    assert split_reasoning("so</thinking>4", opened="<thinking>") == ("so", "4")


def test_a_template_that_ends_with_an_opening_tag_is_found() -> None:
    def renderer(prompt: str) -> Any:
        tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: prompt)
        return SimpleNamespace(prompt_ids=lambda messages: [1], tokenizer=tokenizer)

    assert opening_of(renderer("<|im_start|>assistant\n<think>\n")) == OPEN_TAG
    assert opening_of(renderer("<|im_start|>assistant\n<think>\n\n</think>\n\n")) == ""


@given(PIECES, PLAIN)
@settings(deadline=None)
def test_what_a_server_gives_apart_stays_apart_whatever_tags_are_in_the_reasoning(reasoning: str, content: str) -> None:
    message = {"content": content, "reasoning_content": reasoning}
    body = canonical_json({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
    reply: Any = read_reply(body)
    found, answer = split_reasoning(reply.choices[0].text)
    assert answer == content
    assert found is None if not reasoning else found is not None
    assert "".join((found or "").split()) == "".join(_without_tags(reasoning).split())


@given(PLAIN)
@settings(deadline=None)
def test_reasoning_without_an_answer_leaves_the_thought_open(reasoning: str) -> None:
    text = with_reasoning(reasoning, "")
    assert split_reasoning(text) == (reasoning, "")
    assert is_truncated("stop", text)


def _without_tags(text: str) -> str:
    text = text.strip()
    while OPEN_TAG in text or CLOSE_TAG in text:
        text = text.replace(OPEN_TAG, "").replace(CLOSE_TAG, "").strip()
    return text
