"""Training in processes of their own: their news arrive, their error is raised here, and they end with this process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill_pipeline import launching
from distill_pipeline.errors import ComputeError, ConfigError, TrainingError
from distill_pipeline.experiment import Experiment, load_experiment, parse_experiment
from distill_pipeline.launching import Launch, leave_error, train_apart

EXPERIMENT = """\
name: words
prompt_pool: {sources: [{path: prompts.jsonl, license: cc0-1.0}], decontaminate: {against: null}}
teachers: {small: {model: no_such_folder, license: mit}}
filters: {every: {}}
students: {kl: {data: [small/every], init: {prune: {layers: 2}}, stages: [{method: logit_kd}]}}
evaluation: {tasks: [some_task]}
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    (tmp_path / "words.yaml").write_text(EXPERIMENT)
    return load_experiment(tmp_path / "words.yaml")


def start(
    experiment: Experiment, program: str, monkeypatch: pytest.MonkeyPatch, launch: Launch = Launch(), **options: str  # noqa: B008
) -> list[str]:  # fmt: skip
    """What is said when a shell program takes the place of Python."""
    fake = experiment.base_dir / "python"
    fake.write_text("#!/bin/sh\n" + program)
    fake.chmod(0o755)
    monkeypatch.setattr(launching.sys, "executable", str(fake))
    said: list[str] = []
    train_apart(launch, experiment, "kl", root="/store", device="cpu", force=False, progress=said.append, **options)
    return said


def test_another_command_that_trains_is_started_alike(experiment, monkeypatch):
    (line,) = start(experiment, 'echo "$@"', monkeypatch, command="correct")
    assert line.startswith(f"-m distill_pipeline.cli correct {experiment.file} kl --root /store")


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 60.0
    while time.monotonic() < end:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"process {pid} outlived the one that started it")


def test_the_child_is_the_train_command_and_what_it_says_arrives_in_order(experiment, monkeypatch):
    said = start(experiment, 'echo "$@"\necho $DISTILL_TRAIN_PROCESSES $DISTILL_TRAIN_SHARD', monkeypatch)
    command = f"-m distill_pipeline.cli train {experiment.file} kl --root /store --student-device cpu"
    assert said == [command, "1 0"]
    (line,) = start(experiment, 'echo "$@" $OMP_NUM_THREADS', monkeypatch, Launch(64, shard=True))[:1]
    assert line.startswith("-m torch.distributed.run --standalone --nproc-per-node=64 -m distill_pipeline.cli train ")
    assert "--shard" in line


def test_an_error_of_the_child_is_raised_here_and_torchruns_report_is_not_shown(experiment, monkeypatch):
    left = '{"kind": "TrainingError", "message": "the loss is nan"}'
    with pytest.raises(TrainingError, match=r"^the loss is nan$"):
        start(experiment, f"echo '{left}' > $DISTILL_ERROR_FILE\necho Traceback >&2\nexit 1", monkeypatch)


def test_an_error_that_is_left_has_its_class_and_text(tmp_path, monkeypatch):
    monkeypatch.setenv(launching.ERROR_FILE, str(tmp_path / "error.json"))
    leave_error(ConfigError("wrong: 'x'"))
    assert repr(launching._raised(tmp_path / "error.json")) == repr(ConfigError("wrong: 'x'"))


def test_a_child_that_was_killed_or_ends_without_a_word_says_its_last_lines(experiment, monkeypatch):
    with pytest.raises(ComputeError, match=r"exit status 3 and no process said why.*Its last words were:\nout of memory$"):
        start(experiment, "echo out of memory >&2\nexit 3", monkeypatch)
    with pytest.raises(ComputeError, match=r"signal 9 \(SIGKILL\).*goes on from its last checkpoint.*\nnothing"):
        start(experiment, "kill -9 $$", monkeypatch)


def test_an_experiment_that_is_in_no_file_cannot_be_read_by_another_process(experiment):
    data = parse_experiment(experiment.document())
    with pytest.raises(ConfigError, match="was given as data"):
        train_apart(Launch(), data, "kl", root="/store", device="cpu", force=False, progress=print)


def test_cancelling_ends_the_child(experiment, monkeypatch):
    pids: list[int] = []

    def cancel(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    fake = experiment.base_dir / "python"
    fake.write_text("#!/bin/sh\necho $$\nsleep 100")
    fake.chmod(0o755)
    monkeypatch.setattr(launching.sys, "executable", str(fake))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_apart(Launch(), experiment, "kl", root="/store", device="cpu", force=False, progress=cancel)
    wait_until_gone(pids[0])
    assert time.monotonic() - started < 60.0


def test_the_child_ends_when_the_process_that_started_it_is_killed(tmp_path):
    child = (
        "import os, sys, time; from distill_pipeline.launching import end_with_the_launcher\n"
        "end_with_the_launcher(); print(os.getpid(), flush=True); time.sleep(100)"
    )
    parent = (
        "import os, sys; from distill_pipeline.launching import _Child\n"
        "with _Child([sys.executable, '-c', sys.argv[1]], dict(os.environ)) as child:\n"
        "    for line in child.lines():\n        print(line, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    wait_until_gone(pid)
