"""Teacher signals from capture to training: what is stored is what the teacher says, and nothing else is trained on."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from distill_pipeline.errors import ConfigError, IntegrityError, SignalMismatchError, TrainingError
from distill_pipeline.hashing import file_sha256
from distill_pipeline.models.load import load_model, load_tokenizer
from distill_pipeline.models.output_head import OutputHead
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.outcome import Outcome
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.signals.spec import SignalsSpec
from distill_pipeline.signals.table import SignalSource
from distill_pipeline.training import capture, stage
from distill_pipeline.training.capture import capture_signals
from distill_pipeline.training.stage import train_student

EVERYTHING = SignalsSpec(k=300, draws=40, temperatures=(1.0, 2.0), dtype="float32")
"""The tiny teacher's whole vocabulary."""

TOPK = {"method": "logit_kd", "signal": "topk", "epochs": 2}
SAMPLED = TOPK | {"signal": "sampled"}
ONLINE = TOPK | {"signal": "online"}


@pytest.fixture
def captured(teacher: ModelFolder, make_rows: Any, make_batch: Any, tmp_path: Path) -> Callable[..., Outcome]:
    """``captured(signals)`` captures 12 rows into ``signals``; keywords go to capture_signals."""

    def run(signals: SignalsSpec = EVERYTHING, name: str = "signals", **options: Any) -> Outcome:
        arguments: dict[str, Any] = {
            "kinds": ("topk", "sampled"), "max_length": 2048, "teacher": teacher, "system": None, "device": "cpu", "seed": 0,
            "progress": lambda line: None,
        }  # fmt: skip
        rows = options.pop("rows", None) or make_rows(12)
        (tmp_path / name).mkdir(exist_ok=True)
        return capture_signals(
            [make_batch(rows)], tmp_path / name, tmp_path / f"{name}_work", signals=signals, **arguments | options
        )

    return run


@pytest.fixture
def train(teacher: ModelFolder, make_rows: Any, make_batch: Any, make_student: Any, tmp_path: Path) -> Callable[..., Outcome]:
    """``train(stage, ...)`` trains on 12 rows and on what lies in ``signals``; returns the curve in ``facts["curve"]``."""

    def run(*stages: dict[str, Any], signals: SignalsSpec = EVERYTHING, name: str = "run", **options: Any) -> Outcome:
        folder = tmp_path / name
        rows = options.pop("rows", None) or make_rows(12)
        source = SignalSource("teacher_signals/teacher/all", tmp_path / "signals", options.pop("identity", teacher.identity))
        arguments: dict[str, Any] = {"teacher": teacher, "init_model": None, "system": None, "device": "cpu", "seed": 0}
        outcome = train_student(
            [make_batch(rows)], folder / "out", folder / "work", student=make_student(*stages), progress=lambda line: None,
            signals=signals, signal_sources=[source], **arguments | options,
        )  # fmt: skip
        return Outcome(outcome.counts, outcome.facts | {"curve": pq.read_table(folder / "out" / "curve.parquet").to_pylist()})

    return run


def by_definition(teacher: ModelFolder, token_ids: list[int], start: int) -> torch.Tensor:
    """The teacher's log-probabilities before each completion token: the completion alone, all logits."""
    model = load_model(teacher.path)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([token_ids])).logits[0, start - 1 : -1]
    return logits.log_softmax(-1)


def test_stored_tokens_and_tail_are_what_the_teacher_says(captured: Any, teacher: ModelFolder, tmp_path: Path) -> None:
    outcome = captured(SignalsSpec(k=7, temperatures=(1.0, 2.0), dtype="float32"), kinds=("topk",))
    counts = outcome.counts
    rows = pq.read_table(tmp_path / "signals" / "topk-00000.parquet").to_pylist()
    assert counts["completions"] == counts["captured"] == len(rows) == 36
    assert counts["tokens"] == sum(len(row["token_ids"]) - row["completion_start"] for row in rows)
    kept = []
    for row in rows[::5]:
        log_p = by_definition(teacher, row["token_ids"], row["completion_start"])
        values, ids = log_p.topk(7, dim=-1)
        assert row["ids"] == ids.flatten().tolist()
        torch.testing.assert_close(torch.tensor(row["log_probs"]), values.flatten(), atol=2e-5, rtol=1e-5)
        for number, temperature in enumerate((1.0, 2.0)):
            scaled = (log_p.double() / temperature).log_softmax(-1)
            rest = torch.logsumexp(scaled.scatter(1, ids, -torch.inf), 1)
            torch.testing.assert_close(
                torch.tensor(row["log_tail"][number::2]).double(), rest, atol=2e-5, rtol=1e-5, check_dtype=False
            )
        kept.append(values.exp().sum(1))
    assert 0.0 < outcome.facts["kept_mass_by_temperature"]["2.0"] < outcome.facts["kept_mass_by_temperature"]["1.0"] < 1.0


