"""Laws of system prompts by domain, of named texts, and of who sees which of them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.errors import ConfigError
from distill_pipeline.experiment import parse_experiment
from distill_pipeline.nodes import experiment_nodes
from distill_pipeline.system_prompts import CHAIN_OF_THOUGHT, PRESETS, SystemPrompts, with_system

QUICKSTART = Path(__file__).parents[2] / "experiments/quickstart.yaml"
SYSTEMS = st.one_of(st.none(), st.sampled_from(["a", "b", "c"]))


@pytest.fixture
def document() -> dict[str, Any]:
    """The quickstart with a second domain and a second teacher for it."""
    parsed: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text())
    parsed["prompt_pool"]["sources"].append({"path": "more.jsonl", "domain": "math", "license": "cc0-1.0"})
    parsed["teachers"]["other"] = parsed["teachers"]["smollm2"] | {"model": "other/model", "domains": ["math"]}
    return parsed


def faults(document: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(document)
    return str(caught.value)


def versions(document: dict[str, Any]) -> dict[str, str]:
    return {name: node.code_version for name, node in experiment_nodes(parse_experiment(document)).items()}


@given(SYSTEMS, st.dictionaries(st.sampled_from(["x", "y", "z"]), SYSTEMS), st.sampled_from(["x", "y", "other"]))
@settings(deadline=None)
def test_a_renderer_with_the_shared_system_prompt_shows_each_conversation_its_own_domains(
    default: str | None, by_domain: dict[str, str | None], domain: str
) -> None:
    prompts = SystemPrompts(default, by_domain)
    question = [{"role": "user", "content": "q"}]
    shown = with_system(prompts.carried(question, domain), prompts.shared)
    own = by_domain.get(domain, default)
    assert shown == ([{"role": "system", "content": own}] if own is not None else []) + question
    kept = [{"role": "system", "content": "its own"}, *question]
    assert with_system(prompts.carried(kept, domain), prompts.shared) == kept


def test_a_preset_is_its_text_wherever_it_is_named(document: dict[str, Any]) -> None:
    teacher = document["teachers"]["smollm2"]
    before = versions(document)
    teacher["system"] = {"preset": "short_answer"}
    assert versions(document) == before, "quickstart's own text is this preset's"
    teacher["systems"] = {"math": {"preset": "explain_step_by_step"}, "elementary": None}
    teacher["chain_of_thought"] = True
    document["evaluation"]["domains"] = {"elementary_heldout": "elementary"}
    told = parse_experiment(document).teachers["smollm2"].system_prompts
    assert told.of("math") == f"{PRESETS['explain_step_by_step']}\n\n{CHAIN_OF_THOUGHT}"
    assert told.of("elementary") == CHAIN_OF_THOUGHT
    assert told.of("anything") == f"{PRESETS['short_answer']}\n\n{CHAIN_OF_THOUGHT}"


def test_presets_are_short_texts_of_their_own() -> None:
    assert len(set(PRESETS.values())) == len(PRESETS) >= 6
    assert all(len(text.split()) < 40 or len(text) < 400 for text in PRESETS.values())
    assert all(text == text.strip() and text.endswith(".") for text in PRESETS.values())


@pytest.mark.parametrize(
    ("teacher", "fault"),
    [
        (
            {"system": {"preset": "orca"}},
            "teachers.other.system: a system prompt is a text, null or {preset: NAME} with one of",
        ),
        (
            {"systems": {"math": {"text": "x"}}},
            "teachers.other.systems.math: a system prompt is a text, null or {preset: NAME}",
        ),
        ({"systems": {"code": "x"}}, "teachers.other: systems.code: the teacher answers the domains math only"),
        ({"domains": ["*"], "systems": {"*": "x"}}, "systems.*: the system prompt of all other domains is system"),
    ],
)
def test_faults_of_system_prompts_are_reported_with_their_path(
    document: dict[str, Any], teacher: dict[str, Any], fault: str
) -> None:
    document["teachers"]["other"] |= teacher
    assert fault in faults(document)


def test_a_system_prompt_of_a_domain_that_no_prompt_is_in_is_an_error(document: dict[str, Any]) -> None:
    document["teachers"]["smollm2"]["systems"] = {"maths": "x"}
    document["evaluation"]["domains"] = {"elementary_heldout": "elementary"}
    with pytest.raises(ConfigError, match=r"teachers\.smollm2\.systems\.maths: no prompt is in this domain"):
        parse_experiment(document).require_domains(["elementary", "math"])


def test_where_system_prompts_differ_by_domain_each_task_says_whose_it_has(document: dict[str, Any]) -> None:
    document["teachers"]["smollm2"]["systems"] = {"math": "count"}
    text = faults(document)
    assert "evaluation.domains: student kl has system prompts by domain" in text
    assert "the tasks elementary_heldout are asked" in text
    document["evaluation"]["domains"] = {"elementary_heldouts": "math"}
    assert "evaluation: domains.elementary_heldouts: no such task; tasks: elementary_heldout" in faults(document)
    for domain, told in (("math", "count"), ("elementary", "You give short, correct answers."), ("*", None)):
        document["evaluation"]["domains"] = {"elementary_heldout": domain}
        experiment = parse_experiment(document)
        asked = experiment.asked_under(experiment.prompts_of("kl"))
        assert asked == {"elementary_heldout": told or "You give short, correct answers."}


def test_a_domains_system_prompt_makes_its_teacher_and_what_comes_of_it_stale(document: dict[str, Any]) -> None:
    document["evaluation"]["domains"] = {"elementary_heldout": "elementary"}
    edited = copy.deepcopy(document)
    edited["teachers"]["other"]["systems"] = {"math": "count"}
    old, new = versions(document), versions(edited)
    assert {name for name in old if old[name] != new[name]} == {"teacher_outputs/other"}
    edited["teachers"]["smollm2"]["systems"] = {"math": "count"}
    new = versions(edited)
    stale = {name for name in old if old[name] != new[name]}
    assert stale == {"teacher_outputs/other", "teacher_outputs/smollm2"} | {
        f"{stage}/{student}" for stage in ("student_checkpoint", "eval_report") for student in ("kl", "sft", "scratch")
    }


def test_a_student_of_several_teachers_is_told_what_the_first_that_answers_a_domain_is_told(document: dict[str, Any]) -> None:
    document["teachers"]["other"] |= {"system": "count"}
    student = document["students"]["sft"]
    student["data"] = ["other/verified", "smollm2/verified"]
    document["evaluation"]["domains"] = {"elementary_heldout": "elementary"}
    told = parse_experiment(document).prompts_of("sft")
    assert (told.of("math"), told.of("elementary")) == ("count", "You give short, correct answers.")
    student["data"] = ["smollm2/verified", "other/verified"]
    assert parse_experiment(document).prompts_of("sft").of("math") == "You give short, correct answers."
    student |= {"system": "none", "target": "both"}
    untold = parse_experiment(document)
    assert untold.prompts_of("sft").distinct() == (None,)
    assert experiment_nodes(untold)["eval_report/sft"].method == "sft+both+untold"


@pytest.mark.parametrize(
    ("student", "fault"),
    [
        ({"data": ["smollm2/verified", "other/verified"]},
         "students.kl.stages.0: logit_kd has one teacher read along, and the rows are of several models (smollm2, other). "
         "Use logit_kd with signal: topk or sampled"),
        ({"system": "none"}, "students.kl: system none is for sft: in stages.0 (logit_kd) the teacher reads the student's own"),
        ({"answer_weight": 0.3}, "students.kl: answer_weight is for target both; the target is trace"),
        ({"target": "answer", "stages": [{"method": "logit_kd", "signal": "topk"}]},
         "students.kl: target answer: the signals of stages.0 are stored for whole traces; use signal: online"),
        ({"target": "both", "stages": [{"method": "on_policy"}]},
         "students.kl: target both: stages.0 (on_policy) answers prompts itself; use trace or answer"),
    ],
)  # fmt: skip
def test_what_a_student_cannot_do_is_refused_with_what_it_can(
    document: dict[str, Any], student: dict[str, Any], fault: str
) -> None:
    document["students"]["kl"] |= student
    assert fault in faults(document)


def test_one_model_under_two_names_may_read_along_and_stored_signals_may_be_of_several(document: dict[str, Any]) -> None:
    document["students"]["kl"]["data"] = ["smollm2/verified", "other/verified"]
    document["evaluation"]["domains"] = {"elementary_heldout": "elementary"}
    document["teachers"]["other"] |= {"model": document["teachers"]["smollm2"]["model"], "system": "count"}
    parse_experiment(document)
    document["teachers"]["other"]["model"] = "other/model"
    document["students"]["kl"]["stages"] = [{"method": "logit_kd", "signal": "topk"}]
    nodes = experiment_nodes(parse_experiment(document))
    assert {"teacher_signals/smollm2/verified", "teacher_signals/other/verified"} < set(nodes["student_checkpoint/kl"].inputs)
    assert nodes["student_checkpoint/kl"].teacher == "smollm2+other"
