"""Several processes train what one would: the same losses from the same steps, whoever began and whoever goes on."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from distill_pipeline.errors import ConfigError
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.training import loop
from distill_pipeline.training.examples import Example
from distill_pipeline.training.parallel import Processes, share_of, training_cost
from distill_pipeline.training.stage import train_student

KD = {"method": "logit_kd", "epochs": 2, "batch_prompts": 11, "micro_batch_tokens": 128}
OWN = {
    "method": "on_policy", "divergence": "jsd", "lambda_": 0.5, "ce_weight": 0.5, "keep_optimizer": True, "epochs": 2,
    "batch_prompts": 5, "rollouts": {"samples": 3, "max_tokens": 10},
}  # fmt: skip
"""Twelve rows in steps of 11 and 1, then of 5, 5 and 2: now and then a process has nothing to do."""

NUM_STEPS = 4 + 6

PROGRAM = """\
import json, sys
from pathlib import Path
import pyarrow as pa
from distill_pipeline.joining import join
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.records import TRAINING_SCHEMA
from distill_pipeline.training import loop, stage
from distill_pipeline.training.parallel import Processes
from distill_pipeline.training.spec import StudentSpec
from distill_pipeline.training.stage import train_student

loop.CHECKPOINT_SHARE = float("inf")
original = loop.TrainingRun._train_step


def cut(run, *args):
    if len(run.curve) == case["steps"]:
        raise KeyboardInterrupt
    original(run, *args)


loop.TrainingRun._train_step = cut
call = json.loads(Path(sys.argv[1]).read_text())
met = join("cpu", shards=False)
rows = pa.RecordBatch.from_pylist(call["rows"], schema=TRAINING_SCHEMA)
teacher = ModelFolder(Path(call["teacher"]), "tiny-teacher", None, "teacher-identity", None)
for case in call["cases"]:
    if "layout" in case:
        stage.choose_layout = lambda *args: (case["layout"], "asked")
    folder, mine = Path(case["folder"]), Processes(met.rank, met.size, shards=case["shards"], store=met.store)
    try:
        outcome = train_student(
            [rows], folder / "out", folder / "work", student=StudentSpec.model_validate(call["student"]), teacher=teacher,
            init_model=None, system=None, device="cpu", seed=0, progress=lambda line: None, checkpoint_seconds=0.0,
            processes=mine,
        )
        if mine.is_first:
            (folder / "facts.json").write_text(json.dumps(outcome.facts))
    except KeyboardInterrupt:
        pass
"""


def run_in_two(program: str, *words: str) -> list[subprocess.CompletedProcess[str]]:
    """A program in two processes that find each other as torchrun's do; torchrun itself would take seconds more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": os.getcwd(),
              "OMP_NUM_THREADS": "1"}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=900) for process in started]
    return [subprocess.CompletedProcess(p.args, p.returncode, *out) for p, out in zip(started, said, strict=True)]


class Trainings:
    """One student, trained in one process here, and in two."""

    def __init__(self, folder: Path, teacher: ModelFolder, student: Any, rows: list[dict[str, Any]], batch: Any) -> None:
        self.folder, self.teacher, self.student, self.rows, self.batch = folder, teacher, student, rows, batch

    def alone(self, name: str, *, steps: int = NUM_STEPS) -> dict[str, Any]:
        """Train in this process, up to a number of steps; the facts, or nothing where it was cut."""
        original = loop.TrainingRun._train_step

        def cut(run: Any, *args: Any) -> None:
            if len(run.curve) == steps:
                raise KeyboardInterrupt
            original(run, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.TrainingRun, "_train_step", cut)
            patch.setattr(loop, "CHECKPOINT_SHARE", float("inf"))
            try:
                return train_student(
                    [self.batch], self.folder / name / "out", self.folder / name / "work", student=self.student,
                    teacher=self.teacher, init_model=None, system=None, device="cpu", seed=0, progress=lambda line: None,
                    checkpoint_seconds=0.0,
                ).facts  # fmt: skip
            except KeyboardInterrupt:
                return {}

    def in_two(self, cases: dict[str, dict[str, Any]]) -> None:
        """Train these cases in two processes, one after the other."""
        listed = [{"folder": str(self.folder / name), **case} for name, case in cases.items()]
        call = {"cases": listed, "rows": self.rows, "teacher": str(self.teacher.path), "student": self.student.document()}
        (self.folder / "call.json").write_text(json.dumps(call))
        for process in run_in_two(PROGRAM, str(self.folder / "call.json")):
            assert process.returncode == 0, process.stderr

    def curve(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = pq.read_table(self.folder / name / "out" / "curve.parquet").to_pylist()
        return found

    def facts(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name / "facts.json").read_text())
        return found


