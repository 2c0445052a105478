"""Laws of the graph: what an edit of the experiment makes stale, and what it leaves alone."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_pipeline.experiment import parse_experiment
from distill_pipeline.nodes import experiment_nodes

QUICKSTART = Path(__file__).parents[2] / "experiments/quickstart.yaml"


def versions(document: dict[str, Any]) -> dict[str, str]:
    return {name: node.code_version for name, node in experiment_nodes(parse_experiment(document)).items()}


def changed(edit: list[Any], value: Any) -> set[str]:
    """The nodes whose code version moves when one value of the quickstart is edited."""
    before, after = (yaml.safe_load(QUICKSTART.read_text()) for _ in range(2))
    part = after
    for step in edit[:-1]:
        part = part[step]
    part[edit[-1]] = value
    old, new = versions(before), versions(after)
    return {name for name in old | new if old.get(name) != new.get(name)}


def test_the_quickstart_has_these_nodes_with_these_inputs() -> None:
    nodes = experiment_nodes(parse_experiment(yaml.safe_load(QUICKSTART.read_text())))
    assert {name: node.inputs for name, node in nodes.items()} == {
        "prompt_pool": (),
        "teacher_outputs/smollm2": ("prompt_pool",),
        "scored_outputs/smollm2": ("prompt_pool", "teacher_outputs/smollm2"),
        "filtered_set/smollm2/unfiltered": ("prompt_pool", "teacher_outputs/smollm2", "scored_outputs/smollm2"),
        "filtered_set/smollm2/verified": ("prompt_pool", "teacher_outputs/smollm2", "scored_outputs/smollm2"),
        "student_checkpoint/kl": ("filtered_set/smollm2/verified",),
        "eval_report/kl": ("prompt_pool", "student_checkpoint/kl"),
        "student_checkpoint/sft": ("filtered_set/smollm2/verified",),
        "eval_report/sft": ("prompt_pool", "student_checkpoint/sft"),
        "student_checkpoint/scratch": ("filtered_set/smollm2/verified",),
        "eval_report/scratch": ("prompt_pool", "student_checkpoint/scratch"),
        "comparison": ("eval_report/kl", "eval_report/sft", "eval_report/scratch"),
    }


def test_the_filter_ablation_uses_again_what_the_quickstart_made() -> None:
    ablation = yaml.safe_load(QUICKSTART.with_name("filter_ablation.yaml").read_text())
    ours, theirs = versions(ablation), versions(yaml.safe_load(QUICKSTART.read_text()))
    shared = {"prompt_pool", "teacher_outputs/smollm2", "scored_outputs/smollm2"}
    shared |= {f"filtered_set/smollm2/{name}" for name in ("unfiltered", "verified")}
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    budgets = {stage["max_tokens"] for student in ablation["students"].values() for stage in student["stages"]}
    assert len(budgets) == 1
    assert set(ablation["students"]) == set(ablation["filters"])


def test_the_methods_use_again_what_the_quickstart_made_at_one_budget() -> None:
    ours = yaml.safe_load(QUICKSTART.with_name("methods.yaml").read_text())
    found, theirs = versions(ours), versions(yaml.safe_load(QUICKSTART.read_text()))
    shared = {"teacher_outputs/smollm2", "scored_outputs/smollm2"}
    assert {name: found[name] for name in shared} == {name: theirs[name] for name in shared}
    methods = {"scratch", "sft", "forward_kl", "reverse_kl", "jsd", "topk", "sampled", "staged", "on_policy"}
    assert set(ours["students"]) == methods
    budgets = {sum(stage["max_tokens"] for stage in student["stages"]) for student in ours["students"].values()}
    assert len(budgets) == 1


def test_the_offline_students_use_again_what_the_quickstart_made() -> None:
    offline, quickstart = (
        versions(yaml.safe_load(QUICKSTART.with_name(f"{name}.yaml").read_text())) for name in ("offline", "quickstart")
    )
    shared = set(offline) & set(quickstart) - {"comparison"}
    assert {"student_checkpoint/kl", "filtered_set/smollm2/verified", "teacher_outputs/smollm2"} <= shared
    assert {name: offline[name] for name in shared} == {name: quickstart[name] for name in shared}


def test_signals_are_made_once_for_a_set_and_only_where_a_student_asks() -> None:
    document = yaml.safe_load(QUICKSTART.with_name("offline.yaml").read_text())
    nodes = experiment_nodes(parse_experiment(document))
    name = "teacher_signals/smollm2/verified"
    assert [node for node in nodes if node.startswith("teacher_signals/")] == [name]
    assert nodes[name].inputs == ("filtered_set/smollm2/verified",)
    assert nodes[name].command == "distill signals EXPERIMENT smollm2/verified"
    assert nodes["student_checkpoint/kl"].inputs == ("filtered_set/smollm2/verified",)
    assert nodes["student_checkpoint/topk"].inputs == ("filtered_set/smollm2/verified", name)
    assert list(nodes).index(name) < list(nodes).index("student_checkpoint/topk")
    before = versions(document)
    document["signals"]["k"] = 8
    assert {name for name, version in versions(document).items() if before[name] != version} == {name}
    for student in ("topk", "sampled"):
        del document["students"][student]
    assert not [node for node in versions(document) if node.startswith("teacher_signals/")]


def test_settings_of_signals_that_nobody_reads_change_nothing() -> None:
    assert changed(["signals"], {"k": 8, "temperatures": [2.0]}) == set()


def test_a_preset_and_the_same_rules_written_out_are_one_filter() -> None:
    document = yaml.safe_load(QUICKSTART.read_text())
    document["filters"]["verified"] = {"preset": "short_answer"}
    found = experiment_nodes(parse_experiment(document))["filtered_set/smollm2/verified"]
    assert found.spec["filter"]["*"]["repetition"] == {"reasoning": "gopher", "answer": "loops"}
    document["filters"]["verified"] = found.spec["filter"]["*"]
    assert versions(document)["filtered_set/smollm2/verified"] == found.code_version


def test_every_node_comes_after_its_inputs() -> None:
    seen: set[str] = set()
    for name, node in experiment_nodes(parse_experiment(yaml.safe_load(QUICKSTART.read_text()))).items():
        assert set(node.inputs) <= seen
        seen.add(name)


CORRECTED = "corrected_teacher/smollm2"
MADE_BY_ITS_WEIGHTS = {
    CORRECTED, "teacher_outputs/smollm2",
    *(f"{stage}/{student}" for stage in ("student_checkpoint", "eval_report") for student in ("kl", "sft", "scratch")),
}  # fmt: skip


def corrected(document: dict[str, Any], **fields: Any) -> dict[str, Any]:
    teacher = document["teachers"]["smollm2"] | {"correction": fields}
    return document | {"teachers": document["teachers"] | {"smollm2": teacher}}


def test_corrected_weights_stand_between_the_pool_and_whatever_needs_them() -> None:
    document = corrected(yaml.safe_load(QUICKSTART.with_name("offline.yaml").read_text()))
    nodes = experiment_nodes(parse_experiment(document))
    assert nodes[CORRECTED].inputs == ("prompt_pool",)
    assert nodes[CORRECTED].command == "distill correct EXPERIMENT smollm2"
    assert {name for name, node in nodes.items() if CORRECTED in node.inputs} == {
        "teacher_outputs/smollm2", "teacher_signals/smollm2/verified",
        *(f"{stage}/{name}" for stage in ("student_checkpoint", "eval_report") for name in document["students"]),
    }  # fmt: skip
    assert nodes["student_checkpoint/kl"].inputs == ("filtered_set/smollm2/verified", CORRECTED)


def test_whoever_scores_with_a_corrected_teacher_depends_on_it() -> None:
    document = corrected(yaml.safe_load(QUICKSTART.read_text()))
    plain = {"model": "elsewhere", "license": "mit"}
    waits = plain | {"sampling": {"n": 2}, "budget": {"accept_target": {"accepted": 1, "at_most": 4}}}
    document["teachers"] = {"plain": plain, "waits": waits} | document["teachers"]
    document["scorers"] = {"*": [{"kind": "judge", "options": {"model": "smollm2"}}]}
    nodes = experiment_nodes(parse_experiment(document))
    assert nodes["teacher_outputs/plain"].inputs == ("prompt_pool",)
    assert nodes["teacher_outputs/waits"].inputs == ("prompt_pool", CORRECTED)
    for teacher in document["teachers"]:
        assert nodes[f"scored_outputs/{teacher}"].inputs == ("prompt_pool", f"teacher_outputs/{teacher}", CORRECTED)
    assert list(nodes).index(CORRECTED) < list(nodes).index("teacher_outputs/plain")


def test_without_a_correction_nothing_moves() -> None:
    document = yaml.safe_load(QUICKSTART.read_text())
    document["teachers"]["smollm2"]["correction"] = None
    nodes = experiment_nodes(parse_experiment(document))
    assert {name: node.code_version for name, node in nodes.items()} == versions(yaml.safe_load(QUICKSTART.read_text()))
    assert "correction" not in str([node.spec for node in nodes.values()])


def test_versions_are_those_of_before_there_were_corrections() -> None:
    """A fixed experiment; raise its numbers together with a stage's ALGORITHM only."""
    document: dict[str, Any] = {
        "name": "fixed", "seed": 3, "prompt_pool": {"sources": [{"path": "p.jsonl", "license": "cc0-1.0"}]},
        "teachers": {"t": {"model": "m", "license": "mit"}}, "filters": {"f": {}},
        "students": {
            "s": {"data": ["t/f"], "init": {"scratch": {"layers": 1}},
                  "stages": [{"method": "sft"}, {"method": "logit_kd", "schedule": "wsd", "signal": "topk"}]},
        },
        "evaluation": {"tasks": ["x"]},
    }  # fmt: skip
    assert {name: version for name, version in versions(document).items() if name.startswith(("teacher", "student"))} == {
        "teacher_outputs/t": "b10c75a7b393d024", "teacher_signals/t/f": "a5ead2fa78f01efa",
        "student_checkpoint/s": "4cd0f7bca7863a80",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "moved"),
    [({"lr": 1e-4}, MADE_BY_ITS_WEIGHTS), ({"alternatives": False}, MADE_BY_ITS_WEIGHTS),
     ({"micro_batch_tokens": 64, "gradient_checkpointing": True}, set())],
)  # fmt: skip
def test_an_edit_of_a_correction_makes_everything_of_its_teacher_stale(fields: dict[str, Any], moved: set[str]) -> None:
    document = yaml.safe_load(QUICKSTART.read_text())
    before, after = versions(corrected(document, epochs=2)), versions(corrected(document, epochs=2, **fields))
    assert {name for name in before if before[name] != after[name]} == moved


