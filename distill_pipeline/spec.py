"""The base of every model in the experiment file: frozen, and strict about names it does not know."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints

NAME_PATTERN = r"^[a-z0-9]+(_[a-z0-9]+)*$"
"""Names become folders, asset keys and tag values: lower case, digits and single underscores cannot leave any of them."""

ANY_DOMAIN = "*"
"""Where settings are given by domain: every domain that has none of its own."""

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=63)]


class Spec(BaseModel):
    """One part of the experiment file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def document(self) -> dict[str, Any]:
        """The part as JSON-able data, defaults written out: what goes into manifests and versions."""
        return self.model_dump(mode="json")
