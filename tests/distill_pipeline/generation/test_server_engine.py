"""Laws of a served teacher: under faults, crashes, limits and budgets no row is lost and none is paid for twice."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_pipeline.errors import BudgetError, ConfigError, GenerationError, MissingExtraError, ModelNotFoundError
from distill_pipeline.generation import spool
from distill_pipeline.generation.requests import request_key
from distill_pipeline.generation.served import ServedModel
from distill_pipeline.generation.spec import TeacherSpec
from distill_pipeline.generation.stage import generate_outputs, missing_requests
from distill_pipeline.outcome import Outcome
from distill_pipeline.records import COMPLETION_SCHEMA, PROMPT_SCHEMA, prompt_id

MODEL = "fake-model"
FakeServer = Any
"""The server of conftest.py."""
FAULTS = ("500", "429", "hang", "garbage", "reset")
FAST = {"backoff_seconds": 0.002, "max_backoff_seconds": 0.02, "timeout_seconds": 30.0, "timeout_seconds_a_token": 0.0}
"""Waits in milliseconds."""


def pool(texts: Any) -> Iterator[pa.RecordBatch]:
    rows = []
    for text in texts:
        messages = [{"role": "user", "content": text}]
        known = {
            "reference": None,
            "domain": "sums",
            "source": "test",
            "license": "cc0-1.0",
            "split": "train",
            "metadata": "{}",
        }
        rows.append({"prompt_id": prompt_id(messages), "messages": messages, **known})
    yield from pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA).to_batches()


def questions(number: int) -> list[str]:
    return [f"what is {index} plus {index * index}?" for index in range(number)]


class Bench:
    """Runs the stage against a server, over one generation store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.news = folder, list[str]()

    def teacher(self, *urls: str, n: int = 4, server: dict[str, Any] | None = None, **fields: Any) -> TeacherSpec:
        sampling = {"n": n, "temperature": 0.7, "max_tokens": 32} | fields.pop("sampling", {})
        where = {"base_url": list(urls)} | FAST | (server or {})
        return TeacherSpec.model_validate({"model": MODEL, "engine": "openai", "sampling": sampling, "server": where} | fields)

    def served(self, teacher: TeacherSpec, tokenizer_dir: Path | None = None) -> ServedModel:
        assert teacher.server is not None
        return ServedModel(teacher.model, teacher.revision, teacher.server, tokenizer_dir)

    def run(self, texts: Any, *urls: str, flush_rows: int = 2048, tokenizer_dir: Path | None = None, **fields: Any) -> Outcome:
        self.out_dir = self.folder / f"out{len(list(self.folder.glob('out*')))}"
        self.out_dir.mkdir()
        teacher = self.teacher(*urls, **fields)
        return generate_outputs(
            pool(texts), self.out_dir, teacher_name="big", teacher=teacher, model=self.served(teacher, tokenizer_dir),
            generations_dir=self.folder / "generations", device="cpu", seed=0, progress=self.news.append, flush_rows=flush_rows,
        )  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        parts = sorted(self.out_dir.glob("part-*.parquet"))
        return [row for part in parts for row in pq.read_table(part, schema=COMPLETION_SCHEMA).to_pylist()]

    def everything_on_disk(self) -> bytes:
        return b"".join(path.read_bytes() for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# --- what is paid for -------------------------------------------------------------------------------------------------


def test_all_samples_of_a_prompt_are_one_request_and_rows_come_in_the_pools_order(bench: Bench, server: FakeServer) -> None:
    outcome = bench.run(questions(30), server.url)
    assert server.asked == 30
    assert {body["n"] for body in server.bodies} == {4}
    rows = bench.rows()
    assert [row["sample_index"] for row in rows] == [0, 1, 2, 3] * 30
    keys = [request_key(outcome.facts["family"], row["prompt_id"], row["sample_index"]) for row in rows]
    assert [row["request_key"] for row in rows] == keys
    assert [row["prompt_id"] for row in rows[::4]] == [
        row["prompt_id"] for batch in pool(questions(30)) for row in batch.to_pylist()
    ]
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert (outcome.counts["generated"], outcome.counts["stopped"]) == (120, 120)
    assert outcome.facts["cost"]["paid_prompt_tokens"] == 300
    assert outcome.facts["cost"]["paid_completion_tokens"] == outcome.facts["completion_tokens"] == 720


def test_four_samples_made_sixteen_pay_for_exactly_twelve_more(bench: Bench, server: FakeServer) -> None:
    bench.run(questions(10), server.url)
    before = {row["request_key"]: row["raw_text"] for row in bench.rows()}
    server.bodies.clear()
    outcome = bench.run(questions(10), server.url, n=16)
    assert [body["n"] for body in server.bodies] == [12] * 10
    assert (outcome.counts["reused"], outcome.counts["generated"]) == (40, 120)
    assert before.items() <= {row["request_key"]: row["raw_text"] for row in bench.rows()}.items()
    teacher = bench.teacher(server.url, n=20)
    prompts = [row for batch in pool(questions(10)) for row in batch.to_pylist()]
    assert missing_requests(
        prompts, teacher=teacher, model=bench.served(teacher), generations_dir=bench.folder / "generations", device="cpu",
        seed=0,
    ) == 40  # fmt: skip


def test_nothing_is_asked_when_everything_is_stored_and_an_address_changes_no_answer(bench: Bench, server: FakeServer) -> None:
    bench.run(questions(5), server.url)
    first = (bench.out_dir / "part-00000.parquet").read_bytes()
    outcome = bench.run(questions(5), "http://127.0.0.1:9/v1", server={"samples_per_request": 1, "max_concurrency": 1})
    assert outcome.counts["reused"] == 20
    assert (bench.out_dir / "part-00000.parquet").read_bytes() == first


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sampling": {"temperature": 0.2}}, "temperature 0.7 -> 0.2"), ({"revision": "v2"}, "revision None -> 'v2'"),
        ({"extra_body": {"reasoning_effort": "low"}}, "extra_body"), ({"sampling": {"top_k": 20}}, "top_k None -> 20"),
    ],
)  # fmt: skip
def test_other_settings_redo_everything_and_say_so(bench: Bench, server: FakeServer, fields: Any, says: str) -> None:
    bench.run(questions(3), server.url)
    outcome = bench.run(questions(3), server.url, **fields)
    assert (outcome.counts["reused"], server.asked) == (0, 6)
    assert any(says in line and "12 of 12 completions are made anew" in line for line in bench.news)


