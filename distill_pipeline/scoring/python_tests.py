"""Whether an answer's Python passes its tests, run in a sandbox or not at all.

Right needs every test run to its end. Wrong is code that fails a test, does not load, ends early, or takes more CPU time or
memory than it may; what is late by the clock alone is unknown, since a busy machine can do that too. The tests are the
reference or the metadata's ``tests``: Python text, or a list of it; functions ``test_*``, ``unittest`` classes, and
``check(candidate)`` with the metadata's ``entry_point`` are called where the tests do not. Not defended: see
:mod:`distill_pipeline.scoring.sandboxed`; and tests that test nothing pass.
"""

import ast
import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_pipeline.errors import ConfigError
from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.scoring.sandbox import Ending, Limits, Ports, SandboxError, run_isolated

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = {"python", "py", "python3"}
_UNITTEST = """
import unittest as _unittest
for _case in [{names}]:
    _result = _unittest.TestResult()
    _unittest.defaultTestLoader.loadTestsFromTestCase(_case).run(_result)
    assert _result.wasSuccessful() and _result.testsRun, (_result.failures + _result.errors)[0][1].splitlines()[-1]
"""


def require_sandbox() -> None:
    """Raises ConfigError where untrusted code cannot be kept apart; the message says what to do."""
    if sys.platform != "linux":
        raise ConfigError(
            "it runs programs that a model wrote, and can keep them apart on Linux only. Score on a Linux machine."
        )
    try:
        ending = run_isolated(_program(), _request("", "assert True"), Limits(wall_seconds=30.0))
    except (SandboxError, OSError) as err:
        raise ConfigError(
            f"it runs programs that a model wrote, and this machine does not let it keep them apart ({err}). Allow user "
            "namespaces (sysctl user.max_user_namespaces above 0; on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0; "
            "in a container --security-opt seccomp=unconfined), or score elsewhere. There is no mode without isolation."
        ) from err
    if _verdict(ending, Limits()).score != 1.0:
        raise ConfigError(f"the sandbox does not start Python here: {_verdict(ending, Limits()).detail}. Score elsewhere.")


def python_tests(
    reference: str | None,
    answer: str,
    metadata: Mapping[str, Any],
    *,
    cpu_seconds: int = 5,
    wall_seconds: float = 8.0,
    memory_mb: int = 512,
    max_processes: int = 16,
) -> ScoreValue:
    """Whether the answer's code (its last Python block, else all of it) passes the tests.

    Args:
        metadata: ``tests`` goes before the reference; ``entry_point`` names the function that is tested.
        cpu_seconds: for each process of the program; more is wrong.
        wall_seconds: for all of it; more is unknown. Keep it below the scorer's ``timeout_seconds``.
        memory_mb: address space of each process.
        max_processes: processes and threads at a time.
    """
    entry_point = metadata.get("entry_point")
    tests = _tests_text(metadata.get("tests", reference))
    if tests is None:
        return ScoreValue(None, "the prompt has no tests: neither a reference nor a metadata key tests")
    try:
        tests = _with_calls(tests, entry_point if isinstance(entry_point, str) else None)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        return ScoreValue(None, f"the tests are not Python: {err}")
    code = code_of(answer, entry_point if isinstance(entry_point, str) else None)
    if not code.strip():
        return ScoreValue(0.0, "the answer has no code")
    limits = Limits(cpu_seconds, wall_seconds, memory_mb, max_processes)
    return _verdict(run_isolated(_program(), _request(code, tests), limits), limits)


def code_of(answer: str, entry_point: str | None = None) -> str:
    """The last Python block (of those that define the entry point, if any does), else the last block, else all."""
    blocks = _BLOCK.findall(answer)
    if not blocks:
        return answer
    listed = [text for label, text in blocks if label.lower() in _PYTHON] or [text for _, text in blocks]
    if entry_point:
        name = re.escape(entry_point)
        listed = [
            text for text in listed if re.search(rf"\b(?:def|class)\s+{name}\b|^{name}\s*=", text, re.MULTILINE)
        ] or listed
    return str(listed[-1])


def _tests_text(tests: Any) -> str | None:
    if isinstance(tests, list) and all(isinstance(part, str) for part in tests):
        tests = "\n".join(tests)
    return tests if isinstance(tests, str) and tests.strip() else None


def _with_calls(tests: str, entry_point: str | None) -> str:
    """The tests with calls added for what they only define."""
    body = ast.parse(tests).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    called = {name.id for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef)
              for name in ast.walk(node) if isinstance(name, ast.Name)}  # fmt: skip
    calls = [f"{f.name}()" for f in functions if f.name.startswith("test") and not f.args.args and f.name not in called]
    if entry_point and "check" not in called and any(f.name == "check" for f in functions):
        calls.append(f"check({entry_point})")
    cases = [
        node.name for node in body
        if isinstance(node, ast.ClassDef) and any("TestCase" in ast.unparse(base) for base in node.bases)
    ]  # fmt: skip
    if cases and not any("unittest.main" in ast.unparse(node) for node in body if isinstance(node, ast.Expr)):
        calls.append(_UNITTEST.format(names=", ".join(cases)))
    return "\n".join([tests, *calls])


def _program() -> str:
    return Path(__file__).with_name("sandboxed.py").read_text("utf-8")


def _request(code: str, tests: str) -> Any:
    def payload(ports: Ports) -> bytes:
        request = {"code": code, "tests": tests, "report_file": ports.report_file, "word_file": ports.word_file}
        return json.dumps(request).encode("ascii")

    return payload


def _verdict(ending: Ending, limits: Limits) -> ScoreValue:
    if b'"passed": "' + ending.word in ending.report:
        return ScoreValue(1.0, "passed")
    try:  # several processes of one program may have reported
        said, _ = json.JSONDecoder().raw_decode(ending.report.decode("utf-8", "replace"))
    except ValueError:
        said = None
    if ending.status is None:
        return ScoreValue(None, f"stopped: not through within {limits.wall_seconds:g} s")
    if os.WIFSIGNALED(ending.status):
        number = os.WTERMSIG(ending.status)
        if number == signal.SIGXCPU:
            return ScoreValue(0.0, f"stopped: more than {limits.cpu_seconds} s of CPU time")
        if number == signal.SIGKILL:
            return ScoreValue(None, "killed: by itself, for CPU time, or by a system short of memory")
        return ScoreValue(0.0, f"the program ended by {signal.Signals(number).name}")
    if isinstance(said, dict) and isinstance(said.get("failed"), str):
        where = "the tests" if said.get("where") == "the tests" else "the code"
        return ScoreValue(0.0, f"failed in {where}: {said['failed'][:400]}")
    code = os.waitstatus_to_exitcode(ending.status)
    return ScoreValue(0.0, f"ended early with exit code {code}, before the tests were through")
