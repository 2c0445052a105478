"""From a GGUF file to a plain transformers folder with float32 safetensors, once.

Decided: a quantized file becomes the float32 model that its numbers mean, so that it can be trained, pruned and compared
like any other. Gave up: the disk space that quantization saved (4 bytes a parameter).
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from distill_pipeline.errors import ModelNotFoundError
from distill_pipeline.hashing import sha256_of
from distill_pipeline.outcome import Progress
from distill_pipeline.storage.files import write_whole

MARKER = "resolved.json"
"""Stands in a finished folder and holds its identity and licence."""

CONVERTER = "gguf-float32/1"
"""Raise when the same file would become other weights."""


def converted_gguf(file: Path, target: Path, *, file_hash: str, progress: Progress) -> dict[str, str | None]:
    """Make ``target`` the converted model of ``file``, unless it is there, and return its marker.

    Two processes may do so at once: one converts, the other waits and finds it. A crash leaves no folder.

    Raises:
        ModelNotFoundError: transformers cannot read the file as a causal language model.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if (marker := read_marker(target)) is not None:
            return marker
        progress(f"converting {file.name} to safetensors, once")
        temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
        try:
            with _read_once():
                _convert(file, temporary)
                license_key = file_license(file)
            marker = {"identity": sha256_of([CONVERTER, file_hash]), "license": license_key}
            write_whole(temporary / MARKER, json.dumps(marker))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return marker


def read_marker(target: Path) -> dict[str, str | None] | None:
    """What a finished folder says of itself; None when there is no finished folder."""
    try:
        document: dict[str, str | None] = json.loads((target / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    from distill_pipeline.models.load import silent_bars

    with silent_bars(), _silent_tqdm(modeling_gguf_pytorch_utils):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
            loaded = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, dtype=torch.float32, local_files_only=True
            )
        except (OSError, ValueError, KeyError, IndexError, NotImplementedError, RuntimeError) as err:
            raise ModelNotFoundError(
                f"{file} cannot be read as a GGUF causal language model: {err}. Give a file whose architecture "
                "transformers knows, or the model's safetensors."
            ) from err
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict(), strict=True)
        plain.tie_weights()
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _silent_tqdm(module: Any) -> Iterator[None]:
    """A module's own ``tqdm`` bars, which transformers' setting does not reach, print nothing inside."""
    before = module.tqdm
    module.tqdm = partial(before, disable=True)
    try:
        yield
    finally:
        module.tqdm = before


@contextmanager
def _read_once() -> Iterator[None]:
    """Inside, a GGUF file's table of contents is read once, and so is the table of tensor names.

    transformers asks for the first anew for tokenizer, config and weights, and for the second for every module of the model.
    """
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(lru_cache, before)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before


def file_license(file: Path) -> str | None:
    """The licence key that the file itself names."""
    from gguf import GGUFReader

    field = GGUFReader(str(file)).get_field("general.license")
    return None if field is None else str(field.contents()).lower()
