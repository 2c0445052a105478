"""Whether an answer is the reference's mathematics, however it is written.

Numbers are compared exactly here: as fractions, or to 30 digits; a decimal stands for an irrational or repeating number from
six significant digits on. Lists, sets, tuples and intervals are compared part by part. What is left (algebra, equations,
matrices) goes to math-verify, with its own time limits off: this runs in a process that is killed. math-verify is not asked
to find the answer, for it takes any box or number that fits, nor to compare numbers, for it rounds to six places.
An answer that cannot be read is unknown, never wrong.
"""

import logging
import re
from fractions import Fraction
from typing import Any

from distill_pipeline.errors import MissingExtraError
from distill_pipeline.scoring.expressions import (
    as_quantity,
    final_answer,
    is_expression,
    is_wordy,
    parted_from_unit,
    standard_form,
    words_of,
)
from distill_pipeline.scoring.numbers import Quantity, final_part
from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.scoring.scorers import NO_REFERENCE, shown

_SIGNIFICANT = Fraction(1, 10**6)
_DIGITS = 30
_TOO_LARGE = re.compile(r"\^\s*\{?[-(\s]*(?:\d{4,}|[^{}^]*\^)|\d{4,}\s*\)?\s*!|!\s*\)?\s*!|\^\s*\{[^{}]*\{|\d\s*\^[^,]*\d\s*!")
_ASSIGNED = re.compile(
    r"\s*(?P<name>[A-Za-z](?:_\{?\w+\}?)?(?:\([A-Za-z](?:,\s*[A-Za-z])*\))?)\s*(?:=|\\in\b)(?!=)\s*(?P<value>.+)"
)
_BASE = re.compile(r"(?P<digits>[0-9A-F]+)\s*_\s*\{?(?P<base>\d+)\}?")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def require_math_verify() -> None:
    """Raises MissingExtraError where math-verify is not installed."""
    try:
        import math_verify  # noqa: F401
    except ImportError as err:
        raise MissingExtraError.of("the scorer math", f"math-verify ({err})", "scorers") from err
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off, which they are to be
    _same_algebra("x^2 - 1", "(x - 1)(x + 1)")  # loads what the first row would wait for


def math(reference: str | None, answer: str) -> ScoreValue:
    """Whether what the answer states at its end equals the reference; the reference may be a full solution itself."""
    if reference is None:
        return NO_REFERENCE
    marked = final_part(reference)
    wanted = standard_form(reference if marked is None else marked)
    if not wanted:
        return ScoreValue(None, f"the reference {shown(reference)} is empty")
    stated = final_answer(answer)
    if stated is None:
        return ScoreValue(None, "the answer states no result clearly")
    given = standard_form(stated)
    if not given:
        return ScoreValue(None, "the answer states nothing")
    same = _equal(wanted, given)
    if same is None:
        return ScoreValue(None, f"cannot compare {shown(stated)} with {shown(wanted)}")
    return ScoreValue(float(same), "equal" if same else f"{shown(stated)} is not {shown(wanted)}")


def _equal(wanted: str, given: str) -> bool | None:
    """Whether two texts in standard form are the same; None where that cannot be told."""
    if _unspaced(wanted) == _unspaced(given):
        return True
    ours, theirs = as_quantity(wanted), as_quantity(given)
    if ours is not None and theirs is not None:
        return _same_quantity(ours, theirs)
    if (based := _same_based(wanted, given)) is not None:
        return based
    if _BASE.fullmatch(given) or re.search(r"(?<![_\d])\d+\s+\d", wanted + "," + given):
        return None
    (wanted, unit), (given, other_unit) = parted_from_unit(wanted), parted_from_unit(given)
    if unit and other_unit and unit.rstrip("s") != other_unit.rstrip("s"):
        return None
    if is_wordy(wanted) or is_wordy(given):
        return _same_words(wanted, given)
    wanted, given = _without_names(_plain_number(wanted), _plain_number(given))
    for split in (_pieces, _elements):
        left, right = split(wanted), split(given)
        if left is not None or right is not None:
            return _same_parts(left or ("", [wanted]), right or ("", [given]))
    if not is_expression(wanted) or not is_expression(given) or _TOO_LARGE.search(wanted) or _TOO_LARGE.search(given):
        return None
    return _same_algebra(wanted, given)