@pytest.mark.parametrize("takes_n", ["no", "one"])
def test_a_server_that_takes_no_n_is_asked_sample_by_sample(bench: Bench, server: FakeServer, takes_n: str) -> None:
    server.takes_n = takes_n
    outcome = bench.run(questions(20), server.url, server={"max_concurrency": 1})
    assert outcome.counts["stopped"] == 80
    assert sum(body.get("n", 1) > 1 for body in server.bodies) == 1
    assert len({body["seed"] for body in server.bodies}) >= 80
    assert outcome.facts["asking"]["takes_n"] is False


# --- faults -----------------------------------------------------------------------------------------------------------


def test_under_faults_every_row_is_answered_or_recorded_with_its_class(bench: Bench, server: FakeServer) -> None:
    server.fault_frac = 0.25
    texts = [*questions(100), "long " * 500]
    outcome = bench.run(texts, server.url, server={"max_attempts": 8, "timeout_seconds": 1.5})
    assert all(server.requests[fault] for fault in ("500", "429", "hang", "garbage", "reset"))
    counts = outcome.counts
    assert counts["expected"] == counts["stopped"] + counts["failed"] == len(bench.rows()) == 404
    assert outcome.facts["errors"] == {"prompt_too_long": 4}
    assert bench.rows()[-1]["error"].startswith("prompt_too_long: 400: This model's maximum context length")
    asking = outcome.facts["asking"]
    assert asking["limited"] == server.requests["429"]
    assert asking["failed"] >= sum(server.requests[fault] for fault in ("500", "hang", "garbage", "reset"))
    assert server.asked == asking["sent"] == 101 + asking["failed"] + asking["limited"]
    calm = Bench(bench.folder / "calm")
    calm.folder.mkdir()
    server.fault_frac = 0.0
    calm.run(texts, server.url)
    assert calm.rows() == bench.rows()


