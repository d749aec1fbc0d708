"""What goes wrong, as it crosses from the worker to the front and from there to the caller.

    {"error": {"type", "message", "param", "request_id"}, "detail": message}

``detail`` is where clients of other engines' APIs look. No traceback, folder or secret is part of a message, and one
that advises what a caller cannot do says who can.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...config import EngineConfig
from ...errors import EngineError
from ...request import GenerationRequest

# An absolute path in a message; its last part is what tells a caller which file is meant.
_PATH = re.compile(r"(?<![\w.:/…-])/(?:[^\s/'\",;:()]+/)+([^\s/'\",;:()]*)")

# Settings by whole words; those that a request has as well are a caller's.
_SETTINGS = [name for name in EngineConfig.model_fields if "_" in name and name not in GenerationRequest.model_fields]
_ADVICE = (
    rf"(?:add|set|raise|choose|see)\b[^;,]*?(?:the setting \w+|output folder|`tokens`|\b(?:{'|'.join(_SETTINGS)})\b)",
    r"(?:change|check|mend)\b[^;,]*? permissions",
    r"pip install",
    r"put (?:it|the file|\S+ of FLUX)",
    r"free (?:some )?space",
    r"switch it off",
)
_OPERATORS = re.compile(rf"\b(?:{'|'.join(_ADVICE)})[^;,]*?(?=,? or |[;,]|$)")
"""Advice on settings, packages, files and disks, to where it ends."""

# The field that a message begins with, and its place where the field is a list.
_FIELD = re.compile(r"(?P<name>\w+)(?P<place>\[\d+\])?")
_FIRST_FIELDS = re.compile(r"^\w+(?:\[\d+\])?(?:(?=[:.])|(?:, \w+)*(?= had no effect ))")


class Refusal(EngineError):
    """Base of what the service itself refuses; the status of each is in ``http_status``."""

    http_status = 400

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.headers = dict(headers or {})


class MalformedBodyError(Refusal):
    """The body is not JSON as it is meant to be."""


class UnauthorizedError(Refusal):
    """No key, or a wrong one."""

    http_status = 401


class ForbiddenError(Refusal):
    """A web page that is not allowed to call the service."""

    http_status = 403


class UnknownJobError(Refusal):
    """No job, or no picture, of that name."""

    http_status = 404


class NotSupportedError(Refusal):
    """An address of an extension that does not exist here. 404, which is how its clients learn that."""

    http_status = 404


class NotAcceptableError(Refusal):
    """The answer cannot be given in the form that was asked for."""

    http_status = 406


class MalformedHeadError(Refusal):
    """What came is no HTTP, or its head is too long."""


class HeadTimeoutError(Refusal):
    """The head of a request came too slowly."""

    http_status = 408


class BodyTimeoutError(Refusal):
    """The body came too slowly."""

    http_status = 408


class ConflictError(Refusal):
    """A job that is over, or an idempotency key that stands for another request."""

    http_status = 409


class GoneError(Refusal):
    """Pictures that are not kept any more."""

    http_status = 410


class BodyTooLargeError(Refusal):
    """The body is longer than is allowed."""

    http_status = 413


class MediaTypeError(Refusal):
    """The body is said to be something else than JSON."""

    http_status = 415


class WrongHostError(Refusal):
    """A request for a name that is not ours: somebody's DNS points here."""

    http_status = 421


class QueueFullError(Refusal):
    """As many jobs wait as may."""

    http_status = 429


class UnavailableError(Refusal):
    """The service starts, ends, or has lost its worker; the same request may succeed later."""

    http_status = 503


class DeadlineError(Refusal):
    """The job took longer than it was given."""

    http_status = 504


class NotOfferedError(Refusal):
    """Something that an interface knows, and this engine has not."""

    http_status = 501


@dataclass(frozen=True)
class Fault:
    """An error as data."""

    type: str
    message: str
    status: int
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: EngineError) -> Fault:
        """An error that was raised on purpose."""
        param = getattr(error, "field", None) or getattr(error, "param", None)
        return cls(
            type=type(error).__name__,
            message=without_paths(str(error)),
            status=error.http_status,
            param=param,
            headers=getattr(error, "headers", {}),
        )

    @classmethod
    def unexpected(cls) -> Fault:
        """Anything else; what it was is for the log alone."""
        return cls("InternalError", "an error that should not have happened; the log has it under request_id", 500)

    def body(self, request_id: str | None) -> dict[str, Any]:
        """The answer to a request that ended so."""
        message = for_callers(self.message)
        told = {"type": self.type, "message": message, "param": self.param, "request_id": request_id}
        return {"error": told, "detail": message}


def without_paths(text: str) -> str:
    """A message with the folders of absolute paths left out."""
    return _PATH.sub(r"…/\1", text)


def for_callers(text: str) -> str:
    """A message whose advice is for the operator of the service alone, with a word on that where it is first given."""
    return _OPERATORS.sub(r"\g<0> (as the operator of this service can)", text, count=1)


def their_name(field: str, names: Mapping[str, str]) -> str:
    """What a caller knows a field as.

    Args:
        names: theirs by ours, with ``[]`` where the place in a list belongs; without a place, all of the list is meant.
            A field with its place may have a name of its own. What follows a dot stays.
    """
    found = _FIELD.match(field)
    rest = field[found.end() :] if found else ""
    if found is None or (rest and not rest.startswith(".")):
        return field
    if found["place"] and found[0] in names:
        return names[found[0]] + rest
    if found["name"] not in names:
        return field
    name, _, within = names[found["name"]].partition("[]")
    placed = found["place"] and "[]" in names[found["name"]]
    return (f"{name}{found['place']}{within}" if placed else name) + rest


def in_their_words(message: str, names: Mapping[str, str]) -> str:
    """A message that begins with a field, or with those that had no effect, with the names that its reader knows."""
    return _FIRST_FIELDS.sub(lambda found: ", ".join(their_name(each, names) for each in found[0].split(", ")), message)