def _unspaced(form: str) -> str:
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", form)


def _plain_number(form: str) -> str:
    """A number without unit in digits alone, so that ``1e5`` is no product of letters."""
    quantity = as_quantity(form)
    if quantity is None or quantity.unit or quantity.is_percent:
        return form
    value = quantity.value
    if value.denominator != 1 and "/" not in form:
        return form  # a decimal stays one
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _same_quantity(ours: Quantity, theirs: Quantity) -> bool | None:
    """Exactly, but for a decimal that stands for a fraction whose decimals never end."""
    same = ours.equals(theirs, 0.0)
    if same is not False or _terminates(ours.value) == _terminates(theirs.value):
        return same
    exact, decimal = (theirs, ours) if _terminates(ours.value) else (ours, theirs)
    return exact.is_percent == decimal.is_percent and exact.unit == decimal.unit and _stands_for(decimal.value, exact.value)


def _stands_for(decimal: Fraction, exact: Fraction) -> bool:
    """Whether a decimal is a number rounded or cut to its own places, with six significant digits or more."""
    places = 0
    while (decimal * 10**places).denominator != 1 and places < _DIGITS:
        places += 1
    return abs(decimal - exact) <= min(Fraction(1, 10**places), _SIGNIFICANT * abs(exact))


def _terminates(value: Fraction) -> bool:
    rest = value.denominator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    return rest == 1


def _same_based(wanted: str, given: str) -> bool | None:
    """Numerals with their base as a subscript; a missing base is the reference's."""
    ours = _BASE.fullmatch(wanted)
    if ours is None:
        return None
    theirs = _BASE.fullmatch(given)
    if theirs is None:
        return ours["digits"] == given if re.fullmatch(r"[0-9A-F]+", given) else None
    try:
        return int(ours["digits"], int(ours["base"])) == int(theirs["digits"], int(theirs["base"]))
    except ValueError:
        return None


def _same_words(wanted: str, given: str) -> bool | None:
    if words_of(wanted) == words_of(given):
        return True
    return False if is_wordy(wanted) and is_wordy(given) and len(given.split()) <= 2 * len(wanted.split()) else None


def _without_names(wanted: str, given: str) -> tuple[str, str]:
    """Both sides without ``x =`` or ``x \\in``, unless they name different things."""
    ours, theirs = _ASSIGNED.fullmatch(wanted), _ASSIGNED.fullmatch(given)
    if ours and theirs and ours["name"] != theirs["name"]:
        return wanted, given
    one = ours or theirs
    if one and re.search(rf"(?<![\\A-Za-z]){re.escape(one['name'])}(?![A-Za-z])", one["value"].split(",")[0]):
        return wanted, given
    return (ours["value"] if ours and "=" not in ours["value"].split(",")[0] else wanted), (
        theirs["value"].split("=")[-1] if theirs and "," not in theirs["value"] else theirs["value"] if theirs else given
    )


def _pieces(form: str) -> tuple[str, list[str]] | None:
    """The parts of a union of sets."""
    parts = _split(form, r"\\cup\b")
    return ("{", parts) if len(parts) > 1 else None


def _elements(form: str) -> tuple[str, list[str]] | None:
    """The kind of a list (its brackets, none where it stands bare) and its elements; None for a single thing."""
    form = form.replace("\\{", "{").replace("\\}", "}").strip()
    kind = ""
    if form[:1] in _PAIRS and _closing(form) == len(form) - 1:
        inner = form[1:-1]
        parts = _split(inner, r",")
        if form[0] == "{" or len(parts) > 1:
            kind, form = form[0] if form[0] == "{" else form[0] + form[-1], inner
    elif form[:1] in "([" and form[-1:] in ")]" and len(_split(form[1:-1], ",")) == 2:
        kind, form = form[0] + form[-1], form[1:-1]
    parts = _split(form, r",\s*(?:and|or)\b|,|;|\b(?:and|or)\b")
    parts = [expanded for part in parts for expanded in _both_signs(part)]
    if len(parts) == 1 and kind in ("", "{"):
        return None
    return kind, parts


