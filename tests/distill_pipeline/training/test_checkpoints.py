"""Checkpoints: whole or absent, exact, and never used for another run."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_pipeline.training.checkpoints import latest_checkpoint, model_tensors, optimizer_tensors, save_checkpoint
from distill_pipeline.training.optim import make_optimizer
from distill_pipeline.training.spec import TrainStageSpec

STATE = {"run_key": "this-run", "curve": [{"loss": 0.1}]}


@pytest.fixture
def trained(random_model: Any) -> tuple[Any, torch.optim.Optimizer]:
    """A model and an optimizer with state."""
    model = random_model(layers=1, seed=0)
    optimizer = make_optimizer(model, TrainStageSpec(method="sft"))
    for _ in range(2):
        model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
        optimizer.step()
    return model, optimizer


def test_restoring_gives_back_every_bit(trained: Any, random_model: Any, tmp_path: Path) -> None:
    model, optimizer = trained
    torch.manual_seed(7)
    save_checkpoint(tmp_path, 2, model, optimizer, STATE)
    expected = torch.rand(3)
    other = random_model(layers=1, seed=9)
    other_optimizer = make_optimizer(other, TrainStageSpec(method="sft"))
    checkpoint = latest_checkpoint(tmp_path, "this-run", print)
    assert checkpoint is not None
    checkpoint.restore(other, other_optimizer)
    for saved, restored in (
        (model_tensors(model), model_tensors(other)), (optimizer_tensors(optimizer), optimizer_tensors(other_optimizer))
    ):  # fmt: skip
        assert saved.keys() == restored.keys()
        assert all(torch.equal(saved[key], restored[key]) for key in saved)
    assert torch.equal(torch.rand(3), expected)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert checkpoint.state == STATE


def test_only_the_last_two_are_kept_and_nothing_half_written_stays(trained: Any, tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, step, *trained, STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.pkl")) + list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut", "zeros", "gone"])
def test_a_torn_checkpoint_is_skipped_with_a_word(trained: Any, tmp_path: Path, name: str, harm: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, *trained, STATE | {"at": step})
    victim = tmp_path / "step-00000002" / name
    content = victim.read_bytes()
    match harm:
        case "cut":
            victim.write_bytes(content[: len(content) // 2])
        case "zeros":
            victim.write_bytes(content[:-8] + bytes(8) if name != "state.json" else bytes(len(content)))
        case "gone":
            victim.unlink()
    torn = victim.exists() and victim.read_bytes() == content
    said: list[str] = []
    checkpoint = latest_checkpoint(tmp_path, "this-run", said.append)
    assert checkpoint is not None
    if not torn:
        assert checkpoint.state["at"] == 1
        assert "step-00000002 is torn" in said[0]


FULL_DISK = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from distill_pipeline.errors import TrainingError
from distill_pipeline.training.checkpoints import latest_checkpoint, save_checkpoint
from distill_pipeline.training.loop import make_optimizer
from distill_pipeline.training.spec import TrainStageSpec

torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=4, tie_word_embeddings=True))
optimizer = make_optimizer(model, TrainStageSpec(method="sft"))
model(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()
optimizer.step()
folder = Path(sys.argv[1])
for step in range(1, 4):
    try:
        save_checkpoint(folder, step, model, optimizer, {"run_key": "this-run", "at": step})
    except TrainingError as err:
        print("ERROR", err)
        break
print("LEFT", sorted(path.name for path in folder.iterdir()))
print("AT", latest_checkpoint(folder, "this-run", print).state["at"])
"""


def test_a_full_disk_is_a_clear_error_and_the_last_good_checkpoints_survive(tmp_path: Path) -> None:
    """On a real disk of 400 kB, in a mount namespace of the test's own: two checkpoints fit, the third does not."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "program.py").write_text(FULL_DISK)
    script = 'mount -t tmpfs -o size=400k none "$1" || exit 77; exec "$2" "$3" "$1"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", "disk", sys.executable, "program.py"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare here: a full disk is not covered")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    error, left, at = done.stdout.splitlines()
    assert re.match(
        r"ERROR the checkpoint of step 3 could not be written to disk: .*[Nn]o space left.* \([\d,]+ bytes are free\)", error
    )
    assert "goes on from disk/step-00000002 when it is started again. Make room first" in error
    assert left == "LEFT ['step-00000001', 'step-00000002']"
    assert at == "AT 2"


def test_what_a_killed_run_left_half_written_goes_with_the_next_checkpoint(trained: Any, tmp_path: Path) -> None:
    (tmp_path / ".tmp-00000007-123").mkdir()
    save_checkpoint(tmp_path, 8, *trained, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_a_checkpoint_of_other_settings_is_not_used(trained: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, *trained, STATE)
    said: list[str] = []
    assert latest_checkpoint(tmp_path, "another-run", said.append) is None
    assert "belongs to other data or settings" in said[0]
    assert latest_checkpoint(tmp_path / "nothing", "this-run", said.append) is None
