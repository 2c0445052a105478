import pytest

from distill_pipeline.scoring.text import contains_phrase, normalize_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's **Paris**, France's capital.", ["it", "paris", "france", "capital"]),
        ("Don\u2019t stop", ["don't", "stop"]),
        ("5 + 7 = 12.", ["5", "7", "12"]),
        ("About 1,000,000 or 1,5", ["about", "1000000", "or", "1", "5"]),
        ("snake_case and \uff21\uff22\uff23", ["snake", "case", "and", "abc"]),
        ("Asunci\u00f3n, STRASSE, Stra\u00dfe", ["asunci\u00f3n", "strasse", "strasse"]),
        ("Asuncio\u0301n", ["asunci\u00f3n"]),
        ("'quoted' \u201cwords\u201d", ["quoted", "words"]),
        ("...", []),
        ("", []),
    ],
)
def test_words_are_folded_and_stripped_of_signs(text: str, words: list[str]) -> None:
    assert normalize_words(text) == words


@pytest.mark.parametrize("text", ["Don't! 1,000 Stra\u00dfe's", "It's **Paris**", "\u0130stanbul", "\u01c5 \ufb01ne"])
def test_normalizing_twice_changes_nothing(text: str) -> None:
    once = normalize_words(text)
    assert normalize_words(" ".join(once)) == once


def test_a_phrase_is_found_whatever_the_case_and_signs_around_it() -> None:
    assert contains_phrase('The capital is "NEW-DELHI".', "New Delhi")
    assert contains_phrase("The plural of leaf is leaves!", "leaves")


def test_a_phrase_is_found_as_whole_words_in_a_row_only() -> None:
    assert not contains_phrase("a comparison", "Paris")
    assert not contains_phrase("112", "12")
    assert not contains_phrase("the new city of Delhi", "New Delhi")


def test_any_alternative_will_do() -> None:
    assert contains_phrase("It is grey.", "gray|grey")
    assert not contains_phrase("It is green.", "gray|grey")


@pytest.mark.parametrize("alternatives", ["", "|", " | . |"])
def test_an_alternative_without_words_is_never_found(alternatives: str) -> None:
    assert not contains_phrase("any answer", alternatives)
    assert not contains_phrase("", alternatives)
