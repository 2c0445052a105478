"""Laws of a teacher's correction: which references train it, as what, and what it leaves alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distill_pipeline.errors import TrainingError
from distill_pipeline.hashing import file_sha256
from distill_pipeline.learning import CorrectionSpec
from distill_pipeline.models.load import load_model, load_tokenizer, resolve_dtype
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.outcome import Outcome, silent
from distill_pipeline.records import PROMPT_SCHEMA
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.system_prompts import SystemPrompts
from distill_pipeline.training import correction
from distill_pipeline.training.correction import correct_teacher, gold_answer, recipe_of

PROMPTS = SystemPrompts("be brief", {"sums": "count"})
NUM_WORDS = 12


def prompt(name: str, reference: str | None, *, domain: str = "words", split: str = "train") -> dict[str, Any]:
    return {
        "prompt_id": name, "messages": [{"role": "user", "content": f"say {name}"}], "reference": reference, "domain": domain,
        "source": "s", "license": "cc0-1.0", "split": split, "metadata": "{}",
    }  # fmt: skip


TRAINING = [*(prompt(f"word{n}", f"e {n}") for n in range(NUM_WORDS)), prompt("sum", "12", domain="sums")]
OTHERS = [
    prompt("kept for later", "HELDOUT", split="heldout"), prompt("without", None), prompt("blank", " "),
    prompt("of another teacher", "OTHERS", domain="law"), prompt("both", "HELDOUT", domain="law", split="heldout"),
]  # fmt: skip


@pytest.fixture
def correct(teacher: ModelFolder, tmp_path: Path) -> Callable[..., Outcome]:
    """``correct(rows)`` corrects the tiny teacher below the test's folder; keywords are fields of the correction."""

    def run(
        rows: list[dict[str, Any]], name: str = "run", *, model: ModelFolder = teacher, prompts: SystemPrompts = PROMPTS,
        **fields: Any,
    ) -> Outcome:  # fmt: skip
        batches = [pa.RecordBatch.from_pylist([row], schema=PROMPT_SCHEMA) for row in rows]
        return correct_teacher(
            batches, tmp_path / name / "out", tmp_path / name / "work", name="tiny",
            correction=CorrectionSpec.model_validate({"batch_prompts": 4, "lr": 3e-3} | fields), model=model,
            answers={"words", "sums"}.__contains__, prompts=prompts, device="cpu", seed=0, progress=silent,
        )  # fmt: skip

    return run


def curve(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "out" / "curve.parquet").to_pylist()
    return rows


def test_every_prompt_is_used_or_has_its_reason(correct: Any) -> None:
    counts = correct([*OTHERS, *TRAINING, prompt("long", "e" * 300)], max_length=100).counts
    expected = {"used": 13, "too_long": 1, "no_tokens": 0, "held_out": 2, "other_domain": 1, "without_reference": 2}
    assert {name: counts[name] for name in expected} == expected
    assert counts["prompts"] == sum(expected.values()) == 19


def test_held_out_prompts_others_domains_and_rows_without_reference_never_train(correct: Any, tmp_path: Path) -> None:
    mixed = [row for pair in zip(TRAINING, OTHERS * 3, strict=False) for row in pair]
    correct(mixed, "mixed")
    correct(TRAINING, "alone")
    mixed_weights, alone_weights = (file_sha256(tmp_path / name / "out" / "model.safetensors") for name in ("mixed", "alone"))
    assert mixed_weights == alone_weights
    assert curve(tmp_path / "mixed") == curve(tmp_path / "alone")


