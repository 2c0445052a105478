"""Laws of a stage's settings: none is given in vain, and one that is not read decides nothing."""

import inspect
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from distill_pipeline import losses
from distill_pipeline.training.position import StageLoad, stage_load
from distill_pipeline.training.spec import DIVERGENCE_OPTION, Divergence, StudentSpec, TrainStageSpec

POLICY_GRADIENT = {"method": "on_policy", "objective": "policy_gradient", "divergence": "reverse_kl"}


def stage(**fields: Any) -> TrainStageSpec:
    return TrainStageSpec.model_validate(fields)


def test_divergences_and_their_numbers_are_those_of_the_loss_library() -> None:
    assert set(get_args(Divergence)) == {"forward_kl", *losses.TOKEN_DIVERGENCES}
    for name in get_args(Divergence):
        defaults = {
            key: parameter.default
            for key, parameter in inspect.signature(getattr(losses, name)).parameters.items()
            if key in set(DIVERGENCE_OPTION.values())
        }
        assert stage(method="logit_kd", divergence=name).divergence_options == defaults


@pytest.mark.parametrize("method", ["sft", "logit_kd"])
def test_settings_of_other_methods_are_not_in_a_stages_document(method: str) -> None:
    document = stage(method=method).document()
    assert document.keys().isdisjoint({"alpha", "beta", "mu", "lambda_", "objective", "rollouts", "keep_optimizer"})
    assert stage(**document) == stage(method=method)


def test_the_decay_of_wsd_is_in_its_document_only() -> None:
    assert stage(method="sft", schedule="wsd").document()["decay_frac"] == 0.1
    for schedule in ("cosine", "linear", "constant"):
        assert "decay_frac" not in stage(method="sft", schedule=schedule).document()


def test_what_a_stage_reads_is_in_its_document() -> None:
    document = stage(method="on_policy", divergence="jsd", keep_optimizer=True).document()
    assert {"beta", "lambda_", "objective", "rollouts", "keep_optimizer"} <= document.keys()
    assert document.keys().isdisjoint({"alpha", "mu"})
    assert stage(**document).document() == document


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "sft", "lambda_": 0.5, "rollouts": {}}, "lambda_, rollouts: not read by method sft"),
        ({"method": "logit_kd", "beta": 0.9}, "beta: not read by method logit_kd with divergence forward_kl"),
        ({"method": "on_policy", "ce_weight": 0.5}, r"ce_weight is 0\.5, but with lambda_ 1 no step sees the data's tokens"),
        (POLICY_GRADIENT | {"divergence": "jsd"}, "policy_gradient estimates reverse_kl and nothing else; divergence is jsd"),
        (POLICY_GRADIENT | {"lambda_": 0.5}, r"needs tokens that the student drew: set lambda_: 1 \(it is 0\.5\)"),
        (POLICY_GRADIENT | {"rollouts": {"top_k": 50}}, r"leave out rollouts\.top_k and rollouts\.top_p"),
        (POLICY_GRADIENT | {"rollouts": {"temperature": 0.7}}, r"set rollouts\.temperature to kd_temperature \(1\.0\)"),
        ({"method": "sft", "decay_frac": 0.2}, "decay_frac: not read by method sft .* and schedule cosine"),
        (
            {"method": "sft", "schedule": "wsd", "warmup_frac": 0.5, "decay_frac": 0.6},
            r"warmup_frac 0\.5 and decay_frac 0\.6 are more than the whole way",
        ),
        ({"method": "on_policy", "divergence": "uld"}, "it is for method logit_kd"),
        ({"method": "logit_kd", "divergence": "uld", "signal": "topk"}, "signal topk is for .* with divergence forward_kl"),
        ({"method": "on_policy", "rollouts": {"temperature": 0}}, "4 samples would be equal; set samples: 1"),
    ],
)
def test_a_setting_that_would_do_nothing_or_harm_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(**fields)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"method": "sft", "keep_optimizer": True}], "no stage comes before the first"),
        ([{"method": "on_policy", "rollouts": {"max_tokens": 64}}], r"rollouts\.max_tokens is 64, and .* max_length=64"),
    ],
)
def test_stages_that_do_not_fit_their_student_are_refused(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentSpec.model_validate({"data": ["t/f"], "init": {"scratch": {"layers": 1}}, "stages": stages, "max_length": 64})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"method": "sft", "epochs": 2}, StageLoad(400, 0, 4000)),
        ({"method": "sft", "epochs": 2, "batch_prompts": 8, "max_steps": 5}, StageLoad(80, 0, 800)),
        ({"method": "sft", "batch_prompts": 8, "max_tokens": 3000}, StageLoad(300, 0, 3000)),
        ({"method": "sft", "batch_prompts": 10, "max_tokens": 3000, "max_steps": 2}, StageLoad(40, 0, 400)),
        ({"method": "on_policy", "batch_prompts": 10, "max_steps": 3}, StageLoad(120, 120, 3000)),
        ({"method": "on_policy", "batch_prompts": 10, "max_steps": 4, "lambda_": 0.5}, StageLoad(120, 80, 2400)),
        ({"method": "on_policy", "max_tokens": 500}, StageLoad(20, 20, 500)),
    ],
)
def test_a_stages_load_counts_its_steps_its_budget_and_its_rollouts(fields: dict[str, Any], expected: StageLoad) -> None:
    rollouts = {"rollouts": {"max_tokens": 25}} if fields["method"] == "on_policy" else {}
    assert stage_load(stage(**fields | rollouts), 104 if fields.get("batch_prompts") == 8 else 100, 2, 10.0) == expected


