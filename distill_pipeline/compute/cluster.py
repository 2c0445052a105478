"""Workers that are actors of a Ray cluster: the same function on the same chunks, on other machines.

Decided: actors and not ``map_batches``, because the function holds an index that is built once, chunks are whole prompts, and
results must come in order. A chunk is a pure function's argument, so an actor that is lost with its machine is started again
and its chunks are tried again.
"""

import importlib
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
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
        num_workers: actors; None for as many as fit.
        num_cpus, num_gpus: of each actor.
    """

    def __init__(self, address: str | None, num_workers: int | None, *, num_cpus: int = 1, num_gpus: float = 0.0) -> None:
        self._address, self._wanted = address, num_workers
        self._num_cpus, self._num_gpus = num_cpus, num_gpus
        self._is_ours = False
        self.num_workers = num_workers or 1
        self._ray: Any = None
        self._shared: dict[int, Any] = {}

    def __enter__(self) -> "RayCluster":
        """Raises MissingExtraError without Ray, ComputeError when no cluster answers or the actors do not fit it."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no news to anybody unless the user wants it
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as err:
            raise MissingExtraError.of("compute: {engine: ray}", "ray", "ray") from err
        self._ray = ray
        if not ray.is_initialized():
            num_cpus = None if self._wanted is None else self._wanted * self._num_cpus
            here: dict[str, Any] = {} if self._address else {"num_cpus": num_cpus, "include_dashboard": False}
            try:
                ray.init(address=self._address, log_to_driver=False, **here)
            except (ConnectionError, RuntimeError, ValueError) as err:
                raise ComputeError(
                    f"no Ray cluster at {self._address or 'this machine'}: {err}. Start it, mend compute.address, or set "
                    "compute: {engine: local}."
                ) from err
            self._is_ours = True
        try:
            self.num_workers = self._wanted or self._fitting()
            self._require_room()
        except ComputeError:
            self.__exit__(None, None, None)
            raise
        return self

    def _fitting(self) -> int:
        """How many actors all machines of the cluster have room for."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return sum(
            int(min(room.get("CPU", 0) // self._num_cpus, room.get("GPU", 0) // self._num_gpus if self._num_gpus else math.inf))
            for room in machines
        )

    def _require_room(self) -> None:
        """Actors without room would be waited for without end."""
        room = self._fitting()
        if not self.num_workers or self.num_workers > room:
            each = f"{self._num_cpus} CPUs" + (f" and {self._num_gpus:g} GPUs" if self._num_gpus else "")
            raise ComputeError(
                f"{self.num_workers or 'no'} workers of {each} each were asked for, and the Ray cluster has room for {room}. "
                "Lower compute.workers, compute.cpus_per_engine or compute.gpus_per_engine, or add machines."
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._shared.clear()
        if self._is_ours:
            self._ray.shutdown()

    def worker(self, prepare: Callable[[], Callable[[Any], Any]]) -> "RayWorker[Any, Any]":
        """A new actor; ``prepare`` is put into the cluster once for all of them."""
        if id(prepare) not in self._shared:
            self._shared[id(prepare)] = self._ray.put(prepare)
        remote = self._ray.remote(
            num_cpus=self._num_cpus, num_gpus=self._num_gpus, max_restarts=_RESTARTS, max_task_retries=_RESTARTS
        )(_Actor)
        return RayWorker(self._ray, remote.remote(self._shared[id(prepare)]))

    def first_done(self, workers: "Sequence[RayWorker[Any, Any]]") -> "RayWorker[Any, Any]":
        """The worker whose oldest chunk is done first; waits for it. All of them must have one under way."""
        (first,), _ = self._ray.wait([worker.oldest for worker in workers], num_returns=1)
        return next(worker for worker in workers if worker.oldest == first)


class _Actor:
    """Holds the function in a process of the cluster, built with the first chunk: an error in building it is told as it is."""

    def __init__(self, prepare: Callable[[], Callable[[Any], Any]]) -> None:
        self._prepare = prepare
        self._function: Callable[[Any], Any] | None = None

    def work(self, chunk: Any) -> Any:
        self._function = self._function or self._prepare()
        return self._function(chunk)

    def leave(self) -> None:
        if self._function is not None:
            release(self._function)


class RayWorker(Generic[Chunk, Result]):
    """One actor. See :class:`distill_pipeline.compute.ordered.Worker`."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._under_way: deque[Any] = deque()

    @property
    def num_under_way(self) -> int:
        """Chunks handed over whose results were not taken."""
        return len(self._under_way)

    @property
    def oldest(self) -> Any:
        """Ray's reference to the result of the oldest chunk."""
        return self._under_way[0]

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
