"""Golden set of the language rule: prose in another language is found, and a doubt, code or a formula never is."""

import builtins
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_pipeline.errors import MissingExtraError
from distill_pipeline.filtering import languages
from distill_pipeline.filtering.languages import MIN_LETTERS, other_language, prose_of

OTHERS = {
    "fr": "La capitale de la France est Paris, une tres belle ville.",
    "de": "Die Hauptstadt von Frankreich ist Paris.",
    "zh": "法国的首都是巴黎、这是一个非常美丽的城市、很多人去那里旅游。",
    "es": "Hola, ¿cómo estás? Estoy muy bien, gracias.",
    "ru": "Столица Франции — Париж, очень красивый город.",
    "ja": "フランスの首都はパリです。とても美しい街です。",
}
KEPT = [
    "The capital of France is Paris.",
    "Photosynthesis converts carbon dioxide and water into glucose.",
    "Wait, let me check that again.",
    "Oui.",
    "Die Hauptstadt",
    "Barcelona, Madrid, Sevilla, Valencia, Granada",
    "Pierre Auguste Renoir, Claude Monet, Edgar Degas",
    "cat dog mouse elephant giraffe zebra",
    'Voulez-vous means "do you want" in English, and merci beaucoup means thank you very much.',
    "x = \\frac{-b \\pm \\sqrt{b^2-4ac}}{2a}, so x = 3",
    "$$\\sum_{i=1}^n i = \\frac{n(n+1)}{2}$$ QED",
    "```python\nfor wert in liste:\n    drucke(wert und noch ein wert)\n```",
    "def addiere(a, b):\n    return a + b\n\nfor mein_wert in liste_der_werte:\n    drucken(mein_wert)",
    "SELECT nombre FROM clientes WHERE ciudad = 'Madrid'",
    "",
]


@pytest.mark.parametrize("code", OTHERS)
def test_prose_in_another_language_is_found_and_kept_where_it_is_allowed(code: str) -> None:
    assert other_language(OTHERS[code], ("en",)) == code
    assert other_language(OTHERS[code], ("en", code)) is None


@pytest.mark.parametrize("text", KEPT)
def test_doubts_names_code_and_formulas_are_kept(text: str) -> None:
    assert other_language(text, ("en",)) is None


def test_too_few_letters_are_never_judged() -> None:
    letters = "这是一个非常美丽的城市很多人去那里旅游每年都有"
    assert other_language(letters[: MIN_LETTERS - 1], ("en",)) is None
    assert other_language(letters[:MIN_LETTERS], ("en",)) == "zh"


def test_code_in_a_text_does_not_hide_its_language() -> None:
    text = f"{OTHERS['de']} Hier ist das Programm:\n```python\nprint('the and of with that have')\n```\nEs schreibt einen Satz."
    assert other_language(text, ("en",)) == "de"


@given(text=st.text(max_size=200))
def test_no_text_breaks_it(text: str) -> None:
    prose_of(text)
    other_language(text, ("en",))


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("py3langid"):
            raise ImportError(name)
        return original(name, *args, **options)

    languages._identifier.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        MissingExtraError, match=r"the filter rule language needs the package py3langid\. Install it: .*\[scorers\]'"
    ):
        other_language(OTHERS["fr"], ("en",))
