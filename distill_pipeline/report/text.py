"""Text that a model wrote, made safe to show: no markup, no invisible characters, no endless page.

HTML is escaped by the template engine; here control and direction characters become visible ones, long texts are cut with
the number of characters that are missing, and Markdown's own characters are escaped.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

UNKNOWN = "\u2013"
"""What stands where a number is unknown: an en dash."""

SHOWN_CHARS = 1200
"""Longest text of a sample on a page: about a screen of a phone."""

_INVISIBLE_KEPT = {"\n", "\t"}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~>:@/])")
_LINE = re.compile(r"\r\n|[\r\n\u0085\u2028\u2029\v\f]")


def visible_text(value: Any, limit: int = SHOWN_CHARS) -> str:
    """Text with every character visible: controls as their pictures (NUL is U+2400), others as ``<U+202E>``; cut at ``limit``.

    >>> visible_text("a\\x00b\\u202ec")
    'a\u2400b\u27e8U+202E\u27e9c'
    """
    text = "" if value is None else str(value)
    head = "".join(_visible_character(character) for character in text[:limit])
    return head if len(text) <= limit else f"{head} … ({len(text) - limit:,} more characters)"


def one_line(value: Any, limit: int = 160) -> str:
    """Visible text on one line; line breaks become a return sign."""
    return visible_text(_LINE.sub(" ⏎ ", "" if value is None else str(value)), limit).replace("\t", " ").strip()


def markdown_text(value: Any, limit: int = 160) -> str:
    """One line that no Markdown renderer reads as markup, a link, a table cell's end or HTML."""
    line = one_line(value, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # The dot and the colon are escaped too: some renderers make links of bare addresses.
    return _MARKDOWN.sub(r"\\\1", line).replace("www", "ww\u200bw")


def _visible_character(character: str) -> str:
    if character in _INVISIBLE_KEPT:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}:
        return f"⟨U+{code:04X}⟩"
    return character


# --- numbers ---------------------------------------------------------------------------------------------------------


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; a dash where it is unknown.

    >>> percent(0.5333), percent(None) == UNKNOWN
    ('53.3 %', True)
    """
    return UNKNOWN if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    """A number with a few significant digits; whole numbers with thousands separators; a dash where it is unknown.

    >>> number(1234567), number(0.04217), number(None) == UNKNOWN
    ('1,234,567', '0.0422', True)
    """
    if value is None:
        return UNKNOWN
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def compact(value: float | None) -> str:
    """A large count in three digits.

    >>> compact(134515008), compact(1520), compact(999)
    ('134.5M', '1.5K', '999')
    """
    if value is None:
        return UNKNOWN
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.1f}{unit}"
    return number(value)


def duration(seconds: float | None) -> str:
    """Seconds as people say them.

    >>> duration(42.4), duration(312), duration(8000)
    ('42 s', '5 min 12 s', '2 h 13 min')
    """
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def metric_text(value: float | None, *, is_share: bool) -> str:
    """A metric's value: a percentage for shares, a number for the rest."""
    return percent(value) if is_share else number(value)


def signed(value: float, *, is_share: bool) -> str:
    """A difference with its sign (a true minus), in percentage points where it is one of shares.

    >>> signed(0.05, is_share=True), signed(0.25, is_share=False)
    ('+5.0', '+0.25')
    """
    return (f"{100 * value:+.1f}" if is_share else f"{value:+.3g}").replace("-", "\u2212")


def interval_text(interval: Mapping[str, Any], *, is_share: bool = True) -> str:
    """``53.3 % (47.0 to 59.5)``, with a dash for the word; the value alone where there is no interval."""
    said, ends = metric_text(interval.get("value"), is_share=is_share), interval_range(interval, is_share=is_share)
    return f"{said} ({ends})" if ends and interval.get("value") is not None else said


def interval_range(interval: Mapping[str, Any], *, is_share: bool) -> str:
    """The two ends of an interval, or nothing where there is none."""
    ends = interval.get("low"), interval.get("high")
    if None in ends:
        return ""
    return f" {UNKNOWN} ".join(metric_text(end, is_share=is_share).removesuffix(" %") for end in ends)
