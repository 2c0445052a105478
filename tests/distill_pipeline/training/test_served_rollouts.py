"""Rollouts at a server: drawn from the student as it is now, as tokens, and refused where they are not."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from distill_pipeline.errors import ConfigError, MissingExtraError, TrainingError
from distill_pipeline.learning import LoraSpec
from distill_pipeline.models.load import load_model, load_tokenizer, silent_bars
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.training import loop, rollout_server
from distill_pipeline.training.adapters import add_adapters
from distill_pipeline.training.examples import Example
from distill_pipeline.training.handed_weights import MARK, WeightsFolder
from distill_pipeline.training.parallel import ALONE, Processes
from distill_pipeline.training.rollout_server import RolloutServer
from distill_pipeline.training.rollouts import RolloutBatch, StudentSampler
from distill_pipeline.training.served_rollouts import ServedRollouts
from distill_pipeline.training.spec import RolloutSpec
from distill_pipeline.training.stage import train_student

HAS_VLLM = importlib.util.find_spec("vllm") is not None
FAST = {"backoff_seconds": 0.001, "max_backoff_seconds": 0.002, "wait_seconds": 0.0, "timeout_seconds": 20.0}
KEY = "sk-of-the-test"


@dataclass
class Server:
    """Imitates a vLLM server with a model behind it: what it draws comes from the weights that it was told to load.

    A reload takes effect when the prefix cache is emptied, as keys and values of the weights before answer until then.

    Args:
        takes_weights, empties: whether it really does what it says that it did.
        faults: statuses that the next requests for completions get.
        edit: changes each choice before it is sent.
    """

    model: Any
    takes_weights: bool = True
    empties: bool = True
    has_development_endpoints: bool = True
    context: int = 256
    key: str | None = None
    faults: list[int] = field(default_factory=list)
    edit: Callable[[dict[str, Any]], None] = lambda choice: None
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    drawn: list[tuple[int, ...]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    resets_refused: int = 0

    def __enter__(self) -> "Server":
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.answer()

            def answer(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(length)) if length else {}
                status, document = server.reply(self.path, self.headers.get("authorization"), body)
                raw = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self.coming, self.lock = self.model, threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def reply(self, path: str, authorization: str | None, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            torch.set_num_threads(1)  # of this thread: each has a number of its own
            self.calls[path] += 1
            if self.key is not None and authorization != f"Bearer {self.key}":
                return 401, {"error": {"message": f"wrong key {authorization}"}}
            if path == "/v1/models":
                return 200, {"data": [{"id": "as-it-is-served", "max_model_len": self.context}]}
            if path == "/collective_rpc" and self.has_development_endpoints:
                assert body["method"] == "reload_weights"
                self.coming = load_model(Path(body["kwargs"]["weights_path"])) if self.takes_weights else self.coming
                return 200, {"results": [None]}
            if path == "/reset_prefix_cache" and self.has_development_endpoints:
                self.resets_refused -= 1
                self.model = self.coming if self.empties else self.model
                return 200, {"success": self.resets_refused < 0}
            if path != "/v1/completions":
                return 404, {"detail": "Not Found"}
            if self.faults:
                return self.faults.pop(0), {"error": {"message": f"it broke, {KEY}"}}
            assert body["model"] == "as-it-is-served"
            self.bodies.append(body)
            chance = torch.Generator().manual_seed(body.get("seed", len(self.bodies)))
            choices = [self.choice(body, index, chance) for index in range(body["n"])]
            for choice in choices:
                self.edit(choice)
            return 200, {"choices": choices[::-1]}

    @torch.inference_mode()
    def choice(self, body: dict[str, Any], index: int, chance: torch.Generator) -> dict[str, Any]:
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < body["max_tokens"] and (not ids or ids[-1] not in body["stop_token_ids"]):
            logits = self.model(input_ids=torch.tensor([[*body["prompt"], *ids]])).logits[0, -1]
            cut = logits.clone()
            for token, bias in body.get("logit_bias", {}).items():
                cut[int(token)] += bias
            if body["top_k"] > 0:
                cut[cut < cut.topk(body["top_k"]).values[-1]] = -torch.inf
            probs = torch.softmax(cut / (body["temperature"] or 1e-4), dim=-1)
            ids.append(int(torch.multinomial(probs, 1, generator=chance)))
            logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
        self.drawn.append(tuple(ids))
        reason = "stop" if ids[-1] in body["stop_token_ids"] else "length"
        return {"index": index, "token_ids": ids, "finish_reason": reason, "logprobs": {"token_logprobs": logprobs},
                "text": "nobody reads it"}  # fmt: skip


@pytest.fixture
def student(small_model: ModelFolder) -> Any:
    return load_model(small_model.path).train()


@pytest.fixture
def other(teacher: ModelFolder) -> Any:
    """What a server was started with: another model."""
    return load_model(teacher.path)


@pytest.fixture
def make_server() -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:
        yield lambda model, **options: stack.enter_context(Server(model, **options))


@pytest.fixture
def examples(renderer: ChatRenderer) -> list[Example]:
    texts = ["what is the plural of mouse?", "hot", "the capital of France"]
    prompts = [tuple(renderer.prompt_ids([{"role": "user", "content": text}])) for text in texts]
    return [Example(f"p{i}", prompt, ((5, 6, 7),)) for i, prompt in enumerate(prompts)]


class Bench:
    """A student's sampler with a server behind it."""

    def __init__(self, student: Any, renderer: ChatRenderer, examples: list[Example], folder: Path) -> None:
        self.student, self.renderer, self.examples, self.folder = student, renderer, examples, folder
        self.said: list[str] = []

    def sampler(self, server: Server | str, *, student: Any = None, prepares: bool = True, **fields: Any) -> StudentSampler:
        url = server if isinstance(server, str) else server.url
        own = {name: fields.pop(name) for name in list(fields) if name in RolloutSpec.model_fields}
        where = {"base_url": url, "folder": str(self.folder), **FAST, **fields}
        self.rollouts = RolloutSpec.model_validate({"samples": 3, "max_tokens": 6, "server": where, **own})
        spec, chosen = self.rollouts.server, self.student if student is None else student
        assert spec is not None
        served = ServedRollouts(spec, self.renderer, limit=256, dtype=torch.float32, progress=self.said.append)
        if prepares:
            served.prepare(chosen)
        return StudentSampler(chosen, self.renderer, seed=0, limit=256, served={spec: served})

    def roll_out(self, sampler: StudentSampler, step: int = 0, stage: int = 0, processes: Processes = ALONE) -> RolloutBatch:
        return sampler.roll_out(self.examples, self.rollouts, stage=stage, step=step, processes=processes)


