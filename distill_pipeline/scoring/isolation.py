"""Scoring one row at a time where it cannot hurt: in a process that is killed when a row takes too long.

A row whose scorer hangs, raises, crashes the process or returns nonsense is unknown, never wrong, and the next row gets a
fresh process. Processes are started by command line, not forked, so they are safe beside threads and never run the caller's
main module again; what the scorer itself started is killed with it.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from distill_pipeline.errors import ConfigError, MissingExtraError
from distill_pipeline.scoring.registry import Scorer, ScoreValue
from distill_pipeline.scoring.worker import extras_of

_START_SECONDS = 60.0
_MAX_REPLY_BYTES = 1 << 20


class _Late(Exception):
    """The worker did not answer in time."""


class _Gone(Exception):
    """The worker ended without an answer."""


class Bench:
    """Scores rows with one scorer; use it as a context manager."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._function: Callable[..., ScoreValue] | None = None
        self._worker: _Worker | None = None
        self._extras: frozenset[str] = frozenset()
        self._row = 0

    def __enter__(self) -> "Bench":
        """
        Raises:
            ConfigError: the scorer cannot be loaded at all, or refuses to work on this machine.
            MissingExtraError: its package is not installed.
        """
        if self.scorer.is_isolated:
            try:
                self._worker = _Worker(self.scorer)
            except (_Late, _Gone, OSError) as err:
                raise ConfigError(
                    f"scorers: {self.scorer.kind} cannot be loaded: {err}. Mend its module and run again."
                ) from err
        else:
            self._function = self.scorer.function()
            self._extras = extras_of(self._function)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._worker is not None:
            self._worker.kill()

    def score(
        self, reference: str | None, answer: str, metadata: Mapping[str, Any] | None = None, prompt: str | None = None
    ) -> ScoreValue:
        """One row's score. Never raises on account of the scorer.

        Args:
            metadata: the prompt's other columns; None is none. Given to scorers that have a parameter of this name.
            prompt: the last user message, for scorers that have a parameter of this name.
        """
        extras = {"metadata": dict(metadata or {}), "prompt": prompt}
        if self._function is not None:
            given = {name: extras[name] for name in self._extras}
            return self._function(reference, answer, **given, **self.scorer.options)
        self._row += 1
        request = {"row": self._row, "reference": reference, "answer": answer, "options": dict(self.scorer.options)}
        try:
            if self._worker is None:
                self._worker = _Worker(self.scorer)
            request |= {name: extras[name] for name in self._worker.extras}
            reply = self._worker.ask(request, self.scorer.timeout_seconds)
            if reply.get("row") != self._row:
                raise _Gone("it answered something else")
        except (_Late, _Gone, OSError) as err:
            return self._lost(err)
        return ScoreValue(reply["score"], reply["detail"])

    def _lost(self, err: Exception) -> ScoreValue:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None
        if isinstance(err, _Late):
            return ScoreValue(None, f"timeout: no score within {self.scorer.timeout_seconds:g} s", "timeout")
        return ScoreValue(None, f"crash: the scorer's process ended ({err})", "crash")


class _Worker:
    """One process. Reading and writing keep a deadline, so that no state of the process can block the caller."""

    def __init__(self, scorer: Scorer) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distill_pipeline.scoring.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True, env=_environment(),
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        self._read = b""
        try:
            setup = {
                "target": scorer.target, "start": scorer.start, "search_path": list(scorer.search_path),
                "timeout_seconds": scorer.timeout_seconds,
            }  # fmt: skip
            reply = self.ask(setup, _START_SECONDS)
        except BaseException:
            self.kill()
            raise
        if "ready" not in reply:
            self.kill()
            if "missing" in reply:
                raise MissingExtraError(reply["missing"])
            if "refusal" in reply:
                raise ConfigError(f"scorers: {scorer.kind} cannot be used: {reply['refusal']}")
            raise _Gone(reply.get("error", "it answered something else"))
        self.extras: list[str] = reply["extras"]

    def ask(self, request: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """Send one line and wait for one. Raises _Late or _Gone."""
        deadline = time.monotonic() + timeout_seconds
        self._send(json.dumps(request).encode("ascii") + b"\n", deadline)
        while b"\n" not in self._read:
            if not _is_ready(self._from, select.POLLIN, deadline):
                raise _Late(f"no answer within {timeout_seconds:g} s")
            data = os.read(self._from, 65536)
            if not data or len(self._read) > _MAX_REPLY_BYTES:
                raise _Gone(self._ending())
            self._read += data
        line, self._read = self._read.split(b"\n", 1)
        try:
            reply = json.loads(line)
        except ValueError as err:
            raise _Gone("it answered something else") from err
        return reply if isinstance(reply, dict) else {}

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            if not _is_ready(self._to, select.POLLOUT, deadline):
                raise _Late("it does not read")
            try:
                view = view[os.write(self._to, view) :]
            except BrokenPipeError as err:
                raise _Gone(self._ending()) from err

    def _ending(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """End the process and what it started, at once."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):  # what is left in the buffer of a dead process
                    stream.close()


def _is_ready(file: int, event: int, deadline: float) -> bool:
    """Wait until a file can be read or written, or has ended; False when the deadline comes first."""
    poll = select.poll()
    poll.register(file, event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _environment() -> dict[str, str]:
    """The caller's environment, with this package importable whatever the working directory."""
    import distill_pipeline

    root = os.path.dirname(os.path.dirname(os.path.abspath(distill_pipeline.__file__)))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}
