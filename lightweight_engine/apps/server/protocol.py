"""HTTP on one connection, as uvicorn speaks it by h11, with a time for what a caller has to send.

uvicorn waits for the head of a request as long as a byte comes now and then, so that a few thousand idle connections
take the place of all others; and what it cannot read it answers in plain text.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...config import EngineConfig
from .faults import Fault, HeadTimeoutError, MalformedHeadError
from .guards import answer_unread
from .metrics import Metrics

_HEAD, _BODY = "head", "body"
_AGAIN_SECONDS = 1.0  # between looks at a body whose time is over, until it was answered: see guards.Guard

log = logging.getLogger(__name__)


class TimedProtocol(H11Protocol):
    """One connection. A head has to come within ``header_seconds``; a body within ``body_seconds``, also where the
    answer was given before it."""

    header_seconds: float
    body_seconds: float
    metrics: Metrics

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._timer: asyncio.TimerHandle | None = None
        self._awaited: tuple[str, Any] | None = None
        super().connection_made(transport)
        self._wait_for_next()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_for(None)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        self._wait_for_next()

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedHeadError("what came is no HTTP request, or its head is too long; send another"))

    def _wait_for_next(self) -> None:
        """Set the clock for what the caller has to send now; between requests uvicorn's own runs."""
        state = self.conn.their_state
        if self.transport.is_closing():
            self._wait_for(None)
        elif state is h11.IDLE and self.timeout_keep_alive_task is None:
            self._wait_for((_HEAD, self.cycle))
        elif state is h11.SEND_BODY:
            self._wait_for((_BODY, self.cycle))
        else:
            self._wait_for(None)

    def _wait_for(self, awaited: tuple[str, Any] | None) -> None:
        if awaited == self._awaited:  # each has one time, however many pieces it comes in
            return
        if self._timer is not None:
            self._timer.cancel()
        self._awaited = awaited
        seconds = {_HEAD: self.header_seconds, _BODY: self.body_seconds}
        self._timer = self.loop.call_later(seconds[awaited[0]], self._late) if awaited else None

    def _late(self) -> None:
        assert self._awaited is not None
        if self._awaited[0] == _BODY and not self.cycle.response_complete:
            self._timer = self.loop.call_later(_AGAIN_SECONDS, self._late)
        elif self._awaited[0] == _BODY or not self.conn.trailing_data[0]:  # it was answered, or has sent nothing at all
            self.transport.close()
        else:
            self._refuse(
                HeadTimeoutError(
                    f"the head of the request took longer than {self.header_seconds:g} s (setting header_seconds); "
                    "send it faster"
                )
            )

    def _refuse(self, error: HeadTimeoutError | MalformedHeadError) -> None:
        """Answer what never became a request, and hang up; where an answer is under way already, only that."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            fault = Fault.of(error)
            response = answer_unread(fault, self.metrics)
            head = h11.Response(status_code=response.status_code, headers=response.raw_headers)
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            log.info("broken off", extra={**fault.logged, "client": self.client[0] if self.client else None})
        self.transport.close()


def timed_protocol(config: EngineConfig, metrics: Metrics) -> type[TimedProtocol]:
    """The protocol with the times of a configuration, as uvicorn wants a class."""
    times = {"header_seconds": config.header_seconds, "body_seconds": config.body_seconds}
    return type("TimedProtocol", (TimedProtocol,), {**times, "metrics": metrics})
