"""The exception tree of the engine.

    EngineError
    ├── ConfigError                 a setting is unknown, of the wrong type or out of range
    ├── RequestError                a request field is wrong (HTTP 422)
    │   ├── PictureTooLargeError    a picture with more pixels than are decoded (HTTP 413)
    │   └── TooCostlyError          more work than one request may ask for (HTTP 413)
    ├── ModelError                  a model file cannot be used
    │   ├── ModelNotFoundError      no such file or name (HTTP 404)
    │   ├── UnsupportedCheckpointError   a valid file that is not a Flux part we read
    │   └── CorruptCheckpointError  truncated, empty, or not a model file at all
    ├── AdapterError                a LoRA does not fit (HTTP 422)
    │   └── AdapterChangedError     its file is replaced at this moment (HTTP 503)
    ├── MemoryBudgetError           the job does not fit (HTTP 507)
    ├── GenerationCancelled         the caller asked to stop
    ├── DownloadError               a server did not give the file (HTTP 424)
    │   ├── DownloadBrokenError     cut off on the way; what came can be resumed
    │   ├── InvalidURLError         not a URL that can be fetched (HTTP 422)
    │   ├── BlockedURLError         a guard: address, port or scheme that is not allowed (HTTP 403)
    │   ├── UnsupportedURLError     a kind of file or archive that is not read (HTTP 415)
    │   ├── DownloadTooLargeError   longer than is allowed (HTTP 413)
    │   ├── DownloadTimeoutError    took too long, or trickled (HTTP 504)
    │   ├── WrongContentError       a web page, no model, or not the pinned content (HTTP 422)
    │   └── CacheStorageError       the disk or the cache has no room (HTTP 507)
    ├── OutputError                 a picture could not be written (HTTP 507)
    └── MissingDependencyError      an optional package is needed

A message says what is wrong, where, and the one thing to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

NAMES_SHOWN = 10
"""Names in a message; a folder may hold hundreds."""
_LONGEST_SLIP = 255  # characters of what may have been meant as a name; to compare a long text takes seconds


class EngineError(Exception):
    """Base of every error that the engine raises on purpose.

    ``exit_code`` is what the command line returns, ``http_status`` what the service answers, ``field`` the setting
    or the field of a request that is at fault, where one is.
    """

    exit_code = 1
    http_status = 500
    field: str | None = None

    def put_before(self, text: str) -> None:
        """Let the field, which begins the message, begin with a text: it is another's, or a part of one."""
        self.field = f"{text}{self.field}"
        self.args = (f"{text}{self}",)


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


class PictureTooLargeError(RequestError):
    """A picture with more pixels than are decoded."""

    http_status = 413


class TooCostlyError(RequestError):
    """More work than one request may ask for; the message tells its cost and the limit."""

    http_status = 413


class ModelError(EngineError):
    """A model file cannot be used."""

    exit_code = 3


class ModelNotFoundError(ModelError):
    """No file of that name or at that place; ``field`` is the setting or the field of a request that named it."""

    http_status = 404

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


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


class AdapterChangedError(AdapterError):
    """The file of a LoRA is replaced, or goes away, as it is read: asked again, it is whole, or told as missing."""

    http_status = 503
    headers = {"Retry-After": "1"}


class MemoryBudgetError(EngineError):
    """The job needs more memory than there is; ``plan`` is its table, where there is one, and ends the message."""

    exit_code = 4
    http_status = 507

    def __init__(self, message: str, *, plan: str = "") -> None:
        super().__init__(f"{message}\n{plan}" if plan else message)
        self.plan = plan


class GenerationCancelled(EngineError):
    """The caller asked to stop; the engine stays usable."""

    exit_code = 5
    http_status = 499


class DownloadError(EngineError):
    """A server could not be reached or did not give the file. Messages name the host, never the rest of the URL."""

    exit_code = 6
    http_status = 424


class DownloadBrokenError(DownloadError):
    """The connection was lost while the file came; the next attempt goes on from there."""


class InvalidURLError(DownloadError):
    """Not a URL, or one written so that programs read it differently."""

    http_status = 422


class BlockedURLError(DownloadError):
    """A guard refuses the address, port or scheme; the allow-list may lift that."""

    http_status = 403


class UnsupportedURLError(DownloadError):
    """A URL of something that is not read: a pickle, another archive, a page."""

    http_status = 415


class DownloadTooLargeError(DownloadError):
    """The file is longer than is allowed."""

    http_status = 413


class DownloadTimeoutError(DownloadError):
    """The server was silent, too slow, or took longer in all than is allowed."""

    http_status = 504


class WrongContentError(DownloadError):
    """What came is a web page, no model file, or not of the expected size or hash."""

    http_status = 422


class CacheStorageError(DownloadError):
    """The disk is full, the cache may not hold as much, or it cannot be written to."""

    http_status = 507


class OutputError(EngineError):
    """A result could not be written; nothing partial is left behind. ``saved`` has pictures that were, before it."""

    exit_code = 7
    http_status = 507
    saved: tuple[str, ...] = ()


class MissingDependencyError(EngineError):
    """An optional package is needed; the message names the extra to install."""

    exit_code = 8
    http_status = 501


@contextmanager
def about(field: str | None) -> Iterator[None]:
    """Faults of files, names and addresses in the block, which know no request, name the field that brought them."""
    try:
        yield
    except (RequestError, ModelError, AdapterError, DownloadError, OutputError) as error:
        if field is not None and error.field is None:
            error.field = field
            error.args = (f"{field}: {error}",)
        raise


def placed(*parts: str | int) -> str:
    """The name of what lies in a field: its parts by names and its values by numbers, as ``loras[1].scale``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` is probably a slip of, for messages that ask "did you mean"."""
    if len(name) > _LONGEST_SLIP:
        return None
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def counted(count: int, noun: str) -> str:
    """How many there are of what a noun says, which is regular: "1 picture", "2 pictures"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def some_of(names: Sequence[str]) -> str:
    """Names for a message: the first of many, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{', '.join(names[:NAMES_SHOWN])}{more}" if names else "none"
