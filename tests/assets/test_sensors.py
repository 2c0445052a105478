import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
import yaml

from assets import prompt_files
from assets.definitions import build_definitions
from assets.prompt_files import SETTLE_SECONDS, Seen, UnsettledError, look
from assets.sensors import SENSOR_NAME
from distill_pipeline.experiment import load_experiment
from distill_pipeline.storage.artifacts import ArtifactStore, Making

REPOSITORY = Path(__file__).resolve().parents[2]
LONG_AGO = time.time() - 3600


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of prompt files, with one file in it."""
    (tmp_path / "prompts").mkdir()
    write(tmp_path / "prompts" / "one.jsonl", "one")
    return tmp_path / "prompts"


def write(path: Path, text: str, modified: float = LONG_AGO) -> None:
    path.write_text(json.dumps({"prompt": text}) + "\n")
    os.utime(path, (modified, modified))


@pytest.fixture
def tick(folder: Path, store: ArtifactStore, instance: dg.DagsterInstance) -> Callable[..., dg.SensorResult]:
    """One tick of the sensor on an experiment that reads the folder; cursors travel from one to the next."""
    document = yaml.safe_load((REPOSITORY / "experiments" / "quickstart.yaml").read_text())
    document["prompt_pool"]["sources"] = [{"path": "prompts", "license": "cc0-1.0"}]
    (folder.parent / "experiment.yaml").write_text(yaml.safe_dump(document))
    definitions = build_definitions(load_experiment(folder.parent / "experiment.yaml"))
    sensor = definitions.resolve_sensor_def(SENSOR_NAME)
    memory: dict[str, str | None] = {"cursor": None}

    def evaluate(*, keep_cursor: bool = True) -> dg.SensorResult:
        context = dg.build_sensor_context(
            instance=instance, cursor=memory["cursor"], resources=definitions.resources, sensor_name=SENSOR_NAME
        )
        result = sensor(context)
        if keep_cursor:
            memory["cursor"] = result.cursor
        return result

    return evaluate


def runs(result: dg.SensorResult) -> int:
    return len(result.run_requests or [])


def why(result: dg.SensorResult) -> str:
    assert result.skip_reason is not None
    return str(result.skip_reason.skip_message)


def commit_pool(store: ArtifactStore, digests: list[str]) -> None:
    inputs = {f"source:{index}": digest[:16] for index, digest in enumerate(digests)}
    with store.draft() as draft:
        store.commit(
            draft, "prompt_pool", Making(experiment="e", spec={}, code_version="c", inputs=inputs), counts={}, facts={}
        )


def test_the_first_look_starts_a_run_when_there_is_no_pool(tick):
    assert runs(tick()) == 1


def test_unchanged_files_start_nothing(tick):
    tick()
    result = tick()
    assert runs(result) == 0
    assert "unchanged" in why(result)


def test_the_first_look_starts_nothing_when_the_pool_was_made_from_these_files(tick, store, folder):
    from distill_pipeline.hashing import file_sha256

    commit_pool(store, [file_sha256(folder / "one.jsonl")])
    assert runs(tick()) == 0


def test_the_first_look_sees_what_changed_while_the_sensor_was_off(tick, store):
    commit_pool(store, ["0" * 64])
    assert runs(tick()) == 1


def test_a_new_file_starts_one_run(tick, folder):
    tick()
    write(folder / "two.jsonl", "two")
    assert [runs(tick()) for _ in range(3)] == [1, 0, 0]


def test_a_changed_file_starts_one_run_and_a_touched_one_none(tick, folder):
    tick()
    write(folder / "one.jsonl", "other", modified=LONG_AGO + 60)
    assert [runs(tick()) for _ in range(2)] == [1, 0]
    os.utime(folder / "one.jsonl", (LONG_AGO + 120, LONG_AGO + 120))
    assert runs(tick()) == 0


def test_a_deleted_file_starts_one_run_while_others_are_left(tick, folder):
    write(folder / "two.jsonl", "two")
    tick()
    (folder / "two.jsonl").unlink()
    assert [runs(tick()) for _ in range(2)] == [1, 0]


def test_when_every_file_is_gone_it_waits_and_says_where_it_looked(tick, folder):
    tick()
    (folder / "one.jsonl").unlink()
    result = tick()
    assert runs(result) == 0
    assert "prompts matches no file" in why(result)
    write(folder / "one.jsonl", "one")
    assert runs(tick()) == 0


def test_a_half_written_file_waits_for_the_next_look(tick, folder):
    tick()
    write(folder / "two.jsonl", "half", modified=time.time())
    result = tick()
    assert runs(result) == 0
    assert "prompts/two.jsonl was changed less than 5 s ago" in why(result)
    write(folder / "two.jsonl", "whole")
    assert runs(tick()) == 1


def test_a_change_and_its_return_are_two_runs_with_different_keys(tick, folder):
    keys = [tick().run_requests[0].run_key]
    for text, age in (("other", 60), ("one", 120), ("other", 180)):
        write(folder / "one.jsonl", text, modified=LONG_AGO + age)
        keys.append(tick().run_requests[0].run_key)
    assert len(set(keys)) == 4


def test_a_tick_that_died_before_its_cursor_was_kept_asks_for_the_same_run_again(tick):
    first, again = tick(keep_cursor=False), tick()
    assert first.run_requests[0].run_key == again.run_requests[0].run_key


def test_changes_during_a_run_become_one_run_after_it(tick, folder, instance):
    tick()
    run = dg.DagsterRun(
        job_name="prompts_to_comparison", status=dg.DagsterRunStatus.STARTED, tags={"dagster/sensor_name": SENSOR_NAME}
    )
    instance.add_run(run)
    for number in range(3):
        write(folder / f"new_{number}.jsonl", str(number))
        assert "waits for the run" in why(tick())
    instance.report_run_failed(run)
    assert [runs(tick()) for _ in range(2)] == [1, 0]


def test_unchanged_files_are_not_read_again(tick, folder, monkeypatch):
    tick()
    read: list[str] = []
    from distill_pipeline.prompts import sources

    real = sources._sha256
    monkeypatch.setattr(sources, "_sha256", lambda source, file: read.append(file.label) or real(source, file))
    tick()
    write(folder / "two.jsonl", "two")
    tick()
    assert read == ["prompts/two.jsonl"]


def test_a_file_that_changes_while_it_is_read_waits():
    stamps = iter([{"a": ("1", 0.0)}, {"a": ("2", 0.0)}])
    with pytest.raises(UnsettledError, match="a changed while prompt files were read"):
        look(Seen(), lambda: next(stamps), lambda paths: {"a": "h"}, now=1000.0)


def test_a_clock_that_is_far_ahead_does_not_make_a_file_fresh_for_ever():
    assert prompt_files.is_fresh(1000.0, now=1000.0 + SETTLE_SECONDS / 2)
    assert not prompt_files.is_fresh(1_000_000.0, now=1000.0)
    assert not prompt_files.is_fresh(None, now=1000.0)
