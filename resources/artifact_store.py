"""Where artifacts lie."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

if TYPE_CHECKING:
    from distill_pipeline.storage.artifacts import ArtifactStore

REPOSITORY = Path(__file__).resolve().parent.parent


class ArtifactStoreResource(dg.ConfigurableResource):
    """The artifact store of a run.

    The environment is read when the store is opened, so that one set of definitions serves a laptop and a bucket.
    """

    root: str = Field(
        default="",
        description="Folder or fsspec URL. Empty: the environment variable DISTILL_ROOT, else ./data. "
        "A relative path starts at the repository, whatever the working directory is.",
    )

    def location(self) -> str:
        """The root as an absolute path or a URL."""
        root = self.root or os.environ.get("DISTILL_ROOT") or "data"
        return root if "://" in root else str(REPOSITORY / Path(root).expanduser())

    def open(self) -> "ArtifactStore":
        """The store at :meth:`location`."""
        from distill_pipeline.storage.artifacts import ArtifactStore

        return ArtifactStore(self.location())
