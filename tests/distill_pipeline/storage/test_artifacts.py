"""Laws of the artifact store: content decides the version, nothing half-written is seen, nothing leaves the root."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.errors import ConfigError, IntegrityError, MissingInputError
from distill_pipeline.storage.artifacts import Artifact, ArtifactStore, Making


def making(code: str = "code1", **inputs: str) -> Making:
    return Making(experiment="demo", spec={"a": 1}, code_version=code, inputs=inputs)


def commit(store: ArtifactStore, name: str, text: str, made: Making, **options: object) -> Artifact:
    with store.draft() as folder:
        (folder / "words.txt").write_text(text)
        return store.commit(folder, name, made, counts={"rows": len(text)}, facts={}, **options)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def test_equal_content_has_one_version_and_keeps_both_ways_of_making(store: ArtifactStore) -> None:
    first = commit(store, "filtered_set/t/f", "same", making("code1"))
    second = commit(store, "filtered_set/t/f", "same", making("code2"))
    assert first.version == second.version
    assert store.versions("filtered_set/t/f") == [first.version]
    for code in ("code1", "code2"):
        found = store.find("filtered_set/t/f", making(code).input_key)
        assert found is not None
        assert found.reused


def test_other_content_has_another_version_and_latest_points_to_it(store: ArtifactStore) -> None:
    first = commit(store, "prompt_pool", "one", making())
    second = commit(store, "prompt_pool", "two", making())
    assert first.version != second.version
    latest = store.latest("prompt_pool")
    assert latest is not None
    assert latest.version == second.version


def test_unhashed_files_are_stored_and_do_not_make_a_version(store: ArtifactStore) -> None:
    versions = set()
    for text in ("took 1 s", "took 2 s"):
        with store.draft() as folder:
            (folder / "result.json").write_text("{}")
            (folder / "report.html").write_text(text)
            artifact = store.commit(
                folder, "eval_report/kl", making(), counts={}, facts={}, unhashed=frozenset({"report.html"})
            )
            versions.add(artifact.version)
    assert len(versions) == 1
    assert (artifact.local_dir() / "report.html").read_text() == "took 2 s"
    artifact.verify()


def test_find_needs_equal_code_inputs_and_seed(store: ArtifactStore) -> None:
    commit(store, "prompt_pool", "x", making("code1", source="1"))
    assert store.find("prompt_pool", making("code1", source="1").input_key)
    assert store.find("prompt_pool", making("code2", source="1").input_key) is None
    assert store.find("prompt_pool", making("code1", source="2").input_key) is None
    other_seed = making("code1", source="1").model_copy(update={"seed": 1})
    assert store.find("prompt_pool", other_seed.input_key) is None


def test_a_folder_without_manifest_is_no_artifact_and_is_replaced(store: ArtifactStore) -> None:
    artifact = commit(store, "prompt_pool", "x", making())
    (artifact.local_dir() / "manifest.json").unlink()
    (artifact.local_dir() / "words.txt").write_text("torn")
    assert store.versions("prompt_pool") == []
    again = commit(store, "prompt_pool", "x", making())
    again.verify()


def test_require_refuses_what_was_made_under_other_settings(store: ArtifactStore) -> None:
    with pytest.raises(MissingInputError, match=r"not in .* yet. Make it first: distill prompts"):
        store.require("prompt_pool", "code1", "distill prompts EXPERIMENT")
    commit(store, "prompt_pool", "x", making("code1"))
    assert store.require("prompt_pool", "code1", "").version
    with pytest.raises(MissingInputError, match=r"other settings \(code version code1, the experiment now says code2\)"):
        store.require("prompt_pool", "code2", "distill prompts EXPERIMENT")


def test_a_failed_gate_stops_later_stages_in_later_runs_too(store: ArtifactStore) -> None:
    commit(store, "filtered_set/t/f", "x", making(), status="failed", reason="0 of 8 passed")
    with pytest.raises(IntegrityError, match="0 of 8 passed"):
        ArtifactStore(store.root).require("filtered_set/t/f", "code1", "")


def test_verify_names_the_first_file_that_differs(store: ArtifactStore) -> None:
    artifact = commit(store, "prompt_pool", "x", making())
    artifact.verify()
    (artifact.local_dir() / "words.txt").write_text("y")
    with pytest.raises(IntegrityError, match=r"words\.txt differs"):
        artifact.verify()
    (artifact.local_dir() / "words.txt").unlink()
    with pytest.raises(IntegrityError, match=r"words\.txt is missing"):
        artifact.verify()


@pytest.mark.parametrize("name", ["../x", "a/../b", "a b", "/etc", "a//b", "A", "", "a/.work", "a\x00b", "a/b\n"])
def test_no_name_leaves_the_store(store: ArtifactStore, name: str) -> None:
    with pytest.raises(ConfigError, match="no artifact name"):
        commit(store, name, "x", making())


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_any_name_stays_inside_the_root_or_is_refused(name: str) -> None:
    store = ArtifactStore("/nowhere/store")
    try:
        uri = store.uri_of(name)
    except ConfigError:
        return
    assert os.path.normpath(uri).startswith("/nowhere/store/")


def test_a_crashed_draft_leaves_no_artifact(store: ArtifactStore) -> None:
    folders: list[Path] = []

    def crash() -> None:
        with store.draft() as folder:
            folders.append(folder)
            (folder / "words.txt").write_text("x")
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        crash()
    assert not folders[0].exists()
    assert store.latest("prompt_pool") is None


def test_a_torn_manifest_is_a_clear_error(store: ArtifactStore) -> None:
    artifact = commit(store, "prompt_pool", "x", making())
    path = artifact.local_dir() / "manifest.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(IntegrityError, match="cannot be read as a manifest"):
        store.open("prompt_pool", artifact.version)


def test_batches_stream_the_parquet_parts_in_order(store: ArtifactStore) -> None:
    with store.draft() as folder:
        for part in range(3):
            pq.write_table(pa.table({"n": list(range(part * 10, part * 10 + 10))}), folder / f"part-{part:05}.parquet")
        artifact = store.commit(folder, "prompt_pool", making(), counts={}, facts={})
    assert [row["n"] for row in artifact.rows()] == list(range(30))
    assert max(batch.num_rows for batch in artifact.batches(rows=4)) == 4
    assert [entry.rows for entry in artifact.manifest.files] == [10, 10, 10]


def test_a_store_on_any_filesystem_reads_back_what_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = ArtifactStore("memory://bucket/store")
    artifact = commit(store, "student_checkpoint/kl", "weights", making())
    reopened = ArtifactStore("memory://bucket/store").latest("student_checkpoint/kl")
    assert reopened is not None
    assert (reopened.local_dir() / "words.txt").read_text() == "weights"
    assert str(reopened.local_dir()).startswith(str(tmp_path))
    assert reopened.version == artifact.version
    reopened.verify()


def test_lineage_names_every_ancestor_once_nearest_first(store: ArtifactStore) -> None:
    pool = commit(store, "prompt_pool", "p", making())
    outputs = commit(store, "teacher_outputs/t", "o", making(prompt_pool=pool.version), inputs=[pool])
    data = commit(store, "filtered_set/t/f", "f", making(), inputs=[pool, outputs])
    student = commit(store, "student_checkpoint/s", "s", making(), inputs=[data])
    assert [ancestor.name for ancestor in student.manifest.lineage] == ["filtered_set/t/f", "teacher_outputs/t", "prompt_pool"]


def test_the_manifest_is_plain_json_with_hashes_bytes_and_counts(store: ArtifactStore) -> None:
    artifact = commit(store, "prompt_pool", "abc", making())
    document = json.loads((artifact.local_dir() / "manifest.json").read_text())
    assert document["counts"] == {"rows": 3}
    assert document["files"][0]["bytes"] == 3
    assert len(document["files"][0]["sha256"]) == 64
    assert document["made"]["code_version"] == "code1"
