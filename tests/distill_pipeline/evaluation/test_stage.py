"""Laws of a model's measurement."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from distill_pipeline.errors import ConfigError
from distill_pipeline.evaluation.stage import evaluate_by_system, held_out_divergence
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.training import held_out

Evaluate = Callable[..., dict[str, Any]]


def test_measurement_is_json_with_every_document_once(evaluate: Evaluate) -> None:
    found = evaluate("written")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [(sample["task"], sample["doc_id"]) for sample in found["samples"]] == [("written", index) for index in range(3)]
    assert found["samples"][1]["target"] == "mice"
    assert found["tasks"]["written"]["exact_match"]["n"] == 3
    assert found["tasks"]["written"]["exact_match"]["higher_is_better"]
    assert (found["requested"], found["primary"]) == (["written"], {"written": "exact_match"})
    assert {sample["finish_reason"] for sample in found["samples"]} <= {"stop", "until", "length"}


def test_value_is_the_mean_of_the_documents_and_stderr_its_standard_error(evaluate: Evaluate) -> None:
    found = evaluate("choice")
    for metric in ("acc", "acc_norm"):
        scores = torch.tensor([sample["metrics"][metric] for sample in found["samples"]], dtype=torch.float64)
        assert found["tasks"]["choice"][metric]["value"] == pytest.approx(float(scores.mean()))
        assert found["tasks"]["choice"][metric]["stderr"] == pytest.approx(float(scores.std() / len(scores) ** 0.5))


def test_tasks_under_several_system_prompts_are_measured_as_each_alone_and_their_messages_say_which(
    evaluate: Evaluate, student: Any, tokenizer: Any, task_folder: str
) -> None:
    systems = {"choice": "be brief", "written": None, "filtered": "be brief"}
    options: dict[str, Any] = {"include_path": task_folder, "limit": None, "batch_size": 4, "device": "cpu"}
    found = evaluate_by_system(student, tokenizer, systems=systems, progress=lambda line: None, **options)
    for task, system in systems.items():
        alone = evaluate(task, system=system)
        assert (found["tasks"][task], found["primary"][task]) == (alone["tasks"][task], alone["primary"][task])
        for sample, own in zip((s for s in found["samples"] if s["task"] == task), alone["samples"], strict=True):
            first = [{"role": "system", "content": system}] if system else []
            assert sample["messages"] == first + own["messages"]
            assert sample | {"messages": None} == own | {"messages": None}
    assert sorted(found["requested"]) == sorted(systems)
    one = evaluate_by_system(student, tokenizer, systems={"written": "x"}, progress=lambda line: None, **options)
    assert one == evaluate("written", system="x")


def test_answer_of_a_choice_task_is_the_likeliest_choice(evaluate: Evaluate) -> None:
    for sample, right in zip(evaluate("choice")["samples"], ("Paris", "mice", "seven"), strict=True):
        assert sample["target"] == right
        assert sample["finish_reason"] is None
        assert (sample["answer"] == right) == (sample["metrics"]["acc"] == 1.0)


def test_metrics_of_several_filters_are_told_apart(evaluate: Evaluate) -> None:
    found = evaluate("filtered")
    assert set(found["tasks"]["filtered"]) == {"exact_match,strict-match", "exact_match,flexible"}
    assert set(found["samples"][0]["metrics"]) == set(found["tasks"]["filtered"])
    assert len(found["samples"]) == 3


def test_group_without_an_aggregate_is_its_tasks(evaluate: Evaluate) -> None:
    found = evaluate("everything")
    assert found["requested"] == ["written", "choice"]
    assert found["subtasks"] == {"everything": ["written", "choice"]}
    assert len(found["samples"]) == 6


def test_metric_made_of_pairs_has_a_value_and_no_document_scores(evaluate: Evaluate) -> None:
    found = evaluate("rolling")
    assert found["tasks"]["rolling"]["bits_per_byte"]["stderr"] is None
    assert not found["tasks"]["rolling"]["bits_per_byte"]["higher_is_better"]
    assert found["samples"][0]["metrics"] == {}
    assert found["samples"][0]["messages"] is None


def test_limit_takes_the_first_documents(evaluate: Evaluate) -> None:
    found = evaluate("written", limit=2)
    assert [sample["doc_id"] for sample in found["samples"]] == [0, 1]
    assert found["limit"] == 2


def test_two_measurements_are_equal_and_leave_the_random_state_alone(evaluate: Evaluate) -> None:
    before = (random.getstate(), torch.get_rng_state())
    assert evaluate("written", "choice") == evaluate("written", "choice")
    assert before[0] == random.getstate()
    assert torch.equal(before[1], torch.get_rng_state())


def test_task_that_runs_model_written_code_is_refused(evaluate: Evaluate) -> None:
    with pytest.raises(ConfigError, match="unsafe would run code that the model wrote"):
        evaluate("unsafe")


# --- divergence -------------------------------------------------------------------------------------------------------


def test_divergence_of_a_model_from_itself_is_zero(evaluate: Evaluate, teacher: Any, tokenizer: Any) -> None:
    samples = evaluate("written", model=teacher)["samples"]
    found = held_out_divergence(teacher, teacher, ChatRenderer(tokenizer), samples, "cpu")
    assert found["forward_kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["top1_agreement"] == 1.0
    assert (found["answers"], found["reason"]) == (3, None)


def test_divergence_is_forward_kl_over_every_token_of_the_teachers_answers(
    evaluate: Evaluate, student: Any, teacher: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = ChatRenderer(tokenizer)
    samples = evaluate("written", model=teacher)["samples"]
    samples[1] |= {"answer": "mice and seven", "finish_reason": "stop"}
    samples.append(dict(samples[1]))  # the same answer to the same question counts twice
    kls: list[torch.Tensor] = []
    agreed: list[torch.Tensor] = []
    for sample in samples:
        prompt = renderer.prompt_ids(sample["messages"])
        answer = renderer.completion_ids(sample["answer"], finished=sample["finish_reason"] == "stop")
        with torch.no_grad():
            both = [model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] for model in (student, teacher)]
        log_q, log_p = (logits[:, : renderer.vocab_size].log_softmax(-1) for logits in both)
        kls.append(functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1))
        agreed.append(log_q.argmax(-1) == log_p.argmax(-1))
    found = held_out_divergence(student, teacher, renderer, samples, "cpu")
    assert found["forward_kl"] == pytest.approx(float(torch.cat(kls).mean()), rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(float(torch.cat(agreed).float().mean()))
    assert found["tokens"] == len(torch.cat(kls))
    monkeypatch.setattr(held_out, "LOGIT_CELLS", 1)
    in_small_batches = held_out_divergence(student, teacher, renderer, samples, "cpu")
    assert in_small_batches["forward_kl"] == pytest.approx(found["forward_kl"], rel=1e-5)


def test_divergence_is_unknown_with_a_reason_where_nothing_was_written(
    evaluate: Evaluate, student: Any, teacher: Any, tokenizer: Any
) -> None:
    samples = evaluate("choice")["samples"]
    found = held_out_divergence(student, teacher, ChatRenderer(tokenizer), samples, "cpu")
    assert found["forward_kl"] is None
    assert "writes an answer" in found["reason"]


def test_divergence_is_unknown_between_vocabularies(student: Any, teacher: Any, tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<extra>"])
    found = held_out_divergence(student, teacher, ChatRenderer(tokenizer), [], "cpu", teacher_renderer=ChatRenderer(other))
    assert found["forward_kl"] is None
    assert "1 tokens have another id or exist in one only, for instance '<extra>'" in found["reason"]
    found = held_out_divergence(student, teacher, ChatRenderer(other), [], "cpu")
    assert "the student has 300 logits a token, the tokenizer 301 ids" in found["reason"]
