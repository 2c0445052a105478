"""Mathematical answers as text: where an answer stands in what a model wrote, and one way of writing it.

Decided: a text is never searched for a number that happens to fit. The answer is what the text marks (a box, a ``####``
line, "the answer is"), else what its last line states; where the text goes on to say something else, there is no answer.
"""

import re
import unicodedata

from distill_pipeline.scoring.numbers import Quantity, is_unit, phrases, quantities

MAX_ANSWER_CHARS = 500

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{}$\\]+)")
_BETWEEN_BOXES = re.compile(r"[\s$,;]*(?:\\text\{)?\s*(?:and|or)?\s*\}?[\s$,;]*")
_SAID = re.compile(r"\banswers?\b[\s*_]*(?:is|are|[:=])[\s*_:]*", re.IGNORECASE)
_REASON = re.compile(r"(?<=[^\s\d])\.\s|(?<=\d)\.(?!\d)|\n|,?\s(?:because|since|which|as|so|where|for)\s|[;?!](?:\s|$)")
_SPAN = re.compile(r"\$\$(.+?)\$\$|(?<![\\\d])\$([^$\n]+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_GLUE = re.compile(r"\s*(?:,|and|or|,\s*and|,\s*or)\s*")
_TAIL_CHARS = 2_000
_UNSURE = re.compile(
    r"[\\^=?]|n't\b|\b(?:not?|none|neither|or|than|maybe|perhaps)\b|"
    r"\b(?:about|at least|at most|around|approximately|over|under|nearly|almost)\b"
)
_BOLD = re.compile(r"(?<![\w)*])\*\*(?=\S)([^*\n]+)(?<=\S)\*\*(?![\w*])")
_LEAD = re.compile(r"(?:so|thus|hence|therefore|then|finally)\b[,:]?\s*", re.IGNORECASE)

_REPLACED = {
    "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u00f7": "/", "\u03c0": r"\pi ",
    "\u221e": r"\infty ",
    "\u222a": r"\cup ", "\u00b0": "", "\u00b1": r"\pm ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2208": r"\in ",
    "\u221a": r"\sqrt",
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\left": "", "\\right": "", "\\displaystyle": "",
    "\\leq": "\\le", "\\geq": "\\ge", "\\!": "", "{,}": ",", "\\$": "$", "**": "^", "\\operatorname": "", "\\mathbf": "",
    "\\approx": "", "\\lbrace": "\\{", "\\rbrace": "\\}", "\\\\{": "\\{", "\\div": "/", "\\quad": " ", "\\ldotp": ".",
}  # fmt: skip
_POWERS = str.maketrans({"\u00b2": "^2", "\u00b3": "^3", "\u2074": "^4", "\u2044": "/"})
_FULL_UNITS = {"m": "meters", "s": "seconds", "g": "grams", "h": "hours", "l": "liters", "L": "liters"}
_WORDED = re.compile(r"\\(?:text|mathrm|textrm|textbf|mbox|rm|textit|mathit)\s*\{([^{}]*)\}")
_SHORT_FRAC = re.compile(r"\\frac\s*(?:(\d)|\{([^{}]*)\})\s*(?:(\d)|\{([^{}]*)\})")
_PLAIN_FRAC = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")
_FUNCTIONS = re.compile(
    r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|cot|sec|csc|ln|log|exp|pi|infty|infinity|arcsin|arccos|arctan)(?![A-Za-z])"
)
_PLAIN = re.compile(
    r"[-+]?\s?[$\u20ac\u00a3\u00a5]?\s?[-+]?\s?[\d.,'\u00a0\u2009\u202f]*(?:\d|\s\d)(?:\s?\d+)?(?:\.\d*)?(?:\s?/\s?\d+|\s\d+\s?/\s?\d+)?"
    r"(?:[eE][-+]?\d{1,3}|\s?(?:\\times|\\cdot|x|\*)\s?10\s?\^\s?\{?-?\d{1,3}\}?)?\s?(?:\\?%)?"
    r"(?P<unit>(?:\s?(?:[A-Za-z]{2,20}|/)\.?){0,4}|\s[mghsLl])(?:\s?\^\s?\{?[23]\}?)?"
)
_TRAILING_UNIT = re.compile(
    r"\s+(?:(?:square|cubic|sq)\.?\s+)?(?:(?P<known>units?)|(?P<word>[A-Za-z]{2,12}))\s*(?:\^\s*\{?[23]\}?)?$"
)
_NO_UNIT = re.compile(
    r"\b(?:squared|cubed|factorial|choose|half|halves|thirds?|fourths?|times|plus|minus|or|and|to|of|than|not|mod|base)\b"
)