@pytest.fixture
def bench(student: Any, renderer: ChatRenderer, examples: list[Example], tmp_path: Path) -> Bench:
    return Bench(student, renderer, examples, tmp_path / "weights")


def learn(student: Any) -> None:
    """Move all weights, as a large step would."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


# --- whose tokens, and which ------------------------------------------------------------------------------------------


def test_the_student_as_it_is_now_draws_and_its_tokens_come_back_as_they_were_drawn(
    bench: Bench, make_server: Any, other: Any
) -> None:
    server = make_server(other)
    sampler = bench.sampler(server)
    for step in range(3):
        server.drawn.clear()
        rolled = bench.roll_out(sampler, step)
        got = [ids for example in rolled.examples for ids in example.completions]
        assert sorted(got) == sorted(server.drawn), "the end token where one was drawn, and nothing else"
        assert [example.prompt for example in rolled.examples] == [example.prompt for example in bench.examples]
        assert (rolled.completions, rolled.num_tokens) == (9, sum(map(len, got)))
        assert rolled.truncated == sum(ids[-1] != 2 for ids in got)
        for name, tensor in server.model.state_dict().items():
            assert torch.equal(tensor, bench.student.state_dict()[name]), name
        learn(bench.student)
    (facts,) = sampler.server_facts()
    assert (facts["transfers"], facts["bit_reproducible"]) == (3, False)
    assert facts["most_logprob_gap"] < 1e-4
    assert bench.student.training


def test_samples_stay_with_their_prompt_in_the_order_of_their_numbers(bench: Bench, make_server: Any, student: Any) -> None:
    server = make_server(student)
    rolled = bench.roll_out(bench.sampler(server, max_concurrency=1))
    assert [ids for example in rolled.examples for ids in example.completions] == server.drawn
    assert [body["prompt"] for body in server.bodies] == [list(example.prompt) for example in bench.examples]


def test_every_setting_of_a_draw_is_sent_and_each_prompt_has_a_seed_of_its_own(
    bench: Bench, make_server: Any, student: Any
) -> None:
    server = make_server(student)
    student.generation_config.eos_token_id = [2, 7]
    student.generation_config.do_sample, student.generation_config.top_k = (
        True,
        3,
    )  # of the model's own settings only the end tokens count
    sampler = bench.sampler(server, temperature=0.7, top_k=20, top_p=0.9)
    bench.roll_out(sampler)
    bench.roll_out(sampler, step=1)
    for body in server.bodies:
        sent = {name: body[name] for name in ("n", "temperature", "top_k", "top_p", "max_tokens", "stop_token_ids", "min_p")}
        assert sent == {
            "n": 3, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "max_tokens": 6, "stop_token_ids": [2, 7], "min_p": 0.0,
        }  # fmt: skip
        assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)
        assert "logit_bias" not in body
    assert len({body["seed"] for body in server.bodies}) == 6
    server.bodies.clear()
    bench.roll_out(bench.sampler(server, seeds=False))
    bench.roll_out(bench.sampler(server, temperature=0.0, samples=1))
    assert all("seed" not in body for body in server.bodies)
    assert {body["top_k"] for body in server.bodies} == {-1}


def test_equal_seeds_draw_equal_rollouts_where_the_server_takes_them(bench: Bench, make_server: Any, student: Any) -> None:
    first, again = (bench.roll_out(bench.sampler(make_server(student))) for _ in range(2))
    assert first == again


def test_a_rollout_ends_where_the_limit_of_prompt_and_completion_is(
    bench: Bench, make_server: Any, student: Any, renderer: ChatRenderer
) -> None:
    server = make_server(student)
    sampler = bench.sampler(server)
    (spec,) = sampler._served
    limit = max(len(example.prompt) for example in bench.examples) + 2
    served = {spec: ServedRollouts(spec, renderer, limit=limit, dtype=torch.float32, progress=bench.said.append)}
    rolled = bench.roll_out(StudentSampler(student, renderer, seed=0, limit=limit, served=served))
    assert all(len(example.prompt) + len(ids) <= limit for example in rolled.examples for ids in example.completions)
    assert min(body["max_tokens"] for body in server.bodies) == 2


def test_padding_of_a_head_is_never_drawn(bench: Bench, make_server: Any, student: Any) -> None:
    student.resize_token_embeddings(320)
    with torch.no_grad():
        student.get_input_embeddings().weight[300:] = 30 * student.get_input_embeddings().weight[50]  # very likely tokens
    server = make_server(student)
    rolled = bench.roll_out(bench.sampler(server))
    assert max(token for example in rolled.examples for ids in example.completions for token in ids) < 300
    assert all(body["logit_bias"] == {str(token): -100.0 for token in range(300, 320)} for body in server.bodies)
    server.edit = lambda choice: choice["token_ids"].__setitem__(0, 310)
    with pytest.raises(TrainingError, match="drew 310, which is no token of the tokenizer"):
        bench.roll_out(bench.sampler(server))


# --- what is not the student's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [{"takes_weights": False}, {"empties": False}])
def test_a_server_that_still_draws_from_other_weights_is_refused_with_both_numbers(
    bench: Bench, make_server: Any, other: Any, broken: dict[str, bool]
) -> None:
    sampler = bench.sampler(make_server(other, **broken))
    with pytest.raises(TrainingError) as caught:
        bench.roll_out(sampler, step=3, stage=1)
    said = str(caught.value)
    assert "in step 4 of stage 2 http://127.0.0.1" in said
    assert "does not draw from the student" in said
    numbers = [float(said.split(before)[1].split(after)[0]) for before, after in (
        ("mean log-probability of ", ","), ("the student gives them ", ";"), ("a token differs by ", " nats"),
    )]  # fmt: skip
    assert abs(numbers[0] - numbers[1]) > 0.02
    assert numbers[2] >= abs(numbers[0] - numbers[1]) - 1e-3
    assert "0.02 are allowed" in said
    assert str(bench.folder) in said


def test_a_step_that_never_arrived_is_found_by_what_it_changed(bench: Bench, make_server: Any, student: Any) -> None:
    server = make_server(student)
    sampler = bench.sampler(server)
    bench.roll_out(sampler)
    server.takes_weights = False
    bench.roll_out(sampler, step=1)  # nothing was learnt, so nothing is amiss
    with torch.no_grad():
        student.lm_head.weight.mul_(1.2)
    with pytest.raises(TrainingError, match="does not draw from the student"):
        bench.roll_out(sampler, step=2)
    (facts,) = sampler.server_facts()
    assert facts["transfers"] == 3
    bench.roll_out(bench.sampler(server, max_logprob_gap=5.0))


def test_weights_are_handed_over_as_often_as_asked_and_anew_in_each_stage(bench: Bench, make_server: Any, student: Any) -> None:
    server = make_server(student)
    sampler = bench.sampler(server, refresh_every=3)
    handed = []
    for stage, step in [(0, 0), (0, 1), (0, 2), (0, 3), (0, 5), (0, 6), (1, 6), (1, 7), (1, 9)]:
        before = server.calls["/collective_rpc"]
        bench.roll_out(sampler, step, stage)
        handed += [(stage, step)] if server.calls["/collective_rpc"] > before else []
        assert server.calls["/reset_prefix_cache"] == server.calls["/collective_rpc"]
        learn(student)
    assert handed == [(0, 0), (0, 3), (0, 6), (1, 6), (1, 9)]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda choice: choice.pop("token_ids"), "gives no token ids with a log-probability each"),
        (lambda choice: choice["logprobs"]["token_logprobs"].pop(), "gives no token ids with a log-probability each"),
        (lambda choice: choice.update(token_ids=[5], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop"),
         r"finish_reason 'stop' at the token 5, and the end tokens are 2\. Start it with --generation-config vllm"),
        (lambda choice: choice.update(token_ids=[2], logprobs={"token_logprobs": [-1.0]}, finish_reason="length"),
         "finish_reason 'length' at the token 2"),
        (lambda choice: choice.update(token_ids=[2, 2], logprobs={"token_logprobs": [-1.0, -1.0]}, finish_reason="stop"),
         "finish_reason 'stop' at the token 2"),
        (lambda choice: choice.update(finish_reason="abort"), "finish_reason 'abort'"),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_have_been_drawn_so_is_refused(
    bench: Bench, make_server: Any, student: Any, edit: Any, said: str
) -> None:
    with pytest.raises(TrainingError, match=said):
        bench.roll_out(bench.sampler(make_server(student, edit=edit)))


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_request_that_fails_is_sent_again_and_then_ends_training(bench: Bench, make_server: Any, student: Any) -> None:
    server = make_server(student, faults=[500, 429, 503])
    assert bench.roll_out(bench.sampler(server)).completions == 9
    server.faults[:] = [500] * 100
    with pytest.raises(
        TrainingError, match=r"does not complete a prompt \(server_error: 500: .*; attempt 3\)\. Mend the server"
    ):
        bench.roll_out(bench.sampler(server, max_attempts=3, max_concurrency=1))
    assert 100 - len(server.faults) == 3, "after one prompt that gets no answer no other is asked"
    server.faults[:] = [400] * 100
    with pytest.raises(TrainingError, match=r"rejected: 400: .*; attempt 1\)"):
        bench.roll_out(bench.sampler(server))


def test_a_prefix_cache_that_is_in_use_is_emptied_later_or_not_at_all(bench: Bench, make_server: Any, student: Any) -> None:
    server = make_server(student, resets_refused=3)
    bench.roll_out(bench.sampler(server))
    assert server.calls["/reset_prefix_cache"] == 4
    server.resets_refused = 100
    with pytest.raises(TrainingError, match=r"does not empty its prefix cache, 5 times in a row: somebody else asks it"):
        bench.roll_out(bench.sampler(server))


def test_a_server_that_comes_later_is_waited_for_and_how_it_is_started_is_said_once(
    bench: Bench, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    command = (
        f"VLLM_SERVER_DEV_MODE=1 vllm serve {bench.folder} --host 127.0.0.1 --port {port} --max-model-len 256"
    )  # fmt: skip
    with pytest.raises(TrainingError, match=f"nobody answers at {url} .*Start it with {command}, and run again"):
        bench.roll_out(bench.sampler(url))
    server, waits = Server(student, port=port), []
    monkeypatch.setattr(rollout_server, "POLL_SECONDS", 0.001)
    sleep = time.sleep

    def start_at_the_third(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            server.__enter__()
        sleep(seconds)

    monkeypatch.setattr(rollout_server.time, "sleep", start_at_the_third)
    try:
        assert bench.roll_out(bench.sampler(url, wait_seconds=20)).completions == 9
    finally:
        server.__exit__()
    assert bench.said == [f"rollouts wait for the server at {url}; it is started with {command}"]


def test_a_server_that_was_started_for_something_else_says_what_is_missing(
    bench: Bench, make_server: Any, student: Any
) -> None:
    with pytest.raises(ConfigError, match="collective_rpc is not there: start the server with VLLM_SERVER_DEV_MODE=1"):
        bench.roll_out(bench.sampler(make_server(student, has_development_endpoints=False)))
    with pytest.raises(ConfigError, match=r"holds 64 tokens, .* may have 256\. Start it with --max-model-len 256"):
        bench.roll_out(bench.sampler(make_server(student, context=64)))
    with pytest.raises(ConfigError, match=r"refuses to say what it serves \(refused: 404"):
        bench.roll_out(bench.sampler(make_server(student).url.replace("/v1", "/elsewhere/v1")))


def test_the_key_comes_from_the_environment_and_is_in_no_message(
    bench: Bench, make_server: Any, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server(student, key=KEY)
    with pytest.raises(ConfigError, match=r"the environment variable STUDENT_KEY, .* is not set"):
        bench.sampler(server, api_key_env="STUDENT_KEY")
    monkeypatch.setenv("STUDENT_KEY", KEY)
    assert bench.roll_out(bench.sampler(server, api_key_env="STUDENT_KEY")).completions == 9
    server.faults[:] = [500] * 100
    with pytest.raises(TrainingError, match="it broke") as caught:
        bench.roll_out(bench.sampler(server, api_key_env="STUDENT_KEY"))
    assert KEY not in str(caught.value)
    with pytest.raises(ConfigError, match=r"refuses to say what it serves \(refused: 401"):
        bench.roll_out(bench.sampler(server))


def test_a_missing_client_names_the_package(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingExtraError, match=r"rollouts\.server needs the package httpx2"):
        bench.sampler("http://127.0.0.1:1/v1")


# --- the weights' folder ----------------------------------------------------------------------------------------------


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([[3, 4, 5, 6, 7]])).logits
    return found


def test_a_folder_holds_the_student_with_a_head_of_its_own_and_leaves_the_student_tied(
    student: Any, renderer: ChatRenderer, tmp_path: Path
) -> None:
    folder = WeightsFolder(tmp_path / "weights")
    folder.claim(renderer.tokenizer)
    folder.write(student)
    model = load_model(folder.path)
    assert not model.config.tie_word_embeddings
    assert "lm_head.weight" in dict(model.named_parameters())
    assert torch.equal(logits_of(model), logits_of(student))
    assert student.config.tie_word_embeddings
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert load_tokenizer(folder.path).chat_template == renderer.tokenizer.chat_template


def test_adapters_are_merged_into_what_is_written_and_stay_in_the_student(
    student: Any, renderer: ChatRenderer, tmp_path: Path
) -> None:
    add_adapters(student, LoraSpec(rank=2, alpha=8.0), seed=0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    folder = WeightsFolder(tmp_path / "weights")
    folder.claim(renderer.tokenizer)
    folder.write(student)
    names = set(dict(student.named_parameters()))
    torch.testing.assert_close(logits_of(load_model(folder.path)), logits_of(student), atol=1e-4, rtol=1e-4)
    assert set(dict(student.named_parameters())) == names
    assert any("lora_" in name for name in names)


def test_new_weights_take_the_place_of_the_old_ones_which_a_reader_still_has(
    student: Any, renderer: ChatRenderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = WeightsFolder(tmp_path / "weights")
    folder.claim(renderer.tokenizer)
    folder.write(student)
    weights = folder.path / "model.safetensors"
    before = weights.read_bytes()
    with weights.open("rb") as reader:
        learn(student)
        folder.write(student)
        assert reader.read() == before
    after = weights.read_bytes()
    assert after != before

    def torn(path: Path, **_: Any) -> None:
        Path(path, "model.safetensors").write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(student, "save_pretrained", torn)
    with pytest.raises(TrainingError, match=r"could not be written to rollouts\.server\.folder .*no space left on device"):
        folder.write(student)
    assert weights.read_bytes() == after
    assert not list(folder.path.glob(".tmp-*"))


def test_a_folder_with_other_files_is_left_alone(renderer: ChatRenderer, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds files that are not of a training's rollouts.*Give a folder of its own"):
        WeightsFolder(tmp_path).claim(renderer.tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    ours = WeightsFolder(tmp_path / "ours")
    ours.claim(renderer.tokenizer)
    (ours.path / ".tmp-of-a-killed-run").mkdir()
    ours.claim(renderer.tokenizer)
    assert (ours.path / MARK).exists()
    assert not list(ours.path.glob(".tmp-*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file cannot be written"):
        WeightsFolder(tmp_path / "file").claim(renderer.tokenizer)


# --- several processes, and whole trainings ---------------------------------------------------------------------------


class InThreads(Processes):
    """One of several processes that are threads here: what they reduce, they leave in a list and take from it."""

    def __init__(self, rank: int, barrier: threading.Barrier, left: list[Any]) -> None:
        super().__init__(rank, barrier.parties)
        self.barrier, self.left = barrier, left

    def _reduced(self, values: Any, operation: Any) -> list[float]:
        self.left[self.rank] = list(values)
        self.barrier.wait(20)
        columns = list(zip(*self.left, strict=True))
        self.barrier.wait(20)
        return [float(max(column) if "MAX" in str(operation) else sum(column)) for column in columns]


def test_each_process_asks_for_its_own_prompts_and_the_first_hands_the_weights_over(
    bench: Bench, make_server: Any, other: Any, small_model: ModelFolder
) -> None:
    server, barrier, left, rolled = make_server(other), threading.Barrier(2), [None, None], {}
    copies = [load_model(small_model.path).train() for _ in range(2)]
    samplers = [bench.sampler(server, student=copy, prepares=rank == 0) for rank, copy in enumerate(copies)]

    def work(rank: int) -> None:
        processes = InThreads(rank, barrier, left)
        try:
            rolled[rank] = [bench.roll_out(samplers[rank], step, processes=processes) for step in range(2)]
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.calls["/collective_rpc"] == 2
    assert [sampler.server_facts()[0]["transfers"] for sampler in samplers] == [2, 0]
    for step in range(2):
        mine, theirs = rolled[0][step], rolled[1][step]
        assert {example.prompt_id for example in (*mine.examples, *theirs.examples)} == {"p0", "p1", "p2"}
        assert len(mine.examples) + len(theirs.examples) == 3
        assert mine.completions == theirs.completions == 9
        assert mine.num_tokens == theirs.num_tokens
    assert len(server.bodies) == 6


OWN = {"method": "on_policy", "divergence": "reverse_kl", "epochs": 2, "batch_prompts": 3}


@pytest.fixture
def train(teacher: ModelFolder, make_student: Any, make_rows: Any, make_batch: Any, tmp_path: Path) -> Callable[..., Any]:
    """``train(url, *stages before)``: four steps of rollouts at a server, a checkpoint after each."""

    def run(url: str, *stages: dict[str, Any], student: dict[str, Any] | None = None, **options: Any) -> Any:
        server = {"base_url": url, "folder": str(tmp_path / "weights"), **FAST}
        own = OWN | {"rollouts": {"samples": 2, "max_tokens": 4, "server": server}}
        return train_student(
            [make_batch(make_rows(6))], tmp_path / "out", tmp_path / "work", teacher=teacher, init_model=None, system=None,
            student=make_student(*stages, own, **(student or {})), device="cpu", seed=0, checkpoint_seconds=0.0,
            **{"progress": lambda line: None, **options},
        )  # fmt: skip

    return run


def test_a_student_learns_from_what_a_server_draws_and_the_manifest_says_so(
    train: Any, make_server: Any, other: Any, tmp_path: Path
) -> None:
    server = make_server(other)
    facts = train(server.url, {"method": "sft", "epochs": 1}).facts
    rows = pq.read_table(tmp_path / "out" / "curve.parquet").to_pylist()
    assert [row["rollouts"] for row in rows] == [None] * 2 + [6] * 4
    (served,) = facts["rollouts"]["servers"]
    assert (served["base_url"], served["transfers"], served["bit_reproducible"]) == (server.url, 4, False)
    assert served["most_logprob_gap"] < 1e-4
    assert facts["rollouts"]["tokens"] == sum(map(len, server.drawn)) == facts["stage_tokens"][1]
    last = load_model(tmp_path / "out")
    assert not torch.equal(logits_of(last), logits_of(server.model)), "the last step is after the last transfer"


def test_adapters_train_on_what_a_server_draws(train: Any, make_server: Any, other: Any) -> None:
    facts = train(make_server(other).url, student={"lora": {"rank": 2}}).facts
    assert facts["rollouts"]["servers"][0]["most_logprob_gap"] < 1e-3
    assert facts["lora"]["rank"] == 2


def test_a_server_that_dies_ends_training_and_another_one_takes_it_up_from_the_last_checkpoint(
    train: Any, make_server: Any, other: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", float("inf"))
    first, original = Server(other), Server.reply
    first.__enter__()

    def dies(server: Server, path: str, *rest: Any) -> Any:
        if server is first and server.calls["/collective_rpc"] == 3 and path == "/v1/completions":
            raise ConnectionResetError
        return original(server, path, *rest)

    monkeypatch.setattr(Server, "reply", dies)
    monkeypatch.setattr(ThreadingHTTPServer, "handle_error", lambda *_: None)
    with pytest.raises(TrainingError, match=r"does not complete a prompt \(connection: .*goes on from its last checkpoint"):
        train(first.url)
    first.__exit__()
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "work" / "checkpoints").iterdir()][-1].startswith("step-")
    second = make_server(other)
    outcome = train(second.url)
    assert outcome.facts["resumed_from_step"] == 2
    assert outcome.counts["steps"] == 4
    assert outcome.facts["rollouts"]["servers"][0]["transfers"] == 2


# --- with vLLM itself -------------------------------------------------------------------------------------------------


PADDED = 320
"""Rows of the head of the model that vLLM serves: 20 more than its tokenizer has ids."""


@dataclass
class Vllm:
    """A real server on the folder that a training writes, started when it is waited for."""

    folder: Path
    log: Path
    port: int
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        words = f"--model {self.folder} --host 127.0.0.1 --port {self.port} --max-model-len 256 --dtype float32 --enforce-eager"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words.split()]
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def hear(self, line: str) -> None:
        """What a training says."""
        if line.startswith("rollouts wait for the server"):
            self.start()

    def end(self) -> None:
        """It ends its workers when it is asked to."""
        if self.process is not None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
            self.process.kill()
            self.process.wait()


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[Vllm]:
    server = Vllm(tmp_path / "weights", tmp_path / "server.log", free_port())
    yield server
    server.end()


@pytest.fixture
def padded(wide_model_dir: Path, tmp_path: Path) -> ModelFolder:
    """A model that vLLM's kernels take, whose head has rows that no token uses and that it would draw often."""
    model = load_model(wide_model_dir)
    model.resize_token_embeddings(PADDED)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[300:] = 3 * weight[280:300]
    with silent_bars():
        model.save_pretrained(tmp_path / "padded")
    load_tokenizer(wide_model_dir).save_pretrained(tmp_path / "padded")
    return ModelFolder(tmp_path / "padded", "padded", None, "padded-identity", None)


@pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed: what its server draws is not covered")
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(1800)
def test_vllm_itself_draws_from_the_student_that_is_trained(
    vllm: Vllm, padded: ModelFolder, make_student: Any, make_rows: Any, make_batch: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    server = {"base_url": vllm.url, "folder": str(vllm.folder), "wait_seconds": 400}
    rollouts = {"samples": 4, "max_tokens": 24, "server": server}
    own = {"method": "on_policy", "divergence": "jsd", "epochs": 8, "lr": 3e-3, "rollouts": rollouts}
    rows = make_rows(12)
    for row in rows:  # longer than a block of vLLM's cache, and alike at the beginning
        row["messages"][0]["content"] = "what is the opposite of hot? " * 11 + row["messages"][0]["content"]
    outcome = train_student(
        [make_batch(rows)], tmp_path / "out", tmp_path / "work", student=make_student(own, init={"scratch": {"layers": 2}}),
        teacher=padded, init_model=None, system=None, device="cpu", seed=0, progress=vllm.hear,
    )  # fmt: skip
    (facts,) = outcome.facts["rollouts"]["servers"]
    print(outcome.facts["rollouts"], outcome.facts["initial_loss"], outcome.facts["final_loss"])
    assert facts["transfers"] == outcome.counts["steps"] == 24
    assert facts["most_logprob_gap"] < 1e-3
    assert outcome.facts["final_loss"] < 0.7 * outcome.facts["initial_loss"]
    check_vllm_alone(vllm, padded, monkeypatch)


def check_vllm_alone(vllm: Vllm, padded: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts of one model at the server that the training started: greedy as at home, and refused from old caches."""
    renderer = ChatRenderer(load_tokenizer(padded.path))
    prompt = tuple(renderer.prompt_ids([{"role": "user", "content": "what is the opposite of hot? " * 11}]))
    assert len(prompt) > 128, "a block of the CPU build's cache"
    examples = [Example(f"p{i}", (*prompt[:-6], token, *prompt[-6:]), ((5,),)) for i, token in enumerate((50, 60, 70))]
    bench = Bench(load_model(padded.path), renderer, examples, vllm.folder)
    greedy = bench.sampler(vllm.url, temperature=0.0, samples=1, max_tokens=24)
    at_the_server = bench.roll_out(greedy)
    at_home = greedy.roll_out(examples, RolloutSpec(samples=1, temperature=0.0, max_tokens=24), stage=0, step=0)
    assert [example.completions for example in at_the_server.examples] == [example.completions for example in at_home.examples]
    sampler = bench.sampler(vllm.url, samples=8, max_tokens=24)
    assert bench.roll_out(sampler) == bench.roll_out(sampler), "equal seeds"
    learn(bench.student)
    bench.roll_out(sampler, step=1)
    ask = RolloutServer._ask

    def keeps_its_cache(self: Any, client: Any, url: str, *rest: Any) -> Any:
        return {"success": True} if url.endswith("/reset_prefix_cache") else ask(self, client, url, *rest)

    learn(bench.student)
    monkeypatch.setattr(RolloutServer, "_ask", keeps_its_cache)
    with pytest.raises(TrainingError, match="does not draw from the student"):
        bench.roll_out(sampler, step=2)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
