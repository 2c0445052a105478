"""A teacher behind a server in an experiment: gate, stages, judge, versions, plan, and what is said where it cannot do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_pipeline.errors import ConfigError, LicenseError
from distill_pipeline.experiment import parse_experiment
from distill_pipeline.nodes import experiment_nodes
from distill_pipeline.pipeline import Pipeline
from distill_pipeline.planning import plan_experiment
from distill_pipeline.scoring.opening import open_scorer
from distill_pipeline.scoring.rows import ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.storage.artifacts import ArtifactStore
from distill_pipeline.work import Work

ELEMENTARY = str(Path(__file__).parents[3] / "examples/elementary/tasks")
PRICES = {"max_usd": 5.0, "usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 2.0}


def document(folder: Path, url: str, **teacher: Any) -> dict[str, Any]:
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"what is {i} plus {i * i}?"}) for i in range(12)))
    big = {"model": "fake-model", "engine": "openai", "license": "apache-2.0", "server": {"base_url": url}, "budget": PRICES}
    return {
        "name": "served",
        "prompt_pool": {
            "sources": [{"path": str(folder / "prompts.jsonl"), "domain": "sums", "license": "cc0-1.0"}],
            "holdout_fraction": 0.0, "dedup": {"exact": True}, "decontaminate": {"against": None},
        },
        "teachers": {"big": big | {"sampling": {"n": 2, "max_tokens": 32}} | teacher},
        "scorers": {"*": [{"kind": "judge", "options": {"model": "big", "rubric": "helpful"}}]},
        "filters": {"all": {}},
        "students": {"small": {"data": ["big/all"], "init": {"scratch": {"layers": 2}}, "stages": [{"method": "sft"}]}},
        "evaluation": {"tasks": ["elementary_heldout"], "include_path": ELEMENTARY},
    }  # fmt: skip


@pytest.fixture
def open_served(tmp_path: Path, server: Any) -> Callable[..., Pipeline]:
    def script(prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        text = "Fine. Score: 5" if "You judge an answer" in prompt else "it is a number"
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 5 * body.get("n", 1)}
        return {"choices": [choice] * body.get("n", 1), "usage": usage}

    server.script = script

    def opened(**teacher: Any) -> Pipeline:
        experiment = parse_experiment(document(tmp_path, server.url, **teacher))
        return Pipeline(experiment, ArtifactStore(tmp_path / "store"), teacher_device="cpu", progress=lambda line: None)

    return opened


def test_answers_and_verdicts_of_a_served_model_cost_what_the_manifest_says(
    open_served: Callable[..., Pipeline], server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIG_KEY", "sk-secret-2")
    pipeline = open_served(server={"base_url": server.url, "api_key_env": "BIG_KEY"})
    pipeline.make("prompt_pool")
    (line,) = [line for line in plan_experiment(pipeline, probe=False) if line.node == "teacher_outputs/big"]
    assert (line.rows, line.tokens) == (24, 24 * 32)
    assert "USD for them at most" in line.note
    outputs = pipeline.make("teacher_outputs/big")
    assert server.asked == 12
    assert outputs.manifest.facts["cost"]["usd"] == pytest.approx(12 * (10 + 2 * 10) / 1e6)
    assert outputs.manifest.facts["teacher"]["engine"] == "openai"
    scored = pipeline.make("scored_outputs/big")
    assert scored.manifest.counts["scored"] == 24
    assert server.asked == 12 + 12, "equal answers to a prompt are judged once"
    assert all("Bearer sk-secret-2" in head for head in server.headers)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert b"sk-secret-2" not in stored


@pytest.mark.parametrize(
    ("license_key", "said"),
    [
        ("openai", "licence openai forbids training on its outputs"),
        (None, "no licence is known"),
        ("own", "licence 'own' is not"),
    ],
)
def test_a_licence_that_is_refused_stops_before_any_request(
    open_served: Callable[..., Pipeline], server: Any, license_key: str | None, said: str
) -> None:
    pipeline = open_served(license=license_key)
    pipeline.make("prompt_pool")
    with pytest.raises(LicenseError, match=f"teacher big: {said}"):
        pipeline.make("teacher_outputs/big")
    assert sum(server.requests.values()) == 0


def test_where_and_how_fast_a_server_is_asked_changes_no_version(tmp_path: Path) -> None:
    def version(**teacher: Any) -> str:
        return experiment_nodes(parse_experiment(document(tmp_path, "http://a/v1", **teacher)))[
            "teacher_outputs/big"
        ].code_version

    known = version()
    assert version(server={"base_url": ["http://b/v1", "http://c/v1"], "requests_per_minute": 60}) == known
    assert version(budget=None) == known
    assert version(weights="some/model") == known
    assert version(extra_body={"reasoning_effort": "low"}) != known
    assert version(revision="june") != known


def test_a_student_that_needs_the_weights_of_a_served_teacher_says_how_to_give_them(
    open_served: Callable[..., Pipeline], tiny_teacher_dir: Path
) -> None:
    def work(pipeline: Pipeline) -> Work:
        node = pipeline.node("student_checkpoint/small")
        return Work(pipeline.experiment, pipeline.store, node, {}, "cpu", "cpu", pipeline.progress)

    with pytest.raises(ConfigError, match=r"teacher big is served, .* set teachers\.big\.weights to the same model"):
        work(open_served()).teacher_model()
    assert work(open_served(weights=str(tiny_teacher_dir))).teacher_model().path == tiny_teacher_dir


def test_a_reward_model_cannot_be_served(open_served: Callable[..., Pipeline]) -> None:
    pipeline = open_served()
    model = Work(
        pipeline.experiment, pipeline.store, pipeline.node("scored_outputs/big"), {}, "cpu", "cpu", pipeline.progress
    ).answering_model("big")
    context = ScoringContext(models={("big", None): model}, device="cpu")
    with pytest.raises(ConfigError, match=r"reward_model needs a model's weights, and fake-model is served"):
        open_scorer(ScorerSpec(kind="reward_model", options={"model": "big"}), context)


@pytest.mark.parametrize(
    ("teacher", "fault"),
    [
        ({"server": None}, "engine openai needs server"),
        ({"engine": "transformers"}, "server is for engine openai; this teacher's engine is transformers"),
        ({"server": {"base_url": "http://user:pass@host/v1"}}, "teachers.big.server.base_url.0"),
        ({"server": {"base_url": "http://host/v1?key=secret"}}, "teachers.big.server.base_url.0"),
        ({"server": {"base_url": "localhost:8000"}}, "teachers.big.server.base_url.0"),
        ({"server": {"base_url": "http://a/v1", "api_key": "sk-1"}}, "teachers.big.server.api_key: unknown field"),
        ({"server": {"base_url": "http://a/v1", "api_key_env": "sk-123"}}, "teachers.big.server.api_key_env"),
        ({"budget": {"max_usd": 3.0}}, "max_usd needs usd_per_million_prompt_tokens"),
    ],
)  # fmt: skip
def test_faults_of_a_served_teacher_are_reported_with_their_path(tmp_path: Path, teacher: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(document(tmp_path, "http://a/v1", **teacher))
    assert fault in str(caught.value)
