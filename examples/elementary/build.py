"""Makes ``prompts.jsonl`` and ``heldout.jsonl`` from the fact tables in ``facts/``.

    python examples/elementary/build.py            writes both files
    python examples/elementary/build.py --check    writes nothing; exit status 1 if a committed file differs

A kind of question is a table of facts (subject, answer) and one template. The order of the rows is the order of
``TEMPLATES``, then of the table. A question whose answer already stands in it would be won by an echo, so that is refused.
"""

import argparse
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from distill_pipeline.prompts.split import split_of  # noqa: E402
from distill_pipeline.records import prompt_id  # noqa: E402
from distill_pipeline.scoring.text import contains_phrase  # noqa: E402

HOLDOUT_FRAC = 0.2
MAX_KIND_FRAC = 0.2

TEMPLATES = {
    "plural": "What is the plural of {subject}?",
    "past-tense": "What is the past tense of the verb {subject}?",
    "opposite": "What is the opposite of {subject}? One word.",
    "sum": "What is {subject}?",
    "capital": "What is the capital of {subject}?",
    "continent": "{subject} is on which continent?",
    "language": "What is the main language of {subject}? One word.",
    "nationality": "What is the nationality of a person from {subject}?",
    "city": "What is the country where {subject} is?",
    "landmark": "What country is {subject} in? One word.",
    "chemical-symbol": "What is the chemical symbol for {subject}?",
    "study-of": "What is the study of {subject} called?",
    "sides": "How many sides does {subject} have?",
}
"""The question of each kind, in the order of the file. Kinds and templates were chosen by the teacher's accuracy."""


def read_facts(kind: str) -> list[tuple[str, str]]:
    """The (subject, answer) pairs of a kind: from its table, or computed for sums."""
    if kind == "sum":
        return [(f"{a} + {b}", str(a + b)) for a in range(1, 10) for b in range(a, 10)]
    lines = (HERE / "facts" / f"{kind}.tsv").read_text(encoding="utf-8").splitlines()
    return [(subject, answer) for subject, answer in (line.split("\t") for line in lines[1:])]


def make_id(kind: str, subject: str) -> str:
    """The id of a question, as in ``capital-france``: the kind and the subject in plain lower-case letters and digits."""
    plain = unicodedata.normalize("NFKD", subject).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"^(the|an?) ", "", plain)
    return f"{kind}-" + re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def make_rows() -> Iterator[dict[str, str]]:
    """Every question, in order."""
    for kind, template in TEMPLATES.items():
        for subject, answer in read_facts(kind):
            prompt = template.format(subject=subject)
            prompt = prompt[0].upper() + prompt[1:]
            yield {"id": make_id(kind, subject), "prompt": prompt, "reference": answer, "kind": kind}


def check_rows(rows: list[dict[str, str]]) -> None:
    """Raises ValueError naming every doubled id or prompt, every answer that stands in its question, and a kind too large."""
    faults = [
        f"{column} {value!r} occurs {count} times"
        for column in ("id", "prompt")
        for value, count in Counter(row[column] for row in rows).items()
        if count > 1
    ]
    faults += [
        f"{row['id']}: the answer {row['reference']!r} stands in the question"
        for row in rows
        if contains_phrase(row["prompt"], row["reference"])
    ]
    faults += [
        f"kind {kind!r} has {count} of {len(rows)} questions; at most {MAX_KIND_FRAC:.0%} may be of one kind"
        for kind, count in Counter(row["kind"] for row in rows).items()
        if count > MAX_KIND_FRAC * len(rows)
    ]
    if faults:
        raise ValueError("The fact tables need mending:\n" + "\n".join(faults))


def is_heldout(row: dict[str, str]) -> bool:
    """Whether the pipeline's own rule holds this question out."""
    return split_of(prompt_id([{"role": "user", "content": row["prompt"]}]), HOLDOUT_FRAC) == "heldout"


def to_jsonl(rows: list[dict[str, str]]) -> bytes:
    """One JSON object a line, as UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def build() -> dict[str, bytes]:
    """The content of both files, by name."""
    rows = list(make_rows())
    check_rows(rows)
    return {"prompts.jsonl": to_jsonl(rows), "heldout.jsonl": to_jsonl([row for row in rows if is_heldout(row)])}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make prompts.jsonl and heldout.jsonl from the fact tables.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a committed file differs")
    is_check = parser.parse_args().check
    status = 0
    for name, content in build().items():
        path = HERE / name
        if is_check:
            if not path.is_file() or path.read_bytes() != content:
                print(f"{name} differs from the fact tables. Run: python examples/elementary/build.py", file=sys.stderr)
                status = 1
        else:
            path.write_bytes(content)
            print(f"{name}: {len(content.splitlines())} questions")
    return status


if __name__ == "__main__":
    sys.exit(main())
