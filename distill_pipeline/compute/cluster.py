"""Workers that are actors of a Ray cluster: the same function on the same chunks, on other machines.

Decided: actors and not ``map_batches``, because the function holds an index that is built once, chunks are whole prompts, and
results must come in order. A chunk is a pure function's argument, so an actor that is lost with its machine is started again
and its chunks are tried again.
"""

import importlib
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, TypeVar

from distill_pipeline.compute.worker import release
from distill_pipeline.errors import ComputeError, MissingExtraError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

_RESTARTS = 3
_LEAVE_SECONDS = 5.0


class RayCluster:
    """A connection to a cluster, for as long as the context lasts; one that was there before stays.

    Args:
        address: of a running cluster; None starts one on this machine.
        num_workers: actors; None for one a CPU.
    """

    def __init__(self, address: str | None, num_workers: int | None) -> None:
        self._address, self._wanted = address, num_workers
        self._is_ours = False
        self.num_workers = num_workers or 1
        self._ray: Any = None
        self._shared: dict[int, Any] = {}

    def __enter__(self) -> "RayCluster":
        """Raises MissingExtraError without Ray, ComputeError when no cluster answers."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no news to anybody unless the user wants it
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as err:
            raise MissingExtraError.of("compute: {engine: ray}", "ray", "ray") from err
        self._ray = ray
        if not ray.is_initialized():
            here: dict[str, Any] = {} if self._address else {"num_cpus": self._wanted, "include_dashboard": False}
            try:
                ray.init(address=self._address, log_to_driver=False, **here)
            except (ConnectionError, RuntimeError, ValueError) as err:
                raise ComputeError(
                    f"no Ray cluster at {self._address or 'this machine'}: {err}. Start it, mend compute.address, or set "
                    "compute: {engine: local}."
                ) from err
            self._is_ours = True
        if self._wanted is None:
            self.num_workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._shared.clear()
        if self._is_ours:
            self._ray.shutdown()

    def worker(self, prepare: Callable[[], Callable[[Any], Any]]) -> "RayWorker[Any, Any]":
        """A new actor; ``prepare`` is put into the cluster once for all of them."""
        if id(prepare) not in self._shared:
            self._shared[id(prepare)] = self._ray.put(prepare)
        remote = self._ray.remote(num_cpus=1, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(_Actor)
        return RayWorker(self._ray, remote.remote(self._shared[id(prepare)]))


class _Actor:
    """Holds the function in a process of the cluster."""

    def __init__(self, prepare: Callable[[], Callable[[Any], Any]]) -> None:
        self._function = prepare()

    def work(self, chunk: Any) -> Any:
        return self._function(chunk)

    def leave(self) -> None:
        release(self._function)


class RayWorker(Generic[Chunk, Result]):
    """One actor. See :class:`distill_pipeline.compute.ordered.Worker`."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._under_way: deque[Any] = deque()

    def submit(self, chunk: Chunk) -> None:
        """Hand over one more chunk."""
        self._under_way.append(self._actor.work.remote(chunk))

    def result(self) -> Result:
        """The result of the oldest chunk.

        Raises:
            ComputeError: the actor was lost again and again. Whatever the function raised is raised here.
        """
        errors = self._ray.exceptions
        try:
            found: Result = self._ray.get(self._under_way.popleft())
        except errors.RayTaskError as err:
            raise err.cause from err
        except errors.RayError as err:
            raise ComputeError(
                f"a worker of the Ray cluster was lost {_RESTARTS + 1} times: {err}. See its log in the cluster (memory?), or "
                "set compute: {engine: local}."
            ) from err
        return found

    def close(self) -> None:
        """End the actor at once, in the middle of a chunk too; its function is closed first unless it is at work."""
        if not self._under_way:
            with suppress(self._ray.exceptions.RayError):  # it is ended anyway
                self._ray.get(self._actor.leave.remote(), timeout=_LEAVE_SECONDS)
        self._ray.kill(self._actor)
