"""Several processes that train one student: which part of a step is whose, what is added up, and how models are held.

Every process knows the whole step. It works on its own share of the prompts, and losses, token counts and gradients are
summed, so that the loss of a step is what one process would find: the sum over all its tokens divided by their number. How
many processes there are changes speed and memory; results differ by the rounding of sums taken in another order.

Weights are held in one of two ways. *Copies* (DistributedDataParallel): every process has the whole student, and gradients
are summed while the backward pass still runs. *Shards* (FSDP2, ``fully_shard``): weights, gradients and optimizer state of
the student, and the weights of the teacher, are cut over the processes and gathered a layer at a time.

Decided: torch's own wrappers, without accelerate, which would bring a loop, a division of gradients by processes and
checkpoints of its own, where this loop counts tokens and has one checkpoint for any number of processes. A wrapper sees one
forward pass: a function that is called inside of it reads hidden states and makes the loss, so the gradient of a head that
is also the embedding arrives once. Given up: bfloat16 on the wire, and splitting one prompt's completions.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from distill_pipeline.errors import ConfigError
from distill_pipeline.training.batches import MicroBatch, micro_batches
from distill_pipeline.training.examples import Example
from distill_pipeline.training.student import decoder_layers

Result = TypeVar("Result")

_WORK, _FAILURES = "distill/work", "distill/failures"

_IDLE = Example("idle", (0,), ((0,),), (0,))
"""What a process without work reads; every vocabulary has this token, every table of signals this row."""


@dataclass(frozen=True)
class HeldModel:
    """The way to a model's weights: ``module`` is what wraps it, and ``twin`` its like without weights, where it is sharded.

    Without both, the model is what it seems.
    """

    module: Any = None
    twin: Any = None

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """``function(*args)``, within which the model may be called and its weights read; it returns tensors."""
        result: Result = function(*args) if self.module is None else self.module(function, *args)
        return result

    def adding_up(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around each forward and backward pass of a step: copies sum their gradients over the processes in the last one."""
        copies = isinstance(self.module, DistributedDataParallel)
        return self.module.no_sync() if copies and not last else contextlib.nullcontext()

    @contextlib.contextmanager
    def whole(self, model: Any) -> Iterator[Any]:
        """A model of which all weights are here, to be read; all processes come here together."""
        if self.twin is None:
            yield model
            return
        own = list(self.twin.parameters())
        for mine, parameter in zip(own, model.parameters(), strict=True):
            mine.data = whole_tensor(parameter.detach())
        try:
            yield self.twin
        finally:
            for mine in own:
                mine.data = mine.data.new_empty(0)


PLAIN = HeldModel()