def _both_signs(part: str) -> list[str]:
    return [part.replace("\\pm", sign, 1) for sign in "+-"] if part.count("\\pm") == 1 else [part]


def _closing(form: str) -> int:
    depth = 0
    for place, sign in enumerate(form):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0:
            return place
    return -1


def _split(form: str, separator: str) -> list[str]:
    """Parts at separators that no bracket encloses; a comma before three digits belongs to the number."""
    parts, start, depth = [], 0, 0
    for match in re.finditer(rf"(?P<cut>{separator})|(?P<up>[(\[{{])|(?P<down>[)\]}}])", form):
        depth += bool(match["up"]) - bool(match["down"])
        if match["cut"] and depth == 0:
            if (
                match["cut"] == ","
                and re.search(r"(?<!\d)\d{1,3}$", form[start : match.start()])
                and re.match(r"\d{3}(?!\d)", form[match.end() :])
            ):
                continue
            parts.append(form[start : match.start()].strip())
            start = match.end()
    return [*parts, form[start:].strip()]


def _same_parts(ours: tuple[str, list[str]], theirs: tuple[str, list[str]]) -> bool | None:
    """Part by part: in any order for sets and bare lists, in this order and between these brackets for the rest."""
    kinds = {ours[0], theirs[0]} - {""}
    left, right = ours[1], theirs[1]
    if len(left) != len(right):
        return False
    if kinds <= {"{"}:
        return _matched(left, right)
    if len(kinds) == 2:
        return None if "{" in kinds else False
    verdicts = [_equal(a, b) for a, b in zip(left, right, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _matched(left: list[str], right: list[str]) -> bool | None:
    unsure = False
    rest = list(right)
    for part in left:
        verdicts = [_equal(part, other) for other in rest]
        if True in verdicts:
            del rest[verdicts.index(True)]
        elif None in verdicts:
            unsure = True
        else:
            return False
    return None if unsure else True


def _same_algebra(wanted: str, given: str) -> bool | None:
    gold, stated = _parsed(wanted), _parsed(given)
    if gold is None or stated is None:
        return None
    if (numbers := _same_number(gold, stated)) is not None:
        return numbers
    from math_verify import verify

    return bool(verify([gold], [stated], timeout_seconds=None, raise_on_error=True))


def _parsed(form: str) -> Any:
    """The sympy object of a text in standard form; None where there is none."""
    from math_verify import LatexExtractionConfig, parse

    found = parse(
        rf"$\boxed{{{form}}}$",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return found[0] if found else None


def _same_number(gold: Any, stated: Any) -> bool | None:
    """Whether two constants are equal; None where either is none."""
    from sympy import Abs, Expr, Float

    if not (isinstance(gold, Expr) and isinstance(stated, Expr)) or gold.free_symbols or stated.free_symbols:
        return None
    ours, theirs = gold.doit(), stated.doit()
    if not (ours.is_number and theirs.is_number) or not (ours.is_finite and theirs.is_finite):
        return None
    if ours.is_Rational and theirs.is_Rational:
        return bool(ours == theirs)
    for decimal, exact in ((ours, theirs), (theirs, ours)):
        if isinstance(decimal, Float):
            return _stands_for(Fraction(str(decimal)), Fraction(str(exact.evalf(_DIGITS))))
    size = max(Abs(ours).evalf(_DIGITS), Abs(theirs).evalf(_DIGITS))
    difference = Abs(ours - theirs).evalf(_DIGITS, chop=False)
    if not (size.is_Number and difference.is_Number):
        return None
    return bool(difference <= size * (10.0**-9 if ours.has(Float) or theirs.has(Float) else 10.0**-25))
