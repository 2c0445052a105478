"""What a student answers while it is trained: its own weights, its own draws, and tokens counted after they were drawn."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distill_pipeline.errors import ConfigError, TrainingError
from distill_pipeline.generation.engine import Request, TransformersEngine
from distill_pipeline.models.load import load_model
from distill_pipeline.models.output_head import output_head
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.training.examples import Example
from distill_pipeline.training.loop import ModelPair, accumulate_gradients
from distill_pipeline.training.rollouts import RolloutBatch, StudentSampler, answers_itself, length_limit
from distill_pipeline.training.spec import RolloutSpec, TrainStageSpec

ROLLOUTS = RolloutSpec(samples=4, max_tokens=12)


@pytest.fixture
def student(small_model: ModelFolder) -> Any:
    return load_model(small_model.path).train()


@pytest.fixture
def examples(renderer: ChatRenderer) -> list[Example]:
    """Prompts of several lengths; their completions are the data's, which no rollout may keep."""
    texts = ["what is the plural of mouse?", "hot", "what is the opposite of hot? and of cold?", "the capital of France"]
    prompts = [tuple(renderer.prompt_ids([{"role": "user", "content": text}])) for text in texts]
    return [Example(f"p{i}", prompt, ((5, 6, 7),)) for i, prompt in enumerate(prompts)]


@pytest.fixture
def roll_out(student: Any, renderer: ChatRenderer, examples: list[Example]) -> Callable[..., RolloutBatch]:
    def run(seed: int = 0, stage: int = 0, step: int = 0, limit: int = 256, rollouts: RolloutSpec = ROLLOUTS) -> RolloutBatch:
        sampler = StudentSampler(student, renderer, seed=seed, limit=limit)
        return sampler.roll_out(examples, rollouts, stage=stage, step=step)

    return run


def test_rollouts_keep_the_prompts_and_replace_the_completions(roll_out: Any, examples: list[Example]) -> None:
    rolled = roll_out()
    assert [example.prompt for example in rolled.examples] == [example.prompt for example in examples]
    assert all(len(example.completions) == 4 for example in rolled.examples)
    assert rolled.completions == 16
    assert rolled.num_tokens == sum(len(ids) for example in rolled.examples for ids in example.completions)


def test_rollouts_follow_from_seed_stage_and_step(roll_out: Any) -> None:
    first = roll_out(1, 2, 3)
    assert roll_out(1, 2, 3) == first
    assert all(roll_out(*other).examples != first.examples for other in [(0, 2, 3), (1, 0, 3), (1, 2, 4)])


