"""What goes wrong, as it crosses from the worker to the front and from there to the caller.

    {"error": {"type", "message", "param", "request_id"}, "detail": message}

``detail`` is where clients of other engines' APIs look. No traceback, folder or secret is part of a message: see
``wording``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import DownloadError, EngineError
from ..wording import for_callers, without_paths

LONGEST_MESSAGE = 2**14
"""Characters: a memory plan has some thousand. A name that a caller gave may have millions, which are worded and sent
while nobody else is answered."""
_LONGEST_FIELD = 255
_LONGEST_REASON = 1000  # characters in the log, of which a caller may cause any number

# Of fields that hold what is to be drawn, and from where on a message repeats what a caller gave: no prompt is logged.
_PROMPTS = re.compile(r"prompt|adetailer|script|infotext", re.IGNORECASE)
_GIVEN = re.compile(r"(?<!\w)b?['\"<{]|(?<=: )\[|\(got ")


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
            message=without_paths(str(error)[:LONGEST_MESSAGE]),
            status=error.http_status,
            param=param and param[:_LONGEST_FIELD],
            headers=getattr(error, "headers", {}),
        )

    @classmethod
    def unexpected(cls) -> Fault:
        """Anything else; what it was is for the log alone."""
        return cls("InternalError", "an error that should not have happened; the log has it under request_id", 500)

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed later: it failed by the service, or by a server that it asked."""
        return self.status >= 500 or self.status == DownloadError.http_status

    @property
    def logged(self) -> dict[str, Any]:
        """What the log has of it: status, type, and the message; of a prompt no more than that it is one."""
        reason = self.message
        if (_PROMPTS.search(reason) or _PROMPTS.search(self.param or "")) and (given := _GIVEN.search(reason)):
            reason = f"{reason[: given.start()]}…"
        return {"status": self.status, "error": self.type, "reason": reason[:_LONGEST_REASON]}

    def body(self, request_id: str | None) -> dict[str, Any]:
        """The answer to a request that ended so."""
        message = for_callers(self.message)
        told = {"type": self.type, "message": message, "param": self.param, "request_id": request_id}
        return {"error": told, "detail": message}