def final_answer(text: str) -> str | None:
    """The part of a text that states its answer, at most ``MAX_ANSWER_CHARS`` long; None where it states none clearly."""
    found = _boxed(text)
    if found is None:
        found = _after_hashes(text) or _said(text[-_TAIL_CHARS:])
    if found is None and _SAID.search(text[-_TAIL_CHARS:]) is None:
        found = _last_line(text[-_TAIL_CHARS:])
    return found if found and found.strip() and len(found) <= MAX_ANSWER_CHARS else None


def _boxed(text: str) -> str | None:
    """What the last box holds (or the last boxes, where only "and" parts them); an empty text where that is unclear."""
    starts = list(_BOX.finditer(text, max(0, text.rfind("\\boxed") - _TAIL_CHARS, text.rfind("\\fbox") - _TAIL_CHARS)))
    if not starts:
        return None
    boxes = [(match.start(), *_box_content(text, match)) for match in starts]
    *_, (start, content, end) = boxes
    after = text[end:]
    said = _SAID.search(after)
    if end < 0 or (said and standard_form(content) not in standard_form(after[said.end() :][:_TAIL_CHARS])):
        return ""
    joined = [content]
    for earlier_start, earlier, earlier_end in reversed(boxes[:-1]):
        if earlier_end < 0 or not _BETWEEN_BOXES.fullmatch(text, earlier_end, start):
            break
        joined.insert(0, earlier)
        start = earlier_start
    return ", ".join(joined)


def _box_content(text: str, match: re.Match[str]) -> tuple[str, int]:
    """A box's content and the place behind it, -1 where the box is never closed."""
    if match[1] != "{":
        return match[1], match.end()
    depth = 1
    for end in range(match.end(), min(len(text), match.end() + 4 * MAX_ANSWER_CHARS)):
        depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
        if depth == 0:
            return text[match.end() : end], end + 1
    return "", -1


def _after_hashes(text: str) -> str | None:
    _, mark, after = text.rpartition("####")
    line, _, rest = after.strip().partition("\n")
    return line.strip() if mark and not rest.strip() else None


def _said(tail: str) -> str | None:
    """What follows the last "answer is" or "answer:", unless more numbers follow behind it."""
    matches = list(_SAID.finditer(tail))
    if not matches:
        return None
    after = tail[matches[-1].end() :]
    if span := _SPAN.match(after):
        return _spans(after, span)
    cut = _REASON.search(after)
    found, rest = (after[: cut.start()], after[cut.end() :]) if cut else (after, "")
    is_reason = cut is not None and cut.group().strip(" ,").isalpha()
    return _bare(found) if not re.search(r"\d", rest) or _repeats(found, rest, is_reason) else None


def _repeats(found: str, rest: str, is_reason: bool) -> bool:
    """Whether all numbers of the rest are the answer's own; of a reason, the last one."""
    ours, theirs = quantities(found), quantities(rest)
    theirs = theirs[-1:] if is_reason else theirs
    return len(ours) == 1 and all(number.equals(ours[0], 0.0) for number in theirs)


def _spans(after: str, first: re.Match[str]) -> str | None:
    """Spans of mathematics that only commas and "and" part; none where other ones follow."""
    found, end = [_inner(first)], first.end()
    while (glue := _GLUE.match(after, end)) and (more := _SPAN.match(after, glue.end())):
        found.append(_inner(more))
        end = more.end()
    rest = re.split(r"\n\s*\n", after[end:])[0]
    unit = re.match(r"\s*([A-Za-z]{2,12}|\\?%)(?=[\s.,!]|$)", rest)
    known = unit is not None and len(found) == 1 and bool(quantities(f"1 {unit[1]}")[0].unit or "%" in unit[1])
    return (
        None if _SPAN.search(rest) or re.search(r"\d", rest) else ", ".join(found) + (f" {unit[1]}" if unit and known else "")
    )


def _inner(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None)


