"""Golden sets of the filter's rules, and that ordinary short answers break none."""

import random
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_pipeline.filtering.repetition import loop_period, repetition_fault
from distill_pipeline.filtering.rules import content_key, is_empty, is_refusal, is_repetitive, is_self_reference, is_truncated
from distill_pipeline.filtering.spec import RepetitionSpec
from distill_pipeline.ngrams import word_hashes

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry, but I can\u2019t assist with that request.",
    "Sorry, I cannot provide that information.",
    "I cannot fulfill your request.",
    "I can not comply with this.",
    "As an AI language model, I cannot provide medical advice.",
    "As an AI, I am unable to generate such content.",
    "I am not able to help with illegal activities.",
    "I won't help you do that.",
    "Unfortunately, I'm unable to assist with this request.",
    "I apologize, but I cannot answer that question.",
    "I must decline to answer.",
    "Hello! I'm sorry, but I can't do that.",
    "> I'm sorry, but I can't help you with that.",
    "I don't feel comfortable writing that.",
    "I'm afraid I can't do that.",
    "My apologies, but I'm not able to discuss this topic.",
    "It is against my guidelines to answer.",
]
NO_REFUSALS = [
    "Paris",
    "The capital of France is Paris.",
    "I'm sorry to hear that you are ill. Drink water and rest.",
    "As an AI language model, I have no feelings, but the capital is Paris.",
    "I can't believe how easy this is! The answer is 4.",
    "I cannot stress enough that the answer is 7.",
    "You cannot divide by zero.",
    "We can't have two primes here, so the answer is 3.",
    'The opposite of "can" is "cannot".',
    '"I can\'t help you," said the knight.',
    "He said he could not help, and left.",
    "No, a whale is not a fish.",
    "Hello! How can I help you?",
    "Illegal means against the law.",
    "OpenAI is a company.",
    "I don't know the answer to every question, but 2 + 2 = 4.",
    "x can't be negative, so x = 3.",
    "The word sorry has five letters.",
    "Unfortunately, the train left at 9.",
]


@pytest.mark.parametrize("answer", REFUSALS)
def test_refusals_are_found(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize("answer", NO_REFUSALS)
def test_other_answers_are_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)


def test_a_refusal_deep_in_an_answer_or_in_front_of_a_long_one_is_none() -> None:
    assert not is_refusal("The treaty was signed in 1648. " * 8 + "I cannot help with that.")
    assert not is_refusal("I'm sorry, but I can't help with that. " + "Here is what I can say about it. " * 30)


SELF_REFERENCES = [
    "As an AI language model, I have no feelings, but the capital is Paris.",
    "As an AI, I can tell you it is Paris.",
    "As ChatGPT, I think so.",
    "I'm ChatGPT, a large language model.",
    "I am an AI assistant created by OpenAI.",
    "I\u2019m just an AI, so I cannot taste it, but sugar is sweet.",
    "Sure! I was trained by OpenAI to help.",
    "Based on my training data, the answer is 4.",
    "As of my knowledge cutoff in 2021, it is Paris.",
    "as a large language model I do not eat",
    "As an AI assistant developed by Anthropic, I would say 4.",
    "I am Qwen, made by Alibaba Cloud.",
]
NO_SELF_REFERENCES = [
    "As an AI researcher, Turing asked whether machines think.",
    "ChatGPT is a product of OpenAI.",
    "As a language, Latin is dead.",
    "A large language model predicts words.",
    "I am a teacher.",
    "OpenAI was founded in 2015.",
    "As a model of the atom, Bohr's is simple.",
    "Claude Monet was a painter.",
    "I am an AI researcher at a lab.",
    "My training for the marathon starts today.",
    *[text for text in NO_REFUSALS if "As an AI" not in text],
]


@pytest.mark.parametrize("answer", SELF_REFERENCES)
def test_self_references_are_found_and_are_no_refusals(answer: str) -> None:
    assert is_self_reference(answer)
    assert not is_refusal(answer)


@pytest.mark.parametrize("answer", NO_SELF_REFERENCES)
def test_texts_about_models_are_no_self_references(answer: str) -> None:
    assert not is_self_reference(answer)


