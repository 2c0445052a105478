"""A run that was killed must not block the next one: with real processes of Dagster and a real kill -9."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from assets.slots import free_dead_slots, is_alive

REPOSITORY = Path(__file__).resolve().parents[2]

HANGING = """
import os, pathlib, time
import dagster as dg

@dg.asset(pool="teacher_gpu")
def teacher_outputs():
    pathlib.Path(os.environ["STARTED"]).touch()
    while not pathlib.Path(os.environ["MAY_END"]).exists():
        time.sleep(0.05)

defs = dg.Definitions(assets=[teacher_outputs], executor=dg.{executor}_executor)
"""


class Shell:
    """A folder with this repository's dagster.yaml, in which an asset that waits in a pool is materialised."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started, self.may_end = folder / "started", folder / "may_end"
        shutil.copy(REPOSITORY / "dagster.yaml", folder)
        self.processes: list[subprocess.Popen[bytes]] = []

    def materialize(self, executor: str) -> subprocess.Popen[bytes]:
        (self.folder / "hanging.py").write_text(HANGING.format(executor=executor))
        command = [sys.executable, "-W", "ignore", "-m", "dagster", "asset", "materialize", "-f", "hanging.py", "--select", "*"]
        environment = os.environ | {"STARTED": str(self.started), "MAY_END": str(self.may_end)}
        environment.pop("DAGSTER_HOME", None)
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def instance(self) -> dg.DagsterInstance:
        return dg.DagsterInstance.from_config(str(self.folder))

    def close(self) -> None:
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    monkeypatch.chdir(tmp_path)
    shell = Shell(tmp_path)
    yield shell
    shell.close()


def wait_for(condition: Callable[[], object], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def run_of(instance: dg.DagsterInstance) -> dg.DagsterRun:
    (run,) = instance.get_runs(limit=1)
    return run


def test_a_killed_run_gives_its_place_back_and_the_next_run_goes_through(shell: Shell) -> None:
    process = shell.materialize("in_process")
    wait_for(shell.started.exists)
    with shell.instance() as instance:
        (news,) = free_dead_slots(instance)
        assert "at work in process" in news
        process.kill()
        process.wait()
        assert run_of(instance).status == dg.DagsterRunStatus.STARTED
        news, freed = free_dead_slots(instance)
        assert "is dead, marked as failed" in news
        assert "free again" in freed
        assert run_of(instance).status == dg.DagsterRunStatus.FAILURE
        assert list(free_dead_slots(instance)) == []
    shell.may_end.touch()
    assert shell.materialize("in_process").wait(timeout=90) == 0


def test_a_step_that_outlived_its_killed_run_keeps_its_place_until_it_ends(shell: Shell) -> None:
    process = shell.materialize("multiprocess")
    wait_for(shell.started.exists)
    process.kill()
    process.wait()
    with shell.instance() as instance:
        (news,) = free_dead_slots(instance)
        assert "at work in process" in news
        shell.may_end.touch()
        wait_for(lambda: any("is dead" in line for line in free_dead_slots(instance)))
        assert run_of(instance).status == dg.DagsterRunStatus.FAILURE


def test_a_number_that_another_process_got_later_does_not_count_as_alive() -> None:
    assert is_alive(os.getpid(), last_seen=time.time())
    assert not is_alive(os.getpid(), last_seen=time.time() - 10 * 365 * 86400)


def test_a_zombie_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: not is_alive(process.pid, time.time()))
    process.wait()


def test_the_command_looks_at_this_checkouts_history_and_is_silent_when_all_is_well(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "dagster.yaml", tmp_path)
    text = (tmp_path / "dagster.yaml").read_text().replace("./.dagster", str(tmp_path / "history"))
    (tmp_path / "dagster.yaml").write_text(text)
    command = [sys.executable, "-m", "assets.slots"]
    environment = os.environ | {"DAGSTER_HOME": str(tmp_path)}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