def test_attempts_are_bounded_and_what_failed_is_asked_again_by_the_next_run(bench: Bench, server: FakeServer) -> None:
    server.fault_frac, server.faults = 0.7, ("500", "garbage", "reset")
    outcome = bench.run(questions(40), server.url, server={"max_attempts": 2})
    failed = outcome.counts["failed"]
    assert 0 < failed < 160
    assert set(outcome.facts["errors"]) == {"server_error", "invalid_response", "connection"}
    assert server.asked <= 80
    assert all("(2 attempts)" in row["error"] for row in bench.rows() if row["error"])
    server.fault_frac = 0.0
    again = bench.run(questions(40), server.url)
    assert (again.counts["reused"], again.counts["generated"], again.counts["failed"]) == (160 - failed, failed, 0)


def test_a_prompt_that_the_server_refuses_costs_its_own_rows(bench: Bench, server: FakeServer) -> None:
    outcome = bench.run([*questions(10), "forbidden words"], server.url)
    assert outcome.facts["errors"] == {"rejected": 4}
    assert outcome.counts["stopped"] == 40
    assert outcome.facts["asking"]["takes_n"] is True


def test_windows_overlap_and_change_no_row(bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run(questions(23), server.url)
    whole = bench.rows()
    other = Bench(bench.folder / "other")
    other.folder.mkdir()
    monkeypatch.setattr(spool, "WINDOW_PROMPTS", 4)
    server.seconds, server.most_in_flight = 0.05, 0
    other.run(questions(23), server.url)
    assert len(list(other.out_dir.glob("part-*.parquet"))) == 6
    assert other.rows() == whole
    assert 4 < server.most_in_flight <= 12


def test_several_servers_share_the_work_and_one_that_is_dead_costs_no_row(
    bench: Bench, server: FakeServer, make_server: Any
) -> None:
    second, third = make_server(seconds=0.01), make_server(always=(500, json.dumps({"error": "down"})))
    server.seconds = 0.01
    bench.run(questions(60), server.url, second.url)
    assert min(server.asked, second.asked) >= 15
    outcome = bench.run([f"more {text}" for text in questions(60)], server.url, third.url, server={"max_attempts": 8})
    assert outcome.counts["failed"] == 0
    assert third.asked < 60


def test_a_server_that_is_dead_ends_the_run_and_what_it_answered_is_kept(bench: Bench, server: FakeServer) -> None:
    bench.run(questions(5), server.url)
    server.always = (500, json.dumps({"error": {"message": "out of memory"}}))
    dead = {"dead_after_failures": 6, "dead_after_seconds": 0.05}
    with pytest.raises(GenerationError, match=r"big: given up, no server answers any more .*server_error: 500: out of memory"):
        bench.run(questions(400), server.url, server=dead)
    assert server.asked < 200
    server.always = None
    assert bench.run(questions(5), server.url).counts["reused"] == 20


def test_too_many_requests_is_no_failure(bench: Bench, server: FakeServer) -> None:
    server.fault_frac, server.faults = 0.8, ("429",)
    dead = {"dead_after_failures": 1, "dead_after_seconds": 0.0, "max_attempts": 1}
    outcome = bench.run(questions(12), server.url, server=dead)
    assert outcome.counts["stopped"] == 48
    assert outcome.facts["asking"]["limited"] == server.requests["429"] > 12


# --- crashes ----------------------------------------------------------------------------------------------------------

KILLED_RUN = """
    import importlib.util, sys
    from pathlib import Path
    spec = importlib.util.spec_from_file_location("laws", {test_file!r})
    laws = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(laws)
    bench = laws.Bench(Path({folder!r}))
    bench.run(laws.many_questions(), {url!r}, flush_rows=16, server=laws.PATIENT)
"""
PATIENT = {"max_concurrency": 16, "timeout_seconds": 1.0, "max_attempts": 8}
KILLS = 5


def many_questions() -> list[str]:
    return [*questions(1998), "forbidden: how?", "x" * 3000]


def test_under_faults_and_five_kills_every_row_is_there_and_paid_once(bench: Bench, make_server: Any) -> None:
    server, calm_server = make_server(fault_frac=0.1, seconds=0.03), make_server(fault_frac=0.1)
    code = textwrap.dedent(KILLED_RUN).format(test_file=__file__, folder=str(bench.folder), url=server.url)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    in_flight, chance = 0, random.Random(0)
    for kill in range(KILLS):
        stop_at = server.asked + chance.randrange(100, 400)
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        while server.asked < stop_at and process.poll() is None:
            time.sleep(0.002)
        assert process.poll() is None, f"run {kill + 1} ended before it was killed"
        process.send_signal(signal.SIGKILL)
        in_flight += server.in_flight
        process.wait()
    outcome = bench.run(many_questions(), server.url, server=PATIENT)
    rows = bench.rows()
    calm = Bench(bench.folder / "calm")
    calm.folder.mkdir()
    calm.run(many_questions(), calm_server.url, server=PATIENT | {"max_concurrency": 256})
    assert server.asked <= 1.03 * calm_server.asked + in_flight
    assert {fault for fault in FAULTS if server.requests[fault]} == set(FAULTS)
    assert (outcome.counts["stopped"], outcome.counts["failed"], outcome.counts["expected"]) == (7992, 8, 8000)
    assert outcome.facts["errors"] == {"rejected": 4, "prompt_too_long": 4}
    assert len({row["request_key"] for row in rows}) == 8000
    assert rows == calm.rows()


# --- budget -----------------------------------------------------------------------------------------------------------

PRICES = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 10.0}


