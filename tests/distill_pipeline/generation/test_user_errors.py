"""Laws of what a user gets wrong: ``distill generate`` ends with one line that says what happened, which value, what to do."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from distill_pipeline.cli import main

FakeServer = Any
"""The server of conftest.py."""
FAST = {"backoff_seconds": 0.002, "max_backoff_seconds": 0.02, "timeout_seconds_a_token": 0.0, "connect_seconds": 2.0}
NEXT_COSTS_MORE = (
    ", and the next request could cost more than is left. Everything answered is stored. Raise budget and run again: only the "
    "rest is asked."
)
WEB_PAGE = "<!DOCTYPE html><html><body>Welcome</body></html>"
WHERE_IT_ENDS = "server.base_url must end where /chat/completions begins, usually /v1."
OTHER_NAME = "Set teachers.big.model to a name that GET /models gives there, or load the model into the server."


class Desk:
    """Somebody at the command line, with an experiment of one teacher and twelve prompts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "data"
        self.prompts = [f"what is {number} plus {number * number}?" for number in range(12)]

    def generate(self, *words: str, teacher: str = "big", compute: dict[str, Any] | None = None, **fields: Any) -> Result:
        rows = (json.dumps({"prompt": prompt}) + "\n" for prompt in self.prompts)
        (self.folder / "prompts.jsonl").write_text("".join(rows))
        big = {"model": "fake-model", "license": "apache-2.0", "sampling": {"n": 2, "max_tokens": 8}} | fields
        document = {
            "name": "desk",
            "prompt_pool": {
                "sources": [{"path": "prompts.jsonl", "domain": "sums", "license": "cc0-1.0"}], "holdout_fraction": 0.0,
                "decontaminate": {"against": None},
            },
            "teachers": {"big": big}, "filters": {"all": {}}, "compute": compute or {},
            "students": {"small": {"data": ["big/all"], "init": {"model": "student"}, "stages": [{"method": "sft"}]}},
            "evaluation": {"tasks": ["some_task"]},
        }  # fmt: skip
        (self.folder / "desk.yaml").write_text(yaml.safe_dump(document))
        made = self._run("prompts")
        return made if made.exit_code else self._run("generate", teacher, *words)

    def _run(self, verb: str, *words: str) -> Result:
        return CliRunner().invoke(main, [verb, str(self.folder / "desk.yaml"), *words, "--root", str(self.root)])

    def served(self, url: str, server: dict[str, Any] | None = None, **fields: Any) -> Result:
        return self.generate(engine="openai", server={"base_url": url} | FAST | (server or {}), **fields)

    def errors(self) -> list[str | None]:
        (part,) = self.root.glob("teacher_outputs/big/*/part-*.parquet")
        errors: list[str | None] = pq.read_table(part, columns=["error"])["error"].to_pylist()
        return errors


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def said(result: Result) -> str:
    """What the command ended with."""
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    (found,) = re.findall(r"^Error: (.*)\n\Z", result.output, re.MULTILINE)
    return str(found)


@pytest.mark.parametrize(
    ("answers", "settings", "expected"),
    [
        ({"key": "right"}, {"api_key_env": "BIG_KEY"}, "the server at {url} refuses the key in BIG_KEY (401: Incorrect API key "
         "provided: ***). Put a valid key into BIG_KEY."),
        ({"key": "right", "key_status": 403}, {"api_key_env": "BIG_KEY"}, "the server at {url} refuses the key in BIG_KEY "
         "(403: Incorrect API key provided: ***). Put a valid key into BIG_KEY."),
        ({"key": "right"}, {"api_key_env": "BIG_KEY", "probe": False}, "the server at {url} refuses the key in BIG_KEY (401: "
         "Incorrect API key provided: ***). Put a valid key into BIG_KEY."),
        ({"key": "right"}, {}, "the server at {url} asks for a key (401: Incorrect API key provided:). Set server.api_key_env "
         "to the name of the variable that holds a key."),
        ({}, {"api_key_env": "NO_KEY"}, "the environment variable NO_KEY, which server.api_key_env names, is not set. Set it "
         "to the key."),
        ({"models": ("one", "two")}, {}, "the server at {url} does not have the model fake-model; it has: one, two. "
         + OTHER_NAME),
        ({"models": ()}, {}, "the server at {url} does not have the model fake-model; it has: none. " + OTHER_NAME),
        ({"always": (404, '{"error": {"message": "no model fake-model"}}')}, {"probe": False}, "the server at {url} does not "
         "have the model fake-model (404: no model fake-model). " + OTHER_NAME),
        ({"page": WEB_PAGE}, {}, "{url} is no OpenAI-compatible server: {url}/models is no list of models. " + WHERE_IT_ENDS),
        ({"models_status": 500}, {}, "the server at {url} fails (500: {{\"data\": [{{\"id\": \"fake-model\"}}]}}). Mend it, "
         "and run again."),
    ],
)  # fmt: skip
def test_what_a_server_refuses_is_one_line_before_any_prompt_is_answered(
    desk: Desk, make_server: Callable[..., FakeServer], monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any],
    settings: dict[str, Any], expected: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("BIG_KEY", "wrong")
    server = make_server(**answers)
    assert said(desk.served(server.url, settings)) == "teacher big: " + expected.format(url=server.url)
    assert not desk.root.joinpath("teacher_outputs").exists()


