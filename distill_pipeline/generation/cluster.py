"""A local engine on the machines of a Ray cluster: each actor holds one, takes prompts and gives completions back.

The driver renders, divides each window as the engine itself would, and keeps the store and the budget, so that a run on a
cluster continues one on a single machine and the other way round. An answer depends on its request's key and on the batch it
is computed in (by rounding only), and both are the same wherever the batch is computed.

Decided: actors and not Ray Data's ``map_batches``: results are stored as they come, the budget decides what is handed out
next, and a prompt that fails is a row and no error.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from distill_pipeline.compute.spec import ComputeSpec
from distill_pipeline.compute.team import RayTeam
from distill_pipeline.errors import ComputeError, IntegrityError
from distill_pipeline.generation.budget import Spending, Usage
from distill_pipeline.generation.protocol import Asked, Completion, DivisibleEngine, Engine, Piece
from distill_pipeline.models import pypi
from distill_pipeline.models.resolve import ModelFolder, resolve_model
from distill_pipeline.outcome import silent
from distill_pipeline.storage.files import user_cache


@dataclass(frozen=True)
class Answered:
    """What an actor made of a piece, what that cost, and how its engine works."""

    completions: list[Completion]
    usage: Usage
    facts: dict[str, Any]


class EngineWorker:
    """The function of an actor.

    Args:
        open_here: opens the engine on the actor's machine.
        settings: those of the driver's engine.
    Raises:
        ComputeError: the engine here would give other answers than the driver's.
    """

    def __init__(self, open_here: Callable[[], Engine], settings: dict[str, Any]) -> None:
        self._engine = open_here()
        differing = [name for name, value in settings.items() if self._engine.settings.get(name) != value]
        if differing:
            listed = ", ".join(f"{name} {settings[name]!r} and {self._engine.settings.get(name)!r}" for name in differing)
            raise ComputeError(
                f"an actor of the Ray cluster would give other answers than the run that asks it: {listed}. Use machines of "
                "one kind, and the same versions of packages on all of them."
            )

    def __call__(self, piece: Piece) -> Answered:
        spending = Spending()
        completions = [done for some in self._engine.answer([piece.asked], spending) for done in some]
        return Answered(completions, spending.now, self._engine.facts())


class ClusterEngine:
    """See :class:`distill_pipeline.generation.protocol.Engine`.

    Args:
        engine: the local engine as the driver sees it; it divides windows and is never loaded here.
        open_here: opens the same engine in an actor; picklable.
    """

    def __init__(self, engine: DivisibleEngine, open_here: Callable[[], Engine], compute: ComputeSpec) -> None:
        self._engine, self._open_here, self._compute = engine, open_here, compute
        self._facts: dict[str, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the local engine: a cluster's answers are its answers."""
        return self._engine.settings

    def answer(self, windows: Iterable[Sequence[Asked]], spending: Spending) -> Generator[list[Completion], None, None]:
        """Pieces of a window go to whoever is free; the cluster is joined with the first of them."""
        team: RayTeam[Piece, Answered] | None = None
        with ExitStack() as stack:
            for window in windows:
                pieces, failed = self._engine.pieces(window)
                yield failed
                for piece in pieces:
                    team = team or stack.enter_context(self._team())
                    while not (team.has_room and spending.reserve(piece.most)):
                        if not team.num_under_way:
                            raise spending.used_up()
                        yield self._taken(team, spending)
                    team.submit(piece)
            while team is not None and team.num_under_way:
                yield self._taken(team, spending)

    def facts(self) -> dict[str, Any]:
        """Those of the actors' engines, and how many there were."""
        return self._engine.facts() | self._facts | {"compute": "ray"}

    def _team(self) -> RayTeam[Piece, Answered]:
        return RayTeam(self._compute, partial(EngineWorker, self._open_here, self._engine.settings))

    def _taken(self, team: RayTeam[Piece, Answered], spending: Spending) -> list[Completion]:
        piece, answered = team.next()
        spending.release(piece.most)
        spending.pay(answered.usage)
        self._facts = answered.facts | {"workers": team.num_workers}
        return answered.completions


def model_here(model: ModelFolder) -> ModelFolder:
    """The model on the machine that calls: the driver's folder where it is mounted, else fetched by its reference.

    Raises:
        ComputeError: a local folder that is not on this machine.
        IntegrityError: what was fetched is another model than the driver's.
    """
    if (model.path / "config.json").is_file():
        return model
    is_wheel = model.reference.startswith(pypi.PREFIX)
    if model.revision is None:
        raise ComputeError(
            f"model {model.reference}: {model.path} is not on every machine of the Ray cluster. Put it on a file system that "
            "all of them share, under the same path, or give a Hub id."
        )
    found = resolve_model(
        model.reference, models_dir=user_cache() / "models", revision=None if is_wheel else model.revision, progress=silent
    )
    if found.identity != model.identity:
        raise IntegrityError(
            f"model {model.reference} is another one on a machine of the cluster ({found.identity[:16]}) than where the run "
            f"was started ({model.identity[:16]}). Pin teachers.<name>.revision, or share the model's folder."
        )
    return found
