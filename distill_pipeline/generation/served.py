"""A model that a server has: known by its name there, since nobody can look at its weights."""

from dataclasses import dataclass
from pathlib import Path

from distill_pipeline.generation.spec import ServerSpec
from distill_pipeline.hashing import sha256_of


@dataclass(frozen=True)
class ServedModel:
    """What takes the place of a model folder where a model is served.

    ``reference`` is its name at the server, ``revision`` the experiment's label for it, ``tokenizer_dir`` a folder whose
    tokenizer counts what the server does not report.
    """

    reference: str
    revision: str | None
    server: ServerSpec
    tokenizer_dir: Path | None = None

    @property
    def identity(self) -> str:
        """SHA-256 of name and revision: the address is no part of it, so a model may move between servers."""
        return sha256_of(["served model", self.reference, self.revision])