def test_an_address_with_another_path_says_where_it_must_end(desk: Desk, server: FakeServer) -> None:
    url = f"{server.url}/chat/completions"
    expected = f"teacher big: {url} is no OpenAI-compatible server: it answers 404: Not Found. {WHERE_IT_ENDS}"
    assert said(desk.served(url)) == expected
    assert said(desk.served(url, {"probe": False})) == expected


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://no-such-host.invalid/v1"])
def test_an_address_where_nobody_answers_is_named_with_the_reason(desk: Desk, url: str) -> None:
    pattern = rf"teacher big: no server answers at {url} \(Connect\w+(: .+)?\)\. Start it, or mend server\.base_url\."
    assert re.fullmatch(pattern, said(desk.served(url)))


def test_a_web_page_for_every_answer_is_quoted(desk: Desk, make_server: Callable[..., FakeServer]) -> None:
    found = said(desk.served(make_server(page=WEB_PAGE).url, {"probe": False, "max_attempts": 1}))
    assert found == (
        f"all 24 requests to big failed, the first with invalid_response: no chat completion (JSONDecodeError) in '{WEB_PAGE}' "
        "(1 attempts). None of them is stored: mend the cause and run again."
    )


@pytest.mark.parametrize(
    ("status", "words", "expected"),
    [
        (500, "out of memory", "teacher big: given up, no server answers any more ({url}: 3 failures in a row, the last with "
         "server_error: 500: out of memory). What came is stored: mend the server and run again."),
        (401, "key expired", "teacher big: the server at {url} asks for a key (401: key expired). Set server.api_key_env to "
         "the name of the variable that holds a key."),
        (402, "pay", "teacher big: the account at {url} has no money left (402: pay). Everything answered is stored: pay, and "
         "run again."),
    ],
)  # fmt: skip
def test_a_server_that_ends_in_the_middle_keeps_what_came_and_the_next_run_asks_for_the_rest(
    desk: Desk, server: FakeServer, status: int, words: str, expected: str
) -> None:
    answer = server.answer

    def some_then_none(prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        server.script = None
        if server.asked == 5:
            server.always = (status, json.dumps({"error": {"message": words}}))
        found: dict[str, Any] = answer(prompt, body)
        server.script = some_then_none
        return found

    server.script = some_then_none
    settings = {"max_concurrency": 1, "dead_after_failures": 3, "dead_after_seconds": 0.0}
    assert said(desk.served(server.url, settings)) == expected.format(url=server.url)
    server.always = server.script = None
    result = desk.served(server.url)
    assert result.exit_code == 0, result.output
    assert "reused 10, generated 14" in result.output


@pytest.mark.parametrize(
    ("budget", "used"),
    [
        ({"max_tokens": 5}, "0 of max_tokens 5 are used"),
        ({"max_tokens": 200}, r"[1-9]\d+ of max_tokens 200 are used"),
        ({"max_usd": 0.16, "usd_per_million_prompt_tokens": 1000.0}, r"0\.0[1-9]00 of max_usd 0\.16 are spent"),
    ],
)
def test_a_budget_that_is_used_up_says_of_how_much_and_that_nothing_is_lost(
    desk: Desk, server: FakeServer, budget: dict[str, Any], used: str
) -> None:
    found = said(desk.served(server.url, {"max_concurrency": 1}, budget=budget))
    assert re.fullmatch(f"the budget is reached: {used}{re.escape(NEXT_COSTS_MORE)}", found)


def test_prompts_longer_than_the_context_are_rows_and_the_others_are_answered(desk: Desk, server: FakeServer) -> None:
    desk.prompts[3] = "very long " * 300
    result = desk.served(server.url)
    assert result.exit_code == 0, result.output
    assert "stopped 22, truncated 0, failed 2" in result.output
    quoted = "prompt_too_long: 400: This model's maximum context length is 512 tokens. However, you requested 900 tokens."
    assert [error for error in desk.errors() if error] == [quoted] * 2


def test_prompts_longer_than_the_context_of_a_model_here_are_rows_too(desk: Desk, tiny_model_dir: Path) -> None:
    desk.prompts[3] = "very long " * 300
    result = desk.generate("--teacher-device", "cpu", model=str(tiny_model_dir))
    assert result.exit_code == 0, result.output
    first, second = (error for error in desk.errors() if error)
    assert first == second
    assert re.fullmatch(r"prompt_too_long: \d{3,4} tokens, the model's context holds 256", first)


@pytest.mark.parametrize(
    ("fields", "faults"),
    [
        ({"sampling": {"n": 0, "temperature": -1, "top_k": 0, "top_p": 0, "max_tokens": 0}},
         ["sampling.n: Input should be greater than or equal to 1 (given: 0)",
          "sampling.temperature: Input should be greater than or equal to 0 (given: -1)",
          "sampling.top_k: Input should be greater than or equal to 1 (given: 0)",
          "sampling.top_p: Input should be greater than 0 (given: 0)",
          "sampling.max_tokens: Input should be greater than or equal to 1 (given: 0)"]),
        ({"sampling": {"temp": 1.0}}, ["sampling.temp: unknown field; known: max_tokens, n, temperature, top_k, top_p"]),
        ({"sampling": {"n": "four"}}, ["sampling.n: Input should be a valid integer"]),
        ({"budget": {"max_usd": 5}}, ["budget: max_usd needs usd_per_million_prompt_tokens and usd_per_million_completion_"]),
        ({"engine": "openai"}, ["engine openai needs server: {base_url: ...}"]),
    ],
)  # fmt: skip
def test_all_bad_values_of_a_teacher_are_said_at_once_each_with_its_path(
    desk: Desk, fields: dict[str, Any], faults: list[str]
) -> None:
    result = desk.generate(**fields)
    assert result.exit_code == 1
    for fault in faults:
        assert re.search(rf"^ *teachers\.big.*{re.escape(fault)}", result.output, re.MULTILINE), result.output


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "./none"}, r"model \./none: .*/none does not exist\. Give an existing folder with safetensors or a GGUF "
         r"file; relative paths start at the experiment's folder\."),
        ({"model": "someone/none"}, r"model someone/none was found neither as a folder \(.*/someone/none\) nor on the Hub: "
         r"LocalEntryNotFoundError: .*[^.]\. HF_HUB_OFFLINE is set, so only the local Hub cache was searched\. Check the name "
         r"and the network, set HF_TOKEN for a private model, or give a local folder, a GGUF file or pypi:NAME==VERSION\."),
        ({"model": "what is this?"}, r"'what is this\?' is no model reference\. Give a Hub id, a folder, a GGUF file or "
         r"pypi:NAME==VERSION\."),
        ({"model": "none", "license": None}, r"teacher big: no licence is known \(HF_HUB_OFFLINE is set, and the local Hub "
         r"cache has no card of none, which is no folder here\), so training on its outputs is refused\. Read the lic.*"),
        ({"license": "llama2"}, r"teacher big: licence llama2 forbids training on its outputs \(1\.b\.v: .*\)\. Choose another "
         r"teacher, or set accept: to the reason why you may\."),
        ({"license": "my-own"}, r"teacher big: licence 'my-own' is not in the table of [\d-]+, so training on its outputs is "
         r"refused\. Read the licence\. If it is one of these under another name, set license: to .*; else set accept: to the "
         r"reason why its outputs may train a student\."),
        ({"teacher": "bog"}, r"desk has no teacher_outputs/bog; it has: prompt_pool, teacher_outputs/big, scored_ou.*"),
    ],
)  # fmt: skip
def test_a_model_a_licence_or_a_teacher_that_is_not_there_is_named(desk: Desk, fields: dict[str, Any], expected: str) -> None:
    assert re.fullmatch(expected, said(desk.generate(**fields)))


