"""The exception tree of the engine.

    EngineError
    ├── ConfigError                 a setting is unknown, of the wrong type or out of range
    ├── RequestError                a request field is wrong (HTTP 422)
    ├── ModelError                  a model file cannot be used
    │   ├── ModelNotFoundError      no such file or name (HTTP 404)
    │   ├── UnsupportedCheckpointError   a valid file that is not a Flux part we read
    │   └── CorruptCheckpointError  truncated, empty, or not a model file at all
    ├── AdapterError                a LoRA does not fit
    ├── MemoryBudgetError           the job does not fit (HTTP 507)
    ├── GenerationCancelled         the caller asked to stop
    ├── DownloadError               a fetch failed, was refused, or did not match its hash
    ├── OutputError                 a picture could not be written
    └── MissingDependencyError      an optional package is needed

A message says what is wrong, where, and the one thing to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EngineError(Exception):
    """Base of every error that the engine raises on purpose.

    ``exit_code`` is what the command line returns, ``http_status`` what the service answers.
    """

    exit_code = 1
    http_status = 500


class ConfigError(EngineError):
    """A setting is unknown, has the wrong type, or is out of range."""

    exit_code = 2


class RequestError(EngineError):
    """A field of a generation request is wrong; ``field`` names it."""

    exit_code = 2
    http_status = 422

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ModelError(EngineError):
    """A model file cannot be used."""

    exit_code = 3


class ModelNotFoundError(ModelError):
    """No file of that name or at that place."""

    http_status = 404


class UnsupportedCheckpointError(ModelError):
    """A readable file whose keys or shapes are not those of a Flux part we read."""

    http_status = 422


class CorruptCheckpointError(ModelError):
    """A file that is truncated, empty, or not a model file at all."""

    http_status = 422


class AdapterError(EngineError):
    """A LoRA that does not fit the model."""

    exit_code = 3
    http_status = 422


class MemoryBudgetError(EngineError):
    """The job needs more memory than there is."""

    exit_code = 4
    http_status = 507


class GenerationCancelled(EngineError):
    """The caller asked to stop; the engine stays usable."""

    exit_code = 5
    http_status = 499


class DownloadError(EngineError):
    """A fetch failed, was refused by a guard, or did not match its size or hash."""

    exit_code = 6
    http_status = 502


class OutputError(EngineError):
    """A result could not be written; nothing partial is left behind."""

    exit_code = 7


class MissingDependencyError(EngineError):
    """An optional package is needed; the message names the extra to install."""

    exit_code = 8
    http_status = 501


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` is probably a slip of, for messages that ask "did you mean"."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)
