"""The one tree of exceptions: the command line prints these in one line and exits 2."""

from __future__ import annotations


class TinyEmoError(Exception):
    """Base of the errors that a user can act on; the message is one line that says what to do."""


class ConfigError(TinyEmoError):
    """A recipe, an option or an environment variable has a value that cannot be used."""


class DataError(TinyEmoError):
    """Input data is missing, corrupt or of the wrong shape."""


class AssetError(TinyEmoError):
    """No source of an asset answered, or what came is not what the catalogue names."""


class StorageError(TinyEmoError):
    """S3 cannot be reached, refuses the credentials, or lacks the bucket or object."""


class PlatformError(TinyEmoError):
    """A server of the local platform does not start, answer or stop."""


class TrainingError(TinyEmoError):
    """A run cannot start, go on or be resumed."""


class LostLeaseError(TrainingError):
    """Another driver took the run over; this one writes nothing more, neither to S3 nor to the run's MLflow record."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, at most 300 characters; the name of its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
