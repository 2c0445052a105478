"""Laws of rendering: one way from messages to ids, and where the end token stands."""

from typing import Any

import pytest

from distill_pipeline.errors import ConfigError
from distill_pipeline.models.load import load_tokenizer
from distill_pipeline.rendering import ChatRenderer

QUESTION = [{"role": "user", "content": "the capital of France?"}]
LLAMA3_LIKE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model_dir: Any) -> Any:
    return load_tokenizer(tiny_model_dir)


def test_prompt_is_the_rendered_template_with_the_assistants_turn_open(tokenizer: Any) -> None:
    ids = ChatRenderer(tokenizer).prompt_ids(QUESTION)
    assert tokenizer.decode(ids) == "<|im_start|>user\nthe capital of France?<|im_end|>\n<|im_start|>assistant\n"


def test_prompt_and_completion_joined_are_the_whole_conversation(tokenizer: Any) -> None:
    renderer = ChatRenderer(tokenizer)
    joined = renderer.prompt_ids(QUESTION) + renderer.completion_ids("Paris", finished=True)
    whole = tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": "Paris"}], tokenize=False)
    assert tokenizer.decode(joined) + "\n" == whole


def test_end_token_follows_the_text_once_if_and_only_if_it_finished(tokenizer: Any) -> None:
    renderer = ChatRenderer(tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == renderer.end_token_id
    finished = renderer.completion_ids("Paris", finished=True)
    assert finished.count(renderer.end_token_id) == 1
    assert finished[-1] == renderer.end_token_id
    assert renderer.completion_ids("Paris", finished=False) == finished[:-1]


def test_end_token_is_the_one_of_the_template_even_when_eos_is_another(tokenizer: Any) -> None:
    tokenizer.chat_template = LLAMA3_LIKE
    renderer = ChatRenderer(tokenizer)
    assert renderer.end_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert renderer.stop_token_ids == {renderer.end_token_id, tokenizer.eos_token_id}


def test_template_that_writes_bos_gives_it_once(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.chat_template = LLAMA3_LIKE.replace("<|im_start|>", "")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    ids = ChatRenderer(tokenizer).prompt_ids(QUESTION)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_completion_that_spells_an_end_token_does_not_end(tokenizer: Any) -> None:
    renderer = ChatRenderer(tokenizer)
    ids = renderer.completion_ids("a<|im_end|>b", finished=False)
    assert renderer.end_token_id not in ids
    assert renderer.decode(ids) == "a<|im_end|>b"


def test_system_prompt_comes_first_unless_the_messages_have_one(tokenizer: Any) -> None:
    renderer = ChatRenderer(tokenizer, system="be brief")
    assert tokenizer.decode(renderer.prompt_ids(QUESTION)).startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user"
    )
    own = [{"role": "system", "content": "be long"}, *QUESTION]
    assert "be brief" not in tokenizer.decode(renderer.prompt_ids(own))
    assert renderer.prompt_ids(own) == ChatRenderer(tokenizer).prompt_ids(own)


def test_template_that_refuses_a_system_prompt_is_an_error_at_once(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LLAMA3_LIKE
    )
    ChatRenderer(tokenizer)
    with pytest.raises(ConfigError, match=r"no system.*Remove the system prompt"):
        ChatRenderer(tokenizer, system="be brief")


def test_template_that_prints_the_date_means_the_same_every_day(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + LLAMA3_LIKE
    assert "26 Jul 2024 " in tokenizer.decode(ChatRenderer(tokenizer).prompt_ids(QUESTION))


def test_tokenizer_without_template_renders_plain_text(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    renderer = ChatRenderer(tokenizer, system="be brief")
    assert tokenizer.decode(renderer.prompt_ids(QUESTION)) == "be brief\n\nthe capital of France?"
    assert renderer.end_token_id == tokenizer.eos_token_id


def test_tokenizer_without_any_end_token_is_an_error(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="names a token that ends an answer"):
        ChatRenderer(tokenizer)


def test_fingerprint_changes_with_template_and_system_and_not_with_padding(tokenizer: Any) -> None:
    plain = ChatRenderer(tokenizer).fingerprint
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)
    assert ChatRenderer(tokenizer).fingerprint == plain
    assert ChatRenderer(tokenizer, system="x").fingerprint != plain
    tokenizer.chat_template = LLAMA3_LIKE
    assert ChatRenderer(tokenizer).fingerprint != plain


def test_decode_keeps_white_space_and_leaves_out_special_tokens(tokenizer: Any) -> None:
    renderer = ChatRenderer(tokenizer)
    ids = renderer.completion_ids(" a , b .\n", finished=True)
    assert renderer.decode(ids) == " a , b .\n"
    assert renderer.vocab_size == len(tokenizer)
