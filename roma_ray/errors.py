"""Errors that a user can cause. Each message says what happened and what to do about it.

All are picklable from their message alone, so that they cross process borders whole. Invariants that only a bug can
break are `assert`s, never one of these.
"""

import re

# An object's path is its address as a path, with the server in the bucket's part; nobody reads or types it so.
_OBJECT = re.compile(r"\b(s3|gs|az):/([^/?\s]+)(?:\?[^/\s]*)?(?=[/\s]|[^\w./-]|$)")


def with_addresses(text: str) -> str:
    """A text for people: objects' paths in it as the addresses that they are."""
    return _OBJECT.sub(r"\1://\2", text)


class RomaError(Exception):
    """Base of every expected failure; the command line prints its text without a traceback."""

    def __str__(self) -> str:
        return with_addresses(super().__str__())


class ConfigError(RomaError, ValueError):
    """A configuration file, a `--set` override or a combination of settings is not valid."""


class QuestionError(RomaError, ValueError):
    """A question file cannot be read, or holds no usable question."""


class ModelError(RomaError, ValueError):
    """A model cannot be found, loaded, or is not one whose routers can be tuned."""


class UnmeasuredError(ModelError):
    """No run has measured what a GPU is to use, and here nothing may be started."""


class CheckpointError(RomaError, ValueError):
    """A router checkpoint is foreign, truncated, unsafe, or does not fit the model."""


class NeighborError(RomaError, ValueError):
    """No usable neighborhoods: no successful questions, or nearly all neighborhoods are empty."""


class EmbeddingError(RomaError, ValueError):
    """The sentence-embedding model cannot be loaded or gives unusable vectors."""


class ArtifactError(RomaError, RuntimeError):
    """A stage's output is missing, incomplete, corrupted, or belongs to another run."""


class BusyError(ArtifactError):
    """Another process is writing this stage."""


class CacheError(ArtifactError):
    """The activation cache is truncated, foreign, or does not match the model."""


class StorageError(RomaError, OSError):
    """The storage is not writable, has no room, or is not of a supported kind."""


class BucketError(RomaError, RuntimeError):
    """A bucket refuses something, does not answer or does not exist, or there is no room here for copies of what is in it."""


class OddNameError(BucketError):
    """An object has a name that no file can have, so another program's."""


class TrainingError(RomaError, RuntimeError):
    """Finetuning produced a non-finite loss or gradient, or a frozen weight moved."""


class UnmovedError(TrainingError):
    """Nothing but rounding noise would move the gates."""


class GuardError(RomaError, RuntimeError):
    """A result that must not be reported as one."""


class IdenticalError(GuardError):
    """A tuned model is equal to its base."""


class WorkerError(RomaError, RuntimeError):
    """A worker process died or failed, or no cluster could be reached."""


class TrackingError(RomaError, ConnectionError):
    """MLflow was asked for something, or was to be given something, and cannot be used."""
