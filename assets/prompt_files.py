"""Whether the prompt files of an experiment changed: by content, looked at cheaply.

Size and time of change only decide which files are read again; what counts is the hash of their content. A file that was
changed seconds ago is left for the next look, because its writer may not be done.
"""

from collections.abc import Callable, Collection, Mapping

from pydantic import BaseModel, ConfigDict

from distill_pipeline.experiment import Experiment
from distill_pipeline.hashing import files_version

SETTLE_SECONDS = 5.0

Stamps = Mapping[str, tuple[str, float | None]]
"""By path: a text that changes when the file does, and when it was changed (Unix seconds, None where nobody knows)."""


class Seen(BaseModel):
    """What a sensor remembers from one look to the next, as JSON in its cursor."""

    model_config = ConfigDict(frozen=True)
    stamps: dict[str, str] = {}
    hashes: dict[str, str] = {}
    asked: str | None = None
    """Contents that a run was asked for, or that the stored pool was made from."""
    number: int = 0
    """How many runs were asked for."""

    @property
    def contents(self) -> str:
        """One hash for all files together."""
        return files_version(self.hashes)


class UnsettledError(Exception):
    """A file is being written. The next look may find it whole."""


def look(
    seen: Seen, stamps_now: Callable[[], Stamps], hashes_of: Callable[[Collection[str]], Mapping[str, str]], now: float
) -> Seen:
    """What is there now; only files whose stamp changed are read.

    Raises:
        UnsettledError: a changed file is not settled, or changed while it was read.
    """
    stamps = stamps_now()
    changed = [path for path, (mark, _) in stamps.items() if mark != seen.stamps.get(path)]
    fresh = [path for path in changed if is_fresh(stamps[path][1], now)]
    if fresh:
        raise UnsettledError(f"{fresh[0]} was changed less than {SETTLE_SECONDS:.0f} s ago and may still be written")
    read = hashes_of(changed) if changed else {}
    after = stamps_now() if changed else stamps
    if after != stamps:
        raise UnsettledError(f"{sorted(set(after.items()) ^ set(stamps.items()))[0][0]} changed while prompt files were read")
    hashes = {path: read[path] if path in read else seen.hashes[path] for path in stamps}
    return seen.model_copy(update={"stamps": {path: mark for path, (mark, _) in stamps.items()}, "hashes": hashes})


def is_fresh(modified: float | None, now: float) -> bool:
    """Whether a file was changed moments ago. A time in the far future is a wrong clock, not a fresh file."""
    return modified is not None and abs(now - modified) < SETTLE_SECONDS


def look_at_sources(experiment: Experiment, seen: Seen, now: float) -> Seen:
    """The prompt files of an experiment as they are now.

    Raises:
        SourceError: a source has no file, or one that cannot be read.
        UnsettledError: wait and look again.
    """
    from distill_pipeline.prompts.sources import source_files, source_stamps

    sources = experiment.prompt_pool.sources

    def stamps_now() -> Stamps:
        return {path: stamp for source in sources for path, stamp in source_stamps(source, experiment.resolve_path).items()}

    def hashes_of(paths: Collection[str]) -> Mapping[str, str]:
        found = (source_files(source, experiment.resolve_path, only=paths) for source in sources)
        return {path: digest for files in found for path, digest in files.items()}

    return look(seen, stamps_now, hashes_of, now)
