"""Laws of loading models."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from distill_pipeline.errors import ConfigError, ModelNotFoundError
from distill_pipeline.models.load import load_model, load_tokenizer, resolve_device, resolve_dtype


def test_device_auto_is_one_that_is_there_and_unknown_ones_are_errors() -> None:
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="'gpu' is no device"):
        resolve_device("gpu")


def test_cuda_without_cuda_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        resolve_device("cuda:0")


def test_dtype_is_float32_on_a_cpu_and_the_checkpoints_own_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    assert resolve_dtype(tmp_path, "cpu") == "float32"
    assert resolve_dtype(tmp_path, "cuda") == "bfloat16"


def test_model_loads_for_evaluation_without_a_progress_bar(tiny_model_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(tiny_model_dir)
    assert not model.training
    assert model.dtype == torch.float32
    assert capfd.readouterr().err == ""


def test_pickled_weights_are_never_opened(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors weights"):
        load_model(folder)


def test_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no tokenizer"):
        load_tokenizer(tmp_path)
