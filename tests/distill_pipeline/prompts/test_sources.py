"""Laws of prompt sources: every malformed thing costs its own row, and nothing else."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_pipeline.errors import SourceError
from distill_pipeline.prompts.sources import BadRow, SourceRow, read_source, source_files
from distill_pipeline.prompts.spec import SourceSpec

GOOD = b'{"prompt": "What is the capital of France?", "reference": "Paris"}'


def resolve_in(folder: Path) -> Callable[[str], str]:
    return lambda path: path if "://" in path else str(folder / path)


def rows_of(folder: Path, path: str, **source: Any) -> list[SourceRow | BadRow]:
    return list(read_source(SourceSpec(path=path, license="cc0-1.0", **source), resolve_in(folder)))


BAD_LINES = {
    "torn": (b'{"prompt": "x', "not JSON"),
    "not an object": (b'["a"]', "must be a JSON object"),
    "nan": (b'{"prompt": "a", "x": NaN}', "NaN is not JSON"),
    "other encoding": (b'{"prompt": "caf\xe9"}', "not UTF-8: byte 0xe9"),
    "no column": (b'{"question": "x"}', "no column 'prompt' or 'messages'; columns here: question"),
    "empty": (b'{"prompt": "  "}', "the prompt is empty"),
    "null": (b'{"prompt": null}', "the prompt is empty"),
    "number": (b'{"prompt": 7}', "must be a list of messages"),
    "nul": (b'{"prompt": "a\\u0000b"}', "NUL"),
    "half a character": (b'{"prompt": "a\\ud800b"}', "half a character"),
    "half a character in metadata": (b'{"prompt": "a", "note": "\\ud800"}', "half a character"),
    "no messages": (b'{"messages": []}', "no messages"),
    "message without role": (b'{"messages": [{"content": "x"}]}', "message 0 must have a role"),
    "message of parts": (b'{"messages": [{"role": "user", "content": [{"text": "x"}]}]}', "message 0 must have"),
    "unknown role": (b'{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot'; known: system, user, assistant"),
    "late system": (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}', "may only come first",
    ),
    "answered already": (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}', "must be the user's",
    ),
    "reference of another shape": (b'{"prompt": "x", "reference": {"a": 1}}', "'reference' must be text"),
    "deep": (b'{"prompt": ' + b"[" * 100_000 + b"}", "not JSON"),
    "huge number": (b'{"prompt": "x", "n": ' + b"1" * 5000 + b"}", "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_costs_itself_only(name: str, tmp_path: Path) -> None:
    line, reason = BAD_LINES[name]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join([GOOD, line, b"", GOOD]))
    first, bad, last = rows_of(tmp_path, "p.jsonl")
    assert isinstance(first, SourceRow)
    assert isinstance(last, SourceRow)
    assert isinstance(bad, BadRow)
    assert (bad.file, bad.line) == ("p.jsonl", 2)
    assert reason in bad.reason


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"q": f"What is {i} plus {i}?", "a": str(2 * i), "topic": "sums", "level": f"{i}"} for i in range(5)]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress((tmp_path / "p.jsonl").read_bytes()))
    (tmp_path / "lines.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "p.jsonl").read_bytes())
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "p.csv").write_text("\n".join(["q,a,topic,level", *(f'"{r["q"]}",{r["a"]},sums,{r["level"]}' for r in rows)]))
    (tmp_path / "p.tsv").write_text("\n".join(["q\ta\ttopic\tlevel", *("\t".join(r.values()) for r in rows)]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    columns = {"prompt": "q", "reference": "a", "domain": "topic"}
    names = ("p.jsonl", "q.jsonl.gz", "lines.json", "p.json", "p.csv", "p.tsv", "p.parquet")
    read = [[row.fields for row in rows_of(tmp_path, name, columns=columns) if isinstance(row, SourceRow)] for name in names]
    assert [len(fields) for fields in read] == [5] * len(names)
    assert all(fields == read[0] for fields in read)
    assert (read[0][1].reference, read[0][1].domain, read[0][1].metadata) == ("2", "sums", '{"level":"1"}')


def test_a_json_list_is_read_in_pieces_and_keeps_what_stands_before_a_break(tmp_path: Path) -> None:
    items = ",\n".join(json.dumps({"prompt": f"{i} " + "word " * 3000}) for i in range(40))
    (tmp_path / "p.json").write_text(f"[\n{items},\n{{torn")
    rows = rows_of(tmp_path, "p.json")
    assert sum(isinstance(row, SourceRow) for row in rows) == 40
    assert rows[-1] == BadRow("p.json", 42, rows[-1].reason)  # type: ignore[union-attr]
    assert "the rest of the file is not read" in rows[-1].reason  # type: ignore[union-attr]


def test_bad_csv_records_cost_themselves_only(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b'prompt,reference\none,1\ntwo,2,3\ncaf\xe9,4\n"five\nlines",5\n')
    rows = rows_of(tmp_path, "p.csv")
    assert [row.line for row in rows] == [2, 3, 4, 6]
    assert [row.reason for row in rows if isinstance(row, BadRow)] == ["3 fields under a header of 2", "not UTF-8"]


def test_bad_bytes_in_a_parquet_text_cost_their_row_only(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")]
    )
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "p.parquet")
    rows = rows_of(tmp_path, "p.parquet")
    assert [isinstance(row, SourceRow) for row in rows] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.jsonl", b"", "the file is empty"),
        ("p.parquet", b"", "the file is empty"),
        ("p.parquet", b"PAR1 nonsense", "not a readable Parquet file"),
        ("p.csv", "prompt\nx\n".encode("utf-16"), "UTF-16"),
        ("p.json", b"7", "must hold a list"),
        ("p.csv", b"prompt,prompt\na,b\n", "stands twice in the header"),
        ("p.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:40], "cannot be read to its end"),
        ("p.csv", b"prompt\n", "hold no rows"),
    ],
)
def test_a_source_without_a_usable_row_names_file_line_and_reason(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match="has no usable row") as error:
        rows_of(tmp_path, name)
    assert reason in str(error.value)


def test_an_unusable_file_among_others_costs_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    bad, good = rows_of(tmp_path, "*.jsonl")
    assert bad == BadRow("a.jsonl", 0, "the file is empty")
    assert isinstance(good, SourceRow)


def test_folders_and_globs_name_files_as_the_experiment_would(tmp_path: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("data/b.jsonl", "data/deep/a.jsonl", "data/.hidden.jsonl", "data/README.md"):
        (tmp_path / name).write_bytes(GOOD)
    folder = source_files(SourceSpec(path="data", license="x"), resolve_in(tmp_path))
    assert list(folder) == ["data/b.jsonl", "data/deep/a.jsonl"]
    glob = source_files(SourceSpec(path="data/**/*.jsonl", license="x"), resolve_in(tmp_path))
    assert "data/deep/a.jsonl" in glob
    remote = source_files(SourceSpec(path=f"file://{tmp_path}/data/b.jsonl", license="x"), resolve_in(tmp_path))
    assert list(remote.values()) == [folder["data/b.jsonl"]]


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path: Path) -> None:
    (tmp_path / "set[1].jsonl").write_bytes(GOOD)
    assert len(rows_of(tmp_path, "set[1].jsonl")) == 1


@pytest.mark.parametrize("path", ["none.jsonl", "none/*.jsonl", "notes.txt", "nosuch://x/y.jsonl"])
def test_a_path_that_leads_nowhere_is_an_error_that_names_it(path: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match="prompt_pool source"):
        source_files(SourceSpec(path=path, license="x"), resolve_in(tmp_path))


def test_chat_prompts_references_and_ids_are_understood(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "kim"}]
    listed = [
        {"messages": messages, "reference": ["a", "b"], "id": 7},
        {"prompt": messages, "reference": 0.5},
        {"prompt": "x", "messages": [{"role": "assistant", "content": "old"}], "reference": True},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, listed)))
    first, second, third = (row.fields for row in rows_of(tmp_path, "p.jsonl") if isinstance(row, SourceRow))
    assert first.messages == second.messages == [messages[0], {"role": "user", "content": "Hi"}]
    assert (first.reference, first.source_id, second.reference, third.reference) == ("a|b", "7", "0.5", "true")
    assert json.loads(third.metadata) == {"messages": [{"role": "assistant", "content": "old"}]}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=60).filter(lambda data: b"\n" not in data), name=st.sampled_from(["p.jsonl", "p.csv"]))
def test_no_bytes_break_the_reader_or_the_line_before(junk: bytes, name: str, tmp_path: Path) -> None:
    good = GOOD if name == "p.jsonl" else b"prompt\ngood"
    (tmp_path / name).write_bytes(good + b"\n" + junk + b"\n")
    rows = rows_of(tmp_path, name)
    assert isinstance(rows[0], SourceRow)
    assert len(rows) <= 2 + junk.count(b"\r")
