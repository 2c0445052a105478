"""Training in processes of their own: ``distill train`` or ``distill correct`` started as one, or as several under torchrun.

The child makes the artifact as it would from a shell; here its news are passed on line by line, its error is raised again,
and it ends with this process: when its standard input closes, however that happens.

Decided: torchrun starts and watches the processes, so that the death of one ends all of them. Its own report of a failure is
shown only where no process could say what happened.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from distill_pipeline import errors
from distill_pipeline.errors import ComputeError, ConfigError, DistillError
from distill_pipeline.experiment import Experiment
from distill_pipeline.outcome import Progress

ERROR_FILE = "DISTILL_ERROR_FILE"
"""Environment variable: where a started process leaves its error for the one that started it."""

LEAVE_SECONDS = 20.0
"""How long torchrun may take to end its processes before it is killed; they then end by themselves."""

LAST_LINES = 15


@dataclass(frozen=True)
class Launch:
    """How training is started: in so many processes, which hold the weights as copies, or in shards."""

    processes: int = 1
    shard: bool = False


def train_apart(
    launch: Launch, experiment: Experiment, target: str, *, root: str, device: str, force: bool, progress: Progress,
    command: str = "train",
) -> None:  # fmt: skip
    """Train a student, or whatever another ``distill`` command trains, in processes of their own, and wait for them.

    Raises:
        ConfigError: the experiment was not read from a file.
        ComputeError: a process was killed, or ended by an error that is none of this library's.
        DistillError: what a process raised.
    """
    if experiment.file is None:
        raise ConfigError(f"{experiment.name} was given as data; processes of their own can only read it from a file.")
    words = ["-m", "distill_pipeline.cli", command, str(experiment.file), target, "--root", root, "--student-device", device]
    words += ["--force"] if force else []
    words += ["--shard"] if launch.shard else []
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={launch.processes}"]
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder, "error.json")
        program = [sys.executable, *(torchrun if launch.processes > 1 else []), *words]
        with _Child(program, _environment(launch, error_file)) as child:
            for line in child.lines():
                progress(line)
        if child.code != 0:
            raise _raised(error_file) or _death(child)
    sys.stderr.writelines(child.last_words)


def is_launched() -> bool:
    """Whether this process was started by :func:`train_apart`."""
    return ERROR_FILE in os.environ


def leave_error(error: DistillError) -> None:
    """Tell the process that started this one what was raised here."""
    text = json.dumps({"kind": type(error).__name__, "message": str(error)})
    Path(os.environ[ERROR_FILE]).write_text(text, encoding="utf-8")


def end_with_the_launcher() -> None:
    """End this process as soon as the one that started it is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _environment(launch: Launch, error_file: Path) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // launch.processes)
    library = str(Path(__file__).resolve().parents[1])
    found = {"OMP_NUM_THREADS": str(threads)} if launch.processes > 1 else {}
    paths = [library, *filter(None, [os.environ.get("PYTHONPATH")])]
    alone = {"DISTILL_TRAIN_PROCESSES": "1", "DISTILL_TRAIN_SHARD": "0"}  # the command line says how
    return found | dict(os.environ) | alone | {ERROR_FILE: str(error_file), "PYTHONPATH": os.pathsep.join(paths)}


def _raised(error_file: Path) -> DistillError | None:
    """The error that a process left behind."""
    if not error_file.is_file():
        return None
    said = json.loads(error_file.read_text(encoding="utf-8"))
    kind = getattr(errors, said["kind"], DistillError)
    error: DistillError = kind(said["message"])
    return error


def _death(child: "_Child") -> ComputeError:
    how = f"signal {-child.code} ({signal.Signals(-child.code).name})" if child.code < 0 else f"exit status {child.code}"
    said = "".join(list(child.last_words)[-LAST_LINES:]).strip() or "nothing"
    return ComputeError(
        f"training ended with {how} and no process said why: one may have been killed, for instance for want of memory. "
        f"Run it again: it goes on from its last checkpoint. Its last words were:\n{said}"
    )


class _Child:
    """A process with its own session, whose standard input stays open for as long as this process lives."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.last_words: deque[str] = deque(maxlen=200)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._listen, self._release)]
        for thread in self._threads:
            thread.start()

    @property
    def code(self) -> int:
        """Its exit status."""
        return self._process.wait()

    def lines(self) -> Iterator[str]:
        """What it writes, as it comes."""
        return map(str.rstrip, _stream(self._process.stdout))

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._end()
        for thread in self._threads:
            thread.join()
        _stream(self._process.stdout).close()
        _stream(self._process.stderr).close()

    def _end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(LEAVE_SECONDS)
                return

    def _listen(self) -> None:
        self.last_words.extend(_stream(self._process.stderr))

    def _release(self) -> None:
        """Whatever the process has started ends with it: their standard input closes."""
        self._process.wait()
        _stream(self._process.stdin).close()


def _stream(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