class Processes:
    """The processes that train together, as one of them sees them; without arguments this one is alone.

    Args:
        store: where they leave each other word before there is anything to add up: a torch.distributed store.
        shards: hold weights in shards, not as copies.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, local_rank: int = 0, shards: bool = False, store: Any = None) -> None:
        self.rank, self.size, self.local_rank, self.shards = rank, size, local_rank, shards and size > 1
        self.store = store

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes artifacts, checkpoints and news."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """This process's own device, for a kind of device that all were given.

        Raises:
            ConfigError: all were given one and the same GPU, or there are fewer GPUs than processes.
        """
        asked = torch.device(device)
        if self.size == 1 or asked.type != "cuda":
            return device
        if asked.index is not None:
            raise ConfigError(f"{self.size} processes cannot train on one device, {device}. Say cuda: each takes its own.")
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {self.rank} would train on GPU {self.local_rank} and this machine has {torch.cuda.device_count()}. "
                "Start at most one process a GPU."
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    # --- word before and after the work ---

    def tell(self, *, work: bool) -> None:
        """The first process says whether there is work for all; only its first word counts."""
        if self.size > 1 and self.is_first:
            self.store.compare_set(_WORK, "", str(work))

    def hears_of_work(self, longest_wait: timedelta) -> bool:
        """What the first process told."""
        self.store.wait([_WORK], longest_wait)
        told: bytes = self.store.get(_WORK)
        return told == b"True"

    def fails_first(self) -> bool:
        """Whether no other process has failed before; asked once by each that fails. Their store may be gone with the first."""
        try:
            return self.size == 1 or self.store.add(_FAILURES, 1) == 1
        except dist.DistError:
            return False

    # --- one step's work ---

    def share(self, examples: Sequence[Example], cost: Callable[[Example], int]) -> list[tuple[int, Example]]:
        """This process's examples with their numbers in the step, in the step's order."""
        return [(index, examples[index]) for index in share_of(examples, cost, self.rank, self.size)]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes; whole numbers stay exact."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def most(self, value: int) -> int:
        """The largest that any process has."""
        return int(self._reduced([value], dist.ReduceOp.MAX)[0])

    def decide(self, value: bool) -> bool:
        """What the first process says, for decisions that hang on a clock."""
        return self.most(int(value and self.is_first)) == 1

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=operation)
        found: list[float] = tensor.tolist()
        return found

    def passes(self, own: Iterable[MicroBatch]) -> Iterator[tuple[MicroBatch, bool]]:
        """This process's micro-batches, each with True; then one of a single token, with False, up to the most of any process.

        Models in shards are called by all processes together, so that each calls as often as the others.
        """
        if self.size == 1:
            yield from ((part, True) for part in own)
            return
        mine = list(own)
        missing = self.most(len(mine)) - len(mine)
        yield from ((part, True) for part in mine)
        for idle in micro_batches([_IDLE] * missing, layout="plain", max_tokens=1, pad_id=0):
            yield idle, False

    # --- models ---

    def loading_device(self, device: str) -> str:
        """Where a model is put first: what will be cut into shards need not fit the device."""
        return "cpu" if self.shards else device

    def hold(self, model: Any, device: str) -> HeldModel:
        """Spread a model over the processes as they hold models; one without trainable weights needs no wrapper as a copy.

        A sharded model is called through the result's ``run`` only.
        """
        trained = any(parameter.requires_grad for parameter in model.parameters())
        if self.size == 1 or not (self.shards or trained):
            return PLAIN
        if not self.shards:
            copies = DistributedDataParallel(_Inside(model), gradient_as_bucket_view=True)
            copies.broadcast_buffers = False  # they are computed, not learned
            copies.register_comm_hook(None, _sum_of_bucket)
            return HeldModel(copies)
        twin = _emptied(model, device) if trained else None
        return HeldModel(_sharded(model, device, self.size), twin)


ALONE = Processes()


def share_of(examples: Sequence[Example], cost: Callable[[Example], int], rank: int, size: int) -> list[int]:
    """Numbers of the examples that one of ``size`` processes works on, ascending.

    In the order of their prompts, where those that begin alike stand together, the examples are cut into runs of nearly equal
    cost. Every example is in one run; a run may be empty.
    """
    order = sorted(range(len(examples)), key=lambda index: (examples[index].prompt, index))
    costs = [cost(examples[index]) for index in order]
    total, before, mine = sum(costs), 0, []
    for index, own in zip(order, costs, strict=True):
        if (2 * before + own) * size // (2 * total) == rank:  # by the middle of its own part of the whole
            mine.append(index)
        before += own
    return sorted(mine)


def training_cost(example: Example) -> int:
    """Tokens that a forward pass reads of an example."""
    return len(example.prompt) + example.num_tokens


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor of which every process may hold a part, whole; all processes ask for it together."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The same for many, one after the other; empty without ``keep``, and what was in parts then lies in the CPU's memory."""
    found = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor.detach())
        if keep:
            found[name] = whole.cpu() if isinstance(tensor, DTensor) else whole
    return found


def is_parted(tensors: Iterable[Tensor]) -> bool:
    """Whether every process holds only a part of one of them."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def parted_like(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, where and in the parts that ``like`` is; one of another shape stays whole."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


class _Inside(torch.nn.Module):
    """Calls any function as the forward pass of a module that holds a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def _sum_of_bucket(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Gradients are summed, not averaged: every loss is already divided by the tokens of all processes."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    summed: torch.futures.Future[Tensor] = future.then(lambda done: done.value()[0])
    return summed


def _sharded(model: Any, device: str, size: int) -> torch.nn.Module:
    """Layers are gathered one at a time; embedding, last norm and head together, from forward to backward pass."""
    mesh = init_device_mesh(torch.device(device).type, (size,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    inside = _Inside(model)
    fully_shard(inside, mesh=mesh)
    for part in inside.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # a sum, see _sum_of_bucket
            part.set_force_sum_reduction_for_comms(True)
    return inside


def _emptied(model: Any, device: str) -> Any:
    """A copy of a model on a device, whose parameters have no elements."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for parameter in twin.parameters():
        parameter.data = parameter.data.new_empty(0)
    return twin.to(device)
