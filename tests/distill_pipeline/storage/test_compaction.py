"""Laws of merging a generation store's small parts: nothing is lost, doubled or reordered, whoever is at work or killed."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distill_pipeline.errors import IntegrityError
from distill_pipeline.generation.budget import Usage
from distill_pipeline.generation.protocol import Completion
from distill_pipeline.generation.requests import request_key
from distill_pipeline.generation.store import GenerationStore
from distill_pipeline.storage import compaction
from distill_pipeline.storage.parts import part_files

KEYS = [request_key("family", f"prompt{i}", 0) for i in range(64)]


def opened(root: Path, **options: Any) -> GenerationStore:
    return GenerationStore(root, "family", {"temperature": 0.7}, max_tokens=32, **options)


def answer(key: str, text: str = "Paris") -> Completion:
    return Completion(key, text, (), "stop", 11, 5, -1.5)


def fill(root: Path, keys: list[str], text: str = "Paris") -> GenerationStore:
    """One part an answer, each paid."""
    store = opened(root)
    for key in keys:
        store.add([answer(key, text)])
        store.pay(Usage(11, 5, 1))
        store.flush()
    return store


def test_many_small_parts_become_one_with_the_same_answers_and_the_same_bill(tmp_path: Path) -> None:
    store = fill(tmp_path, KEYS[:20])
    before = opened(tmp_path).read(KEYS)
    store.compact()
    assert len(part_files(store.folder)) == 1
    for reader in (store, opened(tmp_path)):
        assert reader.read(KEYS) == before
        assert reader.paid == Usage(20 * 11, 20 * 5, 20)
    assert list(before) == KEYS[:20]


def test_few_parts_and_large_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path, KEYS[: compaction.MIN_PARTS - 1])
    names = part_files(store.folder)
    store.compact()
    assert part_files(store.folder) == names
    fill(tmp_path, KEYS[20:40])
    monkeypatch.setattr(compaction, "SMALL_BYTES", 1)
    store.compact()
    assert len(part_files(store.folder)) == compaction.MIN_PARTS - 1 + 20


def test_a_merged_part_is_not_too_large_for_those_who_read_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path, KEYS[:40])
    size = part_files(store.folder)[0].stat().st_size
    monkeypatch.setattr(compaction, "LARGE_BYTES", size * 20 + 500)
    store.compact()
    assert 2 <= len(part_files(store.folder)) <= 3
    assert opened(tmp_path).has(KEYS[:40]).all()


def test_a_merged_part_has_not_too_many_rows_for_memory_however_small_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill(tmp_path, KEYS[:40])
    monkeypatch.setattr(compaction, "LARGE_ROWS", 18)
    store.compact()
    assert [pq.read_metadata(part).num_rows for part in part_files(store.folder)] == [18, 18, 1, 1, 1, 1]
    store.compact()
    assert opened(tmp_path).read(KEYS[:40]).keys() == set(KEYS[:40])


def test_a_merged_part_is_written_and_read_a_piece_at_a_time_however_small_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill(tmp_path, KEYS[:20])
    before = store.read(KEYS)
    monkeypatch.setattr(compaction, "PIECE_ROWS", 6)
    store.compact()
    (part,) = part_files(store.folder)
    about = pq.read_metadata(part)
    assert [about.row_group(number).num_rows for number in range(about.num_row_groups)] == [6, 6, 6, 2]
    assert opened(tmp_path).read(KEYS) == before
    read, pieces = pq.ParquetFile.read_row_group, []

    def counted(file: Any, number: int, **options: Any) -> Any:
        pieces.append(number)
        return read(file, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert store.read([KEYS[13], KEYS[19], KEYS[12]]).keys() == {KEYS[13], KEYS[19], KEYS[12]}
    assert pieces == [2, 3]


def test_parts_that_another_process_takes_away_meanwhile_are_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path, KEYS[:20])
    listed = part_files(store.folder)
    for part in listed[:10]:
        part.unlink()
    monkeypatch.setattr(compaction, "part_files", lambda folder: listed)
    assert not compaction.merge_small_parts(store.folder, what="store", merge_notes=lambda notes: {}, min_parts=11)


def test_of_two_answers_the_first_stays_first_also_past_a_part_that_is_not_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "SMALL_BYTES", 6000)
    big = opened(tmp_path)
    big.add([answer(key, "first " + key * 8) for key in KEYS])
    big.flush()
    fill(tmp_path, KEYS[:20], "second")
    store = opened(tmp_path)
    before = store.read(KEYS)
    store.compact()
    assert len(part_files(store.folder)) == 2
    assert opened(tmp_path).read(KEYS) == before
    assert all(row["raw_text"].startswith("first ") for row in before.values())


def test_a_part_made_of_old_ones_is_older_than_a_part_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, KEYS[:20], "first")
    late = opened(tmp_path)
    late.add([answer(key, "second " + key * 8) for key in KEYS])
    late.flush()
    monkeypatch.setattr(compaction, "SMALL_BYTES", 6000)
    store = opened(tmp_path)
    store.compact()
    assert {row["raw_text"] for row in opened(tmp_path).read(KEYS[:20]).values()} == {"first"}


@pytest.mark.parametrize("removed_before_the_crash", [0, 1, 7])
def test_a_crash_while_merged_parts_are_removed_changes_neither_answers_nor_bill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed_before_the_crash: int
) -> None:
    store = fill(tmp_path, KEYS[:20])
    before = store.read(KEYS)
    unlink, calls = Path.unlink, []

    def dies(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("part-"):
            calls.append(path)
            if len(calls) > removed_before_the_crash:
                raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            store.compact()
    assert len(part_files(store.folder)) == 21 - removed_before_the_crash
    after = opened(tmp_path)
    assert after.read(KEYS) == before
    assert after.paid == Usage(20 * 11, 20 * 5, 20)
    fill(tmp_path, KEYS[20:40]).compact()
    assert opened(tmp_path).paid == Usage(40 * 11, 40 * 5, 40)
    assert opened(tmp_path).has(KEYS[:40]).all()


def test_a_crash_before_the_merged_part_is_whole_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path, KEYS[:20])
    names = part_files(store.folder)
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.compact()
    assert part_files(store.folder) == names
    assert opened(tmp_path).has(KEYS[:20]).all()


def test_one_who_opened_the_store_before_still_reads_it_and_writes_to_it(tmp_path: Path) -> None:
    fill(tmp_path, KEYS[:20])
    reader = opened(tmp_path)
    opened(tmp_path).compact()
    assert list(reader.read(KEYS[:20])) == KEYS[:20]
    reader.add([answer(KEYS[30])])
    reader.flush()
    assert opened(tmp_path).has([*KEYS[:20], KEYS[30]]).all()


def test_a_part_that_was_removed_by_hand_is_no_answer_and_a_damaged_one_an_error(tmp_path: Path) -> None:
    store = fill(tmp_path, KEYS[:3])
    part_files(store.folder)[0].unlink()
    assert list(store.read(KEYS[:3])) == KEYS[1:3]
    damaged = part_files(store.folder)[0]
    damaged.write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match=damaged.name):
        store.read(KEYS[:3])


def test_only_one_merges_at_a_time(tmp_path: Path) -> None:
    store = fill(tmp_path, KEYS[:20])
    with compaction._alone(store.folder) as is_alone:
        assert is_alone
        store.compact()
        assert len(part_files(store.folder)) == 20
    store.compact()
    assert len(part_files(store.folder)) == 1


WRITER = """
import importlib.util
spec = importlib.util.spec_from_file_location("laws", {file!r})
laws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(laws)
laws.write_many({root!r}, {worker}, {worker} > 0)
"""


def write_many(root: str, worker: int, compacts: bool) -> None:
    """What each writer does."""
    store = opened(Path(root))
    for number in range(60):
        store.add([answer(request_key("family", f"{worker}/{number}", 0), f"{worker}/{number}")])
        store.pay(Usage(11, 5, 1))
        store.flush()
        if compacts and number % 10 == 9:
            store.compact()


def test_several_processes_write_read_and_merge_one_store_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    codes = [WRITER.format(file=__file__, root=str(tmp_path), worker=worker) for worker in range(3)]
    workers = [subprocess.Popen([sys.executable, "-c", code], env=environment) for code in codes]
    seen = 0
    while any(worker.poll() is None for worker in workers):
        reader = opened(tmp_path)
        keys = [request_key("family", f"{worker}/{number}", 0) for worker in range(3) for number in range(60)]
        there = [key for key, found in zip(keys, reader.has(keys), strict=True) if found]
        assert list(reader.read(there)) == there
        assert len(there) >= seen, "an answer that was there is there for ever"
        seen = len(there)
        time.sleep(0.01)
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    last = opened(tmp_path)
    rows = last.read(keys)
    assert [row["raw_text"] for row in rows.values()] == [f"{worker}/{number}" for worker in range(3) for number in range(60)]
    assert last.paid == Usage(180 * 11, 180 * 5, 180)
    assert len(part_files(last.folder)) < 100
