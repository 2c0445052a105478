"""Rows of JSONL, JSON, CSV and Parquet files, one at a time: a row that cannot be read costs itself and nothing else.

Decided: text is UTF-8 and nothing is guessed. In JSONL, CSV and Parquet a broken row is skipped and the next one read; in a
JSON list everything before the break is kept. Gave up: a CSV file with a quote that never closes loses the rows it swallows.
"""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

MAX_ROW_BYTES = 64 * 2**20
"""A longer row is bad: no prompt is that long, and a file without line ends must not fill the memory."""

_CHUNK_CHARS = 1 << 16
_PARQUET_ROWS = 512


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be used."""

    reason: str


Numbered = Iterator[tuple[int, "dict[str, Any] | Fault"]]
"""Line (of text files) or row number (of Parquet) from 1, or 0 for the file as a whole; and the row or its fault."""


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def read_jsonl(file: BinaryIO) -> Numbered:
    """One JSON object a line; blank lines are skipped."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES)
            yield number, Fault(f"a line longer than {MAX_ROW_BYTES:,} bytes")
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, _json_row(line)


def _json_row(line: bytes) -> dict[str, Any] | Fault:
    try:
        return _as_row(_DECODER.decode(line.decode("utf-8")))
    except UnicodeDecodeError as err:
        return Fault(f"not UTF-8: byte 0x{line[err.start]:02x} at position {err.start}")
    except (ValueError, RecursionError) as err:
        return Fault(f"not JSON: {str(err) or type(err).__name__}")


def _as_row(value: Any) -> dict[str, Any] | Fault:
    return value if isinstance(value, dict) else Fault(f"a row must be a JSON object, this is a {type(value).__name__}")


def read_json(file: BinaryIO) -> Numbered:
    """A JSON list of objects, read without holding the whole file; also JSON Lines under the name ``.json``."""
    start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    yield from read_jsonl(file) if start.startswith(b"{") else _JsonList(file).rows()


class _JsonList:
    """A window over the text of a JSON list that grows while an item is incomplete and forgets what was read."""

    def __init__(self, file: BinaryIO) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._file = file
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def rows(self) -> Numbered:
        try:
            if self._next_char() != "[":
                yield self._line, Fault("a JSON file must hold a list of objects")
                return
            self._at += 1
            while (char := self._next_char()) != "]":
                if char == "":
                    yield self._line, Fault("the JSON list does not end: the file was cut short")
                    return
                line, item = self._line, self._item()
                yield line, _as_row(item)
                if self._next_char() == ",":
                    self._at += 1
                elif self._next_char() != "]":
                    yield self._line, Fault("not JSON: expected , or ] after an item; the rest of the file is not read")
                    return
        except UnicodeDecodeError as err:
            yield self._line, Fault(f"not UTF-8 ({err.reason}); the rest of the file is not read")
        except (ValueError, RecursionError) as err:
            reason = getattr(err, "msg", None) or str(err) or type(err).__name__
            yield self._line, Fault(f"not JSON: {reason}; the rest of the file is not read")

    def _more(self, chars: int = _CHUNK_CHARS) -> None:
        data = self._file.read(chars)
        self._ended = not data
        self._text += self._decode(data, final=self._ended)

    def _next_char(self) -> str:
        """The next character that is no white space, without taking it; empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._line += self._text[self._at] == "\n"
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._text, self._at = "", 0
            self._more()

    def _item(self) -> Any:
        self._text, self._at = self._text[self._at :], 0
        while True:
            try:
                item, end = _DECODER.raw_decode(self._text)
            except json.JSONDecodeError:
                if self._ended or len(self._text) > MAX_ROW_BYTES:
                    raise
                self._more(max(_CHUNK_CHARS, len(self._text)))
                continue
            if end == len(self._text) and not self._ended:  # a number or word may go on in the next chunk
                self._more()
                if len(self._text) > end:
                    continue
            self._line += self._text.count("\n", 0, end)
            self._at = end
            return item


def read_csv(file: BinaryIO, delimiter: str = ",") -> Numbered:
    """A header line, then one row a record; quotes as in RFC 4180."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _csv_records(csv.reader(text, delimiter=delimiter, strict=True))
    finally:
        text.detach()  # the file is its owner's to close


def _csv_records(reader: Any) -> Numbered:
    header: list[str] | None = None
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as err:
            yield reader.line_num, Fault(f"not CSV: {err}")
            continue
        if not fields:
            continue
        if header is None:
            header = fields
            if len(set(header)) < len(header):
                yield reader.line_num, Fault(f"a column name stands twice in the header: {', '.join(header)}")
                return
        elif any("\udc80" <= char <= "\udcff" for field in fields for char in field):
            yield reader.line_num, Fault("not UTF-8")
        elif len(fields) != len(header):
            yield reader.line_num, Fault(f"{len(fields)} fields under a header of {len(header)}")
        else:
            yield reader.line_num, dict(zip(header, fields, strict=True))


def read_tsv(file: BinaryIO) -> Numbered:
    """The same with tabs."""
    return read_csv(file, delimiter="\t")


def read_parquet(file: BinaryIO) -> Numbered:
    """Rows of a Parquet file, a few hundred in memory at a time."""
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_PARQUET_ROWS):
            for row in _batch_rows(batch):
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as err:
        yield 0, Fault(f"not a readable Parquet file after {number:,} rows: {str(err).splitlines()[0]}")


def _batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Fault]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # one cell spoils the batch's conversion: take the rows one by one
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield Fault("not UTF-8")


READERS: dict[str, Callable[[BinaryIO], Numbered]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
"""The reader of each file name ending."""


def read_rows(file: BinaryIO, suffix: str) -> Numbered:
    """The rows of an open file by its name ending. An empty file and UTF-16 are one fault of the file as a whole."""
    head = file.read(4)
    file.seek(0)
    if not head:
        yield 0, Fault("the file is empty")
    elif suffix != ".parquet" and head[:2] in {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE}:
        yield 0, Fault("the file is UTF-16; save it as UTF-8")
    else:
        yield from READERS[suffix](file)
