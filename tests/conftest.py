"""Fixtures that several rooms share: tiny random models with a real tokenizer and chat template, made here, never downloaded.

Not covered by the default run: the marks ``network`` (a wheel from the package index), ``gpu`` and ``slow``.
"""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_TOKEN_SCALE = 0.5
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TRAINING_TEXT = [
    "the capital of France is Paris and the plural of mouse is mice",
    "what is the opposite of hot? cold. what is three plus four? seven.",
    "user assistant system question answer the the and and is is of of",
]


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 300 ids with ChatML turns; its pad token is its end token, as in many real ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(*, layers: int, seed: int, hidden: int = 32, vocab_size: int = 300, scale: float = 8.0) -> Any:
    """A random Llama with grouped-query attention; ``scale`` widens its weights so that its answers are not all alike."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 2:
                    weight.mul_(scale)
            # The pad token's row starts as zeros, but it is the end token too: likely now and then, so that lengths vary.
            model.get_input_embeddings().weight[2].normal_(std=END_TOKEN_SCALE)
    return model.eval()


def save_tiny_model(folder: Path, *, layers: int, seed: int, hidden: int = 32, scale: float = 8.0) -> Path:
    """Write a tiny model and its tokenizer as a model folder."""
    from distill_pipeline.models.load import silent_bars

    tokenizer = make_tokenizer()
    with silent_bars():
        model = make_model(layers=layers, seed=seed, hidden=hidden, vocab_size=len(tokenizer), scale=scale)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers, hidden 32, about 300 byte-level ids."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny_model"), layers=2, seed=0)


@pytest.fixture(scope="session")
def tiny_teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random Llama with the same tokenizer, of 4 layers."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny_teacher"), layers=4, seed=1)


@pytest.fixture(scope="session")
def wide_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose heads are 32 wide: narrower ones are no model to the kernels of other engines."""
    return save_tiny_model(tmp_path_factory.mktemp("wide_model"), layers=2, seed=2, hidden=128, scale=4.0)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A real Ray cluster of this machine with two CPUs, for as long as the tests run."""
    ray = pytest.importorskip("ray", reason="ray is not installed: the Ray engine is not covered")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