def _last_line(tail: str) -> str | None:
    """The last line's one formula or one number, or what stands behind its last equals sign."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    if not lines or len(lines[-1]) > MAX_ANSWER_CHARS:
        return None
    line = _bare(_LEAD.sub("", lines[-1], count=1))
    if spans := list(_SPAN.finditer(line)):
        return _spans(line[spans[-1].start() :], _SPAN.match(line, spans[-1].start()) or spans[-1]) if len(spans) == 1 else None
    if is_expression(standard_form(line)) or (len(lines) == 1 and is_wordy(line) and len(line.split()) <= 3):
        return line
    stated = _bare(re.split(r"=|\bis\b|\bare\b", line)[-1])
    if stated != line and _PLAIN.fullmatch(standard_form(stated)):
        return stated
    numbers = phrases(line)
    return numbers[0] if len(numbers) == 1 and not _UNSURE.search(line) else None


def _bare(text: str) -> str:
    return _BOLD.sub(r"\1", text.replace("`", "")).strip().rstrip(".,;:!*_ ").strip()


def standard_form(text: str) -> str:
    """One way of writing the same mathematics: LaTeX without layout, units as words, no dollar signs around it."""
    form = text.strip()
    while (span := _SPAN.fullmatch(form)) is not None:
        form = _inner(span).strip()
    form = form.replace("\\$", "$")
    for written, meant in _REPLACED.items():
        form = form.replace(written, meant)
    form = _vulgar(form).translate(_POWERS)
    form = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree\b|\bdegrees?\b", "", form)
    form = re.sub(r"(?<=\d)\\[,; ](?=\d{3}(?!\d))", "", form)
    form = re.sub(r"(?<!\\)\\[,;: ]|~", " ", form)
    if re.fullmatch(r"\d{1,3}(?: \d{3})+", form):
        form = form.replace(" ", "")
    form = re.sub(r"\\(begin|end)\{[bB]matrix\}", r"\\\1{pmatrix}", form)
    form = _WORDED.sub(lambda match: f" {_FULL_UNITS.get(match[1].strip(), match[1].strip())} ", form)
    form = re.sub(r"(?<=\d) ([mghsLl])(?=\s*$|\s*\^)", lambda match: f" {_FULL_UNITS[match[1]]}", form)
    form = _SHORT_FRAC.sub(lambda match: rf"\frac{{{match[1] or match[2]}}}{{{match[3] or match[4]}}}", form)
    form = re.sub(r"\\sqrt\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", form)
    form = _FUNCTIONS.sub(lambda match: "\\" + {"infinity": "infty"}.get(match[1], match[1]) + " ", form)
    form = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", form)
    return " ".join(form.split()).rstrip(" .,;:").lstrip(" ,;:")


def _vulgar(text: str) -> str:
    """Signs such as ``\u00bd`` as fractions, set apart from the number before them."""
    if text.isascii():
        return text
    return "".join(
        f" {unicodedata.normalize('NFKC', sign)}" if unicodedata.decomposition(sign).startswith("<fraction>") else sign
        for sign in text
    )


def parted_from_unit(form: str) -> tuple[str, str | None]:
    """A text in standard form without the unit at its end, and the unit's name in lower case."""
    match = _TRAILING_UNIT.search(form)
    if match is None or not (match["known"] or is_unit(match["word"])):
        return form, None
    return form[: match.start()], " ".join(match.group().lower().split()).replace("{", "").replace("}", "")


def as_quantity(form: str) -> Quantity | None:
    """The number (with its unit) that a text in standard form is, or None where it is more than that."""
    plain = _PLAIN_FRAC.sub(r" \1/\2", form).strip()
    plain = re.sub(r"^([-+])\s+", r"\1", plain)
    matched = _PLAIN.fullmatch(plain)
    if matched is None or _NO_UNIT.search(plain):
        return None
    found = quantities(plain)
    return found[0] if len(found) == 1 and re.search(r"\d", plain) else None


def is_expression(form: str) -> bool:
    """Whether a text in standard form is mathematics alone: a number with its unit, or without any word."""
    if as_quantity(form) is not None:
        return True
    rest = re.sub(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+|\b(?:and|or)\b", " ", form)
    return not re.search(r"[A-Za-z]{3}|\?|(?<![\d)])!|(?<![A-Za-z])(?!or\b)[A-Za-z]{2} ", rest) and bool(
        re.search(r"[\dA-Za-z]", form)
    )


def words_of(form: str) -> str:
    """A text in standard form as an answer in words: folded case, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", form).casefold().split())


def is_wordy(form: str) -> bool:
    """Whether a text in standard form holds words other than mathematical functions and no digit."""
    rest = re.sub(r"\\[A-Za-z]+", " ", form)
    return bool(re.search(r"[A-Za-z]{3}", rest)) and not re.search(r"\d", form)
