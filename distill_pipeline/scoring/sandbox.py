"""Running a program that nobody trusts: own users, processes, network and root folder, limits on everything, and an end.

Three processes: one that sets the namespaces up, the first process inside (when it ends, the kernel kills all that is left
there), and the program, a user without rights. Each ends with the one that started it, so killing the caller kills all.
Decided: what the program prints goes nowhere; what it says comes back through one descriptor, and is cut. Gave up: a limit
on the memory of all processes together (it is ``memory_mb`` for each of ``max_processes``), and other systems than Linux.
"""

import os
import resource
import secrets
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from distill_pipeline.scoring import namespaces

SCRATCH_MB = 32
_MAX_REPORT_BYTES = 1 << 16
_MAX_OPEN_FILES = 64
_FIRST_FREE_FILE = 10
_SETUP_SECONDS = 10.0
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "HOME": namespaces.WORK_DIR, "TMPDIR": namespaces.WORK_DIR, "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
}  # fmt: skip


_CONFINED_PROCESSES = 16


class SandboxError(RuntimeError):
    """The sandbox could not be set up; nothing of the program has run."""


@dataclass(frozen=True)
class Limits:
    """Per process, but for ``wall_seconds`` and ``max_processes`` (threads count too)."""

    cpu_seconds: int = 5
    wall_seconds: float = 8.0
    memory_mb: int = 512
    max_processes: int = 16


@dataclass(frozen=True)
class Ending:
    """What came of a program: what it reported, its wait status (None when it was stopped), and the secret word."""

    report: bytes
    status: int | None
    word: bytes


@dataclass(frozen=True)
class Ports:
    """Descriptors that the program may use: where to report, and where the secret word waits."""

    report_file: int
    word_file: int


def run_isolated(program: str, payload: Callable[[Ports], bytes], limits: Limits) -> Ending:
    """Run Python source in a sandbox until it ends or is stopped.

    Args:
        program: source for ``python -c``.
        payload: given the ports, what the program reads from descriptor 0.
    Raises:
        SandboxError: a step of the isolation failed; the message says which.
    """
    word = secrets.token_hex(16).encode()
    low, high = sorted(secrets.SystemRandom().sample(range(_FIRST_FREE_FILE, _MAX_OPEN_FILES), 2))
    ports = Ports(low, high)
    request = os.memfd_create("request")
    with os.fdopen(os.dup(request), "wb") as file:
        file.write(payload(ports))
    os.lseek(request, 0, os.SEEK_SET)
    report, word_pipe, status, go = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    os.write(word_pipe[1], word)
    os.close(word_pipe[1])
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            for file_number in (report[0], status[0], go[1]):
                os.close(file_number)
            _set_up(parent, status[1], go[0])
            _hold(program, limits, ports, (request, report[1], word_pipe[0]), status[1])
        except BaseException as err:
            with suppress(OSError):
                os.write(status[1], b"E" + str(err.strerror if isinstance(err, OSError) else err).encode()[:1000])
        finally:
            os._exit(70)
    for file_number in (request, report[1], word_pipe[0], status[1], go[0]):
        os.close(file_number)
    try:
        return _follow(pid, report[0], status[0], go[1], limits, word)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        _drain(status[0])
        for file_number in (report[0], status[0], go[1]):
            os.close(file_number)


def _follow(pid: int, report: int, status: int, go: int, limits: Limits, word: bytes) -> Ending:
    """The caller's side: name the users, start the program, and listen until it is over or late."""
    said = _heard(status, time.monotonic() + _SETUP_SECONDS)
    if said == b"U":
        try:
            namespaces.map_users(pid)
        except OSError as err:
            raise SandboxError(f"map users: {err.strerror or err}") from err
        os.write(go, b"g")
        said = _heard(status, time.monotonic() + _SETUP_SECONDS)
    if said != b"R":
        raise SandboxError((said.removeprefix(b"E") or b"it ended while it was set up").decode())
    deadline = time.monotonic() + limits.wall_seconds
    heard = {report: b"", status: b""}
    waiting = {report, status}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for file in select.select(list(waiting), [], [], left)[0]:
            data = os.read(file, 65536)
            heard[file] += data
            if not data or len(heard[file]) > _MAX_REPORT_BYTES:
                waiting.discard(file)
    ended = heard[status]
    if ended.startswith(b"E"):
        raise SandboxError(ended[1:].decode())
    return Ending(heard[report][:_MAX_REPORT_BYTES], int(ended[1:]) if ended.startswith(b"S") else None, word)


