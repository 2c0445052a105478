"""ULD between two tokenizers: which tokens meet, what the loss is, and that only this divergence is possible."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from distill_pipeline import losses
from distill_pipeline.errors import VocabularyMismatchError
from distill_pipeline.models.load import load_model, load_tokenizer
from distill_pipeline.models.output_head import output_head
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.training.examples import Example, encode_examples
from distill_pipeline.training.loop import ModelPair, accumulate_gradients
from distill_pipeline.training.spec import TrainStageSpec
from distill_pipeline.training.stage import train_student

END = 2
ULD = {"method": "logit_kd", "divergence": "uld", "ce_weight": 0.4}
# The same three completions, in the student's tokens and in the teacher's: shorter, longer, and as long.
OURS = [Example("p", (3, 4), ((5, 6, 7, 8, END), (5, 6, END))), Example("q", (9, 3, 3), ((4, 4, END),))]
THEIRS = [Example("p", (11, 12, 13), ((14, 15, END), (14, 15, 16, 17, END))), Example("q", (11, 9), ((8, 8, END),))]


@pytest.fixture
def models(random_model: Any) -> ModelPair:
    student, teacher = random_model(layers=2, seed=0), random_model(layers=3, seed=1)
    teacher.requires_grad_(False)
    return ModelPair(student, output_head(student).cut(33), 33, teacher, output_head(teacher))


def by_hand(models: ModelPair, kd_temperature: float) -> torch.Tensor:
    """The loss from its definition: token i of a completion meets token i of its other tokenization, the rest nothing."""
    total, tokens = torch.zeros(()), 0
    for ours, theirs in zip(OURS, THEIRS, strict=True):
        for ids, other in zip(ours.completions, theirs.completions, strict=True):
            logits = models.student(input_ids=torch.tensor([[*ours.prompt, *ids]])).logits[0, len(ours.prompt) - 1 : -1, :33]
            expected = models.teacher(input_ids=torch.tensor([[*theirs.prompt, *other]])).logits[0, len(theirs.prompt) - 1 : -1]
            both = min(len(ids), len(other))
            distance = losses.uld(
                logits[None, :both],
                expected[None, :both],
                torch.zeros(1, both, dtype=torch.int64),
                kd_temperature=kd_temperature,
            )
            ce = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum")
            total, tokens = total + 0.6 * both * distance + 0.4 * ce, tokens + len(ids)
    return total / tokens


@pytest.mark.parametrize("max_tokens", [1, 12, 4096])
@pytest.mark.parametrize("kd_temperature", [1.0, 2.0])
def test_token_i_meets_token_i_and_the_longer_rest_counts_in_cross_entropy_alone(
    models: ModelPair, kd_temperature: float, max_tokens: int
) -> None:
    stage = TrainStageSpec(**ULD, kd_temperature=kd_temperature).model_copy(update={"micro_batch_tokens": max_tokens})
    found = accumulate_gradients(models, OURS, stage, layout="shared", pad_id=END, device="cpu", own=THEIRS)
    gradients = [parameter.grad.clone() for parameter in models.student.parameters()]
    models.student.zero_grad(set_to_none=True)
    loss = by_hand(models, kd_temperature)
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), abs=1e-5)
    assert found.num_tokens == 11
    for gradient, parameter in zip(gradients, models.student.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=2e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in models.teacher.parameters())


@pytest.fixture
def other_model(small_model: ModelFolder, tmp_path: Path) -> ModelFolder:
    """A model whose tokenizer has fewer merges, so more tokens for the same text, and whose head is padded."""
    folder, model = tmp_path / "other", load_model(small_model.path)
    model.resize_token_embeddings(290)
    model.save_pretrained(folder)
    load_tokenizer(small_model.path).save_pretrained(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    vocab = {token: index for token, index in document["model"]["vocab"].items() if index < 270}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in document["model"]["merges"]]
    document["model"] |= {"vocab": vocab, "merges": [pair for pair in pairs if "".join(pair) in vocab]}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return ModelFolder(folder, "other", None, "other-identity", None)


def test_a_student_with_its_own_tokenizer_learns_from_the_teacher_by_uld_alone(
    other_model: ModelFolder, teacher: ModelFolder, make_student: Any, make_rows: Any, make_batch: Any, tmp_path: Path
) -> None:
    def train(stage: dict[str, Any]) -> Any:
        student = make_student(stage, init={"model": "other"})
        return train_student(
            [make_batch(make_rows(12))], tmp_path / "out", tmp_path / "work", student=student, teacher=teacher,
            init_model=other_model, system=None, device="cpu", seed=0, progress=lambda line: None,
        )  # fmt: skip

    with pytest.raises(VocabularyMismatchError, match="Use sft, logit_kd with divergence uld"):
        train({"method": "logit_kd"})
    outcome = train(ULD | {"epochs": 6})
    rows = pq.read_table(tmp_path / "out" / "curve.parquet").to_pylist()
    assert outcome.facts["tokenizer"] == "student"
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["kl"] < rows[0]["kl"]
    assert load_model(tmp_path / "out").config.vocab_size == 290


def test_examples_are_encoded_once_for_each_model_and_pair_by_completion(
    other_model: ModelFolder, renderer: ChatRenderer, make_rows: Any, make_batch: Any
) -> None:
    mine = ChatRenderer(load_tokenizer(other_model.path))
    rows = make_rows(6)
    longest = max(len(renderer.prompt_ids(row["messages"])) for row in rows)
    examples, counts = encode_examples([make_batch(rows)], mine, max_length=longest + 20, own_renderer=renderer)
    own = examples.own
    assert own is not None
    assert len(own) == len(examples) == counts["trained_rows"]
    assert counts["too_long"] > 0
    assert counts["completions"] == counts["trained_completions"] + counts["too_long"] + counts["no_tokens"]
    assert any(examples[i].num_tokens > own[i].num_tokens for i in range(len(own)))
    for ours, theirs in ((examples[i], own[i]) for i in range(len(own))):
        assert ours.prompt_id == theirs.prompt_id
        assert [mine.decode(ids) for ids in ours.completions] == [renderer.decode(ids) for ids in theirs.completions]
    alone, _ = encode_examples([make_batch(rows)], mine, max_length=longest + 20)
    assert alone.fingerprint() != examples.fingerprint()
