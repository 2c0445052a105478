"""The built-in scorers: pure functions of a reference and an answer that never raise, whatever the text.

Each returns 1.0 for right, 0.0 for wrong, and None where it cannot tell: no reference, or an answer of which it can make
nothing. Several right answers are separated by ``|`` in the reference.
"""

import re
import unicodedata

from distill_pipeline.scoring.numbers import Quantity, final_part, quantities
from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.scoring.text import ALTERNATIVES_SEPARATOR, contains_phrase, normalize_words

NO_REFERENCE = ScoreValue(None, "the prompt has no reference")

_SHOWN_CHARS = 80
_ROUNDING = 1e-6
_QUOTES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc", "'") | dict.fromkeys("\u201c\u201d", '"'))
_EDGES = " \t\r\n\"'`*_.!?,;:"


def contains_answer(reference: str | None, answer: str) -> ScoreValue:
    """Whether the answer has the reference's words in a row, whatever case and punctuation."""
    if reference is None:
        return NO_REFERENCE
    if not normalize_words(reference):
        return ScoreValue(None, f"the reference {shown(reference)} has no word to look for")
    found = contains_phrase(answer, reference)
    return ScoreValue(float(found), "found" if found else f"not found: {shown(reference)}")


def exact(reference: str | None, answer: str, *, case_sensitive: bool = False) -> ScoreValue:
    """Whether the answer is the reference, but for spaces, quotes, emphasis and the full stop around it, and case."""
    if reference is None:
        return NO_REFERENCE
    given = _trimmed(answer, case_sensitive)
    right = given in {_trimmed(part, case_sensitive) for part in reference.split(ALTERNATIVES_SEPARATOR)} - {""}
    return ScoreValue(float(right), "equal" if right else f"{shown(answer)} is not {shown(reference)}")


def numeric(reference: str | None, answer: str, *, relative_tolerance: float | None = None, pick: str = "last") -> ScoreValue:
    """Whether the answer's number is the reference's. A marked answer (``\\boxed{}``, ``####``) goes before ``pick``.

    Args:
        relative_tolerance: largest difference, as a share of the larger number; None is none between whole numbers, and a
            millionth where either has decimals.
        pick: ``last``, ``first`` or ``any`` number of the answer.
    """
    if reference is None:
        return NO_REFERENCE
    wanted = [number for part in reference.split(ALTERNATIVES_SEPARATOR) if (number := _only_number(part)) is not None]
    if not wanted:
        return ScoreValue(None, f"the reference {shown(reference)} is not one number")
    marked = final_part(answer)
    found = quantities(answer if marked is None else marked) or quantities(answer)
    if not found:
        return ScoreValue(None, "the answer has no number")
    chosen = {"last": found[-1:], "first": found[:1]}.get(pick, found)
    verdicts = [
        ours.equals(theirs, _tolerance(ours, theirs) if relative_tolerance is None else relative_tolerance)
        for ours in wanted
        for theirs in chosen
    ]
    if True in verdicts:
        return ScoreValue(1.0, "equal")
    if None in verdicts:
        return ScoreValue(None, f"the units of {shown(reference)} and of the answer differ in kind")
    return ScoreValue(0.0, f"{_number(chosen[-1])} is not {shown(reference)}")


def _tolerance(ours: Quantity, theirs: Quantity) -> float:
    """None between whole numbers: 10000001 is not 10000000."""
    return 0.0 if ours.value.denominator == theirs.value.denominator == 1 else _ROUNDING


def multiple_choice(reference: str | None, answer: str, *, letters: str = "ABCDE") -> ScoreValue:
    """Whether the letter an answer chooses is the reference's; unknown where it chooses none or contradicts itself."""
    if reference is None:
        return NO_REFERENCE
    wanted = {letter for part in reference.split(ALTERNATIVES_SEPARATOR) if (letter := _leading_letter(part, letters))}
    if not wanted:
        return ScoreValue(None, f"the reference {shown(reference)} begins with none of the letters {letters}")
    chosen = chosen_letter(answer, letters)
    if chosen is None:
        return ScoreValue(None, "the answer chooses no letter")
    return ScoreValue(float(chosen in wanted), f"chose {chosen}")


def regex(
    reference: str | None, answer: str, *, pattern: str, group: int | None = None, ignore_case: bool = False
) -> ScoreValue:
    """Without ``group``: whether the pattern occurs. With it: whether that group of the last match is the reference."""
    matches = list(re.finditer(pattern, answer, (re.IGNORECASE if ignore_case else 0) | re.MULTILINE))
    if group is None:
        return ScoreValue(float(bool(matches)), "matched" if matches else "no match")
    if reference is None:
        return NO_REFERENCE
    if not matches:
        return ScoreValue(None, "no match in the answer")
    return exact(reference, matches[-1].group(group) or "", case_sensitive=not ignore_case)


def _only_number(reference: str) -> Quantity | None:
    """The number a reference stands for: the marked one, or the only one."""
    marked = final_part(reference)
    found = quantities(reference if marked is None else marked)
    return found[0] if len(found) == 1 else None


def _leading_letter(text: str, letters: str) -> str | None:
    found = re.match(rf"\s*[(\[*]*([{letters}])(?![A-Za-z'])", text) or re.fullmatch(
        rf"\s*[(\[]?([{letters.lower()}])[)\].:]?\s*", text
    )
    return found[1].upper() if found else None


def chosen_letter(answer: str, letters: str) -> str | None:
    """The letter an answer settles on, by the clearest sign it gives."""
    marked = final_part(answer)
    if marked is not None and (letter := _leading_letter(marked.replace("\\text{", ""), letters)):
        return letter
    one = rf"[(\[*\"']{{0,4}}([{letters}])(?![A-Za-z'])"
    lead = r"(?i:\b(?:answer|choice|option)\b(?:\s(?:choice|option))?(?:\s+is)?(?:\s+the)?\s*:?\s*(?:option\s+|choice\s+)?)"
    said = re.findall(lead + one, answer)
    if said:
        return str(said[-1])
    start = re.match(rf"\s*[(\[*]{{0,4}}([{letters}])(?:[)\].:*]|\s*$)", answer)
    if start:
        return start[1] if _named_letters(answer.lstrip().split("\n")[0], letters) <= {start[1]} else None
    if (alone := _leading_letter(answer, letters)) and len(answer.split()) == 1:
        return alone
    named = _named_letters(answer, letters)
    return named.pop() if len(named) == 1 else None


def _named_letters(text: str, letters: str) -> set[str]:
    """Letters that stand as options in a text, such as (B) or B., but for those it says it is not."""
    option = rf"(?<!not )[(\[]([{letters}])[)\]]|(?<!not )\b([{letters}])[).](?=\s|$)"
    return {first or second for first, second in re.findall(option, text)}


def _trimmed(text: str, case_sensitive: bool) -> str:
    plain = unicodedata.normalize("NFKC", text.translate(_QUOTES))
    plain = " ".join(plain.split()).strip(_EDGES)
    return plain if case_sensitive else plain.casefold()


def shown(text: str) -> str:
    """A text in one short line, quoted, for a detail."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 3] + "...")


def _number(quantity: Quantity) -> str:
    try:
        value = f"{float(quantity.value):g}"
    except OverflowError:
        value = "a very large number"
    return f"{value}{'%' if quantity.is_percent else ''}{' ' + quantity.unit if quantity.unit else ''}"