def test_draws_come_from_the_teachers_distribution(captured: Any, teacher: ModelFolder, tmp_path: Path) -> None:
    captured(SignalsSpec(draws=200), kinds=("sampled",))
    for row in pq.read_table(tmp_path / "signals" / "sampled-t1.0-00000.parquet").to_pylist()[::7]:
        p = by_definition(teacher, row["token_ids"], row["completion_start"]).exp().numpy()
        ends = np.cumsum(row["num_ids"])
        for position, (number, end) in enumerate(zip(row["num_ids"], ends, strict=True)):
            ids, counts = row["ids"][end - number : end], np.array(row["counts"][end - number : end])
            assert counts.sum() == 200
            assert len(set(ids)) == len(ids)
            assert np.all(np.abs(counts / 200 - p[position, ids]) < 5 * np.sqrt(p[position, ids] / 200) + 0.03)
            assert row["entropy"][position] == pytest.approx(-(p[position] * np.log(p[position])).sum(), abs=0.01)


@pytest.mark.parametrize("kd_temperature", [1.0, 2.0])
def test_the_whole_vocabulary_offline_trains_as_the_teacher_online(captured: Any, train: Any, kd_temperature: float) -> None:
    captured()
    settings = {"kd_temperature": kd_temperature, "ce_weight": 0.3}
    offline, online = (train(kind | settings, name=kind["signal"]).facts["curve"] for kind in (TOPK, ONLINE))
    for ours, theirs in zip(offline, online, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5 * max(1.0, theirs["loss"]))
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-5 * max(1.0, theirs["kl"]))
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_stored_signals_train_without_a_teacher_in_memory(captured: Any, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = SignalsSpec(k=8)
    captured(small)
    pairs = []
    original = stage._pair
    monkeypatch.setattr(stage, "_pair", lambda *args: pairs.append(original(*args)) or pairs[-1])
    for kind in (TOPK, SAMPLED):
        outcome = train(kind | {"epochs": 6}, signals=small, name=kind["signal"])
        losses = [row["kl"] for row in outcome.facts["curve"]]
        assert losses[-1] < 0.7 * losses[0]
        assert outcome.facts["teacher_sha256_before"] is outcome.facts["teacher_sha256_after"] is None
    assert [pair.teacher for pair in pairs] == [None, None]
    both = train(TOPK, SAMPLED, {"method": "sft"}, signals=small, name="staged").facts["curve"]
    assert {row["stage"] for row in both} == {0, 1, 2}


def test_layout_and_micro_batches_do_not_change_the_loss_of_stored_signals(
    captured: Any, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SignalsSpec(k=8)
    captured(small)
    for kind in (TOPK, SAMPLED):
        many = train(kind | {"micro_batch_tokens": 64}, signals=small, name="many" + kind["signal"]).facts["curve"]
        for layout, tokens in (("plain", 4096), ("packed", 256), ("varlen", 4096)):
            with monkeypatch.context() as patch:
                patch.setattr(stage, "choose_layout", lambda *args, chosen=layout: (chosen, "asked"))
                one = train(kind | {"micro_batch_tokens": tokens}, signals=small, name=layout + kind["signal"]).facts["curve"]
            for a, b in zip(many, one, strict=True):
                assert a["loss"] == pytest.approx(b["loss"], abs=1e-5 * max(1.0, b["loss"]))
                assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_every_layout_captures_the_same(captured: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {}
    for layout in ("shared", "packed", "varlen", "plain"):
        monkeypatch.setattr(capture, "choose_layout", lambda *args, chosen=layout: (chosen, "asked"))
        outcome = captured(SignalsSpec(k=7, dtype="float32"), kinds=("topk",), name=layout)
        assert outcome.facts["layout"] == layout
        found[layout] = pq.read_table(tmp_path / layout / "topk-00000.parquet").to_pylist()
    for layout, rows in found.items():
        for ours, theirs in zip(rows, found["plain"], strict=True):
            assert (ours["completion_id"], ours["ids"]) == (theirs["completion_id"], theirs["ids"]), layout
            np.testing.assert_allclose(ours["log_probs"], theirs["log_probs"], atol=1e-5)


PROGRAM = """
import json, sys, torch
from pathlib import Path
import pyarrow as pa
from distill_pipeline.models.output_head import OutputHead
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.records import TRAINING_SCHEMA
from distill_pipeline.signals.spec import SignalsSpec
from distill_pipeline.training import capture
torch.set_num_threads(1)
call = json.loads(Path(sys.argv[1]).read_text())
work = capture._capture_part
def announced(*args):
    print("PART", args[1].number, flush=True)
    return work(*args)
capture._capture_part = announced
teacher = ModelFolder(Path(call["teacher"]), "tiny-teacher", None, "teacher-identity", None)
batch = pa.RecordBatch.from_pylist(call["rows"], schema=TRAINING_SCHEMA)
capture.capture_signals(
    [batch], Path(call["out"]), Path(call["work"]), signals=SignalsSpec(k=7), kinds=("topk", "sampled"), max_length=2048,
    teacher=teacher, system=None, device="cpu", seed=0, progress=print, part_tokens=60,
)
"""


def test_a_killed_capture_goes_on_and_leaves_the_same_files(
    captured: Any, teacher: ModelFolder, make_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SignalsSpec(k=7)
    captured(small, "whole", part_tokens=60)
    call = {"teacher": str(teacher.path), "rows": make_rows(12), "out": str(tmp_path / "signals"),
            "work": str(tmp_path / "signals_work")}  # fmt: skip
    (tmp_path / "signals").mkdir()
    (tmp_path / "call.json").write_text(json.dumps(call))
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "call.json")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "PART 2\n":
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    done = len(list((tmp_path / "signals_work").glob("part-*.json")))
    assert 2 <= done < len(list((tmp_path / "whole_work").glob("part-*.json")))
    again = []
    original = capture._capture_part
    monkeypatch.setattr(capture, "_capture_part", lambda *args: again.append(args[1].number) or original(*args))
    captured(small, part_tokens=60)
    assert again[0] == done
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(files) > 4
    assert files == sorted(path.name for path in (tmp_path / "signals").iterdir())
    for name in files:
        assert file_sha256(tmp_path / "whole" / name) == file_sha256(tmp_path / "signals" / name), name


def test_training_on_signals_of_several_parts_finds_every_row(captured: Any, train: Any) -> None:
    one, many = SignalsSpec(k=8), SignalsSpec(k=8)
    captured(one)
    whole = train(TOPK, signals=one, name="whole").facts["curve"]
    captured(many, part_tokens=50, name="signals")
    parts = train(TOPK, signals=many, name="parts").facts["curve"]
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)


@pytest.mark.parametrize(("wanted", "message"), [
    (EVERYTHING.model_copy(update={"k": 9}), "k: stored 300, wanted 9"),
    (EVERYTHING.model_copy(update={"draws": 9}), "draws: stored 40, wanted 9"),
])  # fmt: skip
def test_another_size_is_refused_with_both_values(captured: Any, train: Any, wanted: SignalsSpec, message: str) -> None:
    captured()
    with pytest.raises(SignalMismatchError, match=message):
        train(SAMPLED if "draws" in message else TOPK, signals=wanted)


def test_a_temperature_that_was_not_stored_is_an_error_for_either_kind(captured: Any, train: Any) -> None:
    captured(EVERYTHING.model_copy(update={"temperatures": (1.0,)}))
    with pytest.raises(SignalMismatchError, match=r"kd_temperature 2\.0 was not stored, only 1\.0"):
        train(TOPK | {"kd_temperature": 2.0})
    with pytest.raises(SignalMismatchError, match=r"no sampled signals at kd_temperature 2\.0 \(stored: 1\.0\)"):
        train(SAMPLED | {"kd_temperature": 2.0})


def test_another_teacher_template_or_tokenizer_is_refused_with_both_values(
    captured: Any, train: Any, teacher: ModelFolder, tmp_path: Path
) -> None:
    captured()
    with pytest.raises(SignalMismatchError, match="teacher: stored teacher-identity, wanted somebody"):
        train(TOPK, identity="somebody")
    own = ChatRenderer(load_tokenizer(teacher.path))
    with pytest.raises(SignalMismatchError, match=f"chat template.*: stored {own.template_sha256}, wanted [0-9a-f]{{64}}"):
        train(TOPK, system="Be brief.")
    tokenizer = load_tokenizer(teacher.path)
    tokenizer.add_tokens(["a-new-token"])
    load_model(teacher.path).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    other = ModelFolder(tmp_path / "other", "other", None, teacher.identity, None)
    with pytest.raises(SignalMismatchError, match=f"tokenizer: stored {own.tokenizer_sha256}.*vocabulary size: stored 300"):
        train(TOPK, teacher=other)


def test_rows_that_were_not_captured_or_read_otherwise_then_are_refused(captured: Any, train: Any, make_rows: Any) -> None:
    captured()
    with pytest.raises(SignalMismatchError, match="completion 12-0 has no teacher signals"):
        train(TOPK, rows=make_rows(13))
    rows = make_rows(12)
    rows[3]["completions"][0]["raw_text"] += "?"
    with pytest.raises(
        SignalMismatchError, match="completion 3-0 has other tokens than when its teacher signals were captured"
    ):
        train(TOPK, rows=rows)


def test_a_file_that_is_cut_short_is_named(captured: Any, train: Any, tmp_path: Path) -> None:
    captured()
    path = tmp_path / "signals" / "topk-00000.parquet"
    path.unlink()  # the work folder keeps its own name for the same file
    path.write_bytes((tmp_path / "signals_work" / path.name).read_bytes()[:-9])
    with pytest.raises(IntegrityError, match=r"topk-00000\.parquet cannot be read as teacher signals"):
        train(TOPK)


def test_more_tokens_than_the_teacher_has_are_refused_before_any_work(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "load_model", lambda *args, **options: pytest.fail("the teacher was loaded"))
    with pytest.raises(ConfigError, match=r"signals\.k is 301 and tiny-teacher has 300 tokens"):
        captured(SignalsSpec(k=301))


def test_logits_that_are_not_numbers_name_the_prompts(captured: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = capture.load_model

    def broken(*args: Any, **options: Any) -> Any:
        model = original(*args, **options)
        monkeypatch.setattr(capture, "choose_layout", lambda *_: ("shared", ""))
        monkeypatch.setattr(capture, "output_head", lambda model: OutputHead(model.get_output_embeddings().weight))
        with torch.no_grad():
            model.get_output_embeddings().weight[5] = torch.nan
        return model

    monkeypatch.setattr(capture, "load_model", broken)
    with pytest.raises(TrainingError, match=r"logits are not numbers on one of these prompts: .*prompt-0"):
        captured()
    assert not list((tmp_path / "signals").iterdir())


def test_completions_that_are_left_out_are_counted(captured: Any, make_rows: Any) -> None:
    rows = make_rows(12)
    rows[0]["completions"][1] |= {"raw_text": "", "finish_reason": "length"}
    counts = captured(rows=rows, max_length=40).counts
    assert counts["no_tokens"] == 1
    assert counts["too_long"] > 0
    assert counts["completions"] == counts["captured"] + counts["too_long"] + counts["no_tokens"] == 36
    nothing = captured(name="nothing", max_length=2)
    assert nothing.failed_gate == "no token to capture: of 36 completions 36 are longer than 2"


def test_bytes_a_token_are_those_of_the_files(captured: Any, tmp_path: Path) -> None:
    outcome = captured(SignalsSpec())
    size = sum(path.stat().st_size for path in (tmp_path / "signals").glob("topk-*"))
    assert outcome.facts["bytes_a_token"]["topk"] == pytest.approx(size / outcome.counts["tokens"], abs=0.01)