# --- rollouts at a server ---------------------------------------------------------------------------------------------

SERVER = {"base_url": "http://127.0.0.1:8000/v1", "folder": "/dev/shm/student"}


def served(**rollouts: Any) -> StudentSpec:
    return StudentSpec.model_validate(
        {"data": ["big/all"], "init": {"model": "s"}, "stages": [{"method": "on_policy", "rollouts": rollouts}]}
    )


def test_rollouts_without_a_server_are_written_out_as_before_there_were_servers() -> None:
    document = served().document()["stages"][0]["rollouts"]
    assert document.keys() == {"samples", "temperature", "top_k", "top_p", "max_tokens", "batch_tokens"}
    assert served().resumable_document() == served().document()


def test_a_server_says_how_old_its_weights_may_be_and_a_run_goes_on_at_another_address() -> None:
    here, there = served(server=SERVER), served(server=SERVER | {"base_url": "http://gpu7:9000/v1", "api_key_env": "KEY"})
    assert here.stages[0].rollouts.refresh_every == 1
    assert StudentSpec.model_validate(here.document()) == here
    assert served(server=SERVER, refresh_every=None) == here
    assert here.resumable_document() == there.resumable_document()
    assert "gpu7" not in str(there.resumable_document())
    known = [one.resumable_document() for one in (here, served(server=SERVER, refresh_every=4), served())]
    assert all(known[i] != known[j] for i in range(3) for j in range(i))


@pytest.mark.parametrize(
    ("rollouts", "fault"),
    [
        ({"refresh_every": 2}, "refresh_every 2 is for server; the project's own engine shares the weights"),
        ({"server": SERVER, "refresh_every": 0}, "greater than or equal to 1"),
        ({"server": {"base_url": SERVER["base_url"]}}, r"server\.folder\s+Field required"),
        ({"server": SERVER | {"folder": "student"}}, r"should match pattern '\^/\.\+'"),
        ({"server": SERVER | {"base_url": "http://127.0.0.1:8000"}}, "should match pattern"),
        ({"server": SERVER | {"base_url": "http://me:secret@host/v1"}}, "should match pattern"),
        ({"server": SERVER | {"model": "m"}}, "Extra inputs are not permitted"),
    ],
)
def test_faults_of_a_rollout_server_are_reported(rollouts: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        served(**rollouts)


def test_policy_gradient_wants_the_student_as_it_is() -> None:
    rollouts = {"server": SERVER, "refresh_every": 2}
    with pytest.raises(ValidationError, match=r"set rollouts\.refresh_every to 1 \(it is 2\)"):
        stage(**POLICY_GRADIENT, rollouts=rollouts)
    assert stage(**POLICY_GRADIENT, rollouts={"server": SERVER}).objective == "policy_gradient"
