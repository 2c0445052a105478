"""From a model folder to a tokenizer and a model in memory. Safetensors only; code of the model only when asked for."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from distill_pipeline.errors import ConfigError, ModelNotFoundError


@contextmanager
def silent_bars() -> Iterator[None]:
    """No progress bars of transformers inside: they would tear the lines of a log."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def resolve_device(device: str) -> str:
    """``auto`` becomes ``cuda`` where there is one, else ``cpu``; other names are checked and kept.

    Raises:
        ConfigError: the name is no torch device, or CUDA is asked for and not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as err:
        raise ConfigError(f"{device!r} is no device. Use auto, cpu, cuda or cuda:0.") from err
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device} was asked for and this machine has no CUDA device. Use auto or cpu.")
    return device


def resolve_dtype(path: Path, device: str) -> str:
    """The dtype a model folder is loaded in when nothing else is asked for: float32 on a CPU, its own elsewhere."""
    if torch.device(device).type == "cpu":
        return "float32"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ModelNotFoundError(f"{path} has no readable config.json, so it is no transformers model folder: {err}") from err
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelNotFoundError: the folder holds none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError) as err:
        raise ModelNotFoundError(f"{path} holds no tokenizer that transformers can read: {err}") from err


def load_generation_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """A model folder's own generation settings, as transformers gives them to the model it loads."""
    try:
        return GenerationConfig.from_pretrained(str(path), local_files_only=True)
    except OSError:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
        return GenerationConfig.from_model_config(config)


def load_model(path: Path, *, device: str = "cpu", dtype: str = "float32", trust_remote_code: bool = False) -> Any:
    """A causal language model in evaluation mode on ``device`` (a name, or ``auto``).

    Args:
        dtype: a torch dtype's name, or ``auto`` for :func:`resolve_dtype`.
    Raises:
        ModelNotFoundError: no config.json, or no safetensors weights; other weight files are never opened.
    """
    return _loaded(AutoModelForCausalLM, "causal language model", path, device, dtype, trust_remote_code)[0]


def load_classifier(path: Path, *, device: str = "cpu", dtype: str = "float32") -> Any:
    """A sequence classifier in evaluation mode; arguments and errors as for :func:`load_model`.

    Raises:
        ConfigError: the folder's model has no classification head that was trained: it would score at random.
    """
    model, info = _loaded(AutoModelForSequenceClassification, "sequence classifier", path, device, dtype, False)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(f"{path} is no sequence classifier: it has no weights for {missing}. Give a reward model.")
    return model


def _loaded(kind: Any, called: str, path: Path, device: str, dtype: str, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """A model of a transformers class, and what transformers says of its weights."""
    device = resolve_device(device)
    if dtype == "auto":
        dtype = resolve_dtype(path, device)
    if not any(path.glob("*.safetensors")):
        raise ModelNotFoundError(f"{path} holds no .safetensors weights. Save it with save_pretrained, or give a GGUF file.")
    try:
        with silent_bars():
            model, info = kind.from_pretrained(
                str(path), dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError) as err:
        raise ModelNotFoundError(f"{path} holds no {called} that transformers can load: {err}") from err
    return model.to(device).eval(), info