def test_domains_without_a_prompt_are_named_beside_those_of_the_pool(desk: Desk, server: FakeServer) -> None:
    assert said(desk.served(server.url, domains=["law", "art"])) == (
        "teacher big answers the domains law, art, and no training prompt is in them; the pool's training prompts are in: "
        "sums. Mend teachers.big.domains, or the domain of a source."
    )
    assert sum(server.requests.values()) == 0


@pytest.mark.parametrize(
    ("module", "fields", "what"),
    [
        ("httpx2", {"engine": "openai", "server": {"base_url": "http://127.0.0.1:9/v1"}}, "engine openai needs the package "
         "httpx2. Install it: pip install 'distill-pipeline[server]'"),
        ("vllm", {"engine": "vllm"}, "engine vllm needs the package vllm. Install it: pip install 'distill-pipeline[vllm]'"),
        ("ray", {"compute": {"engine": "ray"}}, "compute: {engine: ray} needs the package ray. Install it: pip install "
         "'distill-pipeline[ray]'"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_with_its_pip_command(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, module: str, fields: dict[str, Any], what: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert said(desk.generate("--teacher-device", "cpu", **({"model": str(tiny_model_dir)} | fields))) == what


def test_a_device_that_is_none_is_answered_with_what_there_is(desk: Desk, tiny_model_dir: Path) -> None:
    found = said(desk.generate("--teacher-device", "gpu", model=str(tiny_model_dir)))
    assert found == "'gpu' is no device. Use auto, cpu, cuda or cuda:0."
