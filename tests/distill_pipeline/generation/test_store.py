"""Laws of the generation store."""

import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distill_pipeline.errors import IntegrityError
from distill_pipeline.generation.protocol import Completion
from distill_pipeline.generation.requests import family_of, family_settings, request_key
from distill_pipeline.generation.spec import SamplingSpec
from distill_pipeline.generation.store import GenerationStore
from distill_pipeline.records import FinishReason

KEYS = [request_key("family", f"prompt{i}", 0) for i in range(6)]


def opened(root: Path, max_tokens: int = 32, **options: Any) -> GenerationStore:
    return GenerationStore(root, "family", {"temperature": 0.7}, max_tokens=max_tokens, **options)


def completion(key: str, *, tokens: int = 5, reason: FinishReason = "stop", text: str = "Paris") -> Completion:
    error = "broken: it broke" if reason == "error" else None
    return Completion(key, text, (), reason, 11, tokens, -1.5, error)


def settings_with(**changes: Any) -> str:
    known: dict[str, Any] = {
        "identity": "m", "revision": None, "engine": "transformers/1", "dtype": "float32", "system": None, "rendering": "r",
        "seed": 0, "sampling": SamplingSpec(),
    }  # fmt: skip
    return family_of(family_settings(**(known | changes)))


def test_flushed_answers_are_found_by_the_next_run(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add([completion(KEYS[0]), completion(KEYS[1], text="Rome")])
    assert not store.has(KEYS[:2]).any()
    store.flush()
    for reader in (store, opened(tmp_path)):
        assert reader.has(KEYS[:3]).tolist() == [True, True, False]
        rows = reader.read(KEYS[:3])
        assert {key: row["raw_text"] for key, row in rows.items()} == {KEYS[0]: "Paris", KEYS[1]: "Rome"}
        assert rows[KEYS[0]]["logprob"] == -1.5
    assert "0.7" in (tmp_path / "family/family.json").read_text()


def test_answer_that_ended_serves_every_limit_that_holds_it_and_a_cut_one_only_its_own(tmp_path: Path) -> None:
    store = opened(tmp_path, max_tokens=8)
    store.add([completion(KEYS[0], tokens=5), completion(KEYS[1], tokens=8), completion(KEYS[2], tokens=8, reason="length")])
    store.add([completion(KEYS[3], tokens=6, reason="length")])  # cut by the model's context, not by max_tokens
    store.flush()
    usable = {limit: opened(tmp_path, max_tokens=limit).has(KEYS[:4]).tolist() for limit in (4, 5, 8, 64)}
    assert usable == {
        4: [False, False, False, False],
        5: [True, False, False, False],
        8: [True, True, True, True],
        64: [True, True, False, True],
    }


def test_an_answer_serves_its_own_limit_whatever_its_server_counts(tmp_path: Path) -> None:
    store = opened(tmp_path, max_tokens=8)
    store.add([completion(KEYS[0], tokens=11), completion(KEYS[1], tokens=11, reason="length")])
    store.flush()
    usable = {limit: opened(tmp_path, max_tokens=limit).has(KEYS[:2]).tolist() for limit in (7, 8, 9, 64)}
    assert usable == {7: [False, False], 8: [True, True], 9: [False, False], 64: [True, False]}


def test_longer_answer_to_a_cut_request_is_kept_beside_it(tmp_path: Path) -> None:
    short, long = opened(tmp_path, max_tokens=8), opened(tmp_path, max_tokens=64)
    short.add([completion(KEYS[0], tokens=8, reason="length", text="The city")])
    short.flush()
    long.add([completion(KEYS[0], tokens=20, text="The city of Paris")])
    long.flush()
    assert opened(tmp_path, max_tokens=8).read(KEYS[:1])[KEYS[0]]["raw_text"] == "The city"
    assert opened(tmp_path, max_tokens=64).read(KEYS[:1])[KEYS[0]]["raw_text"] == "The city of Paris"


def test_failed_requests_are_asked_again(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add([completion(KEYS[0], reason="error", text="")])
    store.flush()
    assert not opened(tmp_path).has(KEYS[:1]).any()


def test_of_two_writers_the_first_answer_stays(tmp_path: Path) -> None:
    one, two = opened(tmp_path), opened(tmp_path)
    two.add([completion(KEYS[0], text="second"), completion(KEYS[1])])
    one.add([completion(KEYS[0], text="first")])
    one.flush()
    two.flush()
    rows = opened(tmp_path).read(KEYS[:2])
    assert rows[KEYS[0]]["raw_text"] == "first"
    assert rows[KEYS[1]]["raw_text"] == "Paris"


def test_unfinished_file_of_a_killed_writer_is_ignored_and_later_removed(tmp_path: Path) -> None:
    torn = tmp_path / "family" / ".tmp-torn.parquet"
    torn.parent.mkdir()
    torn.write_bytes(b"PAR1 half a fi")
    assert not opened(tmp_path).has(KEYS).any()
    assert torn.exists()
    os.utime(torn, (time.time() - 200_000,) * 2)
    opened(tmp_path)
    assert not torn.exists()


def test_part_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    store.add([completion(KEYS[0])])

    def fails_half_way(file: Any, schema: Any, **options: Any) -> None:
        file.write(b"PAR1 half a fi")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "ParquetWriter", fails_half_way)
        with pytest.raises(OSError, match="no space left"):
            store.flush()
    assert not opened(tmp_path).has(KEYS).any()
    store.flush()
    assert opened(tmp_path).has(KEYS[:1]).all()


def test_damaged_part_is_an_error_that_names_it(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add([completion(KEYS[0])])
    store.flush()
    (part,) = (tmp_path / "family").glob("part-*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match=part.name):
        opened(tmp_path)


def test_flush_is_due_by_rows_or_by_time(tmp_path: Path) -> None:
    store = opened(tmp_path, flush_rows=2, flush_seconds=1000)
    store.add([completion(KEYS[0])])
    store.flush_if_due()
    assert not list((tmp_path / "family").glob("part-*"))
    store.add([completion(KEYS[1])])
    store.flush_if_due()
    (part,) = (tmp_path / "family").glob("part-*")
    assert pq.read_metadata(part).num_rows == 2
    hasty = opened(tmp_path, flush_seconds=0)
    hasty.add([completion(KEYS[2])])
    hasty.flush_if_due()
    assert opened(tmp_path).has(KEYS[:3]).all()


def test_every_setting_but_n_and_max_tokens_makes_another_family() -> None:
    base = settings_with()
    assert settings_with(sampling=SamplingSpec(n=16, max_tokens=9)) == base
    others = [
        settings_with(identity="other"), settings_with(revision="abc"), settings_with(dtype="bfloat16"),
        settings_with(system="be brief"), settings_with(rendering="other"), settings_with(seed=1),
        settings_with(sampling=SamplingSpec(temperature=0.8)), settings_with(sampling=SamplingSpec(top_k=10)),
        settings_with(sampling=SamplingSpec(top_p=0.5)),
    ]  # fmt: skip
    assert len({base, *others}) == len(others) + 1
