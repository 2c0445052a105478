"""Laws of files on other filesystems: nobody sees half of one, a listing is never an old one, and an error says what to do."""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distill_pipeline.errors import ConfigError, MissingExtraError, StorageError
from distill_pipeline.storage import places
from distill_pipeline.storage.artifacts import ArtifactStore
from distill_pipeline.storage.files import text_of, write_whole
from distill_pipeline.storage.parts import remove_abandoned
from distill_pipeline.storage.places import RemotePath


class Faulty(MemoryFileSystem):
    """Objects in memory; each call takes the next of ``faults``: None, or what it raises before or after it has worked."""

    protocol = "faulty"
    cachable = False

    def __init__(self, *faults: Exception | None, lands: bool = False) -> None:
        super().__init__()
        self.store, self.pseudo_dirs = {}, [""]
        self.faults, self.lands, self.puts = list(faults), lands, []

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        fault = self.faults.pop(0) if self.faults else None
        self.puts.append(path)
        if fault is None or self.lands:
            super().pipe_file(path, value, mode, **kwargs)
        if fault is not None:
            raise fault


class Share(Faulty):
    """A filesystem with a rename that replaces nothing, as some have it."""

    protocol = "share"

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        if path2 in self.store:
            raise FileExistsError(path2)
        self.store[path2] = self.store.pop(path1)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "RETRY_SECONDS", (0.0, 0.0, 0.0))


def test_an_object_is_put_at_once_and_a_file_elsewhere_is_written_aside_and_moved() -> None:
    bucket, share = Faulty(), Share()
    for filesystem in (bucket, share):
        file = RemotePath(filesystem, "/store/family/family.json")
        for text in ("one", "two"):
            write_whole(file, text)
            assert text_of(file) == text
        assert [path.name for path in file.parent.glob("*")] == ["family.json"]
    assert bucket.puts == ["/store/family/family.json"] * 2
    assert all("/family/.tmp-" in path for path in share.puts)


def test_a_crash_before_the_move_leaves_no_file_and_what_it_left_is_removed_a_day_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = RemotePath(Share(), "/store")
    with monkeypatch.context() as patch:
        patch.setattr(Share, "mv", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            (folder / "part-1.parquet").write_bytes(b"whole")
    assert folder.glob("part-*") == []
    remove_abandoned(folder)
    assert len(folder.glob(".tmp-*")) == 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100_000)
    remove_abandoned(folder)
    assert folder.glob("*") == []


def test_two_who_replace_a_file_at_once_are_not_in_each_others_way(monkeypatch: pytest.MonkeyPatch) -> None:
    file = RemotePath(Share(), "/store/family.json")
    file.write_bytes(b"one")
    remove = Share.rm_file

    def already_removed(filesystem: Share, path: str) -> None:
        remove(filesystem, path)
        raise FileNotFoundError(path)

    monkeypatch.setattr(Share, "rm_file", already_removed)
    file.write_bytes(b"two")
    assert file.read_bytes() == b"two"


@pytest.mark.parametrize("lands", [False, True])
def test_a_hiccup_while_writing_is_tried_again_under_the_same_name(lands: bool) -> None:
    filesystem = Faulty(ConnectionResetError("reset"), RuntimeError("503"), lands=lands)
    (RemotePath(filesystem, "/store") / "part-1.parquet").write_bytes(b"whole")
    assert filesystem.puts == ["/store/part-1.parquet"] * 3
    assert filesystem.cat_file("/store/part-1.parquet") == b"whole"


@pytest.mark.parametrize(
    ("fault", "tries", "said"),
    [
        (PermissionError("AccessDenied"), 1, "AccessDenied. Give this user or these credentials the right to list, read and"),
        (FileNotFoundError("NoSuchBucket"), 1, "NoSuchBucket. Make the bucket or folder first, or correct the root"),
        (RuntimeError("no credentials"), 4, "no credentials. Look at the credentials, the network and the service, then run"),
        (TimeoutError(), 4, "TimeoutError. Look at the credentials"),
    ],
)
def test_a_write_that_fails_for_good_is_one_error_that_names_the_place(fault: Exception, tries: int, said: str) -> None:
    filesystem = Faulty(*[fault] * 9)
    with pytest.raises(StorageError) as caught:
        (RemotePath(filesystem, "/store") / "x").write_bytes(b"")
    assert f"cannot write faulty:///store/x: {said}" in str(caught.value)
    assert len(filesystem.puts) == tries


def test_reading_and_listing_tell_what_is_not_there_from_what_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RemotePath(Faulty(), "/store")
    assert folder.glob("*") == []
    assert text_of(folder / "x") is None
    (folder / "x").remove()
    monkeypatch.setattr(Faulty, "ls", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no route")))
    monkeypatch.setattr(Faulty, "cat_file", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no route")))
    for what, call in (("list", lambda: folder.glob("*")), ("read", lambda: text_of(folder))):
        with pytest.raises(StorageError, match=f"cannot {what} faulty:///store: no route. Look at"):
            call()  # type: ignore[no-untyped-call]


def test_a_reader_asks_for_the_ranges_it_reads() -> None:
    file = RemotePath(Faulty(), "/store/x")
    file.write_bytes(bytes(range(100)))
    with file.open() as reader:
        assert reader.seek(-4, 2) == 96
        assert reader.read() == bytes([96, 97, 98, 99])
        assert reader.read() == b""
        reader.seek(10)
        assert reader.read(3) == bytes([10, 11, 12])
        assert reader.tell() == 13
        buffer = bytearray(2)
        assert reader.readinto(buffer) == 2
        assert buffer == bytes([13, 14])


def test_a_root_that_cannot_be_opened_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="the root nowhere://x is no folder and no URL that fsspec knows"):
        ArtifactStore("nowhere://x")
    fsspec.register_implementation("unmade", "no_such_package.FileSystem", errtxt="Install no_such_package", clobber=True)
    with pytest.raises(MissingExtraError, match="the root unmade://x needs another package: Install no_such_package"):
        ArtifactStore("unmade://x")


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.versions("prompt_pool"),
        lambda store: store.latest("prompt_pool"),
        lambda store: store._write(f"{store.root}/latest.json", "{}"),
    ],
)
def test_an_artifact_store_that_cannot_be_reached_says_so(
    call: Callable[[ArtifactStore], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError(errno.EHOSTUNREACH, "no route to host")

    store = ArtifactStore("memory://gone/store")
    for name in ("ls", "info", "cat_file", "pipe_file", "find", "glob"):
        monkeypatch.setattr(MemoryFileSystem, name, unreachable)
    with pytest.raises(StorageError, match=r"memory://.*gone/store.*no route to host"):
        call(store)


def test_a_shared_folder_lies_under_the_root_and_a_local_one_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote, local = ArtifactStore("memory://bucket/root"), ArtifactStore(tmp_path / "root")
    assert str(remote.shared_folder("scores")) == "memory:///bucket/root/scores"
    assert remote.local_folder("models").is_relative_to(tmp_path / "cache")
    assert local.shared_folder("scores") == tmp_path / "root/scores"