def test_the_student_as_it_is_now_answers_and_is_left_as_it_was(
    student: Any, renderer: ChatRenderer, examples: list[Example]
) -> None:
    sampler = StudentSampler(student, renderer, seed=0, limit=256)
    before = sampler.roll_out(examples, ROLLOUTS, stage=0, step=0)
    assert student.training
    assert sampler.shares_prefixes
    with torch.no_grad():
        student.get_input_embeddings().weight.mul_(-1.0)
    assert sampler.roll_out(examples, ROLLOUTS, stage=0, step=0) != before
    student(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()  # its weights still learn
    engine = TransformersEngine(copy.deepcopy(student).eval(), renderer)
    greedy = RolloutSpec(samples=1, temperature=0.0, max_tokens=12)
    alone = {a.key: a for a in engine.generate([Request(e.prompt_id, e.prompt) for e in examples], max_tokens=12)}
    for example in sampler.roll_out(examples, greedy, stage=0, step=1).examples:
        answer = alone[example.prompt_id]
        ended = () if answer.end_token_id is None else (answer.end_token_id,)
        assert example.completions == ((*answer.token_ids, *ended),)


def test_a_rollout_ends_with_the_token_that_ended_it_and_a_truncated_one_with_none(
    roll_out: Any, student: Any, renderer: ChatRenderer
) -> None:
    student.generation_config.eos_token_id = [2, 7]  # a second end token, which is not the template's
    rolled = roll_out(rollouts=RolloutSpec(samples=60, max_tokens=12, temperature=3.0))
    completions = [ids for example in rolled.examples for ids in example.completions]
    ends = {2, 7} | renderer.stop_token_ids
    assert all(not ends.intersection(ids[:-1]) for ids in completions)
    open_ones = [ids for ids in completions if ids[-1] not in ends]
    assert {2, 7} <= {ids[-1] for ids in completions}
    assert rolled.truncated == len(open_ones) > 0
    assert all(len(ids) == 12 for ids in open_ones)
    assert rolled.row() == {
        "rollouts": 240, "rollout_mean_tokens": sum(map(len, completions)) / 240,
        "rollout_truncated_frac": len(open_ones) / 240,
    }  # fmt: skip


def test_a_rollout_stops_at_the_limit_of_prompt_and_completion(roll_out: Any, examples: list[Example]) -> None:
    limit = max(len(example.prompt) for example in examples) + 2
    for example in roll_out(limit=limit).examples:
        assert all(len(example.prompt) + len(ids) <= limit for ids in example.completions)


def stage_of(**fields: Any) -> TrainStageSpec:
    return TrainStageSpec.model_validate({"method": "on_policy", "rollouts": {"max_tokens": 12}} | fields)


def test_a_lambda_share_of_the_steps_is_answered_by_the_student() -> None:
    def share(stage: TrainStageSpec, index: int = 0) -> list[bool]:
        return [answers_itself(stage, seed=0, index=index, step=step) for step in range(4000)]

    half = share(stage_of(lambda_=0.3))
    assert abs(sum(half) / 4000 - 0.3) < 0.03
    assert half == share(stage_of(lambda_=0.3))
    assert half != share(stage_of(lambda_=0.3), index=1)
    assert all(share(stage_of()))
    assert not any(share(stage_of(lambda_=0.0)))
    assert not any(share(TrainStageSpec(method="logit_kd")))


POLICY_GRADIENT = {"objective": "policy_gradient", "divergence": "reverse_kl"}


@pytest.mark.parametrize("fields", [{"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 0.9}, POLICY_GRADIENT])
def test_loss_is_over_the_tokens_that_were_drawn_whatever_the_micro_batches(
    fields: dict[str, Any], roll_out: Any, student: Any, teacher: ModelFolder
) -> None:
    rolled = roll_out()
    frozen = load_model(teacher.path).requires_grad_(False)
    pair = ModelPair(student, output_head(student), student.config.vocab_size, frozen, output_head(frozen))
    found = []
    for layout, tokens in (("shared", 4096), ("shared", 64), ("packed", 4096), ("packed", 64), ("varlen", 4096), ("plain", 64)):
        student.zero_grad()
        stage = stage_of(micro_batch_tokens=tokens, **fields)
        result = accumulate_gradients(pair, rolled.examples, stage, layout=layout, pad_id=2, device="cpu")
        assert result.num_tokens == rolled.num_tokens
        found.append((result.loss, torch.cat([p.grad.flatten() for p in student.parameters()])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-4, rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-4, rtol=1e-4)


def test_what_is_trained_is_the_policy_that_drew(
    roll_out: Any, student: Any, teacher: ModelFolder, renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    original = TransformersEngine.run_batch
    monkeypatch.setattr(
        TransformersEngine, "run_batch", lambda *args, **options: drawn.extend(original(*args, **options)) or drawn[-16:]
    )
    rolled = roll_out()
    frozen = load_model(teacher.path).requires_grad_(False)
    pair = ModelPair(student, output_head(student), student.config.vocab_size, frozen, output_head(frozen))
    result = accumulate_gradients(pair, rolled.examples, stage_of(**POLICY_GRADIENT), layout="shared", pad_id=2, device="cpu")
    assert result.ce == pytest.approx(-sum(answer.logprob for answer in drawn) / rolled.num_tokens, rel=1e-4)


def test_logits_that_are_no_numbers_say_where(student: Any, renderer: ChatRenderer, examples: list[Example]) -> None:
    sampler = StudentSampler(student, renderer, seed=0, limit=256)
    with torch.no_grad():
        student.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the student answers no prompt in step 4 of stage 2: not_a_number"):
        sampler.roll_out(examples, ROLLOUTS, stage=1, step=3)


def test_rollouts_longer_than_a_context_are_refused(student: Any) -> None:
    options = {"max_length": 2048, "longest_prompt": 40}
    assert length_limit([stage_of()], [student], **options) == 256
    with pytest.raises(ConfigError, match=r"stages\.1\.rollouts\.max_tokens is 256, and the models' context holds 256 tokens"):
        length_limit([stage_of(), stage_of(rollouts={"max_tokens": 256})], [student], **options)
    with pytest.raises(ConfigError, match="the longest prompt has 256 tokens and the models' context holds 256"):
        length_limit([stage_of()], [student], max_length=2048, longest_prompt=256)
