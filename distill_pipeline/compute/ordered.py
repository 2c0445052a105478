"""A pure function over a stream of chunks, by as many workers as there are, with the results in the chunks' order.

A worker gets the function once, as a picklable ``prepare`` that builds it there (an index, a model), and then chunk after
chunk. At most ``CHUNKS_PER_WORKER`` chunks a worker are under way, so memory is bounded by the size of a chunk, and the next
chunk lies ready when a worker is done. Results come back in order and hold nothing of who made them: any number of workers
gives the same stream. A function that holds something has a ``close``, which is called when its worker ends.

Decided: chunks go round the workers in turn, which needs no queue that is shared and no result that is kept back; chunks of
one stage cost about the same. The chunk comes back beside its result, so that the result need not repeat what is in it.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from typing import Protocol, TypeVar

from distill_pipeline.compute.spec import ComputeSpec
from distill_pipeline.compute.worker import release

CHUNKS_PER_WORKER = 2
SMALL_CHUNKS = 8
"""An input of fewer chunks is worked on in this process when the number of workers is ``auto``: starting takes a second."""

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")
ChunkIn = TypeVar("ChunkIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)


class Worker(Protocol[ChunkIn, ResultOut]):
    """Somebody who works on chunks, first come first served."""

    def submit(self, chunk: ChunkIn) -> None:
        """Hand over one more chunk."""
        ...

    def result(self) -> ResultOut:
        """The result of the oldest chunk handed over; waits for it. Raises what the function raised."""
        ...

    def close(self) -> None:
        """End at once, whatever is under way; the function lets go of what it holds."""
        ...


def ordered_map(
    prepare: Callable[[], Callable[[Chunk], Result]],
    chunks: Iterable[Chunk],
    compute: ComputeSpec,
    *,
    small_chunks: int = SMALL_CHUNKS,
) -> Generator[tuple[Chunk, Result], None, None]:
    """Each chunk with its result, in order. Close the iterator (``contextlib.closing``) to end its processes early.

    Args:
        prepare: makes the function; called once in each worker. It, chunks and results must be picklable unless the work
            stays in this process.
        small_chunks: how many make processes worth their start when the number of workers is ``auto``.
    Raises:
        ComputeError: a worker died. What the function itself raises comes out as it is.
        MissingExtraError: the engine is ``ray`` and Ray is not installed.
    """
    if compute.engine == "ray":
        from distill_pipeline.compute.cluster import RayCluster

        with RayCluster(compute.address, None if compute.workers == "auto" else compute.workers) as cluster:
            yield from _in_turn(lambda: cluster.worker(prepare), cluster.num_workers, chunks)
        return
    waiting = iter(chunks)
    num_workers = num_cpus() if compute.workers == "auto" else compute.workers
    if compute.workers == "auto":
        head = list(islice(waiting, small_chunks))
        num_workers = num_workers if len(head) == small_chunks else 1
        waiting = chain(head, waiting)
        del head
    if num_workers == 1:
        function = prepare()
        try:
            yield from ((chunk, function(chunk)) for chunk in waiting)
        finally:
            release(function)
        return
    from distill_pipeline.compute.processes import ProcessWorker

    yield from _in_turn(lambda: ProcessWorker(prepare), num_workers, waiting)


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_turn(
    start: Callable[[], Worker[Chunk, Result]], num_workers: int, chunks: Iterable[Chunk]
) -> Iterator[tuple[Chunk, Result]]:
    """Deal chunks to workers in turn; each is started when its first chunk is there, and all are closed at the end."""
    workers: list[Worker[Chunk, Result]] = []
    under_way: deque[tuple[Worker[Chunk, Result], Chunk]] = deque()
    with ExitStack() as stack:
        for number, chunk in enumerate(chunks):
            done = None
            if len(under_way) == num_workers * CHUNKS_PER_WORKER:
                worker, oldest = under_way.popleft()
                done = oldest, worker.result()
            if len(workers) < num_workers:
                workers.append(start())
                stack.callback(workers[-1].close)
            worker = workers[number % num_workers]
            worker.submit(chunk)
            under_way.append((worker, chunk))
            if done is not None:
                yield done
        while under_way:
            worker, oldest = under_way.popleft()
            yield oldest, worker.result()
