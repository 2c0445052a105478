"""Training as a whole: the teacher stays, killing changes nothing, and what cannot be trained says so."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_pipeline.errors import ConfigError, TrainingError, VocabularyMismatchError
from distill_pipeline.hashing import file_sha256
from distill_pipeline.models.load import load_model, load_tokenizer
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.outcome import Outcome
from distill_pipeline.training import apart, loop, measuring, stage
from distill_pipeline.training.examples import epoch_order
from distill_pipeline.training.position import StagePosition, learning_rate, stage_steps
from distill_pipeline.training.spec import StudentSpec, TrainStageSpec
from distill_pipeline.training.stage import different_ids, parameters_sha256, train_student
from distill_pipeline.training.student import keep_layers

KD, SFT = {"method": "logit_kd", "epochs": 2}, {"method": "sft", "epochs": 1}
OWN = {"method": "on_policy", "divergence": "reverse_kl", "epochs": 2, "rollouts": {"samples": 3, "max_tokens": 10}}
MIXED = OWN | {"divergence": "jsd", "lambda_": 0.5, "ce_weight": 0.5, "keep_optimizer": True}
DRAWN = OWN | {"objective": "policy_gradient"}


@pytest.fixture
def train(teacher: ModelFolder, make_rows: Any, make_batch: Any, tmp_path: Path) -> Callable[..., Outcome]:
    """``train(student)`` trains on 12 rows below the test's folder; keywords go to train_student."""

    def run(student: StudentSpec, name: str = "run", **options: Any) -> Outcome:
        arguments: dict[str, Any] = {
            "student": student, "teacher": teacher, "init_model": None, "system": None, "device": "cpu", "seed": 0,
            "progress": lambda line: None,
        }  # fmt: skip
        rows = options.pop("rows", None) or make_rows(12)
        folder = tmp_path / name
        return train_student([make_batch(rows)], folder / "out", folder / "work", **arguments | options)

    return run


def curve(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "out" / "curve.parquet").to_pylist()
    return rows


def test_training_lowers_the_loss_and_leaves_a_model_that_loads(train: Any, make_student: Any, tmp_path: Path) -> None:
    outcome = train(make_student(KD | {"epochs": 6}, SFT))
    rows = curve(tmp_path / "run")
    kd = [row["loss"] for row in rows if row["method"] == "logit_kd"]
    assert len(rows) == outcome.counts["steps"] == 18 + 3
    assert kd[-1] < 0.7 * kd[0]
    assert [row["step"] for row in rows] == list(range(1, 22))
    assert all(row["kl"] is None for row in rows if row["method"] == "sft")
    assert outcome.facts["initial_loss"] == kd[0]
    assert outcome.counts["trained_tokens"] == outcome.counts["data_tokens"] * 7 == rows[-1]["tokens"]
    model = load_model(tmp_path / "run" / "out")
    assert model.config.num_hidden_layers == 2
    assert load_tokenizer(tmp_path / "run" / "out").chat_template is not None
    assert outcome.facts["layout"] == "shared"
    assert not (tmp_path / "run" / "work" / "checkpoints").exists()


