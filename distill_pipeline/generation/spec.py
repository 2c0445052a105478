"""The ``teachers`` part of an experiment file."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from distill_pipeline.learning import CorrectionSpec
from distill_pipeline.spec import ANY_DOMAIN, Spec
from distill_pipeline.system_prompts import PRESETS, SystemPrompts, with_chain_of_thought

ALGORITHM = "teacher_outputs/1"
"""Raise when the same answers of a teacher would be laid out or parsed otherwise."""


class SamplingSpec(Spec):
    """How a teacher answers. ``temperature: 0`` is greedy and then ``n`` must be 1."""

    n: int = Field(4, ge=1, le=4096, description="completions a prompt")
    temperature: float = Field(0.7, ge=0.0, le=10.0)
    top_k: int | None = Field(
        50, ge=1, le=1024, description="sampled among this many likeliest tokens; a server is told only where it is set"
    )
    top_p: float = Field(0.95, gt=0.0, le=1.0, description="and among the likeliest tokens that hold this mass")
    max_tokens: int = Field(512, ge=1, le=131_072, description="longest completion, in the teacher's tokens")


class ServerSpec(Spec):
    """Where an OpenAI-compatible server is and how it is asked. Nothing here changes an answer: it enters no version."""

    base_url: tuple[Annotated[str, StringConstraints(pattern=r"^https?://[^/@?#\s]+(/[^@?#\s]*)?$")], ...] = Field(
        min_length=1, description="one or several; each up to where /chat/completions begins, usually /v1"
    )
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="name of the environment variable that holds the key"
    )
    probe: bool = Field(True, description="ask GET /models for key, address and model before the first prompt")
    samples_per_request: int | None = Field(None, ge=1, description="most samples of one prompt in a request; null is all")
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    max_concurrency: int = Field(256, ge=1, le=8192, description="most requests in flight at one base_url")
    requests_per_minute: int | None = Field(None, ge=1, description="over all base_urls")
    tokens_per_minute: int | None = Field(None, ge=1, description="prompt and completion tokens, over all base_urls")
    connect_seconds: float = Field(10.0, gt=0.0)
    timeout_seconds: float = Field(60.0, gt=0.0, description="deadline of a request without its completion's tokens")
    timeout_seconds_a_token: float = Field(0.1, ge=0.0, description="added to the deadline for each of max_tokens")
    max_attempts: int = Field(5, ge=1, le=100, description="times a request is sent before its failure is recorded")
    backoff_seconds: float = Field(0.5, gt=0.0, description="the first wait is up to so long; it doubles with each attempt")
    max_backoff_seconds: float = Field(60.0, gt=0.0)
    dead_after_failures: int = Field(20, ge=1, description="a server is given up after so many failures without a success")
    dead_after_seconds: float = Field(120.0, ge=0.0, description="and so long after its last success")

    @model_validator(mode="before")
    @classmethod
    def _one_url_is_a_list(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("base_url"), str):
            return {**data, "base_url": [data["base_url"]]}
        return data


class VllmSpec(Spec):
    """What engine vllm may take of the machine. Nothing here changes an answer beyond rounding: it enters no version."""

    gpu_memory_utilization: float | None = Field(None, gt=0.0, le=1.0, description="share of a device's memory; null is vLLM's")
    kv_cache_gib: float | None = Field(None, gt=0.0, description="memory for keys and values, on a CPU the one that counts")
    tensor_parallel_size: int = Field(1, ge=1, description="devices that one copy of the model is spread over")
    max_num_seqs: int | None = Field(None, ge=1, description="most completions in a step; null is vLLM's")
    enforce_eager: bool = Field(False, description="compile nothing: starts sooner, answers more slowly")


class AcceptTargetSpec(Spec):
    """How many accepted completions of a prompt are enough: one without so many is asked for ``sampling.n`` more, in rounds.

    A completion is accepted that ended by itself and whose every score, of the scorers of its domain, is known and high enough.
    """

    accepted: int = Field(ge=1, description="accepted completions after which a prompt is not asked again")
    at_most: int = Field(ge=1, le=4096, description="completions after which it is not asked again either")
    min_score: float = Field(1.0, ge=0.0, le=1.0, description="every score at least this, as min_score of a filter")

    @model_validator(mode="after")
    def _can_be_reached(self) -> "AcceptTargetSpec":
        if self.accepted > self.at_most:
            raise ValueError(f"accepted {self.accepted} is more than at_most {self.at_most}: no prompt could reach it")
        return self


def _is_unset(value: Any) -> bool:
    """Fields that came after the first version stay out of versions while nobody sets them."""
    return not value


class BudgetSpec(Spec):
    """What a teacher's answers under its present settings may cost, over all runs. Tokens are those it reports."""

    max_usd: float | None = Field(None, gt=0.0)
    max_tokens: int | None = Field(None, ge=1, description="prompt and completion tokens")
    usd_per_million_prompt_tokens: float = Field(0.0, ge=0.0)
    usd_per_million_completion_tokens: float = Field(0.0, ge=0.0)
    accept_target: AcceptTargetSpec | None = Field(
        None, exclude_if=_is_unset, description="sample until a prompt has enough accepted completions, instead of n"
    )

    @property
    def has_prices(self) -> bool:
        """Whether tokens have a price."""
        return self.usd_per_million_prompt_tokens + self.usd_per_million_completion_tokens > 0

    @model_validator(mode="after")
    def _has_prices(self) -> "BudgetSpec":
        if self.max_usd is not None and not self.has_prices:
            raise ValueError("max_usd needs usd_per_million_prompt_tokens and usd_per_million_completion_tokens")
        return self


