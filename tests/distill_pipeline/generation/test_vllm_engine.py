"""Laws of engine vllm. What vLLM itself computes is tested where it is installed; wiring and errors with a stand-in of it."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from distill_pipeline.errors import BudgetError, ConfigError, GenerationError, MissingExtraError
from distill_pipeline.experiment import parse_experiment
from distill_pipeline.generation import vllm_engine
from distill_pipeline.generation.budget import Spending
from distill_pipeline.generation.engine import seed_of
from distill_pipeline.generation.opening import open_engine
from distill_pipeline.generation.protocol import Asked, Completion, Engine
from distill_pipeline.generation.requests import family_of
from distill_pipeline.generation.spec import BudgetSpec, TeacherSpec
from distill_pipeline.models.resolve import ModelFolder, resolve_model
from distill_pipeline.nodes import experiment_nodes

HAS_VLLM = importlib.util.find_spec("vllm") is not None
CONTEXT = 128
SERVER = {"base_url": "http://a/v1"}


@dataclass
class StandIn:
    """A vllm module that answers each request, at some later step, with its number of tokens, then the end token."""

    device_type: str = "cpu"
    max_num_seqs: int = 4
    finish_reason: str = "stop"
    logprob: float = -1.5
    fails: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    added: list[tuple[str, list[int], Any]] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    most_running: int = 0
    is_shut: bool = False

    def modules(self) -> dict[str, ModuleType]:
        vllm, platforms, params = ModuleType("vllm"), ModuleType("vllm.platforms"), ModuleType("vllm.sampling_params")
        vllm.__version__ = "0.0-stand-in"  # type: ignore[attr-defined]
        vllm.EngineArgs = lambda **args: args  # type: ignore[attr-defined]
        vllm.SamplingParams = lambda **params: SimpleNamespace(**params)  # type: ignore[attr-defined]
        vllm.LLMEngine = SimpleNamespace(from_engine_args=self.opened)  # type: ignore[attr-defined]
        platforms.current_platform = SimpleNamespace(device_type=self.device_type)  # type: ignore[attr-defined]
        params.RequestOutputKind = SimpleNamespace(FINAL_ONLY="final")  # type: ignore[attr-defined]
        return {"vllm": vllm, "vllm.platforms": platforms, "vllm.sampling_params": params}

    def opened(self, args: dict[str, Any]) -> "StandIn":
        if self.fails == "load":
            raise ValueError("No available memory for the cache blocks")
        self.args = args
        context = args.get("max_model_len", CONTEXT)
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=context),
            scheduler_config=SimpleNamespace(max_num_seqs=self.max_num_seqs),
        )
        self.engine_core = SimpleNamespace(shutdown=lambda: setattr(self, "is_shut", True))
        return self

    def add_request(self, key: str, prompt: dict[str, list[int]], params: Any) -> None:
        self.added.append((key, prompt["prompt_token_ids"], params))
        self.running.append(key)
        self.most_running = max(self.most_running, len(self.running))

    def step(self) -> list[Any]:
        if self.fails == "step":
            raise RuntimeError("EngineCore encountered an issue")
        key = self.running.pop()  # the last one first: out of order
        number = next(i for i, (added, _, _) in enumerate(self.added) if added == key)
        end = [self.added[number][2].stop_token_ids[0]] if self.finish_reason == "stop" else []
        output = SimpleNamespace(
            token_ids=[20 + number % 7, 21, *end], finish_reason=self.finish_reason, cumulative_logprob=self.logprob
        )
        return [SimpleNamespace(request_id=key, finished=True, outputs=[output])]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    fake = StandIn()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake


@pytest.fixture
def model(tmp_path: Path, tiny_model_dir: Path) -> ModelFolder:
    return resolve_model(str(tiny_model_dir), models_dir=tmp_path / "models", progress=lambda line: None)


def opener(model: ModelFolder) -> Callable[..., Engine]:
    def opened(*, device: str = "cpu", engine: str = "vllm", **fields: Any) -> Engine:
        sampling = {"n": 2, "temperature": 0.8, "max_tokens": 12} | fields.pop("sampling", {})
        teacher = TeacherSpec.model_validate({"model": "tiny", "engine": engine, "sampling": sampling} | fields)
        return open_engine("tiny", teacher, model, device=device, seed=0)

    return opened


@pytest.fixture
def open_vllm(model: ModelFolder) -> Callable[..., Engine]:
    return opener(model)


def asked(numbers: Any, samples: int = 2) -> list[Asked]:
    return [
        Asked([{"role": "user", "content": f"what is {i} plus {i}?"}], tuple(f"{i}/{j}" for j in range(samples)))
        for i in numbers
    ]


def answers(engine: Engine, windows: Any, spending: Spending | None = None) -> dict[str, Completion]:
    lists = list(engine.answer(windows, spending or Spending()))
    done = {one.key: one for part in lists for one in part}
    assert len(done) == sum(map(len, lists))
    return done


def test_every_key_is_answered_once_and_the_next_window_starts_before_one_has_ended(
    open_vllm: Callable[..., Engine], stand_in: StandIn
) -> None:
    taken: list[int] = []

    def windows() -> Iterator[list[Asked]]:
        for number in range(3):
            taken.append(len(stand_in.added))
            yield asked(range(4 * number, 4 * number + 4))

    done = answers(open_vllm(), windows())
    assert sorted(done) == sorted(key for one in asked(range(12)) for key in one.keys)
    assert stand_in.most_running == 2 * stand_in.max_num_seqs
    assert taken == [0, 8, 16], "a window is taken when its first request has room, and not before"
    assert {one.finish_reason for one in done.values()} == {"stop"}
    assert all(one.completion_tokens == len(one.token_ids) + 1 == 3 and one.end_token_id == 2 for one in done.values())
    assert stand_in.is_shut


def test_prompts_are_the_token_ids_that_engine_transformers_sees(open_vllm: Callable[..., Engine], stand_in: StandIn) -> None:
    local, engine = open_vllm(engine="transformers", system="be brief"), open_vllm(system="be brief")
    answers(engine, [asked(range(3), samples=1)])
    expected = [local._renderer.prompt_ids(one.messages) for one in asked(range(3))]  # type: ignore[attr-defined]
    assert [ids for _, ids, _ in stand_in.added] == expected
    assert stand_in.args["skip_tokenizer_init"] is True
    shared = local.settings.keys() - {"engine"}
    assert all(local.settings[name] == engine.settings[name] for name in shared)
    others = [open_vllm(system="be brief", **{name: value}) for name, value in (("max_model_len", 64), ("dtype", "bfloat16"))]
    assert len({family_of(one.settings) for one in (local, engine, *others)}) == 4


def test_sampling_end_tokens_and_what_the_machine_may_give_reach_vllm(
    open_vllm: Callable[..., Engine], stand_in: StandIn
) -> None:
    resources = {"gpu_memory_utilization": 0.5, "kv_cache_gib": 2, "tensor_parallel_size": 2, "enforce_eager": True}
    engine = open_vllm(dtype="bfloat16", max_model_len=64, vllm=resources, sampling={"top_k": 7, "top_p": 0.9})
    answers(engine, [asked(range(1))])
    args = stand_in.args
    assert (args["dtype"], args["max_model_len"], args["gpu_memory_utilization"]) == ("bfloat16", 64, 0.5)
    assert (args["kv_cache_memory_bytes"], args["tensor_parallel_size"], args["enforce_eager"]) == (2 * 2**30, 2, True)
    assert args["load_format"] == "safetensors"
    assert args["logprobs_mode"] == "processed_logprobs", "log-probabilities are of the distribution that was sampled from"
    params = stand_in.added[0][2]
    assert (params.temperature, params.top_k, params.top_p, params.logprobs) == (0.8, 7, 0.9, 0)
    assert params.stop_token_ids == [2]
    answers(open_vllm(sampling={"n": 1, "temperature": 0.0}), [asked([9], samples=1)])
    assert stand_in.args["logprobs_mode"] == "raw_logprobs"
    assert "max_model_len" not in stand_in.args


def test_a_requests_seed_follows_from_its_key_and_greedy_has_none(open_vllm: Callable[..., Engine], stand_in: StandIn) -> None:
    answers(open_vllm(), [asked(range(1))])
    assert [params.seed for _, _, params in stand_in.added] == [seed_of("0/0"), seed_of("0/1")]
    answers(open_vllm(sampling={"n": 1, "temperature": 0.0}), [asked(range(1), samples=1)])
    assert stand_in.added[-1][2].seed is None


def test_a_prompt_without_room_in_the_context_costs_its_own_rows(open_vllm: Callable[..., Engine], stand_in: StandIn) -> None:
    long = Asked([{"role": "user", "content": "word " * 200}], ("long/0",))
    done = answers(open_vllm(), [[*asked(range(2)), long]])
    assert done["long/0"].finish_reason == "error"
    assert done["long/0"].error is not None
    assert done["long/0"].error.startswith("prompt_too_long: ")
    assert done["long/0"].error.endswith(f"tokens, the model's context holds {CONTEXT}")
    assert [done[key].finish_reason for key in ("0/0", "0/1", "1/0", "1/1")] == ["stop"] * 4
    near = open_vllm(max_model_len=len(stand_in.added[0][1]) + 3)
    answers(near, [asked(range(1))])
    assert stand_in.added[-1][2].max_tokens == 3, "an answer ends where the context does"


@pytest.mark.parametrize(
    ("finish_reason", "logprob", "error"),
    [("abort", -1.0, "engine_error: vLLM ended the request with finish_reason 'abort'"),
     ("stop", float("nan"), "not_a_number: the model's logits are not finite")],
)  # fmt: skip
def test_a_request_that_vllm_gave_up_is_a_failed_row(
    open_vllm: Callable[..., Engine], stand_in: StandIn, finish_reason: str, logprob: float, error: str
) -> None:
    stand_in.finish_reason, stand_in.logprob = finish_reason, logprob
    (done,) = answers(open_vllm(), [asked(range(1), samples=1)]).values()
    assert (done.error or "").startswith(error)


def test_a_budget_holds_and_what_fits_is_answered(open_vllm: Callable[..., Engine], stand_in: StandIn) -> None:
    prompt = len(open_vllm()._renderer.prompt_ids(asked(range(1))[0].messages))  # type: ignore[attr-defined]
    spending = Spending(BudgetSpec(max_tokens=2 * (prompt + 3 + 3) + prompt))
    got: list[list[Completion]] = []
    with pytest.raises(BudgetError, match="the budget is reached"):
        got.extend(open_vllm().answer([asked(range(4))], spending))
    assert {one.key for part in got for one in part} >= {"0/0", "0/1", "1/0"}
    assert spending.now.tokens <= 2 * (prompt + 6) + prompt
    assert spending.reserved.tokens == 0
    assert stand_in.is_shut


def test_nothing_is_loaded_when_nothing_is_asked(open_vllm: Callable[..., Engine], stand_in: StandIn) -> None:
    assert answers(open_vllm(), [[], []]) == {}
    assert stand_in.args == {}


# --- errors a user can meet ------------------------------------------------------------------------------------------


def test_a_missing_vllm_names_the_package_and_the_pip_command(
    open_vllm: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError) as caught:
        answers(open_vllm(), [asked(range(1))])
    assert str(caught.value) == "engine vllm needs the package vllm. Install it: pip install 'distill-pipeline[vllm]'"


@pytest.mark.parametrize(
    ("fails", "said"),
    [("load", r"teacher tiny: vLLM cannot run .* \(ValueError: No available memory .* lower max_model_len or set vllm\."),
     ("step", r"teacher tiny: vLLM stopped working \(RuntimeError: EngineCore .* Everything answered is stored: run again")],
)  # fmt: skip
def test_an_engine_that_dies_ends_the_run_with_its_reason(
    open_vllm: Callable[..., Engine], stand_in: StandIn, fails: str, said: str
) -> None:
    stand_in.fails = fails
    with pytest.raises(GenerationError, match=said):
        answers(open_vllm(), [asked(range(1))])
    assert stand_in.is_shut == (fails == "step")


def test_a_vllm_for_another_device_says_which(open_vllm: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in StandIn(device_type="cuda").modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ConfigError, match=r"the installed vllm runs on cuda, and the teacher's device is cpu\. Install"):
        answers(open_vllm(), [asked(range(1))])


def test_a_numbered_device_is_refused(open_vllm: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "resolve_device", lambda device: device)
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES shows, and the teacher's device is cuda:1\. Set"):
        open_vllm(device="cuda:1")


@pytest.mark.parametrize(
    ("teacher", "fault"),
    [
        ({"engine": "vllm", "server": SERVER}, "server is for engine openai; this teacher's engine is vllm"),
        ({"vllm": {"tensor_parallel_size": 2}}, "vllm is for engine vllm; this teacher's engine is transformers"),
        ({"max_model_len": 2048}, "max_model_len is for engine vllm; this teacher's engine is transformers"),
        ({"engine": "vllm", "vllm": {"gpu_memory_utilization": 1.5}}, "less than or equal to 1"),
        ({"engine": "vllm", "vllm": {"max_seqs": 3}}, "unknown field; known: enforce_eager, gpu_memory_utilization"),
        ({"engine": "vllm", "dtype": "int8"}, "'float32', 'bfloat16' or 'float16'"),
        ({"engine": "openai", "server": SERVER, "dtype": "float32"}, "dtype is for a model that runs here"),
    ],
)  # fmt: skip
def test_faults_of_a_vllm_teacher_are_reported(teacher: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(document(**teacher))
    assert fault in str(caught.value)


# --- versions --------------------------------------------------------------------------------------------------------


def document(**teacher: Any) -> dict[str, Any]:
    return {
        "name": "local",
        "prompt_pool": {"sources": [{"path": "prompts.jsonl", "domain": "sums", "license": "cc0-1.0"}]},
        "teachers": {"big": {"model": "m"} | teacher},
        "filters": {"all": {}},
        "students": {"small": {"data": ["big/all"], "init": {"model": "s"}, "stages": [{"method": "sft"}]}},
        "evaluation": {"tasks": ["elementary_heldout"]},
    }


def version(**teacher: Any) -> str:
    return experiment_nodes(parse_experiment(document(**teacher)))["teacher_outputs/big"].code_version


def test_what_vllm_may_take_of_the_machine_changes_no_version_and_what_can_change_answers_does() -> None:
    known = version(engine="vllm")
    assert version(engine="vllm", vllm={"gpu_memory_utilization": 0.5, "tensor_parallel_size": 4}) == known
    assert version(engine="vllm", vllm={}) == known
    assert len({known, version(), version(engine="vllm", dtype="float16"), version(engine="vllm", max_model_len=512)}) == 4


# --- with vLLM itself ------------------------------------------------------------------------------------------------

LITTLE: dict[str, Any] = {
    "max_model_len": CONTEXT, "vllm": {"enforce_eager": True, "kv_cache_gib": 0.25, "max_num_seqs": 8},
}  # fmt: skip


def needs_vllm(test: Any) -> Any:
    """Skipped without vLLM, whose own warnings are no errors and which takes its time to start."""
    test = pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed: what it computes is not covered")(test)
    return pytest.mark.filterwarnings("default")(pytest.mark.timeout(1800)(test))


@needs_vllm
def test_vllm_itself_answers_as_engine_transformers_does(open_wide: Callable[..., Engine]) -> None:
    greedy = {"sampling": {"n": 1, "temperature": 0.0, "max_tokens": 12}, "top_logprobs": 3}
    windows = [asked(range(6), samples=1), asked(range(6, 12), samples=1)]
    engine = open_wide(**greedy, **LITTLE)
    theirs, ours = answers(engine, windows), answers(open_wide(engine="transformers", **greedy), windows)
    equal = [key for key in ours if drawn(ours[key]) == drawn(theirs[key])]
    assert len(equal) >= 11
    for key in equal:
        assert theirs[key].text == ours[key].text
        assert theirs[key].finish_reason == ours[key].finish_reason
        assert theirs[key].completion_tokens == ours[key].completion_tokens
        assert theirs[key].logprob == pytest.approx(ours[key].logprob, abs=0.02 * ours[key].completion_tokens)
        mine, other = ours[key].tokens, theirs[key].tokens
        assert mine is not None
        assert other is not None
        assert mine.ids.tolist() == other.ids.tolist()
        assert mine.logprobs == pytest.approx(other.logprobs, abs=0.02)
        assert mine.top_logprobs == pytest.approx(other.top_logprobs, abs=0.02)
        assert len(other.top_ids) == 3 * len(other.ids)
        assert mine.top_ids.tolist()[::3] == other.top_ids.tolist()[::3]
    assert {one.finish_reason for one in theirs.values()} == {"stop", "length"}
    assert engine.facts()["context_tokens"] == CONTEXT


@needs_vllm
def test_vllm_itself_draws_equal_tokens_for_equal_keys_from_the_distribution_that_was_asked_for(
    open_wide: Callable[..., Engine],
) -> None:
    sampling = {"n": 2, "temperature": 0.8, "top_k": 5, "top_p": 1.0, "max_tokens": 12}
    first = answers(open_wide(sampling=sampling, **LITTLE), [asked(range(6))])
    again = answers(open_wide(sampling=sampling, **LITTLE), [asked(range(3, 6)), asked(range(3))])
    equal = [key for key in first if drawn(first[key]) == drawn(again[key])]
    assert len(equal) >= len(first) - 1
    assert len({drawn(one) for one in first.values()}) > len(first) / 2
    sure = answers(open_wide(sampling=sampling | {"top_k": 1}, **LITTLE), [asked(range(2))])
    assert all(one.logprob == pytest.approx(0.0, abs=1e-5) for one in sure.values()), "of one token nothing is uncertain"


def drawn(completion: Completion) -> tuple[Any, ...]:
    return completion.token_ids, completion.end_token_id


@pytest.fixture
def open_wide(tmp_path: Path, wide_model_dir: Path) -> Callable[..., Engine]:
    """As ``open_vllm``, of a model that vLLM's kernels take."""
    return opener(resolve_model(str(wide_model_dir), models_dir=tmp_path / "models", progress=lambda line: None))