def test_the_untrained_students_loss_is_known_before_its_first_step(
    train: Any, make_student: Any, make_rows: Any, renderer: Any, teacher: ModelFolder
) -> None:  # fmt: skip
    outcome = train(make_student(KD, init={"prune": {"keep": [0, 3]}}), rows=make_rows(12))
    model, losses = load_model(teacher.path), []
    keep_layers(model, [0, 3])
    for row in make_rows(12):
        prompt = renderer.prompt_ids(row["messages"])
        first = row["completions"][0]
        answer = renderer.completion_ids(first["raw_text"], finished=first["finish_reason"] == "stop")
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    assert outcome.facts["untrained_loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


def test_a_student_learns_from_its_own_answers_and_says_what_they_were(
    train: Any, make_student: Any, tmp_path: Path
) -> None:  # fmt: skip
    said: list[str] = []
    outcome = train(make_student(KD, OWN | {"epochs": 8}), progress=said.append)
    rows, facts = curve(tmp_path / "run"), outcome.facts
    own = [row for row in rows if row["method"] == "on_policy"]
    assert len(own) == 24
    assert sum(row["loss"] for row in own[-4:]) < 0.8 * sum(row["loss"] for row in own[:4])
    assert all(row["rollouts"] == 4 * 3 for row in own)
    assert all(row["rollouts"] is None for row in rows if row["method"] == "logit_kd")
    tokens = [round(row["rollouts"] * row["rollout_mean_tokens"]) for row in own]
    assert [row["tokens"] for row in own] == [rows[5]["tokens"] + sum(tokens[: i + 1]) for i in range(24)]
    assert all(row["rollout_mean_tokens"] <= 10 for row in own)
    assert facts["rollouts"]["completions"] == 24 * 12
    assert facts["rollouts"]["tokens"] == facts["stage_tokens"][1] == sum(tokens)
    assert facts["stage_tokens"][0] == rows[5]["tokens"]
    assert facts["rollouts"]["seconds"] <= facts["stage_seconds"][1] <= facts["seconds"]
    assert facts["rollouts"]["shares_prefixes"]
    assert re.search(r"on_policy step 24 of 24, .*; rollouts \d+ tokens/s, [\d.]+ tokens long, \d+% truncated", said[-1])


def test_a_curve_without_rollouts_has_no_columns_for_them(train: Any, make_student: Any, tmp_path: Path) -> None:
    train(make_student(SFT))
    assert set(curve(tmp_path / "run")[0]) == set(stage.CURVE_SCHEMA.names)


def test_cross_entropy_counts_on_the_datas_tokens_only(train: Any, make_student: Any, tmp_path: Path) -> None:
    train(make_student(MIXED | {"keep_optimizer": False, "epochs": 4}))
    rows = curve(tmp_path / "run")
    assert {row["rollouts"] for row in rows} == {None, 12}
    for row in rows:
        expected = row["kl"] if row["rollouts"] else 0.5 * row["kl"] + 0.5 * row["ce"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_kept_optimizer_goes_on_as_if_no_stage_had_ended(train: Any, make_student: Any, tmp_path: Path) -> None:
    flat = SFT | {"batch_prompts": 12, "schedule": "constant", "warmup_frac": 0.0}
    train(make_student(flat | {"epochs": 6}), "whole")
    train(make_student(flat | {"epochs": 3}, flat | {"epochs": 3, "keep_optimizer": True}), "kept")
    train(make_student(flat | {"epochs": 3}, flat | {"epochs": 3}), "anew")
    whole, kept, anew = ([row["loss"] for row in curve(tmp_path / name)] for name in ("whole", "kept", "anew"))
    assert kept == pytest.approx(whole, abs=1e-5)
    assert abs(anew[-1] - whole[-1]) > 1e-3


@pytest.mark.parametrize("stages", [(SFT, SFT | {"keep_optimizer": True}), (SFT, MIXED), (SFT, OWN)])
def test_a_run_cut_between_two_stages_goes_on_with_the_optimizer_that_the_second_asks_for(
    train: Any, make_student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: Any
) -> None:
    student, original = make_student(*stages), loop.TrainingRun._train_step
    train(student, "whole")

    def cut(run: Any, index: int, *args: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        original(run, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingRun, "_train_step", cut)
        with pytest.raises(KeyboardInterrupt):
            train(student, "cut")
    assert train(student, "cut").facts["resumed_from_step"] == 3
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_on_policy_without_a_teacher_is_an_error(train: Any, make_student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = stage._pair
    monkeypatch.setattr(stage, "_pair", lambda model, teacher, *rest: original(model, None, *rest))
    with pytest.raises(TrainingError, match=r"stage 2 \(on_policy\) needs a teacher, and none was given"):
        train(make_student(SFT, OWN))


def test_rollouts_longer_than_the_models_context_are_an_error(train: Any, make_student: Any) -> None:
    with pytest.raises(ConfigError, match=r"stages\.0\.rollouts\.max_tokens is 300, and the models' context holds 256"):
        train(make_student(OWN | {"rollouts": {"max_tokens": 300}}))


def test_only_the_student_changes(train: Any, make_student: Any, teacher: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []
    original = stage._pair
    monkeypatch.setattr(stage, "_pair", lambda *args: pairs.append(original(*args)) or pairs[-1])
    before = parameters_sha256(load_model(teacher.path))
    outcome = train(make_student(KD))
    (pair,) = pairs
    assert outcome.facts["teacher_sha256_before"] == outcome.facts["teacher_sha256_after"] == before
    assert all(not p.requires_grad and p.grad is None for p in pair.teacher.parameters())
    assert not pair.teacher.training
    assert parameters_sha256(pair.student) != parameters_sha256(load_model(teacher.path))


def test_a_teacher_that_changed_is_an_error(train: Any, make_student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.accumulate_gradients

    def meddle(models: Any, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            next(iter(models.teacher.parameters())).add_(1e-6)
        return original(models, *args, **options)

    monkeypatch.setattr(loop, "accumulate_gradients", meddle)
    with pytest.raises(TrainingError, match="the teacher tiny-teacher changed while the student trained"):
        train(make_student(KD))


def test_equal_runs_leave_equal_files(train: Any, make_student: Any, tmp_path: Path) -> None:
    for name in ("first", "second"):
        train(make_student(KD, OWN, SFT), name)
    files = {path.name for path in (tmp_path / "first" / "out").iterdir()} - {"speed.parquet"}  # which makes no version
    assert {"model.safetensors", "config.json", "curve.parquet", "tokenizer.json"} <= files
    for name in files:
        assert file_sha256(tmp_path / "first" / "out" / name) == file_sha256(tmp_path / "second" / "out" / name), name


def test_micro_batch_size_does_not_change_the_training(train: Any, make_student: Any, tmp_path: Path) -> None:
    for tokens in (64, 4096):
        train(make_student(KD | {"micro_batch_tokens": tokens}), str(tokens))
    for small, large in zip(curve(tmp_path / "64"), curve(tmp_path / "4096"), strict=True):
        assert abs(small["loss"] - large["loss"]) < 1e-5
        assert abs(small["grad_norm"] - large["grad_norm"]) < 1e-4


PROGRAM = """
import json, sys, torch
from pathlib import Path
import pyarrow as pa
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.records import TRAINING_SCHEMA
from distill_pipeline.training import loop
from distill_pipeline.training.spec import StudentSpec
from distill_pipeline.training.stage import train_student

torch.set_num_threads(1)
loop.CHECKPOINT_SHARE = float("inf")  # a checkpoint after every step, however long it takes
call = json.loads(Path(sys.argv[1]).read_text())
step = loop.TrainingRun._train_step
def announced(run, *args):
    step(run, *args)
    print("STEP", len(run.curve), flush=True)
loop.TrainingRun._train_step = announced
teacher = ModelFolder(Path(call["teacher"]), "tiny-teacher", None, "teacher-identity", None)
batch = pa.RecordBatch.from_pylist(call["rows"], schema=TRAINING_SCHEMA)
outcome = train_student(
    [batch], Path(call["out"]), Path(call["work"]), student=StudentSpec.model_validate(call["student"]), teacher=teacher,
    init_model=None, system=None, device="cpu", seed=0, progress=print, checkpoint_seconds=0.0,
)
print("RESUMED", outcome.facts["resumed_from_step"], flush=True)
"""


BUDGETS = KD | {"max_tokens": 700, "epochs": 0.1}, SFT | {"max_tokens": 700}


@pytest.mark.parametrize(
    ("stages", "kill_after"),
    [((KD, SFT), 3), ((KD, SFT), 8), (BUDGETS, 7), ((DRAWN, MIXED), 4), ((SFT, MIXED), 3), ((SFT, MIXED), 6)],
)
def test_kill_and_resume_gives_the_same_losses_as_an_uninterrupted_run(
    train: Any, make_student: Any, make_rows: Any, teacher: ModelFolder, tmp_path: Path, stages: Any, kill_after: int
) -> None:  # fmt: skip
    student = make_student(*stages)  # the kills fall into either stage
    train(student, "whole")
    folder = tmp_path / "killed"
    call = {"teacher": str(teacher.path), "rows": make_rows(12), "student": student.document(), "out": str(folder / "out"),
            "work": str(folder / "work")}  # fmt: skip
    (tmp_path / "call.json").write_text(json.dumps(call))
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "call.json")]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == f"STEP {kill_after}":
                process.send_signal(signal.SIGKILL)
                break
    assert not (folder / "out").exists()
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    resumed = int(again.stdout.split("RESUMED ")[1])
    assert kill_after - 1 <= resumed <= kill_after + 1
    assert curve(folder) == curve(tmp_path / "whole")
    assert file_sha256(folder / "out" / "model.safetensors") == file_sha256(tmp_path / "whole" / "out" / "model.safetensors")


def test_a_loss_that_is_no_number_names_the_batch_and_keeps_the_checkpoint(
    train: Any, make_student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = loop.head_loss, []

    def poisoned(hidden: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return original(hidden * float("nan") if len(calls) == 4 else hidden, *args, **options)

    monkeypatch.setattr(loop, "head_loss", poisoned)
    with pytest.raises(
        TrainingError, match=r"stage 1 \(logit_kd\), after step 3 of 6: the loss is nan.*prompt-\d{3}, prompt-\d{3}"
    ):
        train(make_student(KD), checkpoint_seconds=0.0)
    assert not (tmp_path / "run" / "out").exists()
    (folder, *_) = sorted((tmp_path / "run" / "work" / "checkpoints").glob("step-*"), reverse=True)
    monkeypatch.setattr(loop, "head_loss", original)
    outcome = train(make_student(KD))
    assert outcome.facts["resumed_from_step"] == int(folder.name.removeprefix("step-"))
    assert all(torch.isfinite(p).all() for p in load_model(tmp_path / "run" / "out").parameters())


@pytest.mark.parametrize("method", [KD, OWN, KD | {"divergence": "uld"}])
def test_a_teacher_whose_logits_are_no_numbers_names_the_prompts_and_the_checkpoint_survives(
    train: Any, make_student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:  # fmt: skip
    pairs, original_pair, original = [], stage._pair, loop.hidden_states
    victim = step_prompts(12)[5]

    def poisoned(model: Any, batch: Any) -> Any:
        hidden = original(model, batch)
        is_teacher = model is pairs[-1].teacher
        return hidden * float("nan") if is_teacher and victim in batch.prompt_ids else hidden

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_pair", lambda *args: pairs.append(original_pair(*args)) or pairs[-1])
        for module in (loop, apart, measuring):
            patch.setattr(module, "hidden_states", poisoned)
        patch.setattr(loop, "CHECKPOINT_SHARE", float("inf"))
        with pytest.raises(
            TrainingError,
            match=rf"after step 1 of 6: the loss is nan .*teacher's logits are not numbers on these prompts: {victim}\.",
        ):
            train(make_student(method), checkpoint_seconds=0.0)
    assert not (tmp_path / "run" / "out").exists()
    assert train(make_student(method)).facts["resumed_from_step"] == 1


def step_prompts(rows: int) -> list[str]:
    """The prompts of the first epoch in the order of its steps."""
    return [f"prompt-{index:03d}" for index in epoch_order(rows, seed=0, epoch=0)]


def test_a_student_that_cannot_be_written_is_a_clear_error_and_the_checkpoint_survives(
    train: Any, make_student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", float("inf"))
    with monkeypatch.context() as patch:
        patch.setattr(stage.pq, "write_table", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(
            TrainingError, match=r"the student could not be written to .*No space left on device.*goes on from .*step-00000005"
        ):
            train(make_student(KD), checkpoint_seconds=0.0)
    assert not (tmp_path / "run" / "out").exists()
    assert train(make_student(KD)).facts["resumed_from_step"] == 5


def test_other_settings_do_not_resume_a_checkpoint(train: Any, make_student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_write_student", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(make_student(KD), checkpoint_seconds=0.0)
    said: list[str] = []
    outcome = train(make_student(KD | {"lr": 2e-3}), progress=said.append)
    assert outcome.facts["resumed_from_step"] is None
    assert any("belongs to other data or settings" in line for line in said)


def test_nothing_to_train_on_is_an_error(train: Any, make_student: Any) -> None:
    with pytest.raises(TrainingError, match="no token to train on"):
        train(make_student(KD, max_length=16))


def narrow_tokenizer(source: ModelFolder, folder: Path) -> ModelFolder:
    """The same model behind a tokenizer in which two tokens have traded places."""
    load_model(source.path).save_pretrained(folder)
    load_tokenizer(source.path).save_pretrained(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return ModelFolder(folder, "other-tokenizer", None, "other", None)


def test_token_ids_with_two_meanings_are_refused_by_name(
    train: Any, make_student: Any, small_model: ModelFolder, tmp_path: Path
) -> None:
    other = narrow_tokenizer(small_model, tmp_path / "other")
    with pytest.raises(VocabularyMismatchError, match=r"different meanings to 2 token ids, for instance \d+: '[ab]' / '[ab]'"):
        train(make_student(KD, init={"model": "other"}), init_model=other)
    with pytest.raises(VocabularyMismatchError, match="different meanings to 2 token ids"):
        train(make_student(SFT, OWN, init={"model": "other"}), init_model=other)
    with pytest.raises(VocabularyMismatchError, match="and no held_out, which compares the two token by token"):
        train(make_student(SFT, init={"model": "other"}, held_out={}), init_model=other)
    outcome = train(make_student(SFT, init={"model": "other"}), init_model=other)
    assert outcome.facts["tokenizer"] == "student"


def test_padding_rows_of_a_wider_head_are_cut(train: Any, make_student: Any, small_model: ModelFolder, tmp_path: Path) -> None:
    wide = load_model(small_model.path)
    wide.resize_token_embeddings(320)
    wide.save_pretrained(tmp_path / "wide")
    load_tokenizer(small_model.path).save_pretrained(tmp_path / "wide")
    folder = ModelFolder(tmp_path / "wide", "wide", None, "wide", None)
    student = make_student(KD, init={"model": "m"})
    train(student, "wide_run", init_model=folder)
    train(student, "narrow_run", init_model=small_model)
    for wide_row, narrow_row in zip(curve(tmp_path / "wide_run"), curve(tmp_path / "narrow_run"), strict=True):
        assert abs(wide_row["loss"] - narrow_row["loss"]) < 1e-5


def test_padding_rows_of_a_wider_teacher_are_cut(
    train: Any, make_student: Any, teacher: ModelFolder, small_model: ModelFolder, tmp_path: Path
) -> None:
    wide = load_model(teacher.path)
    wide.resize_token_embeddings(320)
    wide.save_pretrained(tmp_path / "wide")
    load_tokenizer(teacher.path).save_pretrained(tmp_path / "wide")
    folder = ModelFolder(tmp_path / "wide", "wide", None, "wide", None)
    student = make_student(KD | {"epochs": 1}, init={"model": "m"})
    for name, frozen in (("wide_run", folder), ("narrow_run", teacher)):
        train(student, name, init_model=small_model, teacher=frozen)
    for wide_row, narrow_row in zip(curve(tmp_path / "wide_run"), curve(tmp_path / "narrow_run"), strict=True):
        assert abs(wide_row["loss"] - narrow_row["loss"]) < 1e-5


def test_different_ids_are_listed_with_both_meanings() -> None:
    assert different_ids({"x": 0, "y": 1}, {"x": 0, "z": 1, "w": 2}) == ["1: 'y' / 'z'", "2: None / 'w'"]


def test_steps_of_a_stage() -> None:
    def steps(examples: int, **fields: Any) -> int | None:
        return stage_steps(TrainStageSpec(method="sft", **fields), examples)

    assert steps(33, batch_prompts=16, epochs=2) == 6
    assert steps(32, batch_prompts=16, epochs=0.5) == 1
    assert steps(3, batch_prompts=16, epochs=0.1) == 1
    assert steps(1000, batch_prompts=16, max_steps=5) == 5
    assert steps(1000, batch_prompts=16, max_tokens=5) is None


@pytest.mark.parametrize("budget", [1, 150, 1000])
def test_a_budget_of_tokens_ends_with_the_step_that_reaches_it_whatever_the_epochs(
    train: Any, make_student: Any, tmp_path: Path, budget: int
) -> None:  # fmt: skip
    outcome = train(make_student(SFT | {"max_tokens": budget, "epochs": 0.5}))
    tokens = [row["tokens"] for row in curve(tmp_path / "run")]
    assert tokens[-1] >= budget
    assert all(before < budget for before in tokens[:-1])
    assert outcome.counts["trained_tokens"] == tokens[-1]
    assert budget < 1000 or outcome.counts["trained_tokens"] > 2 * outcome.counts["data_tokens"]


def test_a_budget_holds_for_its_own_stage_and_steps_may_end_it_earlier(train: Any, make_student: Any, tmp_path: Path) -> None:
    train(make_student(SFT | {"max_tokens": 200}, SFT | {"max_tokens": 200}, SFT | {"max_tokens": 10_000, "max_steps": 2}))
    rows = curve(tmp_path / "run")
    per_stage = [max(row["tokens"] for row in rows if row["stage"] == stage) for stage in range(3)]
    assert per_stage[0] >= 200
    assert 200 <= per_stage[1] - per_stage[0] <= per_stage[0] + 100
    assert sum(row["stage"] == 2 for row in rows) == 2


def test_with_equal_steps_the_rate_by_tokens_is_the_rate_by_steps() -> None:
    for schedule in ("cosine", "linear", "constant"):
        spec = {"method": "sft", "lr": 1.0, "schedule": schedule, "warmup_frac": 0.2}
        by_steps = StagePosition.of(TrainStageSpec.model_validate(spec | {"epochs": 10, "batch_prompts": 4}), 4)
        by_tokens = StagePosition.of(TrainStageSpec.model_validate(spec | {"max_tokens": 70}), 4)
        for _ in range(10):
            assert by_tokens.next_rate(7) == pytest.approx(by_steps.next_rate(7))
            assert by_tokens.share == pytest.approx(by_steps.share)
            by_steps.advance(7)
            by_tokens.advance(7)
        assert by_steps.is_over
        assert by_tokens.is_over


def test_the_rate_reaches_its_end_with_the_budget_and_not_before() -> None:
    spec = TrainStageSpec(method="sft", lr=1.0, schedule="linear", warmup_frac=0.0, max_tokens=100)
    position, rates = StagePosition.of(spec, 4), []
    for tokens in (30, 5, 50, 14, 40):
        rates.append(position.next_rate(tokens))
        position.advance(tokens)
    assert rates == [pytest.approx(left) for left in (1.0, 0.7, 0.65, 0.15, 0.01)]
    assert position.is_over
    assert str(position) == "step 5, 139 of 100 tokens"


def test_learning_rate_rises_and_falls_as_said() -> None:
    def rates(schedule: Any, warmup_frac: float = 0.2) -> list[float]:
        spec = TrainStageSpec(method="sft", lr=1.0, schedule=schedule, warmup_frac=warmup_frac)
        return [learning_rate(spec, step, 10) for step in range(10)]

    assert rates("constant")[2:] == [1.0] * 8
    assert rates("linear")[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert rates("linear")[-1] == pytest.approx(1 / 8)
    assert rates("cosine", 0.0)[5] == pytest.approx(0.5)
    assert all(0 < rate <= 1 for schedule in ("linear", "cosine") for rate in rates(schedule))


@given(whole=st.integers(1, 500), warmup_frac=st.floats(0.0, 0.5), decay_frac=st.floats(0.01, 0.5), share=st.floats(0.0, 0.999))
def test_wsd_rises_stays_and_falls_on_straight_lines(
    whole: int, warmup_frac: float, decay_frac: float, share: float
) -> None:  # fmt: skip
    spec = TrainStageSpec(method="sft", lr=2.0, schedule="wsd", warmup_frac=warmup_frac, decay_frac=decay_frac)
    done, warmup = int(share * whole), -(-warmup_frac * whole // 1)
    rate = learning_rate(spec, done, whole)
    if done < warmup:
        assert rate == pytest.approx(2.0 * (done + 1) / (warmup + 1))
    elif done <= whole * (1.0 - decay_frac):
        assert rate == pytest.approx(2.0)
    else:
        assert rate == pytest.approx(2.0 * (1.0 - done / whole) / decay_frac)
    assert 0.0 < rate <= 2.0
    assert learning_rate(spec, whole, whole) == 0.0


def test_cosine_and_linear_are_their_closed_forms_after_the_warmup() -> None:
    for schedule, form in (
        ("linear", lambda x: 1.0 - x), ("cosine", lambda x: 0.5 + 0.5 * math.cos(math.pi * x)), ("constant", lambda x: 1.0)
    ):  # fmt: skip
        spec = TrainStageSpec.model_validate({"method": "sft", "lr": 3.0, "schedule": schedule, "warmup_frac": 0.1})
        rates = [learning_rate(spec, step, 50) for step in range(5, 50)]
        assert rates == pytest.approx([3.0 * form(i / 45) for i in range(45)])
