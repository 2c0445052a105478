"""Law 6, the index: evaluation items are found in other clothes, and a shared template is no evidence."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_pipeline.prompts.contamination import ContaminationIndex

LONG_ITEM = (
    "A farmer has twelve sheep and buys nine more at the spring market before giving away five of them to a neighbour "
    "who lost a whole herd in the storm. How many sheep does the farmer have now?"
)
INDEX = ContaminationIndex.build(
    [
        ("capitals:0", "What is the capital of France?\nParis"),
        ("sums:0", "What is 7 + 3?\n10"),
        ("words:0", f"Question: {LONG_ITEM}\nAnswer:\n16"),
        ("verbs:0", "What is the simple past tense of the verb run?\nran"),
    ]
)


def rule_of(text: str, index: ContaminationIndex = INDEX) -> str | None:
    match = index.match(text)
    return None if match is None else match.rule


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France?",
        "what is the capital of france",
        "Question: What is the capital of France?\nAnswer:",
        "**What** is the capital of\nFrance ?",
    ],
)
def test_an_item_in_another_layout_is_the_item(text: str) -> None:
    match = INDEX.match(text)
    assert match is not None
    assert (match.document_id, match.rule, match.is_flag) == ("capitals:0", "equal_text", False)
    assert match.span == "what is the capital of france"


@pytest.mark.parametrize("text", ["What is the capital of Italy?", "What is 7 - 3?", "What is 7 + 4?", "Paris", "10", "", "🙂"])
def test_a_sibling_or_a_short_answer_is_not_the_item(text: str) -> None:
    assert INDEX.match(text) is None


def test_thirteen_shared_words_give_an_item_away() -> None:
    match = INDEX.match("Tell me: a FARMER has twelve sheep, and buys nine more at the Spring market. Why?")
    assert match is not None
    assert (match.document_id, match.rule) == ("words:0", "shared_13_gram")
    assert match.span == "a farmer has twelve sheep and buys nine more at the spring market"


def test_half_of_a_long_item_in_shorter_runs_gives_it_away() -> None:
    words = LONG_ITEM.split()
    pieces = " so ".join(" ".join(words[start : start + 11]) for start in range(0, 33, 11))
    assert rule_of(pieces) == "half_covered"
    assert rule_of(" ".join(words[:11])) == "shared_8_gram"


def test_fewer_words_only_flag_a_text() -> None:
    match = INDEX.match("My story: has twelve sheep and buys nine more at noon.")
    assert match is not None
    assert match.is_flag
    assert match.span == "has twelve sheep and buys nine more at"


def test_a_whole_short_question_inside_a_text_gives_it_away() -> None:
    assert rule_of("Please tell me, what is the simple past tense of the verb run? Thanks.") == "whole_question"


def test_one_replaced_word_of_a_short_item_is_another_question() -> None:
    match = INDEX.match("What is the simple past tense of the verb walk?")
    assert match is not None
    assert match.is_flag


def template(name: str) -> str:
    return f"Read this with care and then answer in one word only: on which of the seven continents is the country {name}"


def test_ngrams_of_three_items_are_the_template_and_no_evidence() -> None:
    names = ["France", "Italy", "Peru", "Chad"]
    index = ContaminationIndex.build((f"t:{name}", template(name) + f"?\n{name}land") for name in names)
    assert index.match(template("Norway") + "?") is None
    assert rule_of(template("Peru") + "?", index) == "equal_text"
    assert rule_of("Hello. " + template("Peru") + "? Thank you.", index) in {"shared_13_gram", "whole_question"}


def test_an_item_listed_by_three_tasks_is_still_protected() -> None:
    index = ContaminationIndex.build((f"task{number}:0", LONG_ITEM) for number in range(5))
    assert index.num_items == 1
    assert rule_of("So, " + LONG_ITEM, index) == "shared_13_gram"


def test_a_rejection_goes_before_a_flag() -> None:
    match = INDEX.match_any(["He has twelve sheep and buys nine more at noon.", "nothing", "What is the capital of France?"])
    assert match is not None
    assert match.rule == "equal_text"


def test_an_empty_index_matches_nothing() -> None:
    assert ContaminationIndex.build([]).match("What is the capital of France?") is None
    assert ContaminationIndex.build([("a", ""), ("b", "...")]).match("...") is None


@given(seed=st.integers(0, 10_000), start=st.integers(0, 40), before=st.text(max_size=40), after=st.text(max_size=40))
def test_any_thirteen_words_of_an_item_are_found_whatever_stands_around(seed: int, start: int, before: str, after: str) -> None:
    words = [f"w{number}x" for number in random.Random(seed).sample(range(10_000), 60)]
    index = ContaminationIndex.build([("a", " ".join(words))])
    match = index.match(f"{before} {' '.join(words[start : start + 13])} {after}")
    assert match is not None
    assert not match.is_flag


@given(text=st.text(max_size=200))
def test_no_text_breaks_the_index(text: str) -> None:
    INDEX.match(text)
    ContaminationIndex.build([("a", text)]).match(text)