def _heard(file: int, deadline: float) -> bytes:
    ready = select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]
    return os.read(file, 2000) if ready else b""


def _drain(status: int) -> None:
    """Wait until the last process inside is gone: the first one's end of this pipe closes with it."""
    deadline = time.monotonic() + _SETUP_SECONDS
    while _heard(status, deadline):
        pass


def _set_up(parent: int, status: int, go: int) -> None:
    namespaces.end_with_parent()
    if os.getppid() != parent:
        os._exit(0)
    namespaces.enter(new_processes=True)
    os.write(status, b"U")
    if os.read(go, 1) != b"g":
        os._exit(0)
    namespaces.build_root(SCRATCH_MB)
    os.write(status, b"R")


def _hold(program: str, limits: Limits, ports: Ports, files: tuple[int, int, int], status: int) -> None:
    """Start the first process inside, and stay until it has ended."""
    alive_read, alive_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(alive_write)
        namespaces.end_with_parent()
        namespaces.hide_from_program()
        if os.read(alive_read, 1) == b"g":
            _watch(program, limits, ports, files, status)
        os._exit(0)
    os.close(status)
    os.write(alive_write, b"g")
    os.waitpid(pid, 0)
    os._exit(0)


def _watch(program: str, limits: Limits, ports: Ports, files: tuple[int, int, int], status: int) -> None:
    """The first process inside: start the program, bury whoever dies, and say how the program ended."""
    pid = os.fork()
    if pid == 0:
        try:
            _become(program, limits, ports, files)
        except BaseException as err:
            os.write(status, b"E" + f"start the program: {err}".encode()[:1000])
        os._exit(70)
    for file_number in files:
        os.close(file_number)
    while True:
        dead, how = os.wait()
        if dead == pid:
            os.write(status, b"S%d" % how)
            return


def _become(program: str, limits: Limits, ports: Ports, files: tuple[int, int, int]) -> None:
    os.setsid()  # so that it cannot signal the caller's group
    os.umask(0o077)
    request, report, word = (os.dup2(file, 100 + number) for number, file in enumerate(files))
    nothing = os.open(os.devnull, os.O_RDWR)
    for source, target in ((request, 0), (nothing, 1), (nothing, 2), (report, ports.report_file), (word, ports.word_file)):
        os.dup2(source, target, inheritable=True)
    keep = sorted({ports.report_file, ports.word_file})
    for start, end in zip([3, keep[0] + 1, keep[1] + 1], [*keep, 4096], strict=True):
        os.closerange(start, end)
    _limit(limits.memory_mb, limits.max_processes)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 1))
    namespaces.drop_rights()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execve(sys.executable, [sys.executable, "-I", "-B", "-c", program], _ENVIRONMENT)


def _limit(memory_mb: int, max_processes: int) -> None:
    for what, value in (
        (resource.RLIMIT_AS, memory_mb * 2**20), (resource.RLIMIT_FSIZE, SCRATCH_MB * 2**20), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, max_processes), (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
    ):  # fmt: skip
        resource.setrlimit(what, (value, value))


def confine(memory_mb: int) -> None:
    """Lock this very process up, for good: no network, no files but the interpreter's, no rights, no environment.

    Open descriptors stay. Call it before anything starts a thread.

    Raises:
        SandboxError: a step of the isolation failed; the process is of no further use.
    """
    entered = os.pipe()
    this = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(entered[1])
        code = 1
        with suppress(OSError):
            if os.read(entered[0], 1):
                namespaces.map_users(this)
                code = 0
        os._exit(code)
    try:
        namespaces.enter(new_processes=False)
        os.write(entered[1], b"g")
    finally:
        os.close(entered[0])
        os.close(entered[1])
        failed = os.waitpid(helper, 0)[1]
    if failed:
        raise SandboxError("map users: this process may not name the users of its namespace")
    namespaces.build_root(SCRATCH_MB)
    _limit(memory_mb, _CONFINED_PROCESSES)
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    namespaces.drop_rights()
