"""What scorers read, and what a scorer is: an object that scores many rows at once, with an identity for its scores."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from distill_pipeline.errors import ConfigError
from distill_pipeline.hashing import sha256_of, version_of
from distill_pipeline.outcome import Progress, silent
from distill_pipeline.scoring.isolation import Bench
from distill_pipeline.scoring.kept import KeptScores
from distill_pipeline.scoring.registry import Scorer, ScoreValue
from distill_pipeline.storage.places import Place

if TYPE_CHECKING:
    from distill_pipeline.generation.opening import TeacherModel


@dataclass(frozen=True)
class AnswerRow:
    """A completion with its prompt. ``metadata`` is the prompt's JSON text; the others are as in the records."""

    completion_id: str
    prompt_id: str
    domain: str
    messages: Sequence[Mapping[str, str]]
    reference: str | None
    metadata: str
    answer: str
    raw_text: str
    finish_reason: str
    completion_tokens: int
    logprob: float | None

    @property
    def has_failed(self) -> bool:
        """Whether the teacher gave no answer at all."""
        return self.finish_reason == "error"

    @property
    def last_user_message(self) -> str | None:
        """What the user said last, or None."""
        said = [message["content"] for message in self.messages if message["role"] == "user"]
        return said[-1] if said else None

    @cached_property
    def content_key(self) -> str:
        """A hash of all that a function of one row can depend on: prompt, reference, metadata and answer."""
        return sha256_of([self.prompt_id, self.reference, self.metadata, self.answer])[:32]


@dataclass(frozen=True)
class ScoringContext:
    """What scorers need of their surroundings.

    Args:
        models: the models that scorers ask, in folders or at servers, by (model, revision) as written in their options.
        device: a torch device or ``auto``, for models.
        scores_dir: where scores are kept for the next run; None keeps none.
        generations_dir: where answers of models are kept.
    """

    models: Mapping[tuple[str, str | None], "TeacherModel"] = field(default_factory=dict)
    device: str = "auto"
    scores_dir: Place | None = None
    generations_dir: Place | None = None
    progress: Progress = silent


class OpenedScorer(ABC):
    """A scorer in use: a context manager that scores any rows of its domain.

    ``identity`` is what its scores depend on beside the rows, ``version`` a short form of it for the score rows. ``kept``
    holds its earlier scores, if they are kept; it stays behind when the scorer travels to another process. Subclasses whose
    rows of one prompt can only be scored together, and only all of them, set ``scores_whole_prompts``; those whose scores are
    cheaper to make than to look up clear ``is_worth_keeping``; those that hold no model and are worth the way set
    ``is_movable``, and can be pickled before they are entered.
    """

    scores_whole_prompts = False
    is_worth_keeping = True
    is_movable = False

    def __init__(self, scorer: Scorer, context: ScoringContext, **more_identity: Any) -> None:
        options = dict(scorer.options)
        self.identity = {"kind": scorer.kind, "code": scorer.version, "options": options, **more_identity}
        deciding = {name: value for name, value in {"options": options, **more_identity}.items() if value}
        self.version = f"{scorer.version}+{version_of(deciding)[:8]}" if deciding else scorer.version
        self.kept: KeptScores | None = None
        if context.scores_dir is not None and self.is_worth_keeping:
            self.kept = KeptScores(context.scores_dir, self.identity)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kept": None}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def keys(self, rows: Sequence[AnswerRow]) -> list[str]:
        """For each row a hash of all that its score depends on: equal keys have equal scores."""
        return [row.content_key for row in rows]

    @abstractmethod
    def score(self, rows: Sequence[AnswerRow]) -> list[ScoreValue]:
        """The rows' scores, in order; rows without an answer are never given."""


class BenchScorer(OpenedScorer):
    """A scorer that has a function of one row run where it cannot hurt: its own, or one that it uses."""

    is_movable = True

    def __init__(self, scorer: Scorer, context: ScoringContext, function: Scorer) -> None:
        super().__init__(scorer, context)
        self._bench = Bench(function)

    def __enter__(self) -> Self:
        self._bench.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bench.__exit__(kind, error, trace)


OpenScorer = Callable[[Scorer, ScoringContext], OpenedScorer]


def model_of(scorer: Scorer, context: ScoringContext) -> "TeacherModel":
    """The model that a scorer's options name. Raises ConfigError where nobody resolved it."""
    place = (scorer.options["model"], scorer.options.get("revision"))
    if place not in context.models:
        raise ConfigError(f"scorers: the model {place[0]} of {scorer.kind} was not resolved.")
    return context.models[place]