@pytest.mark.parametrize(
    ("finish", "raw", "expected"),
    [
        ("length", "x", True),
        ("stop", "<think>so", True),
        ("stop", "  <think>so</think>Paris", False),
        ("stop", "so</think>Paris", False),
        ("stop", "Write <think> around it.", False),
        ("stop", "", False),
    ],
)
def test_truncation_is_a_status(finish: str, raw: str, expected: bool) -> None:
    assert is_truncated(finish, raw) is expected


@pytest.mark.parametrize("text", ["", " \n", "\u200b", "\ufeff \u2060"])
def test_nothing_visible_is_empty(text: str) -> None:
    assert is_empty(text)
    assert not is_empty(text + ".")


SHORT_ANSWERS = [
    "Paris", "no no no", "Ha ha ha!", "The capital of France is Paris. Paris is the capital of France.",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20",
    "one fish two fish red fish blue fish", "a b a b a b", "\n".join(f"{n} x 7 = {7 * n}" for n in range(1, 11)),
    "| a | b |\n|---|---|\n| 1 | 2 |", "do re mi " * 4,
]  # fmt: skip


@pytest.mark.parametrize("text", SHORT_ANSWERS)
def test_short_answers_are_not_eaten(text: str) -> None:
    assert repetition_fault(text) is None


def prose(num_words: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(num_words)]


@pytest.mark.parametrize(
    "text",
    [
        "Let me see. " + "Wait, let me check that again. " * 6,
        " ".join(prose(100)) + " and" * 20,
        " ".join(prose(300) + prose(150, 1) * 3),
        "a" * 200,
        "你" * 40,
        "0101" * 60,
        " ".join(prose(40)) + "\n" + "The answer is not clear to me yet now.\n" * 12 + " ".join(prose(30, 3)),
        "\n".join(["the same line again"] * 5 + ["other words stand here"] * 5 + prose(40)),
    ],
)
def test_texts_that_go_round_in_circles_are_found(text: str) -> None:
    assert repetition_fault(text) is not None
    assert is_repetitive(text, "Paris")
    assert is_repetitive(None, text)


def test_trace_and_answer_are_judged_apart_each_by_its_own_test() -> None:
    table = "\n".join(f"case {n} of the big table gives the value of case {n} of the big table" for n in range(12))
    loop = "wait, that is wrong. " * 9
    assert is_repetitive(None, table)
    assert is_repetitive(table, "Paris")
    assert not is_repetitive(table, table, RepetitionSpec(reasoning="off", answer="loops"))
    assert is_repetitive(None, loop, RepetitionSpec(answer="loops"))
    assert not is_repetitive(loop, "Paris", RepetitionSpec(reasoning="off"))


def test_ordinary_long_text_is_not_repetitive() -> None:
    assert repetition_fault(" ".join(prose(5000))) is None
    assert not is_repetitive(None, "")


@given(period=st.integers(1, 30), times=st.integers(1, 8), before=st.integers(0, 40))
def test_a_loop_is_found_from_its_third_time_and_sixteenth_word(period: int, times: int, before: int) -> None:
    hashes = np.concatenate([word_hashes(prose(before, 7)), np.tile(word_hashes([f"{n}x" for n in range(period)]), times)])
    expected = period if times >= 3 and period * times >= 16 else None
    assert loop_period(hashes) == expected


@given(text=st.text(max_size=300))
def test_rules_are_total(text: str) -> None:
    is_refusal(text)
    is_self_reference(text)
    is_repetitive(text, text)
    is_empty(text)
    content_key(None, text)


def test_no_text_takes_long() -> None:
    started = time.process_time()
    for unit in ("i ", "sorry ", "i'm sorry, but ", ". ", "*", "\n", "a b ", "- "):
        is_refusal(unit * 40)
        is_self_reference(unit * 50_000)
        is_repetitive(None, unit * 50_000)
    assert time.process_time() - started < 10


def test_two_ways_to_one_answer_are_not_the_same() -> None:
    assert content_key("one way", "4") != content_key("another way", "4")
    assert content_key(None, "Paris  is\nbig") == content_key("", "paris is big")
