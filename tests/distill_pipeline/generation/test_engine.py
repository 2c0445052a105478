"""Laws of the engine: it computes what the model computes, and a row's answer is its own business."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distill_pipeline.generation.decoders import PlainDecoder, decoder_for
from distill_pipeline.generation.engine import MAX_ROWS, Request, TransformersEngine
from distill_pipeline.generation.protocol import Completion
from distill_pipeline.generation.shared_prefix import SharedPrefixDecoder
from distill_pipeline.models.load import load_model, load_tokenizer
from distill_pipeline.rendering import ChatRenderer

SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}


@pytest.fixture(scope="module")
def renderer(tiny_teacher_dir: Path) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(tiny_teacher_dir))


@pytest.fixture(scope="module")
def model(tiny_teacher_dir: Path) -> Any:
    return load_model(tiny_teacher_dir)


@pytest.fixture(scope="module")
def requests(renderer: ChatRenderer) -> list[Request]:
    questions = [f"what is the opposite of {'very ' * (i % 5)}{i}?" for i in range(12)]
    prompts = [tuple(renderer.prompt_ids([{"role": "user", "content": question}])) for question in questions]
    return [Request(f"{i}/{j}", prompt) for i, prompt in enumerate(prompts) for j in range(3)]


def by_key(completions: Any) -> dict[str, Completion]:
    return {done.key: done for done in completions}


def tokens_of(completions: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    return {done.key: (done.token_ids, done.finish_reason) for done in completions}


def test_greedy_answers_equal_those_of_transformers(model: Any, renderer: ChatRenderer, requests: list[Request]) -> None:
    engine = TransformersEngine(model, renderer)
    assert engine.shares_prefixes
    for done in engine.generate(requests[::3], max_tokens=20):
        prompt = next(list(request.prompt_ids) for request in requests if request.key == done.key)
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20, do_sample=False
        )
        drawn = theirs[0, len(prompt) :].tolist()
        assert list(done.token_ids) + [renderer.end_token_id] * (done.finish_reason == "stop") == drawn


def test_shared_prefixes_change_no_answer(model: Any, renderer: ChatRenderer, requests: list[Request]) -> None:
    shared = TransformersEngine(model, renderer, decoder=SharedPrefixDecoder(model))
    plain = TransformersEngine(model, renderer, decoder=PlainDecoder(model))
    ours, theirs = (by_key(engine.generate(requests, max_tokens=24, **SAMPLED)) for engine in (shared, plain))
    assert tokens_of(ours.values()) == tokens_of(theirs.values())
    assert {done.finish_reason for done in ours.values()} == {"stop", "length"}
    for key, done in ours.items():
        assert done.logprob == pytest.approx(theirs[key].logprob, abs=1e-3)


@pytest.mark.parametrize("prompts", [[(5,)], [(5,), (5, 6), (5, 6, 7)], [(5, 6, 7), (8, 6, 7)], [(9,), (4, 4, 4, 4, 4, 4)]])
def test_shared_prefixes_change_no_answer_at_their_edges(
    model: Any, renderer: ChatRenderer, prompts: list[tuple[int, ...]]
) -> None:
    """One prompt, prompts that begin others, prompts that share nothing, very unequal ones."""
    requests = [Request(f"{prompt}/{j}", prompt) for j in range(2) for prompt in prompts]
    engines = [TransformersEngine(model, renderer, decoder=kind(model)) for kind in (SharedPrefixDecoder, PlainDecoder)]
    ours, theirs = (tokens_of(engine.generate(requests, max_tokens=12, **SAMPLED)) for engine in engines)
    assert ours == theirs


def test_answer_does_not_depend_on_batch_mates(model: Any, renderer: ChatRenderer, requests: list[Request]) -> None:
    together = tokens_of(TransformersEngine(model, renderer).generate(requests, max_tokens=16, **SAMPLED))
    small = tokens_of(TransformersEngine(model, renderer, batch_tokens=256).generate(requests[::-1], max_tokens=16, **SAMPLED))
    alone = TransformersEngine(model, renderer)
    for request in requests[::5]:
        assert tokens_of(alone.generate([request], max_tokens=16, **SAMPLED))[request.key] == together[request.key]
    assert small == together


def test_samples_of_one_prompt_differ_and_equal_keys_agree(model: Any, renderer: ChatRenderer, requests: list[Request]) -> None:
    engine = TransformersEngine(model, renderer)
    first = tokens_of(engine.generate(requests, max_tokens=16, **SAMPLED))
    assert first == tokens_of(engine.generate(requests, max_tokens=16, **SAMPLED))
    assert len({first[f"0/{j}"] for j in range(3)}) == 3


def test_shorter_limit_cuts_the_same_answer(model: Any, renderer: ChatRenderer, requests: list[Request]) -> None:
    engine = TransformersEngine(model, renderer)
    long = by_key(engine.generate(requests, max_tokens=24, **SAMPLED))
    for done in engine.generate(requests, max_tokens=6, **SAMPLED):
        assert done.token_ids == long[done.key].token_ids[:6]
        assert done.completion_tokens == min(6, long[done.key].completion_tokens)


def test_logprob_is_the_sum_over_drawn_tokens_with_the_end_token(
    model: Any, renderer: ChatRenderer, requests: list[Request]
) -> None:
    for done in TransformersEngine(model, renderer).generate(requests[::3], max_tokens=16):
        prompt = next(list(request.prompt_ids) for request in requests if request.key == done.key)
        drawn = [*done.token_ids, *([renderer.end_token_id] if done.finish_reason == "stop" else [])]
        assert done.completion_tokens == len(drawn)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1].float()
        expected = torch.log_softmax(logits, dim=-1).gather(-1, torch.tensor(drawn)[:, None]).sum()
        assert done.logprob == pytest.approx(float(expected), abs=1e-3)


def test_over_long_prompt_costs_that_row_alone(model: Any, renderer: ChatRenderer, requests: list[Request]) -> None:
    engine = TransformersEngine(model, renderer, batch_tokens=4096)
    context = engine.context_tokens
    long = Request("long", tuple([5] * context))
    tight = Request("tight", tuple([5] * (context - 3)))
    answers = by_key(engine.generate([*requests[:4], long, tight], max_tokens=16, **SAMPLED))
    assert answers["long"].error == f"prompt_too_long: {context} tokens, the model's context holds {context}"
    assert (answers["long"].finish_reason, answers["long"].completion_tokens) == ("error", 0)
    assert answers["tight"].completion_tokens <= 3
    alone = tokens_of(engine.generate(requests[:4], max_tokens=16, **SAMPLED))
    assert {key: value for key, value in tokens_of(answers.values()).items() if key in alone} == alone


def test_batches_keep_to_the_budget_and_a_plans_rest_is_the_plan_of_the_rest(
    model: Any, renderer: ChatRenderer, requests: list[Request]
) -> None:
    engine = TransformersEngine(model, renderer, batch_tokens=300)
    plan = engine.plan_batches(requests, max_tokens=30)
    assert sorted(request.key for batch in plan for request in batch) == sorted(request.key for request in requests)
    for batch in plan:
        cost = sum(len(prompt) for prompt in {request.prompt_ids for request in batch}) + 30 * len(batch)
        assert cost <= 300
        assert len(batch) <= MAX_ROWS
    lengths = [len(request.prompt_ids) for batch in plan for request in batch]
    assert lengths == sorted(lengths)
    for done in range(len(plan)):
        finished = {request.key for batch in plan[:done] for request in batch}
        rest = [request for request in requests if request.key not in finished]
        assert engine.plan_batches(rest, max_tokens=30) == plan[done:]


def test_padded_vocabulary_columns_are_never_drawn(renderer: ChatRenderer, requests: list[Request]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    padded = LlamaForCausalLM(
        LlamaConfig(vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    for done in TransformersEngine(padded, renderer).generate(requests[:6], max_tokens=20, temperature=5.0, top_k=512):
        assert max(done.token_ids) < renderer.vocab_size


def test_logits_that_are_no_numbers_are_an_error_of_the_row(
    tiny_model_dir: Path, renderer: ChatRenderer, requests: list[Request]
) -> None:
    broken = load_model(tiny_model_dir)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    done = next(
        TransformersEngine(broken, renderer, decoder=PlainDecoder(broken)).generate(requests[:1], max_tokens=2, **SAMPLED)
    )
    assert done.error is not None
    assert done.error.startswith("not_a_number: ")


@pytest.mark.parametrize("kind", ["sliding_window", "softcap"])
def test_attention_that_the_fast_way_cannot_do_takes_the_plain_one(
    kind: str, renderer: ChatRenderer, requests: list[Request]
) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    if kind == "sliding_window":
        model: Any = MistralForCausalLM(MistralConfig(sliding_window=8, **sizes)).eval()
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**sizes)).eval()
    before = model.config._attn_implementation
    assert isinstance(decoder_for(model), PlainDecoder)
    assert model.config._attn_implementation == before
    for done in TransformersEngine(model, renderer).generate(requests[:9:3], max_tokens=8):
        prompt = next(list(request.prompt_ids) for request in requests if request.key == done.key)
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=8, do_sample=False
        )
        ours = list(done.token_ids) + [renderer.end_token_id] * (done.finish_reason == "stop")
        assert ours == theirs[0, len(prompt) :].tolist()


def test_engine_leaves_the_model_as_it_was(model: Any, renderer: ChatRenderer, requests: list[Request]) -> None:
    before = model.config._attn_implementation
    list(TransformersEngine(model, renderer).generate(requests[:3], max_tokens=4))
    assert model.config._attn_implementation == before
    ids = torch.tensor([list(requests[0].prompt_ids)])
    assert model(ids).logits.requires_grad
