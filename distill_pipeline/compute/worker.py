"""The program of a worker process: build the function once, then answer one chunk after the other until the pipe closes.

A thread reads ahead, so that the parent can always hand over the next chunk while this one is worked on, and neither waits
for the other with a full pipe. When the pipe closes the parent is done, or dead: the thread ends the process in the middle of
whatever it does, for nobody waits for a result any more.
"""

import os
import pickle
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO, Any

from distill_pipeline.compute.frames import read_frame, write_frame


def main() -> None:
    """Answer what comes in by standard input. What the function prints goes to standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    functions: list[Callable[[Any], Any]] = []
    reader = threading.Thread(target=_read_ahead, args=(sys.stdin.buffer, frames, functions), daemon=True)
    reader.start()
    while True:
        frame = frames.get()
        reply: tuple[bool, Any]
        try:
            if not functions:
                functions.append(pickle.loads(frame)())
                continue
            reply = (True, functions[0](pickle.loads(frame)))
        except BaseException as err:
            reply = (False, _portable(err))
        try:
            write_frame(replies, pickle.dumps(reply, protocol=pickle.HIGHEST_PROTOCOL))
        except BrokenPipeError:
            reader.join()  # the parent is gone, nobody is left to be told


def release(function: Callable[[Any], Any]) -> None:
    """Close a function that holds something: one that has a ``close``."""
    close = getattr(function, "close", None)
    if close is not None:
        close()


def _read_ahead(stream: IO[bytes], frames: "queue.SimpleQueue[bytes]", functions: list[Callable[[Any], Any]]) -> None:
    try:
        while (frame := read_frame(stream)) is not None:
            frames.put(frame)
        for function in functions:
            release(function)
    finally:
        os._exit(0)  # without waiting for the other thread


def _portable(err: BaseException) -> BaseException:
    """The error with where it was raised, as one that survives the way to the parent."""
    text = "".join(traceback.format_exception(err))
    try:
        copy = pickle.loads(pickle.dumps(err))
    except Exception:
        copy = RuntimeError(f"{type(err).__name__}: {err}")
    copy.add_note(f"raised in a worker process:\n{text}")
    found: BaseException = copy
    return found
