"""What a model says of its own licence, before its weights are fetched: its card, the Hub's model info, or the file itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SECONDS = 30.0


@dataclass(frozen=True)
class DeclaredLicense:
    """``key`` is lower case, None where nothing was said; ``where`` says who said so, or why nobody could be asked."""

    key: str | None
    where: str


def card_license(folder: Path) -> str | None:
    """The licence key in the metadata of a folder's model card."""
    from huggingface_hub import ModelCard

    if not (folder / "README.md").is_file():
        return None
    try:
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except ValueError:
        return None
    return _key_of(data)


def hub_license(reference: str, revision: str | None) -> DeclaredLicense:
    """What the Hub's model info says; without an answer, the card in the local Hub cache. Honours HF_HUB_OFFLINE.

    Raises:
        RepositoryNotFoundError, RevisionNotFoundError: of the Hub's client; the Hub says that it has no such model.
    """
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(reference, revision=revision, timeout=_SECONDS)
        data = {name: getattr(info.card_data, name, None) for name in ("license", "license_name")}
        return DeclaredLicense(_key_of(data), f"the Hub's model info of {reference}")
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except (errors.HTTPError, OSError) as err:  # type: ignore[attr-defined]  # of the HTTP client that the Hub's client uses
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the Hub gave no model info ({type(err).__name__})"
    card = try_to_load_from_cache(reference, "README.md", revision=revision)
    if isinstance(card, str):
        return DeclaredLicense(card_license(Path(card).parent), f"the card of {reference} in the local Hub cache")
    return DeclaredLicense(None, f"{why}, and the local Hub cache has no card of {reference}, which is no folder here")


def _key_of(data: Mapping[str, Any]) -> str | None:
    """A card's licence: ``license``, or ``license_name`` where that says ``other``; several stand beside each other."""
    found = data.get("license")
    if isinstance(found, list):
        found = ", ".join(str(key) for key in found)
    if found == "other" and isinstance(data.get("license_name"), str):
        found = data["license_name"]
    return found.lower() if isinstance(found, str) and found else None
