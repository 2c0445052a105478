"""Words and their hashes: equal for equal words on every machine, and quick in every script."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_pipeline.ngrams import compact, fold, guards, ngram_hashes, word_hashes, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The CAT, the cat!", ["the", "cat", "the", "cat"]),
        ("snake_case x2", ["snake", "case", "x2"]),
        ("Élève naïve", ["eleve", "naive"]),
        ("\uff21\uff22 \u00bd", ["ab", "1", "2"]),
        ("你好吗", ["你", "好", "吗"]),
        ("हिन्दी", ["हनद"]),
        ("🙂 !?", []),
    ],
)
def test_words_are_folded(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_guards_are_numbers_operators_and_negations() -> None:
    text = "It is not 1,000 - 3 but don\u2019t say 2*3 < 7, well-known!"
    assert guards(text) == ("*", "-", "1000", "2", "3", "3", "7", "<", "n't", "not")
    assert guards("well-known words, a dash - and **emphasis**") == ()


def test_hashes_are_the_same_on_every_machine() -> None:
    assert word_hashes(["the", "cat"]).tolist() == [3331141520948189790, 3429664268601861939]
    assert ngram_hashes(word_hashes(["the", "cat"]), 2).tolist() == [16553816895296956961]
    assert ngram_hashes(word_hashes(["the", "cat"]), 3).tolist() == []


@given(listed=st.lists(st.sampled_from("abc"), max_size=20), n=st.integers(1, 5))
def test_equal_ngrams_have_equal_hashes_and_different_ones_do_not(listed: list[str], n: int) -> None:
    hashes = ngram_hashes(word_hashes(listed), n)
    grams = [tuple(listed[start : start + n]) for start in range(len(listed) - n + 1)]
    assert len(hashes) == len(grams)
    assert len(set(grams)) == len(np.unique(hashes))


@given(text=st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_short_way_for_ascii_gives_the_same_words(text: str) -> None:
    assert [*words(text), "e"] == words(f"{text} \u00e9")
    assert fold(text) == text.lower()


@given(text=st.text())
def test_compact_is_total_and_ignores_layout(text: str) -> None:
    assert compact(f"  {text}\n") == compact(text)
