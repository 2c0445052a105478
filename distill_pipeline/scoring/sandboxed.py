"""What runs inside the sandbox: an answer's code, then the tests, then the verdict. It is passed to ``python -c`` as text.

The verdict "passed" needs a word that waits unread in a pipe until the last test is through; code that exits, prints, or
returns early never reads it. The names used after the code has run are bound before, builtins are put back, and the modules
the code can reach by name hold nothing of this one. Not defended: code written against this very file (walking frames to
the descriptors), and objects that lie to the tests, such as one that equals everything.
"""

import builtins
import json
import os
import sys
import types


def main() -> None:
    """Read the request from descriptor 0, run it, report on the descriptor that the request names, and leave at once."""
    with open(0, "rb") as source:
        request = json.load(source)
    os.open(os.devnull, os.O_RDONLY)  # takes the free descriptor 0
    write, read, leave, run, dump, describe = os.write, os.read, os._exit, exec, json.dumps, _describe
    stop_tracing, stop_profiling, builtin_names = sys.settrace, sys.setprofile, vars(builtins)
    kept = dict(builtin_names)
    tests_text = request["tests"]
    tests = compile(tests_text, "<tests>", "exec")
    solution = types.ModuleType("solution")
    sys.modules["solution"], sys.modules["__main__"] = solution, types.ModuleType("__main__")
    names = vars(solution)
    where = "the code"
    try:
        run(compile(request["code"], "<answer>", "exec"), names)
        where = "the tests"
        builtin_names.update(kept)
        names["__builtins__"] = builtin_names
        stop_tracing(None)
        stop_profiling(None)
        run(tests, names)
    except BaseException as err:
        write(request["report_file"], dump({"failed": describe(err, tests_text), "where": where}).encode())
        leave(1)
    write(request["report_file"], b'{"passed": "%s"}' % read(request["word_file"], 64))
    leave(0)


def _describe(err: BaseException, tests: str) -> str:
    """Type, message and the failing line of the tests, whatever the exception's own methods do."""
    line = None
    step = err.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<tests>":
            line = step.tb_lineno
        step = step.tb_next
    try:
        said = f"{type(err).__name__}: {err}"[:300].removesuffix(": ")
    except BaseException:
        said = type(err).__name__
    lines = tests.splitlines()
    return said if line is None or line > len(lines) else f"{said} at {lines[line - 1].strip()[:120]!r}"


if __name__ == "__main__":
    main()
