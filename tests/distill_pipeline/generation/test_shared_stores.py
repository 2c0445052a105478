"""Laws of answers and scores on a filesystem that machines share: nothing is lost, and nothing is paid for twice."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fsspec import AbstractFileSystem

from distill_pipeline.doctor import examine
from distill_pipeline.errors import IntegrityError, StorageError
from distill_pipeline.generation.answering import stored_answers
from distill_pipeline.generation.budget import Spending, Usage
from distill_pipeline.generation.families import Families
from distill_pipeline.generation.protocol import Asked, Completion
from distill_pipeline.generation.requests import request_key
from distill_pipeline.generation.store import GenerationStore
from distill_pipeline.pipeline import Pipeline, open_pipeline
from distill_pipeline.planning import plan_experiment
from distill_pipeline.scoring.kept import KeptScores
from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.storage import compaction, parts, places
from distill_pipeline.storage.parts import part_files
from distill_pipeline.storage.places import Place, RemotePath
from distill_pipeline.system_prompts import SystemPrompts

KEYS = [request_key("family", f"prompt{i}", 0) for i in range(200)]
ELEMENTARY = Path(__file__).parents[3] / "examples/elementary/tasks"


class Bucket(AbstractFileSystem):
    """An object store in a local folder, as one machine's process sees it.

    A put is whole, nothing can be renamed, and listings are cached until somebody asks for a new one. ``faults`` are what the
    next puts raise, before they have worked or after (``lands``); ``fetched`` counts the bytes that were read.
    """

    protocol = "bucket"

    def __init__(self, folder: str = "", seconds: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.folder, self.seconds = Path(folder or os.environ["BUCKET"]), seconds
        self.faults: list[Exception] = []
        self.lands = False
        self.fetched = 0

    def _listed(self, path: str) -> list[dict[str, Any]]:
        if path not in self.dircache:
            folder = self.folder / path
            if not folder.is_dir():
                raise FileNotFoundError(path)
            found = [(each, each.stat()) for each in folder.iterdir() if not each.name.startswith(".put-")]
            self.dircache[path] = [
                {"name": f"{path}/{each.name}".lstrip("/"), "size": stat.st_size,
                 "type": "directory" if each.is_dir() else "file"} for each, stat in found
            ]  # fmt: skip
        return list(self.dircache[path])

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        found = self._listed(self._strip_protocol(path))
        return found if detail else [each["name"] for each in found]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        for each in self._listed(self._parent(path)):
            if each["name"] == path:
                return each
        raise FileNotFoundError(path)

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        time.sleep(self.seconds)
        data = (self.folder / self._strip_protocol(path)).read_bytes()[start:end]
        self.fetched += len(data)
        return data

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        fault = self.faults.pop(0) if self.faults else None
        if fault is None or self.lands:
            place = self.folder / self._strip_protocol(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            whole = place.with_name(f".put-{uuid.uuid4().hex}")
            whole.write_bytes(value)
            whole.replace(place)
            self.invalidate_cache()
        if fault is not None:
            raise fault

    def rm_file(self, path: str) -> None:
        (self.folder / self._strip_protocol(path)).unlink()
        self.invalidate_cache()

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        raise AssertionError(f"an object store has no rename: {path1} to {path2}")

    def put_file(self, lpath: str, rpath: str, *_: Any, **kwargs: Any) -> None:
        if not Path(lpath).is_dir():
            self.pipe_file(rpath, Path(lpath).read_bytes())

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        assert mode == "rb", mode
        return io.BytesIO(self.cat_file(path))


fsspec.register_implementation("bucket", Bucket, clobber=True)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "RETRY_SECONDS", (0.0, 0.0, 0.0))


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., RemotePath]:
    """Gives the one shared root as another machine sees it, whose listings are its own."""

    def seen(**options: Any) -> RemotePath:
        return RemotePath(Bucket(str(tmp_path / "bucket"), skip_instance_cache=True, **options), "root/generations")

    return seen


def opened(root: Place, **options: Any) -> GenerationStore:
    return GenerationStore(root, "family", {"temperature": 0.7}, max_tokens=32, **options)


def answer(key: str, text: str = "Paris") -> Completion:
    return Completion(key, text, (), "stop", 11, 5, -1.5)


def fill(store: GenerationStore, keys: Iterable[str], text: str = "Paris") -> None:
    """One part an answer, each paid."""
    for key in keys:
        store.add([answer(key, text)])
        store.pay(Usage(11, 5, 1))
        store.flush()


# --- one store for all machines ---------------------------------------------------------------------------------------


def test_what_one_machine_flushed_another_finds_also_where_it_looked_before(machine: Callable[..., RemotePath]) -> None:
    here, there = machine(), machine()
    assert not opened(there).has(KEYS).any()
    store = opened(here)
    fill(store, KEYS[:3])
    fill(store, KEYS[3:5], "Rome")
    for reader in (store, opened(there)):
        assert list(reader.read(KEYS[:9])) == KEYS[:5]
        assert reader.read(KEYS[4:5])[KEYS[4]]["raw_text"] == "Rome"
        assert reader.paid == Usage(5 * 11, 5 * 5, 5)
    assert [each.name.split("-")[0] for each in (here / "family").glob("*")] == ["family.json"] + ["part"] * 5
    fill(opened(there), KEYS[5:6])
    assert opened(here).has(KEYS[:6]).all()


def test_scores_are_shared_too(machine: Callable[..., RemotePath]) -> None:
    store = KeptScores(machine(), {"kind": "x"})
    store.add((key, ScoreValue(0.5, key)) for key in KEYS[:9])
    store.flush()
    assert KeptScores(machine(), {"kind": "x"}).read(KEYS[:12]) == {key: ScoreValue(0.5, key) for key in KEYS[:9]}
    assert KeptScores(machine(), {"kind": "y"}).read(KEYS[:12]) == {}


def test_a_local_store_that_was_copied_is_read_merged_parts_too(machine: Callable[..., RemotePath], tmp_path: Path) -> None:
    local = opened(tmp_path / "local")
    fill(local, KEYS[:20])
    old = {path.name: path.read_bytes() for path in part_files(local.folder)}
    local.compact()
    remote = machine()
    for name, data in [*old.items(), *((path.name, path.read_bytes()) for path in local.folder.iterdir())]:
        (remote / "family" / name).write_bytes(data)
    store = opened(machine())
    assert store.read(KEYS) == local.read(KEYS)
    assert store.paid == local.paid == Usage(20 * 11, 20 * 5, 20)


def test_parts_are_the_same_wherever_they_lie(machine: Callable[..., RemotePath], tmp_path: Path) -> None:
    stores = opened(tmp_path / "local"), opened(machine())
    for store in stores:
        fill(store, KEYS[:1])
    local, remote = (part_files(store.folder)[0] for store in stores)
    assert local.read_bytes() == remote.read_bytes()
    assert (local.parent / "family.json").read_bytes() == (remote.parent / "family.json").read_bytes()


def test_opening_and_reading_fetch_no_copy_of_the_family(machine: Callable[..., RemotePath]) -> None:
    store = opened(machine())
    texts = os.urandom(2_000_000).hex()
    for start in (0, 100):
        store.add(answer(key, texts[number * 20_000 :][:20_000]) for number, key in enumerate(KEYS[start : start + 100], start))
        store.flush()
    size = sum(part.size() for part in part_files(store.folder))
    root = machine()
    reader = opened(root)
    assert 0 < root.filesystem.fetched < size / 10
    opening = root.filesystem.fetched
    assert len(reader.read(KEYS[:5])) == 5
    assert root.filesystem.fetched - opening < size * 0.6, "the part that has them, and not the other"


def test_rows_that_come_mixed_fetch_each_part_once_as_far_as_memory_goes(
    machine: Callable[..., RemotePath], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(machine())
    fill(store, KEYS[:40])
    size = sum(part.size() for part in part_files(store.folder))
    for most_bytes in (parts.RECENT_BYTES, size // 2):
        monkeypatch.setattr(parts, "RECENT_BYTES", most_bytes)
        root = machine()
        reader = opened(root)
        before = root.filesystem.fetched
        for _ in range(10):
            assert len(reader.read(KEYS[:40])) == 40
        assert (root.filesystem.fetched - before == size) == (most_bytes > size)
        assert sum(map(len, reader._recent._kept.values())) <= most_bytes


def test_many_parts_are_looked_into_several_at_a_time(machine: Callable[..., RemotePath]) -> None:
    fill(opened(machine()), KEYS[:40])
    started = time.monotonic()
    assert opened(machine(seconds=0.01)).has(KEYS[:40]).all()
    assert time.monotonic() - started < 40 * 2 * 0.01 / 2


def test_parts_stay_where_no_locks_are_and_so_are_written_less_often(
    machine: Callable[..., RemotePath], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(machine())
    fill(store, KEYS[: 2 * compaction.MIN_PARTS])
    store.compact()
    assert len(part_files(store.folder)) == 2 * compaction.MIN_PARTS
    now = time.monotonic()
    for root, seconds in ((tmp_path / "local", parts.FLUSH_SECONDS), (machine(), parts.REMOTE_FLUSH_SECONDS)):
        store = opened(root)
        store.add([answer(KEYS[100])])
        for later, written in ((seconds - 1, False), (seconds + 1, True)):
            monkeypatch.setattr(time, "monotonic", lambda later=later: now + later)
            store.flush_if_due()
            assert store.has([KEYS[100]]).all() == written
        monkeypatch.setattr(time, "monotonic", lambda: now)
    assert parts.REMOTE_FLUSH_SECONDS >= 2 * parts.FLUSH_SECONDS


@pytest.mark.parametrize("where", ["bucket", "memory"])
def test_several_machines_write_and_read_at_once(machine: Callable[..., RemotePath], where: str) -> None:
    memory = RemotePath(fsspec.filesystem("memory"), f"/several/{uuid.uuid4().hex}")
    seen = machine if where == "bucket" else lambda: memory
    done = threading.Event()

    def read() -> int:
        found = 0
        while not done.is_set():
            reader = opened(seen())
            there = [key for key, is_there in zip(KEYS, reader.has(KEYS), strict=True) if is_there]
            assert list(reader.read(there)) == there
            assert len(there) >= found, "an answer that was there is there for ever"
            found = len(there)
        return found

    with ThreadPoolExecutor(5) as pool:
        writers = [pool.submit(fill, opened(seen()), KEYS[start : start + 40]) for start in (0, 20, 60)]
        reader = pool.submit(read)
        try:
            for writer in writers:
                writer.result()
        finally:
            done.set()
        assert 0 < reader.result() <= 100
    last = opened(seen())
    assert list(last.read(KEYS)) == KEYS[:100]
    assert last.paid == Usage(120 * 11, 120 * 5, 120)


# --- what goes wrong ---------------------------------------------------------------------------------------------------


def test_what_could_not_be_written_waits_and_is_written_and_paid_once_later(machine: Callable[..., RemotePath]) -> None:
    root = machine()
    store = opened(root)
    fill(store, KEYS[:1])
    store.add([answer(KEYS[1])])
    store.pay(Usage(11, 5, 1))
    root.filesystem.faults = [ConnectionError("no route to host")] * 4
    with pytest.raises(StorageError, match=r"cannot write bucket://root/generations/family/part-.*: no route to host. Look at"):
        store.flush()
    assert not store.has(KEYS[1:2]).any()
    store.add([answer(KEYS[2])])
    store.pay(Usage(11, 5, 1))
    store.flush()
    for reader in (store, opened(machine())):
        assert reader.has(KEYS[:3]).all()
        assert reader.paid == Usage(33, 15, 3)
    assert len(part_files(store.folder)) == 2


def test_a_part_that_landed_though_its_put_failed_counts_once(machine: Callable[..., RemotePath]) -> None:
    root = machine()
    store = opened(root)
    store.prepare()
    root.filesystem.lands, root.filesystem.faults = True, [TimeoutError("no answer")] * 4
    store.add([answer(KEYS[0])])
    store.pay(Usage(11, 5, 1))
    with pytest.raises(StorageError, match="no answer"):
        store.flush()
    early = opened(machine())
    assert early.has(KEYS[:1]).all()
    store.add([answer(KEYS[1])])
    store.pay(Usage(11, 5, 1))
    store.flush()
    assert opened(machine()).paid == Usage(22, 10, 2)
    assert list(opened(machine()).read(KEYS)) == KEYS[:2]
    assert list(early.read(KEYS[:1])) == KEYS[:1], "one who had seen it before reads it still"


def test_a_full_disk_loses_nothing_and_keeps_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    fill(store, KEYS[:1])
    store.add([answer(KEYS[1])])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StorageError, match=r"cannot write .*family/part-.*No space left on device. Make room on the disk"):
            store.flush()
    assert not list(tmp_path.rglob(".tmp-*"))
    store.flush()
    assert opened(tmp_path).has(KEYS[:2]).all()


def test_a_family_that_cannot_be_written_keeps_no_other_from_being_written(machine: Callable[..., RemotePath]) -> None:
    root = machine()

    def settings_under(system: str | None) -> dict[str, Any]:
        return {"system": system}

    def store(family: str, settings: dict[str, Any]) -> GenerationStore:
        return GenerationStore(root, family, settings, max_tokens=32)

    prompts = SystemPrompts("be brief", {"math": "think"})
    families = Families(prompts, settings_under, store)
    families.prepare()
    rows = [{"prompt_id": f"p{number}", "domain": domain} for number, domain in enumerate(("math", "chat"))]
    keys = [key for row in rows for key in families.keys_of(row, [0])]
    for row, key in zip(rows, keys, strict=True):
        families.expect(row, [key])
    families.add(answer(key) for key in keys)
    root.filesystem.faults = [ConnectionError("reset")] * 4
    with pytest.raises(StorageError, match="reset"):
        families.flush()
    assert sum(Families(prompts, settings_under, store).has(keys)) == 1
    families.flush()
    assert all(Families(prompts, settings_under, store).has(keys))


class Scripted:
    """An engine that answers one request at a time and counts what it was paid for."""

    settings: dict[str, Any] = {}

    def __init__(self) -> None:
        self.asked = 0

    def answer(self, windows: Iterable[Any], spending: Spending) -> Iterator[list[Completion]]:
        for window in windows:
            for one in window:
                self.asked += 1
                spending.pay(Usage(11, 5, 1))
                yield [answer(key) for key in one.keys]

    def facts(self) -> dict[str, Any]:
        return {}


def test_a_store_that_cannot_be_written_is_found_out_before_anything_is_paid(machine: Callable[..., RemotePath]) -> None:
    root, engine = machine(), Scripted()
    root.filesystem.faults = [PermissionError("AccessDenied")]
    with pytest.raises(StorageError, match=r"family\.json: AccessDenied. Give this user or these credentials the right"):
        list(stored_answers(engine, [[Asked([], (KEYS[0],))]], Spending(), opened(root)))
    assert engine.asked == 0


def test_a_run_that_ends_because_of_a_failed_flush_has_stored_what_it_paid_for(machine: Callable[..., RemotePath]) -> None:
    root, engine = machine(), Scripted()
    store = opened(root, flush_rows=4)
    store.prepare()
    root.filesystem.faults = [ConnectionError("reset")] * 4
    with pytest.raises(StorageError, match="reset"):
        list(stored_answers(engine, [[Asked([], (key,)) for key in KEYS]], Spending(), store))
    assert engine.asked == 4
    assert list(opened(machine()).read(KEYS)) == KEYS[:4]
    assert opened(machine()).paid == Usage(44, 20, 4)


def test_a_damaged_part_is_named_and_an_unreachable_one_is_not_called_damaged(
    machine: Callable[..., RemotePath], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(machine())
    fill(store, KEYS[:2])
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "cat_file", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route to host")))
        with pytest.raises(StorageError, match=r"cannot read bucket://root/generations/family/part-.*no route to host"):
            store.read(KEYS[:1])
        with pytest.raises(StorageError, match="no route to host"):
            opened(machine())
    damaged = part_files(store.folder)[0]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match=f"bucket://.*{damaged.name} of the generation store cannot be read"):
        opened(machine())
    damaged.remove()
    assert list(opened(machine()).read(KEYS[:2])) == KEYS[1:2]
    assert list(store.read(KEYS[:2])) == KEYS[1:2], "one who has an index of the part that is gone lists the folder again"


# --- a whole experiment ------------------------------------------------------------------------------------------------


def script(prompt: str, body: dict[str, Any]) -> dict[str, Any]:
    time.sleep(0.001)
    text = "Fine. Score: 5" if "You judge an answer" in prompt else f"the answer to {prompt}"
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return {"choices": [choice] * body.get("n", 1), "usage": {"prompt_tokens": 10, "completion_tokens": 5 * body.get("n", 1)}}


@pytest.fixture
def experiment(tmp_path: Path, server: Any) -> Callable[..., Path]:
    """Writes an experiment with a served teacher that judges itself."""
    server.script = script

    def written(prompts: int = 12, **sampling: Any) -> Path:
        lines = [json.dumps({"prompt": f"what is {i} plus {i * i}?"}) for i in range(prompts)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
        where = {"base_url": server.url, "max_concurrency": 4}
        document = {
            "name": "shared",
            "prompt_pool": {
                "sources": [{"path": str(tmp_path / "prompts.jsonl"), "domain": "sums", "license": "cc0-1.0"}],
                "holdout_fraction": 0.0, "dedup": {"exact": True, "near": None}, "decontaminate": {"against": None},
            },
            "teachers": {"big": {
                "model": "fake-model", "engine": "openai", "license": "apache-2.0", "server": where,
                "sampling": {"n": 2, "max_tokens": 32} | sampling,
            }},
            "scorers": {"*": [{"kind": "judge", "options": {"model": "big", "rubric": "helpful"}}]},
            "filters": {"all": {}},
            "students": {"small": {"data": ["big/all"], "init": {"model": "student"}, "stages": [{"method": "sft"}]}},
            "evaluation": {"tasks": ["elementary_heldout"], "include_path": str(ELEMENTARY)},
        }  # fmt: skip
        (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(document))
        return tmp_path / "experiment.yaml"

    return written


@pytest.fixture
def on_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pipeline]:
    """Opens the experiment on a machine with a cache of its own."""
    monkeypatch.setenv("BUCKET", str(tmp_path / "bucket"))

    def pipeline(name: str, experiment: Path, root: str) -> Pipeline:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        Bucket.clear_instance_cache()
        return open_pipeline(experiment, root, teacher_device="cpu", progress=lambda line: None, force=True)

    return pipeline


@pytest.mark.parametrize("protocol", ["bucket", "memory"])
def test_another_machine_pays_for_nothing_that_one_has_paid_for(
    experiment: Callable[..., Path], on_machine: Callable[..., Pipeline], server: Any, tmp_path: Path, protocol: str
) -> None:
    root = f"{protocol}://{uuid.uuid4().hex}/root"
    names = ("prompt_pool", "teacher_outputs/big", "scored_outputs/big")
    first = on_machine("a", experiment(), root)
    made = {name: first.make(name) for name in names}
    assert server.asked == 12 + 12
    assert not list((tmp_path / "a").rglob("*.parquet")), "no answer stays behind on the machine"

    second = on_machine("b", experiment(), root)
    lines = {line.node: line for line in plan_experiment(second, probe=False)}
    assert (lines["teacher_outputs/big"].rows, "24 of 24 stored" in lines["teacher_outputs/big"].note) == (0, True)
    again = {name: second.make(name) for name in names}
    assert server.asked == 24
    assert not any(artifact.reused for artifact in again.values())
    assert {name: artifact.version for name, artifact in again.items()} == {name: a.version for name, a in made.items()}
    assert again["teacher_outputs/big"].manifest.counts["reused"] == 24
    assert again["scored_outputs/big"].manifest.counts["reused"] == 24

    more = on_machine("b", experiment(n=3), root).make("teacher_outputs/big")
    assert more.manifest.counts["reused"] == 24
    assert server.asked == 24 + 12, "only the third sample of each prompt"


def test_a_changed_setting_is_told_on_every_machine(
    experiment: Callable[..., Path], on_machine: Callable[..., Pipeline]
) -> None:
    root = f"memory://{uuid.uuid4().hex}/root"
    first = on_machine("a", experiment(prompts=2), root)
    for name in ("prompt_pool", "teacher_outputs/big"):
        first.make(name)
    second = on_machine("b", experiment(prompts=2, temperature=0.5), root)
    (line,) = [line for line in plan_experiment(second, probe=False) if line.node == "teacher_outputs/big"]
    assert "other settings than in its last run (temperature" in line.note


KILLED = """
import importlib.util
spec = importlib.util.spec_from_file_location("laws", {file!r})
laws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(laws)
laws.parts.REMOTE_FLUSH_SECONDS = 0.0
pipeline = laws.open_pipeline({experiment!r}, "bucket://root", teacher_device="cpu", progress=lambda line: None)
pipeline.make("prompt_pool")
pipeline.make("teacher_outputs/big")
"""


def test_a_run_that_was_killed_goes_on_elsewhere_and_only_what_was_in_flight_is_paid_again(
    experiment: Callable[..., Path], on_machine: Callable[..., Pipeline], server: Any, tmp_path: Path
) -> None:
    file = experiment(prompts=300)
    environment = os.environ | {
        "BUCKET": str(tmp_path / "bucket"), "XDG_CACHE_HOME": str(tmp_path / "a"), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    code = KILLED.format(file=__file__, experiment=str(file))
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("bucket/root/generations/*/part-*.parquet"))) < 10:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    stored = pa.concat_tables(
        pq.read_table(part, columns=["request_key"], partitioning=None)
        for part in tmp_path.glob("bucket/root/generations/*/part-*.parquet")
    )
    kept = len(set(stored["request_key"].to_pylist())) // 2
    assert 0 < kept < 300
    asked = server.asked
    assert asked - kept <= 2 * 4, "what was in flight, or had come since the last part"
    made = on_machine("b", file, "bucket://root").make("teacher_outputs/big")
    assert server.asked - asked == 300 - kept
    assert made.manifest.counts["reused"] == 2 * kept
    assert made.manifest.counts["stopped"] == 600


def test_doctor_says_what_all_machines_share_and_whether_this_one_may_write(
    experiment: Callable[..., Path], on_machine: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = on_machine("a", experiment(prompts=2), "bucket://root")
    for name in ("prompt_pool", "teacher_outputs/big", "scored_outputs/big"):
        pipeline.make(name)
    found = {finding.what: finding for finding in examine("bucket://root")}
    num_parts = len(pipeline.store.filesystem.glob("root/generations/*/part-*.parquet"))
    assert f"{num_parts} parts of 2 families in bucket://root/generations, shared by all machines" in found["answers"].said
    assert "1 parts of 1 families in bucket://root/scores" in found["kept scores"].said
    assert found["store"].said == "3 artifacts under root verified"
    assert not pipeline.store.filesystem.glob("root/generations/.doctor")
    monkeypatch.setattr(Bucket, "pipe_file", lambda *_, **__: (_ for _ in ()).throw(PermissionError("AccessDenied")))
    (bad,) = [finding for finding in examine("bucket://root") if finding.what in ("store", "answers")]
    assert bad.is_bad
    assert "cannot write bucket://root/generations/.doctor: AccessDenied. Give this user" in bad.said
