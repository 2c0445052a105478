"""A user's scorer that counts its calls, and rows for scorers of many rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill_pipeline.records import prompt_id
from distill_pipeline.scoring.rows import AnswerRow

COUNTING = """
import os, time
VERSION = 1
def score(reference, answer, **options):
    with open(os.environ["COUNT_FILE_{name}"], "a") as file:
        file.write(answer.replace(chr(10), " ") + chr(10))
    if "hang" in answer and os.environ.get("HANGS"):
        time.sleep(60)
    if "raise" in answer:
        raise ValueError("no")
    return float(len(answer) % 2)
"""


class Counting:
    """A user's scorer in a module of its own: ``calls`` are the answers it was given since the last look."""

    def __init__(self, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = folder / f"counting_{name}.py"
        self.module.write_text(COUNTING.replace("{name}", name))
        self.kind = f"counting_{name}:score"
        self._file = folder / f"calls_{name}"
        self._file.touch()
        monkeypatch.setenv(f"COUNT_FILE_{name}", str(self._file))

    def calls(self) -> list[str]:
        found = self._file.read_text().splitlines()
        self._file.write_text("")
        return found

    def change(self) -> None:
        self.module.write_text(self.module.read_text() + "# changed\n")


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Counting]:
    folder = tmp_path / "their_code"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return lambda name: Counting(folder, name, monkeypatch)


def answer_rows(answers: Sequence[str | tuple[str, str]], question: str = "q", **fields: Any) -> list[AnswerRow]:
    """Samples of one prompt: texts, or (text, finish reason)."""
    messages = [{"role": "user", "content": question}]
    rows = []
    for number, given in enumerate(answers):
        answer, finish = (given, "stop") if isinstance(given, str) else given
        full = {
            "completion_id": f"{question}/{number}", "prompt_id": prompt_id(messages), "domain": "d", "messages": messages,
            "reference": None, "metadata": "{}", "answer": answer, "raw_text": answer, "finish_reason": finish,
            "completion_tokens": 1, "logprob": None,
        }  # fmt: skip
        rows.append(AnswerRow(**{**full, **fields}))
    return rows


@pytest.fixture
def samples() -> Callable[..., list[AnswerRow]]:
    return answer_rows


@pytest.fixture(scope="session")
def classifier_of(tiny_model_dir: Path) -> Callable[..., Path]:
    """Saves a tiny random classifier (``llama`` or ``bert``), with the tokenizer of the tiny model, in a folder."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    from distill_pipeline.models.load import load_tokenizer, silent_bars

    tokenizer = load_tokenizer(tiny_model_dir)
    kinds: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaForSequenceClassification), "bert": (BertConfig, BertForSequenceClassification),
    }  # fmt: skip

    def save(folder: Path, *, kind: str = "llama", seed: int = 0, num_labels: int = 1, pad_token_id: int | None = 2) -> Path:
        config_class, model_class = kinds[kind]
        config = config_class(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, num_labels=num_labels, pad_token_id=pad_token_id,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]), silent_bars():
            torch.manual_seed(seed)
            model = model_class(config)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(6.0)
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save
