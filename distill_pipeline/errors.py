"""The errors users can meet. Each is also the standard-library error a caller would expect to catch.

Every message says what happened, with which value, and what to do. The docstring of a class says when it is raised and
whether running the same thing again can help. Only ``assets/`` turns one into a failure of the orchestrator.
"""


class DistillError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(DistillError, ValueError):
    """The experiment file, an option or a name is wrong. A rerun helps only after an edit."""


class SourceError(DistillError, ValueError):
    """A prompt source cannot be read, or holds no usable row. A rerun helps only after the file is mended."""


class ModelNotFoundError(DistillError, FileNotFoundError):
    """A model reference leads nowhere. A rerun helps if the network or the folder was missing."""


class LicenseError(DistillError, PermissionError):
    """The teacher's terms forbid training on its outputs, or are not known, and nobody gave a reason why that is accepted."""


class MissingInputError(DistillError, LookupError):
    """A stage needs an artifact that was not made yet, or only under other settings. Make that one first."""


class IntegrityError(DistillError, RuntimeError):
    """Stored files or counts contradict their manifest. A rerun does not help: restore or remove the named file."""


class StorageError(DistillError, OSError):
    """A store cannot be listed, read or written: rights, a missing bucket, the network, a full disk. A rerun helps once that is
    mended."""


class EmptyResultError(DistillError, RuntimeError):
    """A stage kept nothing, so that the next one has nothing to work on. A rerun helps only after a change."""


class GenerationError(DistillError, RuntimeError):
    """The teacher as a whole stopped answering. What it answered is stored: a rerun asks only for the rest."""


class BudgetError(DistillError, RuntimeError):
    """A teacher's budget is used up. What it answered is stored: with a larger budget a rerun asks only for the rest."""


class TrainingError(DistillError, RuntimeError):
    """Training cannot go on (no trainable token, a loss that is not a number). The last checkpoint is intact."""


class VocabularyMismatchError(DistillError, ValueError):
    """Teacher and student give different meanings to the same token ids. Choose a pair with one tokenizer, or uld."""


class SignalMismatchError(DistillError, ValueError):
    """Stored teacher signals do not fit what they are wanted for (tokens, vocabulary, temperature). Capture them anew."""


class MissingExtraError(DistillError, ImportError):
    """An optional package is not installed. The message names the package and the pip command."""

    @classmethod
    def of(cls, what: str, package: str, extra: str) -> "MissingExtraError":
        """The error of something that needs a package of one of this project's extras."""
        return cls(f"{what} needs the package {package}. Install it: pip install 'distill-pipeline[{extra}]'")


class ComputeError(DistillError, RuntimeError):
    """A worker process or a cluster was lost while it worked. A rerun helps if memory or the machine was the cause."""
