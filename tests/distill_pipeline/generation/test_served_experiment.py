"""A teacher behind a server in an experiment: gate, stages, judge, versions, plan, and what is said where it cannot do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_pipeline.errors import ConfigError, GenerationError, LicenseError
from distill_pipeline.experiment import parse_experiment
from distill_pipeline.nodes import experiment_nodes
from distill_pipeline.pipeline import Pipeline
from distill_pipeline.planning import plan_experiment
from distill_pipeline.scoring.opening import open_scorer
from distill_pipeline.scoring.rows import ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.storage.artifacts import Artifact, ArtifactStore
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
        "students": {"small": {"data": ["big/all"], "init": {"model": "student"}, "stages": [{"method": "sft"}]}},
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


@pytest.mark.parametrize(
    ("student", "fault"),
    [
        ({"init": {"prune": {"layers": 2}}}, "students.small.init.prune: teacher big is only an API, so its layers"),
        ({"init": {"scratch": {"layers": 2}}}, "students.small.init.scratch: teacher big is only an API"),
        ({"stages": [{"method": "sft"}, {"method": "logit_kd"}]}, "students.small.stages.1.method: logit_kd learns"),
        ({"stages": [{"method": "on_policy"}]}, "students.small.stages.0.method: on_policy learns the teacher's distribution"),
    ],
)  # fmt: skip
def test_what_a_student_cannot_have_of_an_api_is_a_fault_of_the_experiment_file(
    tmp_path: Path, student: dict[str, Any], fault: str
) -> None:
    wanted = document(tmp_path, "http://a/v1")
    wanted["students"]["small"] |= student
    with pytest.raises(ConfigError) as caught:
        parse_experiment(wanted)
    assert fault in str(caught.value)
    assert "or set teachers.big.weights to the same model as a Hub id or folder" in str(caught.value)
    wanted["teachers"]["big"]["weights"] = "some/model"
    parse_experiment(wanted)


def test_weights_of_a_served_teacher_are_its_folder(open_served: Callable[..., Pipeline], tiny_teacher_dir: Path) -> None:
    def work(pipeline: Pipeline) -> Work:
        node = pipeline.node("student_checkpoint/small")
        return Work(pipeline.experiment, pipeline.store, node, {}, "cpu", "cpu", pipeline.progress)

    assert work(open_served()).teacher_model() is None
    found = work(open_served(weights=str(tiny_teacher_dir))).teacher_model()
    assert found is not None
    assert found.path == tiny_teacher_dir


@pytest.fixture
def make_whole(tmp_path: Path, server: Any, tiny_model_dir: Path) -> Callable[..., dict[str, Artifact]]:
    """Everything of an experiment whose teacher is only an API; it thinks, and always says the same."""

    def script(prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        message = {"reasoning_content": "Is it Paris or Rome?", "content": "It is Paris, the mice say."}
        return {"choices": [{"message": message, "finish_reason": "stop"}] * body.get("n", 1)}

    server.script = script

    def made(*, system: str | None = None, **evaluation: Any) -> dict[str, Artifact]:
        whole = document(tmp_path, server.url, budget=None, system=system) | {"scorers": {}}
        stages = [{"method": "sft", "batch_prompts": 8}]
        whole["students"] = {"small": {"data": ["big/all"], "init": {"model": str(tiny_model_dir)}, "stages": stages}}
        whole["evaluation"] |= {"limit": 12, **evaluation}
        pipeline = Pipeline(
            parse_experiment(whole), ArtifactStore(tmp_path / "store"), teacher_device="cpu", student_device="cpu",
            progress=lambda line: None,
        )  # fmt: skip
        return {name: pipeline.make(name) for name in pipeline.nodes}

    return made


def test_a_student_of_an_api_is_trained_and_measured_beside_it(
    make_whole: Callable[..., dict[str, Artifact]], server: Any
) -> None:
    made = make_whole(system="Answer in one sentence.")
    facts = made["student_checkpoint/small"].manifest.facts
    assert (facts["tokenizer"], facts["teacher_parameters"], facts["share"]) == ("student", None, None)
    assert facts["teacher_sha256_before"] is None
    assert server.asked == 12 + 12, "each prompt once for all its samples, and each evaluation question once"
    questions = [body for body in server.bodies if "n" not in body]
    assert all(body["messages"][0] == {"role": "system", "content": "Answer in one sentence."} for body in questions)
    assert {(body["temperature"], body["max_tokens"]) for body in questions} == {(0.0, 24)}
    report = made["eval_report/small"].read_json("report.json")
    assert list(report["headline"]["models"]) == ["student", "teacher", "untrained"]
    samples = report["samples"]
    assert {sample["answers"]["teacher"]["text"] for sample in samples} == {"It is Paris, the mice say."}
    assert report["headline"]["models"]["teacher"]["n"] == 12
    held_out = report["held_out"]["student"]
    assert (held_out["forward_kl"], held_out["top1_agreement"]) == (None, None)
    assert held_out["reason"] == "teacher big is only an API: its distribution is not available"
    assert report["warnings"][0].startswith("Teacher big is only an API: how far the student is from its distribution")
    page = (made["eval_report/small"].local_dir() / "report.html").read_text()
    assert "the teacher&#39;s size is not known" in page
    assert "its distribution is not available" in page
    again = make_whole(system="Answer in one sentence.")
    assert server.asked == 24
    assert all(artifact.reused for artifact in again.values())


def test_an_api_is_not_asked_to_be_measured_where_nobody_wants_it_or_it_cannot_be(
    make_whole: Callable[..., dict[str, Artifact]], server: Any, tmp_path: Path
) -> None:
    report = make_whole(baselines=["untrained"])["eval_report/small"].read_json("report.json")
    assert server.asked == 12
    assert "teacher" not in report["headline"]["models"]
    task = Path(ELEMENTARY, "elementary_heldout.yaml").read_text().replace("generate_until", "multiple_choice")
    (tmp_path / "tasks").mkdir()
    for name in ("tasks/elementary_heldout.py", "heldout.jsonl"):
        (tmp_path / name).write_bytes(Path(ELEMENTARY).parent.joinpath(name).read_bytes())
    task = task.replace('doc_to_target: "{{reference}}"', 'doc_to_target: 0\ndoc_to_choice: ["{{reference}}", "no"]')
    unread = ("process_results", "generation_kwargs", "  until", "  do_sample", "  max_gen_toks")
    kept = [line for line in task.splitlines() if not line.startswith(unread)]
    (tmp_path / "tasks" / "elementary_heldout.yaml").write_text("\n".join(kept))
    report = make_whole(include_path=str(tmp_path / "tasks"))["eval_report/small"].read_json("report.json")
    assert server.asked == 12
    said = "Teacher big is only an API and was not evaluated: elementary_heldout needs the likelihood of given texts."
    assert said in report["warnings"]
    assert "The teacher was not evaluated, so the student's score has nothing to stand beside." in report["warnings"]


def test_questions_that_an_api_did_not_answer_end_the_evaluation_and_the_rest_is_kept(
    make_whole: Callable[..., dict[str, Artifact]], server: Any
) -> None:
    answered = server.script

    def broken(prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        if "n" not in body and server.asked % 3 == 0:
            return {"choices": [{"message": {"content": "x"}, "finish_reason": "broken"}]}
        return dict(answered(prompt, body))

    server.script = broken
    with pytest.raises(GenerationError, match=r"teacher big did not answer \d+ of 12 evaluation questions, the first with unk"):
        make_whole()
    server.script, before = answered, server.asked
    report = make_whole()["eval_report/small"].read_json("report.json")
    assert 0 < server.asked - before < 12
    assert report["headline"]["models"]["teacher"]["n"] == 12


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
