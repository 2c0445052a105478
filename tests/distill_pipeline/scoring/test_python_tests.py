"""Law 20: a model's program runs apart, with limits, or not at all; it cannot touch anything, nor say itself that it passed."""

import hashlib
import os
import re
import socket
import threading
import time
from pathlib import Path

import pytest

from distill_pipeline.errors import ConfigError
from distill_pipeline.scoring import namespaces, python_tests, score_answers
from distill_pipeline.scoring.namespaces import NamespaceError
from distill_pipeline.scoring.python_tests import code_of, require_sandbox
from distill_pipeline.scoring.registry import ScoreValue

TESTS = "assert f(2) == 4\nassert f(3) == 9"
GOOD = "def f(x):\n    return x * x\n"


def judged(*answers: str, wall_seconds: float = 8.0, cpu_seconds: int = 5) -> list[ScoreValue]:
    rows = [{"reference": TESTS, "answer": answer} for answer in answers]
    return score_answers("python_tests", rows, timeout_seconds=30, cpu_seconds=cpu_seconds, wall_seconds=wall_seconds)


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        ("x = 'a' * 10**11", "MemoryError"),
        ("parts = []\nwhile True: parts.append('a' * 10**7)", "MemoryError"),
        ("import os\nwhile True: os.fork()", "temporarily unavailable|ended early"),
        ("import threading, time\nfor _ in range(99): threading.Thread(target=time.sleep, args=(3,)).start()", "new thread"),
        ("open('big', 'wb').write(b'x' * 10**8)", "File too large|No space left"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80), 1)", "unreachable"),
        ("open('/etc/passwd').read()", "No such file"),
        ("import os\nopen(os.__file__, 'a')", "Read-only file system|Permission denied"),
        ("import ctypes\nctypes.CDLL(None).mount(b'none', b'/', None, 32, None)\nopen('/x', 'w')", "Read-only|Permission"),
        ("import os\nos.setuid(0)", "not permitted|Invalid argument"),
    ],
)  # fmt: skip
def test_what_a_program_may_not_do_is_stopped_and_recorded(answer: str, detail: str) -> None:
    (value,) = judged(answer + "\n" + "def f(x): return 0")
    assert value.score == 0.0
    assert re.search(detail, value.detail), value.detail


def test_a_program_that_never_ends_is_stopped_by_its_cpu_seconds() -> None:
    (value,) = judged("while True: pass", cpu_seconds=1)
    assert value.score == 0.0
    assert "more than 1 s of CPU time" in value.detail


def test_a_program_that_only_waits_is_stopped_by_the_clock_and_is_unknown() -> None:
    started = time.monotonic()
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    late = judged("import time\ntime.sleep(99)", bomb, GOOD, wall_seconds=3.0)
    assert [value.score for value in late] == [None, None, 1.0]
    assert time.monotonic() - started < 25


@pytest.mark.parametrize(
    "answer",
    [
        "import os\nprint('passed')\nos._exit(0)", "raise SystemExit(0)", "import sys\ndef f(x): sys.exit(0)",
        "import os\ndef f(x): os._exit(0)", "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 1",
        "import builtins\nbuiltins.exec = lambda *a: None\ndef f(x): return 1", "__builtins__ = {}\ndef f(x): return 1",
        "import json, os\njson.dumps = lambda *a: '{\"passed\": \"x\"}'\ndef f(x): return 1",
        "import os\nfor n in range(64):\n    try: os.write(n, b'{\"passed\": \"\"}')\n    except OSError: pass\nos._exit(0)",
        "import os\nos.fork()\nos._exit(0)",
    ],
)  # fmt: skip
def test_a_program_cannot_simply_say_that_it_passed(answer: str) -> None:
    assert judged(answer)[0].score == 0.0


def test_nothing_of_this_machine_lies_where_a_program_works() -> None:
    paths = [*namespaces._needed_paths(), "/proc", "/dev", *(f"/{entry.name}" for entry in Path("/").iterdir())]
    assert not [path for path in paths if path.startswith(namespaces.WORK_DIR)]


def test_nothing_outside_the_work_folder_changes_and_no_secret_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hush")
    (tmp_path / "kept").write_text("kept")
    before = snapshot(tmp_path), sorted(os.listdir("/")), sorted(os.listdir("/tmp"))
    attack = f"""
import os, shutil, socket
for path in ({str(tmp_path)!r}, '/', '/tmp', '/usr', '/root', '/home', '/proc', '/dev'):
    for step in (lambda: open(path + '/planted', 'w').write('x'), lambda: shutil.rmtree(path), lambda: os.chmod(path, 0o777)):
        try: step()
        except OSError: pass
assert not any('hush' in value for value in os.environ.values())
assert not os.path.exists({str(tmp_path)!r})
assert os.getuid() != 0
open('mine', 'w').write('x')
"""
    (value,) = judged(attack + GOOD)
    assert value.score == 1.0, value.detail
    assert (snapshot(tmp_path), sorted(os.listdir("/")), sorted(os.listdir("/tmp"))) == before


def snapshot(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() + oct(path.stat().st_mode) for path in folder.rglob("*")}


def test_a_program_cannot_reach_a_server_of_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reached: list[object] = []
        server.settimeout(3)

        def accept() -> None:
            try:
                reached.append(server.accept())
            except TimeoutError:
                return

        thread = threading.Thread(target=accept)
        thread.start()
        judged(f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)")
        thread.join()
    assert not reached


def test_what_a_program_leaves_running_ends_with_it() -> None:
    name = f"left{os.getpid()}"
    rename = f"import ctypes\n    ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)"
    left = f"import os\nif os.fork() == 0:\n    os.setsid()\n    {rename}\n    while True: pass\nimport time\ntime.sleep(1)\n"
    was_seen, is_over = threading.Event(), threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            if processes_called(name):
                was_seen.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    (value,) = judged(left + GOOD)
    is_over.set()
    watcher.join()
    assert value.score == 1.0, value.detail
    assert was_seen.is_set()
    assert not processes_called(name)


def processes_called(name: str) -> list[Path]:
    return [pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and called(pid) == name]


def called(pid: Path) -> str:
    try:
        return (pid / "comm").read_text().strip()
    except OSError:
        return ""


def test_without_isolation_it_refuses_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*, new_processes: bool) -> None:
        raise NamespaceError(1, "new namespaces (unshare): Operation not permitted")

    monkeypatch.setattr(namespaces, "enter", fail)
    with pytest.raises(ConfigError, match=r"unshare.*not permitted.*max_user_namespaces.*no mode without isolation"):
        require_sandbox()
    monkeypatch.setattr(python_tests.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="Linux only"):
        require_sandbox()


def test_the_last_python_block_is_the_code() -> None:
    assert code_of("a\n```python\nx = 1\n```\n```py\nx = 2\n```\n```bash\nls\n```") == "x = 2\n"
    assert code_of("```python\ndef f(x): pass\n```\n```python\nprint(f(1))\n```", "f") == "def f(x): pass\n"
    assert code_of("x = 3") == "x = 3"


def test_the_tests_see_the_true_builtins() -> None:
    row = {
        "reference": "assert abs(f(2) - 4) == 0",
        "answer": "import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 1",
    }
    assert score_answers("python_tests", [row])[0].score == 0.0
