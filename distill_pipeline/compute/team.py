"""Actors of a Ray cluster that take the next chunk when they are free: results come as they are done, in no order.

For work whose chunks take unlike times, such as a model's answers; :mod:`distill_pipeline.compute.ordered` keeps the order.
"""

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Generic, TypeVar

from distill_pipeline.compute.cluster import RayCluster, RayWorker
from distill_pipeline.compute.ordered import CHUNKS_PER_WORKER
from distill_pipeline.compute.spec import ComputeSpec

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


class RayTeam(Generic[Chunk, Result]):
    """The actors, for as long as the context lasts. An actor that is lost is started again and its chunks are done again.

    Args:
        prepare: makes the function in each actor; it, chunks and results must be picklable.
    Raises:
        ComputeError: no cluster, no room in it, or an actor that was lost again and again.
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, compute: ComputeSpec, prepare: Callable[[], Callable[[Chunk], Result]]) -> None:
        self._prepare = prepare
        self._cluster = RayCluster(
            compute.address, None if compute.workers == "auto" else compute.workers, num_cpus=compute.cpus_per_engine,
            num_gpus=compute.gpus_per_engine,
        )  # fmt: skip
        self._workers: list[RayWorker[Chunk, Result]] = []
        self._chunks: dict[int, deque[Chunk]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "RayTeam[Chunk, Result]":
        self._stack.enter_context(self._cluster)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def num_workers(self) -> int:
        """Actors that were started."""
        return len(self._workers)

    @property
    def num_under_way(self) -> int:
        """Chunks whose results were not taken."""
        return sum(worker.num_under_way for worker in self._workers)

    @property
    def has_room(self) -> bool:
        """Whether one more chunk may be handed over: a few an actor lie ready, and no more."""
        return self.num_under_way < self._cluster.num_workers * CHUNKS_PER_WORKER

    def submit(self, chunk: Chunk) -> None:
        """Hand a chunk to the actor with the fewest; a new one is started while there are less than wanted."""
        worker = min(self._workers, key=lambda worker: worker.num_under_way, default=None)
        if worker is None or (worker.num_under_way and len(self._workers) < self._cluster.num_workers):
            worker = self._cluster.worker(self._prepare)
            self._workers.append(worker)
            self._stack.callback(worker.close)
        worker.submit(chunk)
        self._chunks.setdefault(id(worker), deque()).append(chunk)

    def next(self) -> tuple[Chunk, Result]:
        """The chunk that is done next, with its result; waits for it. Raises what the function raised."""
        worker = self._cluster.first_done([worker for worker in self._workers if worker.num_under_way])
        return self._chunks[id(worker)].popleft(), worker.result()