_OWN_FIELDS: Mapping[str, tuple[str, ...]] = {
    "openai": ("server", "extra_body", "logprobs", "tokenizer", "weights"), "vllm": ("max_model_len", "vllm"),
}  # fmt: skip
"""Fields of a teacher that only one engine reads."""


def _preset_text(value: Any) -> Any:
    """The text of ``{preset: NAME}``; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    name = str(value.get("preset"))
    if set(value) != {"preset"} or name not in PRESETS:
        raise ValueError(f"a system prompt is a text, null or {{preset: NAME}} with one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]


SystemText = Annotated[str | None, BeforeValidator(_preset_text)]


class TeacherSpec(Spec):
    """One teacher: which model, how it is run, and which prompts it answers."""

    model: str = Field(
        min_length=1, description="Hub id, local folder, GGUF file, or pypi:PACKAGE==VERSION; with openai the server's name"
    )
    revision: str | None = Field(
        None, description="commit of a Hub model; pins it. With openai a label of yours: change it when the server's model did"
    )
    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    license: str | None = Field(None, description="licence key of the model, for instance apache-2.0")
    accept: str | None = Field(None, min_length=8, description="why a licence that is refused by default is accepted")
    domains: tuple[str, ...] = Field(("*",), min_length=1, description="domains it answers; * is all")
    system: SystemText = Field(None, description="system prompt: a text or {preset: NAME}; null leaves the model's own default")
    systems: dict[str, SystemText] = Field(
        {}, exclude_if=_is_unset, description="system prompts of single domains; the others have that of system"
    )
    chain_of_thought: bool = Field(
        False, exclude_if=_is_unset, description="ask, in every system prompt, for reasoning between think tags"
    )
    sampling: SamplingSpec = SamplingSpec()
    batch_tokens: int = Field(16_384, ge=256, description="most tokens of a generation batch, prompts and answers")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; recorded in the manifest")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, exclude_if=_is_unset, description="of a model that runs here; null is float32 on a CPU, the model's own elsewhere"
    )
    max_model_len: int | None = Field(
        None, ge=2, exclude_if=_is_unset,
        description="with engine vllm: most tokens of prompt and completion; null is the model's own context",
    )  # fmt: skip
    top_logprobs: int | None = Field(
        None, ge=1, le=128, exclude_if=_is_unset,
        description="store each completion's token ids and, at each place, so many likeliest tokens with log-probabilities",
    )  # fmt: skip
    vllm: VllmSpec | None = Field(None, exclude_if=_is_unset, description="with engine vllm: what it may take of the machine")
    server: ServerSpec | None = Field(None, exclude_if=_is_unset, description="with engine openai: where it is")
    extra_body: dict[str, Any] = Field(
        {}, exclude_if=_is_unset, description="with engine openai: more fields of each request; null takes one out"
    )
    logprobs: bool = Field(False, exclude_if=_is_unset, description="with engine openai: ask for log-probabilities")
    tokenizer: str | None = Field(
        None, min_length=1, exclude_if=_is_unset,
        description="with engine openai: a model whose tokenizer counts what the server does not report",
    )  # fmt: skip
    weights: str | None = Field(
        None, min_length=1, exclude_if=_is_unset,
        description="with engine openai: the served model as a Hub id or folder, for students and reports, which need it here",
    )  # fmt: skip
    budget: BudgetSpec | None = Field(None, exclude_if=_is_unset)
    correction: CorrectionSpec | None = Field(
        None, exclude_if=lambda value: value is None, description="train it on its prompts' references before it answers"
    )

    @property
    def accept_target(self) -> AcceptTargetSpec | None:
        """What ends the asking, where it is not ``sampling.n``."""
        return None if self.budget is None else self.budget.accept_target

    @property
    def most_samples(self) -> int:
        """The most completions of a prompt."""
        return self.sampling.n if self.accept_target is None else self.accept_target.at_most

    @property
    def system_prompts(self) -> SystemPrompts:
        """What the model is told in each domain."""
        if not self.chain_of_thought:
            return SystemPrompts(self.system, self.systems)
        own = {domain: with_chain_of_thought(system) for domain, system in self.systems.items()}
        return SystemPrompts(with_chain_of_thought(self.system), own)

    def answers(self, domain: str) -> bool:
        """Whether it is asked the prompts of a domain."""
        return ANY_DOMAIN in self.domains or domain in self.domains

    @model_validator(mode="after")
    def _systems_are_of_answered_domains(self) -> "TeacherSpec":
        if ANY_DOMAIN in self.systems:
            raise ValueError("systems.*: the system prompt of all other domains is system")
        if strange := [domain for domain in self.systems if not self.answers(domain)]:
            raise ValueError(f"systems.{strange[0]}: the teacher answers the domains {', '.join(self.domains)} only")
        return self

    @model_validator(mode="before")
    @classmethod
    def _unset_top_k_is_not_sent(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("engine") != "openai":
            return data
        sampling = data.get("sampling", {})
        if isinstance(sampling, SamplingSpec):
            sampling = sampling.model_dump(exclude_unset=True)
        return {**data, "sampling": {"top_k": None, **sampling} if isinstance(sampling, Mapping) else sampling}

    @model_validator(mode="after")
    def _rounds_fit_the_target(self) -> "TeacherSpec":
        target, n = self.accept_target, self.sampling.n
        if target is not None and n > target.at_most:
            raise ValueError(f"sampling.n {n}, a round, is more than budget.accept_target.at_most {target.at_most}")
        if target is not None and target.at_most > 1 and self.sampling.temperature == 0:
            raise ValueError("temperature 0 is greedy, so a prompt's samples would be equal and accept_target is never nearer")
        return self

    @model_validator(mode="after")
    def _fields_fit_the_engine(self) -> "TeacherSpec":
        if self.engine == "openai" and self.server is None:
            raise ValueError("engine openai needs server: {base_url: ...}")
        for engine, fields in _OWN_FIELDS.items():
            given = [name for name in fields if getattr(self, name)] if engine != self.engine else []
            if given:
                raise ValueError(f"{', '.join(given)} is for engine {engine}; this teacher's engine is {self.engine}")
        if self.engine == "openai" and self.correction is not None:
            raise ValueError(
                "correction is for a model that runs here; with engine openai the server would have to serve the corrected "
                "model: serve one, and point model at it"
            )
        if self.correction is not None and self.trust_remote_code:
            raise ValueError("correction trains and saves a model without code of its own; leave it or trust_remote_code out")
        if self.engine == "openai" and self.dtype is not None:
            raise ValueError("dtype is for a model that runs here; with engine openai the server decides")
        if self.engine == "transformers" and self.sampling.top_k is None:
            raise ValueError("engine transformers needs sampling.top_k")
        return self
