"""How models and data sets are fetched."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
from pydantic import Field

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


class HubResource(dg.ConfigurableResource):
    """The Hugging Face Hub, or a mirror of it, or none.

    A token comes from HF_TOKEN or from ``hf auth login`` and is no field here: configuration is shown in the UI.
    """

    offline: bool = Field(
        default=False, description="Use only what is stored on this machine. False leaves the environment's choice."
    )
    endpoint: str = Field(
        default="", description="Address of a mirror. Empty: the environment variable HF_ENDPOINT, else the Hub."
    )

    def variables(self) -> dict[str, str]:
        """The environment that says so to the Hub's client and to everything that is built on it."""
        chosen = dict.fromkeys(OFFLINE_VARIABLES, "1") if self.offline else {}
        return chosen | ({"HF_ENDPOINT": self.endpoint} if self.endpoint else {})

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Hold these variables while a step works.

        The Hub's client reads them when it is first imported, so a process keeps the choice of its first step.
        """
        before = {name: os.environ.get(name) for name in self.variables()}
        os.environ.update(self.variables())
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