def test_a_reference_is_the_whole_answer_under_the_domains_system_prompt_and_ends_it(
    correct: Any, teacher: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    original = correction.train_student

    def watched(rows: Any, *args: Any, **options: Any) -> Any:
        listed = list(rows)
        seen.update(options, rows=[row for batch in listed for row in batch.to_pylist()])
        return original(listed, *args, **options)

    monkeypatch.setattr(correction, "train_student", watched)
    correct([prompt("word", "mice|mouses"), prompt("sum", "12", domain="sums")])
    assert [row["completions"] for row in seen["rows"]] == [
        [{"completion_id": "word", "raw_text": "mice", "finish_reason": "stop"}],
        [{"completion_id": "sum", "raw_text": "12", "finish_reason": "stop"}],
    ]
    systems = [row["messages"][0] for row in seen["rows"]]
    assert systems == [{"role": "system", "content": "be brief"}, {"role": "system", "content": "count"}]
    assert (seen["teacher"], seen["init_model"], seen["system"]) == (None, teacher, None)


def test_a_correction_lowers_the_loss_and_its_facts_say_by_how_much(correct: Any, tmp_path: Path, teacher: ModelFolder) -> None:
    before = {path.name: file_sha256(path) for path in teacher.path.iterdir()}
    outcome = correct(TRAINING, epochs=12)
    renderer, model = ChatRenderer(load_tokenizer(teacher.path)), load_model(teacher.path)
    losses = []
    for row in TRAINING:
        told = PROMPTS.told(row["messages"], row["domain"])
        question, answer = renderer.prompt_ids(told), renderer.completion_ids(row["reference"], finished=True)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*question, *answer]])).logits[0, len(question) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    assert outcome.facts["untrained_loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
    assert outcome.facts["final_loss"] < 0.7 * outcome.facts["untrained_loss"]
    assert {path.name: file_sha256(path) for path in teacher.path.iterdir()} == before, "the original is untouched"
    assert load_model(tmp_path / "run" / "out").config.num_hidden_layers == 4


def test_a_template_that_opens_a_thought_has_it_closed_before_the_reference(
    correct: Any, teacher: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, folder = load_tokenizer(teacher.path), tmp_path / "thinker"
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{%", "assistant\n<think>\n{%")
    load_model(teacher.path).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts: list[str] = []
    original = ChatRenderer.completion_ids

    def noted(self: ChatRenderer, raw_text: str, *, finished: bool) -> list[int]:
        texts.append(raw_text)
        return original(self, raw_text, finished=finished)

    monkeypatch.setattr(ChatRenderer, "completion_ids", noted)
    correct([prompt("word", "mice")], model=ModelFolder(folder, "thinker", None, "i", None))
    assert texts == ["</think>\n\nmice"]


def test_without_a_reference_there_is_nothing_to_train_on(correct: Any) -> None:
    with pytest.raises(
        TrainingError, match=r"teacher tiny has nothing to train on: of 5 prompts 2 are held out, 1 are other domain, 2 are "
        r"without reference\. Give prompts of its domains a reference, or leave correction out\.",
    ):  # fmt: skip
        correct(OTHERS)


def test_the_corrected_model_keeps_the_dtype_that_the_original_runs_in(
    correct: Any, teacher: ModelFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    load_model(teacher.path, dtype="bfloat16").save_pretrained(folder)
    load_tokenizer(teacher.path).save_pretrained(folder)
    correct(TRAINING, model=ModelFolder(folder, "half", None, "i", None))
    corrected = tmp_path / "run" / "out"
    assert json.loads((corrected / "config.json").read_text())["dtype"] == "bfloat16"
    assert [resolve_dtype(corrected, device) for device in ("cpu", "cuda")] == ["float32", "bfloat16"]
    weights = load_model(corrected).state_dict()
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values()), "the files are float32"


def test_adapters_and_every_other_setting_reach_the_trainer() -> None:
    fields = {
        "epochs": 2.0, "max_steps": 7, "max_tokens": 99, "batch_prompts": 3, "micro_batch_tokens": 256, "lr": 2e-4,
        "schedule": "wsd", "warmup_frac": 0.1, "decay_frac": 0.2, "weight_decay": 0.1, "clip_norm": 0.5, "max_length": 128,
        "lora": {"rank": 2}, "precision": "fp32", "gradient_checkpointing": True,
    }  # fmt: skip
    spec = CorrectionSpec.model_validate(fields)
    assert set(fields) == set(CorrectionSpec.model_fields) - {"alternatives"}
    recipe = recipe_of("tiny", spec, "folder")
    for name in fields:
        holder = recipe if name in ("max_length", "lora", "precision", "gradient_checkpointing") else recipe.stages[0]
        assert getattr(holder, name) == getattr(spec, name), name
    assert (recipe.stages[0].method, recipe.init.model, len(recipe.stages)) == ("sft", "folder", 1)
    assert CorrectionSpec().lr == recipe_of("tiny", CorrectionSpec(), "folder").stages[0].lr == 1e-5


@pytest.mark.parametrize(
    ("reference", "alternatives", "expected"),
    [("cats", True, "cats"), ("a | b", True, "a"), ("|x|", True, "x"), ("|x|", False, "|x|"), ("|", True, "|")],
)  # fmt: skip
def test_a_bar_parts_right_answers_where_it_is_one(reference: str, alternatives: bool, expected: str) -> None:
    assert gold_answer(reference, alternatives=alternatives) == expected