@pytest.fixture(scope="module")
def trainings(
    tmp_path_factory: pytest.TempPathFactory, teacher: ModelFolder, make_rows: Any, make_batch: Any, make_student: Any
) -> Trainings:
    """All trainings of this module: starting a pair of processes takes longer than what they do."""
    rows, folder = make_rows(12), tmp_path_factory.mktemp("trainings")
    made = Trainings(folder, teacher, make_student(KD, OWN), rows, make_batch(rows))
    made.alone("whole")
    for name in ("cut_copies", "cut_shards"):
        made.alone(name, steps=2)
    made.in_two({
        "copies": {"shards": False, "steps": NUM_STEPS}, "shards": {"shards": True, "steps": NUM_STEPS},
        "cut_copies": {"shards": False, "steps": 6}, "cut_shards": {"shards": True, "steps": 6},
        "packed": {"shards": True, "steps": NUM_STEPS, "layout": "packed"},
    })  # fmt: skip
    return made


@pytest.mark.parametrize("how", ["copies", "shards"])
def test_two_processes_have_the_losses_of_one(trainings: Trainings, how: str) -> None:
    whole, curve = trainings.curve("whole"), trainings.curve(how)
    assert len(whole) == len(curve) == NUM_STEPS
    for one, two in zip(whole, curve, strict=True):
        exact = ("step", "stage", "method", "tokens", "rollouts", "rollout_mean_tokens", "rollout_truncated_frac")
        assert [one[key] for key in exact] == [two[key] for key in exact]
        for key in ("loss", "ce", "kl", "grad_norm", "lr"):
            assert two[key] == pytest.approx(one[key], abs=1e-4), (one["step"], key)
    assert {row["rollouts"] for row in whole} == {None, 15, 6}
    assert (trainings.facts(how)["processes"], trainings.facts(how)["weights_held_in"]) == (2, how)


def test_two_processes_that_pack_have_the_losses_of_one_that_shares(trainings: Trainings) -> None:
    assert (trainings.facts("packed")["layout"], trainings.facts("shards")["layout"]) == ("packed", "shared")
    losses = [row["loss"] for row in trainings.curve("packed")]
    assert losses == pytest.approx([row["loss"] for row in trainings.curve("whole")], abs=1e-4)


@pytest.mark.parametrize("how", ["copies", "shards"])
def test_two_processes_leave_the_weights_of_one(trainings: Trainings, how: str) -> None:
    one, two = (load_file(trainings.folder / name / "out" / "model.safetensors") for name in ("whole", how))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_a_teacher_in_shards_has_the_hash_of_the_whole_one(trainings: Trainings) -> None:
    assert trainings.facts("shards")["teacher_sha256_before"] == trainings.facts("copies")["teacher_sha256_before"]
    assert trainings.facts("shards")["teacher_sha256_after"] == trainings.facts("copies")["teacher_sha256_before"]


@pytest.mark.parametrize("how", ["copies", "shards"])
def test_one_process_two_and_one_again_train_as_one_does(trainings: Trainings, how: str) -> None:
    name = f"cut_{how}"
    shutil.copytree(trainings.folder / name, trainings.folder / f"again_{name}")
    facts = trainings.alone(f"again_{name}")
    assert facts["resumed_from_step"] == 6
    losses = [row["loss"] for row in trainings.curve(f"again_{name}")]
    assert losses == pytest.approx([row["loss"] for row in trainings.curve("whole")], abs=1e-4)


def test_only_the_first_process_leaves_files(trainings: Trainings) -> None:
    for name in ("copies", "shards"):
        assert not list((trainings.folder / name / "work").iterdir())
    for name in ("cut_copies", "cut_shards"):
        folders = sorted(path.name for path in (trainings.folder / name / "work" / "checkpoints").iterdir())
        assert folders == ["step-00000005", "step-00000006"]


LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=20)


@given(lengths=LENGTHS, size=st.integers(1, 5))
def test_each_prompt_is_in_one_share_and_shares_differ_by_one_prompt_at_most(lengths: Any, size: int) -> None:
    examples = [Example(str(i), tuple(range(a)), (tuple(range(b)),)) for i, (a, b) in enumerate(lengths)]
    shares = [share_of(examples, training_cost, rank, size) for rank in range(size)]
    assert sorted(index for share in shares for index in share) == list(range(len(examples)))
    assert all(share == sorted(share) for share in shares)
    costs = [sum(training_cost(examples[index]) for index in share) for share in shares]
    assert max(costs) <= sum(costs) / size + max(map(training_cost, examples))


def test_prompts_that_begin_alike_share_a_process() -> None:
    examples = [Example(str(i), (i % 2, 9, i), ((5, 6),)) for i in range(8)]
    assert share_of(examples, training_cost, 0, 2) == [0, 2, 4, 6]


def test_each_process_takes_a_gpu_of_its_own_or_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert [Processes(rank, 2, local_rank=rank).device("cuda") for rank in range(2)] == ["cuda:0", "cuda:1"]
    assert chosen == [0, 1]
    assert Processes(5, 8, local_rank=5).device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="process 2 would train on GPU 2 and this machine has 2"):
        Processes(2, 3, local_rank=2).device("cuda")
    with pytest.raises(ConfigError, match="2 processes cannot train on one device, cuda:1"):
        Processes(0, 2).device("cuda:1")