@pytest.mark.parametrize(
    ("edit", "value", "expected"),
    [
        (["filters", "verified", "min_score"], 0.5, {"filtered_set/smollm2/verified"}),
        (["students", "kl", "stages", 0, "lr"], 1e-4, {"student_checkpoint/kl"}),
        (["teachers", "smollm2", "sampling", "temperature"], 0.9, {"teacher_outputs/smollm2"}),
        (["scorers", "elementary"], [{"kind": "exact"}], {"scored_outputs/smollm2"}),
        (["evaluation", "limit"], 8, {"eval_report/kl", "eval_report/sft", "eval_report/scratch"}),
        (["evaluation", "batch_size"], 8, set()),
        (["students", "kl", "stages", 0, "micro_batch_tokens"], 512, set()),
        (["students", "kl", "stages", 0, "divergence"], "reverse_kl", {"student_checkpoint/kl"}),
        (["teachers", "smollm2", "batch_tokens"], 4096, set()),
        (["name"], "renamed", set()),
    ],
)
def test_an_edit_moves_only_the_nodes_it_can_change(edit: list[Any], value: Any, expected: set[str]) -> None:
    assert changed(edit, value) == expected


def test_who_works_changes_no_version() -> None:
    document = yaml.safe_load(QUICKSTART.read_text())
    for compute in ({"workers": 4}, {"engine": "ray", "address": "auto"}):
        assert versions(document | {"compute": compute}) == versions(document)