def test_a_budget_is_never_overrun_and_the_rest_is_asked_when_it_is_raised(bench: Bench, server: FakeServer) -> None:
    budget = {"max_usd": 0.01, **PRICES}  # a request costs 10 prompt and 24 completion tokens: 0.00025
    with pytest.raises(
        BudgetError, match=r"budget is reached: 0\.00\d+ of max_usd 0\.01 are spent.*Raise budget and run again"
    ):
        bench.run(questions(100), server.url, budget=budget)
    asked = server.asked
    assert 30 <= asked <= 40
    with pytest.raises(BudgetError):
        bench.run(questions(100), server.url, budget=budget)
    assert server.asked == asked, "a budget holds over all runs"
    outcome = bench.run(questions(100), server.url, budget=budget | {"max_usd": 1.0})
    assert (server.asked, outcome.counts["reused"]) == (100, 4 * asked)
    assert outcome.facts["cost"]["usd"] == pytest.approx((100 - asked) * 0.00025)
    assert outcome.facts["cost"]["usd_all_runs"] == pytest.approx(0.025)


def test_a_budget_of_tokens_counts_prompts_and_completions(bench: Bench, server: FakeServer) -> None:
    with pytest.raises(BudgetError, match=r"of max_tokens 1,000 are used"):
        bench.run(questions(100), server.url, budget={"max_tokens": 1000})
    assert 10 <= server.asked <= 1000 // 34


