"""What a plan's measured steps may touch."""

from distill_pipeline.planning import STEP_PROMPTS, _one_step
from distill_pipeline.training.spec import TrainStageSpec


def test_a_measured_step_of_a_student_whose_rollouts_are_served_asks_no_server() -> None:
    server = {"base_url": "http://127.0.0.1:8000/v1", "folder": "/dev/shm/student"}
    rollouts = {"samples": 2, "server": server, "refresh_every": 3}
    stage = TrainStageSpec.model_validate({"method": "on_policy", "lambda_": 0.5, "rollouts": rollouts})
    step = _one_step(stage)
    assert (step.rollouts.server, step.rollouts.refresh_every, step.rollouts.samples) == (None, None, 2)
    assert (step.lambda_, step.max_steps, step.batch_prompts) == (1.0, 1, STEP_PROMPTS)
    data = _one_step(TrainStageSpec(method="sft"))
    assert (data.rollouts, data.max_steps, data.batch_prompts) == (TrainStageSpec(method="sft").rollouts, 1, STEP_PROMPTS)
