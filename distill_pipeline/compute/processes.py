"""Workers that are processes of this machine, started by command line and spoken to through their pipes.

Why not ``multiprocessing``: a forked process is unsafe beside threads, a spawned one runs the caller's main module again, and
the processes of a killed parent stay. These end by themselves when the parent's end of their pipe closes, even by kill -9 and
in the middle of a chunk, and a Ctrl-C in the terminal reaches the parent alone. Pickles go through pipes between a parent and
its own children only.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Generic, TypeVar

from distill_pipeline.compute.frames import read_frame, write_frame
from distill_pipeline.errors import ComputeError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from distill_pipeline.compute.worker import main; main()"
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""There is a process for each CPU already."""

_LEAVE_SECONDS = 5.0
"""How long a process may take to let go of what its function holds."""


class ProcessWorker(Generic[Chunk, Result]):
    """One process. See :class:`distill_pipeline.compute.ordered.Worker`.

    Args:
        prepare: makes the function in the process; picklable.
    """

    def __init__(self, prepare: Callable[[], Callable[[Chunk], Result]]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True, env={**os.environ, **_ONE_THREAD},
        )  # fmt: skip
        try:
            self._send(prepare)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def submit(self, chunk: Chunk) -> None:
        """Hand over one more chunk; the process reads it while it works on the one before."""
        self._send(chunk)

    def result(self) -> Result:
        """The result of the oldest chunk.

        Raises:
            ComputeError: the process has ended. Whatever the function raised is raised here.
        """
        frame = read_frame(_stream(self._process.stdout))
        if frame is None:
            raise self._death()
        is_result, value = pickle.loads(frame)
        if not is_result:
            raise value
        found: Result = value
        return found

    def close(self) -> None:
        """End the process at once, in the middle of a chunk too; its function is closed first."""
        with suppress(BrokenPipeError):  # what was not yet read by a process that is dead
            _stream(self._process.stdin).close()
        try:
            self._process.wait(timeout=_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _stream(self._process.stdout).close()

    def _send(self, value: object) -> None:
        try:
            write_frame(_stream(self._process.stdin), pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))
        except BrokenPipeError as err:
            raise self._death() from err

    def _death(self) -> ComputeError:
        code = self._process.wait()
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        advice = "It may have run out of memory: free some" if code == -signal.SIGKILL else "Its own message stands above"
        return ComputeError(
            f"a worker process ended by {how} before its chunk of rows was done. {advice}, or set compute: "
            "{workers: 1} to work in one process, and run again; nothing unfinished was stored."
        )


def _stream(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