def test_a_sum_of_tokens_that_gives_one_answer_more_than_its_limit_costs_no_row(bench: Bench, server: FakeServer) -> None:
    def script(prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        texts = ["a", "b", "c", "a word that is longer than all the others together"]
        choices = [{"message": {"content": text}, "finish_reason": "stop"} for text in texts]
        return {"choices": choices, "usage": {"prompt_tokens": 9, "completion_tokens": 100}}

    server.script = script
    outcome = bench.run(questions(3), server.url)
    assert outcome.counts["stopped"] == 12
    assert max(row["completion_tokens"] for row in bench.rows()) > 32
    bench.run(questions(3), server.url)
    assert server.asked == 3


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def test_a_wrong_key_is_named_by_its_variable_and_never_shown(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "sk-right"
    monkeypatch.setenv("BIG_KEY", "sk-wrong-secret")
    with pytest.raises(
        ConfigError, match=r"refuses the key in BIG_KEY \(401: .*\*\*\*\)\. Put a valid key into BIG_KEY"
    ) as caught:
        bench.run(questions(2), server.url, server={"api_key_env": "BIG_KEY"})
    assert "sk-wrong-secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"asks for a key .*Set server\.api_key_env to the name of the variable"):
        bench.run(questions(2), server.url)
    assert server.asked == 0
    monkeypatch.setenv("BIG_KEY", "sk-right")
    outcome = bench.run(questions(2), server.url, server={"api_key_env": "BIG_KEY"})
    assert outcome.counts["stopped"] == 8
    assert b"sk-right" not in bench.everything_on_disk()
    assert "sk-right" not in json.dumps(outcome.facts)


def test_a_key_that_a_server_quotes_in_an_error_reaches_no_row(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run(questions(1), server.url)
    server.always = (422, json.dumps({"detail": "Bearer sk-secret-1 may not ask that"}))
    monkeypatch.setenv("BIG_KEY", "sk-secret-1")
    bench.run(questions(2), server.url, server={"api_key_env": "BIG_KEY"})
    assert bench.rows()[-1]["error"] == "rejected: 422: Bearer *** may not ask that"
    assert b"sk-secret-1" not in bench.everything_on_disk()


def test_a_key_variable_that_is_not_set_is_named(bench: Bench, server: FakeServer) -> None:
    with pytest.raises(ConfigError, match=r"variable NO_SUCH_KEY, which server\.api_key_env names, is not set\. Set it to the"):
        bench.run(questions(2), server.url, server={"api_key_env": "NO_SUCH_KEY"})


def test_an_address_where_nobody_is_says_so(bench: Bench) -> None:
    with pytest.raises(
        GenerationError, match=r"no server answers at http://127\.0\.0\.1:9/v1 .*Start it, or mend server\.base_url"
    ):
        bench.run(questions(2), "http://127.0.0.1:9/v1")


def test_an_address_that_is_no_such_server_says_where_it_must_end(bench: Bench, server: FakeServer) -> None:
    with pytest.raises(ConfigError, match=r"is no OpenAI-compatible server: it answers 404: Not Found.*usually /v1"):
        bench.run(questions(2), server.url.removesuffix("/v1"))


def test_a_model_that_the_server_does_not_have_is_answered_with_those_it_has(bench: Bench, server: FakeServer) -> None:
    server.models = ("one", "two")
    with pytest.raises(
        ModelNotFoundError, match=r"the model fake-model; it has: one, two\. Set teachers\.big\.model to a name"
    ):
        bench.run(questions(2), server.url)


def test_a_server_that_refuses_everything_ends_the_run_with_its_words(bench: Bench, server: FakeServer) -> None:
    server.always = (422, json.dumps({"detail": "unknown field seed"}))
    with pytest.raises(
        GenerationError, match=r"refuses every request, 6 so far, the last with rejected: 422: unknown field seed"
    ):
        bench.run(questions(300), server.url, server={"dead_after_failures": 6}, n=1)
    assert server.asked < 100
    server.always = None
    bench.run(questions(1), server.url, extra_body={"seed": None})
    assert "seed" not in server.bodies[-1]


def test_an_account_without_money_ends_the_run(bench: Bench, server: FakeServer) -> None:
    server.always = (429, json.dumps({"error": {"message": "pay", "code": "insufficient_quota"}}))
    with pytest.raises(GenerationError, match=r"has no money left \(429: pay\)\. Everything answered is stored"):
        bench.run(questions(50), server.url)


def test_without_the_client_the_package_and_the_command_are_named(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingExtraError, match=r"needs the package httpx2.*pip install 'distill-pipeline\[server\]'"):
        bench.run(questions(2), server.url)


# --- what comes back --------------------------------------------------------------------------------------------------


def scripted(message: dict[str, Any], reason: str | None = "stop", **more: Any) -> Any:
    def script(prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [{"message": message, "finish_reason": reason, **more}]}

    return script


@pytest.mark.parametrize(
    ("message", "reason", "reasoning", "answer"),
    [
        ({"content": "4", "reasoning_content": "2 and 2"}, "stop", "2 and 2", "4"),
        ({"content": "4", "reasoning": "2 and 2"}, "stop", "2 and 2", "4"),
        ({"content": "<think>2 and 2</think>4"}, "stop", "2 and 2", "4"),
        ({"content": "2 and 2</think>4"}, "stop", "2 and 2", "4"),
        ({"content": "4", "reasoning_content": "a </think> b"}, "stop", "a  b", "4"),
        ({"content": None, "reasoning_content": "2 and"}, "length", "2 and", ""),
        ({"content": "<think>2 and 2</think>4", "reasoning_content": "2 and 2"}, "stop", "2 and 2", "4"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "2 and 2"}]},
                      {"type": "text", "text": "4"}]}, "stop", "2 and 2", "4"),
        ({"content": [{"text": "4"}], "reasoning": [{"text": "2 and "}, {"text": "2"}]}, "stop", "2 and 2", "4"),
        ({"content": "4", "reasoning_content": None}, "stop", None, "4"),
    ],
)  # fmt: skip
def test_reasoning_is_kept_apart_from_the_answer(
    bench: Bench, server: FakeServer, message: dict[str, Any], reason: str, reasoning: str | None, answer: str
) -> None:
    server.script = scripted(message, reason)
    bench.run(questions(1), server.url, n=1)
    (row,) = bench.rows()
    assert (row["reasoning"], row["answer"], row["finish_reason"]) == (reasoning, answer, reason)