def test_the_address_of_a_rollout_server_moves_no_version_and_that_there_is_one_moves_the_students() -> None:
    def version(**rollouts: Any) -> str:
        document = yaml.safe_load(QUICKSTART.with_name("methods.yaml").read_text())
        document["students"]["on_policy"]["stages"][0]["rollouts"] |= rollouts
        return versions(document)["student_checkpoint/on_policy"]

    servers = [{"base_url": f"http://{host}:8000/v1", "folder": "/dev/shm/student"} for host in ("a", "b")]
    here, there = (version(server=server) for server in servers)
    assert here == there == version(server=servers[0] | {"api_key_env": "KEY", "seeds": False})
    assert len({here, version(), version(server=servers[0], refresh_every=4)}) == 3


def test_other_evaluation_tasks_move_the_pool_because_it_is_cleaned_against_them() -> None:
    moved = changed(["evaluation", "tasks"], ["elementary_heldout", "arc_easy"])
    assert {"prompt_pool", "filtered_set/smollm2/verified", "eval_report/kl"} <= moved
    assert "filtered_set/smollm2/unfiltered" not in moved
    assert "teacher_outputs/smollm2" not in moved


def test_a_command_names_the_node_it_makes() -> None:
    nodes = experiment_nodes(parse_experiment(yaml.safe_load(QUICKSTART.read_text())))
    assert nodes["filtered_set/smollm2/verified"].command == "distill filter EXPERIMENT smollm2/verified"
    assert nodes["prompt_pool"].command == "distill prompts EXPERIMENT"
