"""Numbers in running text: signs, thousands separators, decimals, percent, fractions, powers of ten, magnitudes and units.

Decided: patterns take linear time and numbers of more than 40 digits are not read, so no text is slow or fails. Gave up:
decimal commas (``1,5`` is two numbers), numbers in words above twenty, and arithmetic.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2044": "/"})
_SEPARATOR = re.compile(r"(?<=\d)[,\u00a0\u2009\u202f'](?=\d{3}(?!\d))")
_FRAC = re.compile(r"\\[dt]?frac\s{0,4}\{\s{0,4}(\d{1,40})\s{0,4}\}\s{0,4}\{\s{0,4}(\d{1,40})\s{0,4}\}")
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+]?)(?P<currency>[$€£¥]?\s?)(?P<sign_2>-?)"
    r"(?:(?P<whole>\d{1,40})\s+)?(?<![\d/])(?P<over>\d{1,40})\s?/\s?(?P<under>\d{1,40})(?![\d/])"
    r"|(?<![\w.])(?P<minus>[-+]?)(?:[$€£¥]\s?)?(?P<minus_2>-?)(?P<digits>\d{1,40}(?:\.\d{1,40})?|\.\d{1,40})(?!\d)"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})(?!\w)|\s?(?:\*|x|\u00d7|\u00b7|\\times|\\cdot)\s?10\s?\^\s?\{?(?P<power>[-+]?\d{1,3})\}?"
    r"|\^\{?(?P<raised>\d{1,3})\}?)?"
)
_AFTER = re.compile(r"\s?(?P<percent>\\?%|percent\b)|\s?(?P<word>[A-Za-z]{1,12})\b")
_BOXED = "\\boxed{"
_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18,
    "nineteen": 19, "twenty": 20,
}  # fmt: skip
_IN_WORDS = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)
_MAGNITUDES = {"dozen": 12, "thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9, "bn": 10**9, "trillion": 10**12}
_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (quantity, Fraction(factor))
    for quantity, listed in {
        "length": {
            "mm": "0.001", "millimeter": "0.001", "millimetre": "0.001", "cm": "0.01", "centimeter": "0.01",
            "centimetre": "0.01", "m": "1", "meter": "1", "metre": "1", "km": "1000", "kilometer": "1000", "kilometre": "1000",
            "inch": "0.0254", "ft": "0.3048", "foot": "0.3048", "feet": "0.3048", "yard": "0.9144", "mile": "1609.344",
        },
        "mass": {
            "mg": "0.001", "g": "1", "gram": "1", "kg": "1000", "kilogram": "1000", "ton": "1000000", "tonne": "1000000",
        },
        "time": {
            "ms": "0.001", "s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60", "h": "3600", "hour": "3600",
            "day": "86400", "week": "604800",
        },
        "volume": {"ml": "0.001", "milliliter": "0.001", "l": "1", "liter": "1", "litre": "1"},
        "dollars": {"cent": "0.01", "dollar": "1"},
        "euros": {"euro": "1"},
        "pounds": {"pound": "1"},
        "yen": {"yen": "1"},
    }.items()
    for name, factor in listed.items()
}  # fmt: skip


_CURRENCIES = {"$": "dollar", "\u20ac": "euro", "\u00a3": "pound", "\u00a5": "yen"}


@dataclass(frozen=True)
class Quantity:
    """A number as it stands in a text. ``unit`` is a known unit's name, else None."""

    value: Fraction
    is_percent: bool = False
    unit: str | None = None

    def equals(self, other: "Quantity", relative_tolerance: float) -> bool | None:
        """Whether two quantities agree; None where their units measure different things.

        Units of one kind are converted, a missing unit is no difference, and 50 % is both 50 and 0.5.
        """
        ours, theirs = self.value, other.value
        if self.unit and other.unit:
            (kind, factor), (other_kind, other_factor) = _UNITS[self.unit], _UNITS[other.unit]
            if kind != other_kind:
                return None
            ours, theirs = ours * factor, theirs * other_factor
        if _close(ours, theirs, relative_tolerance):
            return True
        if self.is_percent == other.is_percent:
            return False
        share, plain = (ours / 100, theirs) if self.is_percent else (theirs / 100, ours)
        return _close(share, plain, relative_tolerance)


def _close(a: Fraction, b: Fraction, relative_tolerance: float) -> bool:
    return abs(a - b) <= Fraction(relative_tolerance) * max(abs(a), abs(b))


def quantities(text: str) -> list[Quantity]:
    """All numbers of a text, in order; where it has none in digits, its numbers from zero to twenty in words."""
    plain = _plain(text)
    found = [quantity for match in _NUMBER.finditer(plain) if (quantity := _quantity(match, plain)) is not None]
    return found or [Quantity(Fraction(_WORDS[match.group().lower()])) for match in _IN_WORDS.finditer(plain)]


def phrases(text: str) -> list[str]:
    """The numbers of a text as they stand there, each with the percent sign or the word behind it."""
    plain = _plain(text)
    found = [match for match in _NUMBER.finditer(plain) if _quantity(match, plain) is not None]
    ends = [after.end() if (after := _AFTER.match(plain, match.end())) else match.end() for match in found]
    return [plain[match.start() : end].strip() for match, end in zip(found, ends, strict=True)]


def is_unit(word: str) -> bool:
    """Whether a word is the name of a unit, in the singular or plural."""
    return _unit(word.lower()) is not None


def final_part(text: str) -> str | None:
    """What a text marks as its answer: the last ``\\boxed{...}``, else what follows the last ``####``; None if neither."""
    start = text.rfind(_BOXED)
    if start >= 0:
        depth = 1
        for end in range(start + len(_BOXED), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + len(_BOXED) : end]
    _, mark, after = text.rpartition("####")
    return after.strip().split("\n")[0] if mark and after.strip() else None


def _plain(text: str) -> str:
    """One form of digits, signs and fractions. A vulgar fraction is set apart, so that 1½ does not become 11/2."""
    plain = _SEPARATOR.sub("", text.replace("{,}", ","))
    if not plain.isascii():
        parted = (f" {c}" if unicodedata.decomposition(c).startswith("<fraction>") else c for c in plain)
        plain = unicodedata.normalize("NFKC", "".join(parted)).translate(_MINUS)
    return _FRAC.sub(r" \1/\2", plain.replace("\\$", "$").replace("**", " ").replace("\\!", ""))


def _quantity(match: re.Match[str], text: str) -> Quantity | None:
    if match["under"] is not None:
        if int(match["under"]) == 0:
            return None
        value = Fraction(int(match["over"]), int(match["under"])) + int(match["whole"] or 0)
        sign = match["sign"] + match["sign_2"]
    else:
        value = Fraction(match["digits"] if match["digits"][0] != "." else "0" + match["digits"])
        value *= Fraction(10) ** int(match["exponent"] or match["power"] or 0)
        value **= int(match["raised"] or 1)
        sign = match["minus"] + match["minus_2"]
    after = _AFTER.match(text, match.end())
    word = (after["word"] or "").lower() if after else ""
    value *= _MAGNITUDES.get(word, 1)
    unit = _unit(word) or _CURRENCIES.get(match.group().lstrip("+- ")[:1])
    return Quantity(-value if "-" in sign else value, bool(after and after["percent"]), unit)


def _unit(word: str) -> str | None:
    return next((name for name in (word, word.removesuffix("s"), word.removesuffix("es")) if name in _UNITS), None)