def test_cut_answers_are_asked_again_when_max_tokens_grows_and_only_they(bench: Bench, server: FakeServer) -> None:
    def script(prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        is_cut = body["max_tokens"] < 64 and "what is 1 " in prompt
        message = {"content": "w " * body["max_tokens"] if is_cut else "done"}
        usage = {"prompt_tokens": 9, "completion_tokens": body["max_tokens"] if is_cut else 2}
        return {"choices": [{"message": message, "finish_reason": "length" if is_cut else "stop"}], "usage": usage}

    server.script = script
    assert bench.run(questions(4), server.url, n=1).counts["truncated"] == 1
    outcome = bench.run(questions(4), server.url, n=1, sampling={"max_tokens": 64})
    assert (outcome.counts["reused"], outcome.counts["generated"], outcome.counts["truncated"]) == (3, 1, 0)


def test_an_answer_that_a_filter_took_away_is_a_failed_row(bench: Bench, server: FakeServer) -> None:
    server.script = lambda prompt, body: scripted({"content": "x"}, "content_filter" if "is 1 " in prompt else "stop")(
        prompt, body
    )
    outcome = bench.run(questions(3), server.url, n=1)
    assert outcome.facts["errors"] == {"content_filter": 1}


def test_log_probabilities_are_summed_where_they_are_asked_for(bench: Bench, server: FakeServer) -> None:
    steps = {"content": [{"token": "4", "logprob": -0.5}, {"token": "", "logprob": -0.25}]}
    server.script = scripted({"content": "4"}, logprobs=steps)
    bench.run(questions(1), server.url, n=1, logprobs=True)
    (row,) = bench.rows()
    assert (row["logprob"], row["completion_tokens"]) == (-0.75, 2)
    assert server.bodies[0]["logprobs"] is True


def test_tokens_are_counted_by_a_tokenizer_or_estimated_where_the_server_does_not_say(
    bench: Bench, server: FakeServer, tiny_model_dir: Path
) -> None:
    server.gives_usage = False
    outcome = bench.run(questions(2), server.url)
    assert outcome.facts["asking"]["tokens_from"] == ["estimated"]
    outcome = bench.run(questions(2), server.url, revision="b", tokenizer_dir=tiny_model_dir)
    assert outcome.facts["asking"]["tokens_from"] == ["tokenizer"]
    assert all(row["completion_tokens"] > 0 for row in bench.rows())


def test_requests_carry_the_settings_and_the_system_prompt(bench: Bench, server: FakeServer) -> None:
    bench.run(
        questions(1), server.url, n=2, system="be brief", extra_body={"top_p": None, "chat_template_kwargs": {"x": 1}},
        sampling={"top_k": 7}, server={"max_tokens_field": "max_completion_tokens"},
    )  # fmt: skip
    (body,) = server.bodies
    assert isinstance(body.pop("seed"), int)
    assert body == {
        "model": MODEL, "max_completion_tokens": 32, "temperature": 0.7, "top_k": 7, "n": 2, "chat_template_kwargs": {"x": 1},
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": questions(1)[0]}],
    }  # fmt: skip


def test_a_server_is_told_the_system_prompt_of_each_prompts_domain(bench: Bench, server: FakeServer) -> None:
    bench.run(questions(2), server.url, n=1, system="be brief", systems={"sums": "count", "words": None})
    assert [body["messages"][0] for body in server.bodies] == [{"role": "system", "content": "count"}] * 2
    assert all(len(body["messages"]) == 2 for body in server.bodies)
