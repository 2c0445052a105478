"""The folder in which a server finds a student's weights: a model folder of its own, whose files are replaced, never rewritten.

A server may read, or have mapped into memory, the weights of the step before while the next ones come: they are written beside
it and then take its name. The folder always holds a whole model, so a server that is started anew starts from the last weights.

Decided: an embedding that is also the head is written twice, and the config calls the two apart. vLLM packs a head for CPUs
when it is loaded, and on a reload (0.32) packs it again only where the weights have one by that name: a tied head would go
on as it was. An architecture whose config knows no other way than tied stays so.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from distill_pipeline.errors import ConfigError, TrainingError
from distill_pipeline.models.load import silent_bars
from distill_pipeline.storage.files import write_whole
from distill_pipeline.training.adapters import merged_tensors

MARK = "distill-rollouts.json"
"""A file that says that the folder is ours to write into."""

TEMPORARY = ".tmp-"


class WeightsFolder:
    """One server's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, tokenizer: Any) -> None:
        """Make the folder, with everything but the weights.

        Raises:
            ConfigError: it cannot be made, or holds files that no training has put there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()) and not (self.path / MARK).exists():
                raise ConfigError(
                    f"rollouts.server.folder {self.path} holds files that are not of a training's rollouts, and they would be "
                    "replaced. Give a folder of its own."
                )
            write_whole(self.path / MARK, '{"holds": "the weights of a student that is trained"}\n')
            for torn in self.path.glob(f"{TEMPORARY}*"):
                shutil.rmtree(torn, ignore_errors=True)
            tokenizer.save_pretrained(self.path)
        except OSError as err:
            raise ConfigError(f"rollouts.server.folder {self.path} cannot be written ({err}). Give another one.") from err

    def write(self, student: Any) -> None:
        """Put a student's weights, adapters merged, in place of those before.

        Raises:
            TrainingError: the disk is full or fails; the weights before are still there.
        """
        try:
            with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=self.path) as folder:
                _save(student, Path(folder))
                for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == ".safetensors"):
                    os.replace(file, self.path / file.name)
        except (OSError, SafetensorError) as err:
            free = shutil.disk_usage(self.path if self.path.exists() else "/").free
            raise TrainingError(
                f"the student's weights could not be written to rollouts.server.folder {self.path}: {err} ({free:,} bytes are "
                "free). Make room, and run again: it goes on from the last checkpoint."
            ) from err


def _save(model: Any, folder: Path) -> None:
    tensors, config = merged_tensors(model), model.config
    unties = config.tie_word_embeddings and not type(config)().tie_word_embeddings
    if unties:
        head = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is head)
        tensors[f"{name}.weight"] = head.weight.detach().clone()
        config.tie_word_embeddings = False
    try:
        with silent_bars():
            model.save_pretrained(folder, state_dict=tensors, max_shard_size="10TB")
    finally:
        if unties:
            config.tie_word_embeddings = True
