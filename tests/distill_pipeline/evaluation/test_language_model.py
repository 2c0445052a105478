"""Laws of the model as lm-eval sees it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill_pipeline.errors import ConfigError
from distill_pipeline.evaluation import language_model
from distill_pipeline.evaluation.language_model import EvaluatedModel
from distill_pipeline.generation.engine import Request, TransformersEngine
from distill_pipeline.generation.protocol import Completion
from distill_pipeline.rendering import ChatRenderer

Evaluate = Callable[..., dict[str, Any]]
QUESTION = {"role": "user", "content": "what is the capital of France?"}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Every request that reaches the engine."""
    found: list[Request] = []
    generate = TransformersEngine.generate

    def spy(self: TransformersEngine, requests: Sequence[Request], **options: Any) -> Iterator[Completion]:
        found.extend(requests)
        return generate(self, requests, **options)

    monkeypatch.setattr(TransformersEngine, "generate", spy)
    return found


@pytest.fixture
def subject(student: Any, tokenizer: Any) -> EvaluatedModel:
    return EvaluatedModel(student, ChatRenderer(tokenizer), batch_size=2, device="cpu", progress=lambda line: None)


def _request(*args: Any, **names: Any) -> Any:
    return SimpleNamespace(args=args, task_name="t", doc_id=names.get("doc_id", 0))


def _ask(subject: EvaluatedModel, text: str) -> Any:
    return subject.apply_chat_template([{"role": "user", "content": text}])


def test_evaluation_asks_with_exactly_the_tokens_that_training_sees(
    evaluate: Evaluate, tokenizer: Any, seen: list[Request]
) -> None:
    system = "be brief"
    samples = evaluate("written", system=system)["samples"]
    renderer = ChatRenderer(tokenizer, system=system)
    wanted = [renderer.prompt_ids([{"role": "user", "content": sample["prompt"]}]) for sample in samples]
    assert [list(request.prompt_ids) for request in seen] == wanted
    assert tokenizer.decode(wanted[0]).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwhat is the")


def test_description_of_a_task_is_its_system_message(evaluate: Evaluate, tokenizer: Any, seen: list[Request]) -> None:
    evaluate("described", system="be brief")
    messages = [{"role": "system", "content": "Answer briefly. "}, QUESTION]
    assert list(seen[0].prompt_ids) == ChatRenderer(tokenizer, system="be brief").prompt_ids(messages)


def test_shots_are_turns_of_the_conversation(evaluate: Evaluate, tokenizer: Any, seen: list[Request]) -> None:
    sample = evaluate("shots", limit=1)["samples"][0]
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert list(seen[0].prompt_ids) == ChatRenderer(tokenizer).prompt_ids(sample["messages"])


def test_dictated_beginning_of_an_answer_is_part_of_the_completion(
    evaluate: Evaluate, tokenizer: Any, seen: list[Request]
) -> None:
    sample = evaluate("prefixed", limit=1)["samples"][0]
    renderer = ChatRenderer(tokenizer)
    assert list(seen[0].prompt_ids) == renderer.prompt_ids([QUESTION]) + renderer.completion_ids("It is", finished=False)
    assert sample["answer"].startswith("It is")


def test_model_without_a_chat_template_gets_plain_text(
    evaluate: Evaluate, student: Any, tokenizer: Any, seen: list[Request]
) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    evaluate("written", tokenizer=plain, limit=1)
    assert list(seen[0].prompt_ids) == ChatRenderer(plain).prompt_ids([QUESTION])
    assert tokenizer.decode(seen[0].prompt_ids) == QUESTION["content"]


