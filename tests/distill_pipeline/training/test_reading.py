"""Laws of what a student reads and writes: the system prompt of its rows, and the trace, the answer or both as two tasks."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.models.load import load_tokenizer
from distill_pipeline.models.output_head import output_head
from distill_pipeline.reasoning import split_reasoning
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.system_prompts import SystemPrompts
from distill_pipeline.training.examples import Example, ExampleSet, encode_examples
from distill_pipeline.training.loop import ModelPair, accumulate_gradients
from distill_pipeline.training.reading import (
    REASONING_REQUEST,
    REASONING_TASK,
    rows_for_target,
    rows_under_prompts,
    weigh_tasks,
)
from distill_pipeline.training.spec import TrainStageSpec

TRACES = ["<think>\n2 and 2\n</think>\n\n4", "5", "<think>it goes on"]


@pytest.fixture
def batch(make_rows: Any, make_batch: Any) -> Any:
    rows = make_rows(2, completions=3)
    for row in rows:
        for completion, text, reason in zip(row["completions"], TRACES, ("stop", "stop", "length"), strict=True):
            completion |= {"raw_text": text, "finish_reason": reason}
    return make_batch(rows)


def read(batch: Any, target: Any, **options: Any) -> list[dict[str, Any]]:
    return [row for made in rows_for_target([batch], target, **options) for row in made.to_pylist()]


def texts(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(completion["raw_text"], completion["finish_reason"]) for completion in row["completions"]]


def test_the_whole_trace_is_what_the_teacher_wrote(batch: Any) -> None:
    assert read(batch, "trace") == batch.to_pylist()


def test_the_answer_alone_is_what_stands_behind_the_reasoning_and_ends_as_it_ended(batch: Any) -> None:
    rows = read(batch, "answer")
    assert [texts(row) for row in rows] == [[("4", "stop"), ("5", "stop"), ("", "length")]] * 2
    assert [row["messages"] for row in rows] == [row["messages"] for row in batch.to_pylist()]


def test_a_template_that_opened_a_thought_has_it_closed_before_the_answer(batch: Any) -> None:
    answers = texts(read(batch, "answer", opened="<think>")[0])
    assert answers[0] == ("</think>\n\n4", "stop")
    assert split_reasoning(answers[0][0], opened="<think>") == ("", "4")
    assert answers[2] == ("", "length")


def test_both_are_two_tasks_the_prompt_as_it_is_for_the_answer_and_a_request_behind_it_for_the_reasoning(batch: Any) -> None:
    answer, reasoning, *_ = read(batch, "both")
    assert texts(answer) == [("4", "stop"), ("5", "stop"), ("", "length")]
    assert texts(reasoning) == [("2 and 2", "stop"), ("it goes on", "length")]
    assert reasoning["prompt_id"] == answer["prompt_id"] + REASONING_TASK
    assert reasoning["messages"][-1]["content"] == f"{answer['messages'][-1]['content']}\n\n{REASONING_REQUEST}"
    assert [completion["completion_id"] for completion in reasoning["completions"]] == [
        completion["completion_id"] for completion in (answer["completions"][0], answer["completions"][2])
    ]


@pytest.mark.parametrize("target", ["trace", "answer", "both"])
def test_every_target_counts_each_token_and_the_end_token_once_and_loses_no_completion(
    batch: Any, renderer: ChatRenderer, target: Any
) -> None:
    rows = read(batch, target)
    examples, counts = encode_examples(rows_for_target([batch], target), renderer, max_length=500)
    assert counts["completions"] == counts["trained_completions"] + counts["too_long"] + counts["no_tokens"]
    assert counts["completions"] == sum(len(row["completions"]) for row in rows)
    wanted = [renderer.completion_ids(text, finished=reason == "stop") for row in rows for text, reason in texts(row)]
    assert counts["data_tokens"] == sum(map(len, wanted))
    found = [list(ids) for index in range(len(examples)) for ids in examples[index].completions]
    assert found == [ids for ids in wanted if ids]
    assert all(ids.count(renderer.end_token_id) <= 1 for ids in found)


@given(
    lengths=st.lists(st.tuples(st.booleans(), st.integers(1, 5)), min_size=1, max_size=6),
    answer_weight=st.sampled_from([0.1, 0.5, 0.8]),
)
@settings(deadline=None)
def test_each_tasks_share_of_the_loss_is_its_weight_and_a_token_weighs_one_on_average(
    lengths: list[tuple[bool, int]], answer_weight: float
) -> None:
    examples = ExampleSet()
    for number, (is_reasoning, length) in enumerate(lengths):
        examples.append(Example(f"p{number}" + REASONING_TASK * is_reasoning, (3,), (tuple(range(4, 4 + length)),)))
    tokens = weigh_tasks(examples, answer_weight)
    whole = sum(length for _, length in lengths)
    weights = [examples[index].weight * length for index, (_, length) in enumerate(lengths)]
    assert sum(tokens.values()) == whole == pytest.approx(sum(weights))
    if all(tokens.values()):
        of_answers = sum(weight for weight, (is_reasoning, _) in zip(weights, lengths, strict=True) if not is_reasoning)
        assert of_answers / whole == pytest.approx(answer_weight)


def test_the_loss_of_both_tasks_is_the_weighted_mean_of_each_tasks_own(random_model: Any) -> None:
    student = random_model(layers=2, seed=0)
    pair = ModelPair(student, output_head(student), 40)
    examples = ExampleSet()
    examples.append(Example("p", (3, 4), ((5, 6, 2), (7, 2))))
    examples.append(Example("p" + REASONING_TASK, (3, 4, 9), ((8, 8, 6, 5, 2),)))
    stage = TrainStageSpec(method="sft")

    def loss(*some: Example) -> float:
        return accumulate_gradients(pair, some, stage, layout="shared", pad_id=2, device="cpu").loss

    answers, reasonings = loss(examples[0]), loss(examples[1])
    before = examples.fingerprint()
    weigh_tasks(examples, 0.25)
    assert loss(examples[0], examples[1]) == pytest.approx(0.25 * answers + 0.75 * reasonings, rel=1e-5)
    assert examples.fingerprint() != before


def test_rows_are_read_under_the_system_prompt_of_their_teacher_and_domain(
    make_rows: Any, make_batch: Any, tiny_teacher_dir: Any
) -> None:
    rows = make_rows(2, completions=1)
    rows[1]["domain"] = "math"
    own = [rows[0] | {"messages": [{"role": "system", "content": "its own"}, *rows[0]["messages"]]}]
    told, none = SystemPrompts("be brief", {"math": "count"}), SystemPrompts()
    system, batches = rows_under_prompts([([make_batch(rows)], told), ([make_batch(own)], told), ([make_batch(rows)], none)])
    assert system is None
    tokenizer = load_tokenizer(tiny_teacher_dir)
    found = [ChatRenderer(tokenizer, system=system).prompt_ids(row["messages"]) for b in batches for row in b.to_pylist()]
    wanted = [("be brief", rows[0]), ("count", rows[1]), ("its own", rows[0]), (None, rows[0]), (None, rows[1])]
    assert found == [ChatRenderer(tokenizer, system=text).prompt_ids(row["messages"]) for text, row in wanted]


def test_rows_that_share_a_system_prompt_are_left_as_they_are(make_rows: Any, make_batch: Any) -> None:
    batch = make_batch(make_rows(2))
    shared = SystemPrompts("be brief", {"math": "be brief"})
    system, batches = rows_under_prompts([([batch], shared), ([batch], SystemPrompts("be brief"))])
    assert system == "be brief"
    assert [made is batch for made in batches] == [True, True]