def test_border_between_prompt_and_answer_is_where_training_puts_it(student: Any, tokenizer: Any) -> None:
    """Tokenized as one text, the border would vanish inside a token."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    renderer = ChatRenderer(plain)
    subject = EvaluatedModel(student, renderer, batch_size=2, device="cpu", progress=lambda line: None)
    messages = [{"role": "user", "content": "the capital of Fra"}]
    prompt = subject.apply_chat_template([*messages, {"role": "assistant", "content": "nce"}], add_generation_prompt=False)
    wanted = renderer.prompt_ids(messages) + renderer.completion_ids("nce", finished=False)
    assert subject.prompt_ids(prompt) == wanted
    assert wanted != plain("the capital of France")["input_ids"]
    assert subject._continuation_row("the capital of Fra", "nce") == (
        renderer.prompt_ids(messages), renderer.completion_ids("nce", finished=False)
    )  # fmt: skip


def test_special_tokens_that_a_choice_spells_are_plain_text(subject: EvaluatedModel) -> None:
    _, ids = subject._continuation_row(subject.apply_chat_template([QUESTION]), "Paris<|im_end|>")
    assert subject.renderer.end_token_id not in ids


def test_loglikelihood_equals_the_models_own_token_by_token(subject: EvaluatedModel, student: Any) -> None:
    continuations = ["Paris", "mice and seven", "a" * 40, ""]
    prompts = [_ask(subject, text) for text in ("hot?", "what is it? " * 4, "x", "y")]
    scores = subject.loglikelihood([_request(p, c) for p, c in zip(prompts, continuations, strict=True)])
    for prompt, continuation, (score, is_greedy) in zip(prompts, continuations, scores, strict=True):
        prompt_ids = subject.renderer.prompt_ids(list(prompt.messages))
        ids = subject.renderer.completion_ids(continuation, finished=False)
        with torch.no_grad():
            logprobs = student(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
        wanted = sum(float(logprobs[len(prompt_ids) + i - 1, token]) for i, token in enumerate(ids))
        greedy = all(int(logprobs[len(prompt_ids) + i - 1].argmax()) == token for i, token in enumerate(ids))
        assert (score, is_greedy) == (pytest.approx(wanted, abs=1e-4), greedy)


def test_what_the_model_writes_greedily_is_greedy_to_loglikelihood(subject: EvaluatedModel, student: Any) -> None:
    prompt = subject.apply_chat_template([QUESTION])
    ids = subject.renderer.prompt_ids([QUESTION])
    with torch.no_grad():
        best = int(student(torch.tensor([ids])).logits[0, -1].argmax())
    assert subject._score([(ids, [best]), (ids, [(best + 1) % 300])])[0][1]
    assert not subject._score([(ids, [(best + 1) % 300])])[0][1]
    assert subject.prompt_ids(prompt) == ids


def test_rolling_loglikelihood_predicts_each_token_once_whatever_the_context(subject: EvaluatedModel, student: Any) -> None:
    text = "the capital of France is Paris and the plural of mouse is mice"
    ids = subject.renderer.completion_ids(text, finished=False)
    with torch.no_grad():
        logits = student(torch.tensor([[subject._prefix_token, *ids]])).logits[0, :-1]
    wanted = float(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())
    assert subject.loglikelihood_rolling([_request(text)]) == [pytest.approx(wanted, abs=1e-3)]
    counted: list[int] = []
    score = subject._score
    subject._score = lambda rows: counted.append(sum(len(row[1]) for row in rows)) or score(rows)  # type: ignore[method-assign]
    subject.max_length = 8
    subject.loglikelihood_rolling([_request(text), _request("")])
    assert counted == [len(ids)]


def test_too_long_a_prompt_loses_its_beginning_and_keeps_the_choice(subject: EvaluatedModel) -> None:
    assert language_model._fit(([1, 2, 3, 4], [5, 6]), 4) == ([2, 3, 4], [5, 6])
    assert language_model._fit(([1, 2], [5, 6, 7, 8]), 3) == ([2], [6, 7, 8])
    ((score, _),) = subject.loglikelihood([_request(_ask(subject, "x" * 900), "Paris")])
    assert score < 0


def test_answers_end_before_the_first_until_string_and_say_so(subject: EvaluatedModel) -> None:
    prompts = [_ask(subject, text) for text in ("hot?", "cold?", "seven?", "mice?")]
    answers = subject.generate_until([_request(prompt, {"until": [], "max_gen_toks": 30}) for prompt in prompts])
    whole, prompt = max(zip(answers, prompts, strict=True), key=lambda pair: len(pair[0]))
    assert len(whole) > 4
    stop = whole[2:4]
    (cut,) = subject.generate_until([_request(prompt, {"until": [stop, "never"], "max_gen_toks": 30})])
    assert cut == whole[: whole.index(stop)]
    assert cut.finish_reason == "until"


def test_a_task_sees_the_answer_without_the_reasoning_and_a_cut_thought_as_no_answer(
    subject: EvaluatedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["<think>is it hot?</think>\n\n cold", "<think>is it hot or", " cold"]
    monkeypatch.setattr(subject.renderer, "decode", lambda ids: texts[0])
    for text, said in zip(list(texts), ("cold", "", " cold"), strict=True):
        texts[0] = text
        (answer,) = subject.generate_until([_request(_ask(subject, "hot?"), {"until": [], "max_gen_toks": 4})])
        assert (answer, answer.raw_text) == (said, text)


def test_rounds_write_the_same_answer_as_one_go(subject: EvaluatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [_ask(subject, text) for text in ("hot?", "cold?", "what is seven?")]
    whole = subject.generate_until([_request(p, {"until": [], "max_gen_toks": 23}) for p in prompts])
    monkeypatch.setattr(language_model, "ROUND_TOKENS", 5)
    rounds = subject.generate_until([_request(p, {"until": ["\x00never"], "max_gen_toks": 23}) for p in prompts])
    assert rounds == whole
    assert [answer.finish_reason for answer in rounds] == [answer.finish_reason for answer in whole]


def test_rounds_stop_at_the_end_of_the_context(subject: EvaluatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "ROUND_TOKENS", 7)
    prompt = _ask(subject, "x" * 215)
    (answer,) = subject.generate_until([_request(prompt, {"until": ["\x00never"], "max_gen_toks": 500})])
    assert answer.finish_reason in {"length", "stop"}


def test_prompt_beyond_the_context_is_an_empty_answer_that_says_error(subject: EvaluatedModel) -> None:
    prompts = [_ask(subject, "x" * 900), subject.apply_chat_template([QUESTION])]
    answers = subject.generate_until([_request(prompt, {"until": ["."]}) for prompt in prompts])
    assert (answers[0], answers[0].finish_reason) == ("", "error")
    assert answers[1].finish_reason != "error"


def test_sampled_repeats_differ_and_come_back_in_every_run(subject: EvaluatedModel) -> None:
    prompt = subject.apply_chat_template([QUESTION])
    settings = {"do_sample": True, "temperature": 1.0, "until": [], "max_gen_toks": 12}
    first = subject.generate_until([_request(prompt, settings)] * 4)
    assert len(set(first)) > 1
    assert subject.generate_until([_request(prompt, settings)] * 4) == first


def test_unknown_generation_setting_is_an_error_that_names_it(evaluate: Evaluate) -> None:
    with pytest.raises(ConfigError, match=r"task beams: generation_kwargs num_beams=4 not supported; supported: .*until"):
        evaluate("beams")
