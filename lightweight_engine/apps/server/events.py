"""A job's progress as server-sent events, for any number of watchers at a bounded cost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from .jobs import Job
from .schemas import JobAnswer, as_base64
from .service import Service

HEARTBEAT_SECONDS = 15.0  # between signs of life, as proxies close silent streams
EVENTS_PER_SECOND = 500.0
"""That all watchers together are told at most, so that the front answers others however many watch. Of what happens
meanwhile, each is told the latest; the end of a job is told at once."""


class Events:
    """The streams of a service. ``watching``: those that are open."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._last: tuple[object, str] = None, ""
        self.watching = 0

    async def of(self, job: Job) -> AsyncIterator[str]:
        """``progress`` … and then ``result`` or ``error``, each as text to be sent."""
        self.watching += 1
        try:
            seen = -1
            while not job.over:
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        seen = await job.changed(seen)
                except TimeoutError:
                    yield ": waiting\n\n"
                    continue
                if not job.over:
                    yield self._progress(job)
                    await self._pause(job)
            yield _end(job)
        finally:
            self.watching -= 1

    async def _pause(self, job: Job) -> None:
        """Wait until it is this watcher's turn again, or the job is over."""
        try:
            async with asyncio.timeout(self.watching / EVENTS_PER_SECOND):
                await job.ended()
        except TimeoutError:
            pass

    def _progress(self, job: Job) -> str:
        """The event of a job, made once for all who watch it."""
        position = self._service.position(job)
        made_for = job.id, job.version, position
        known, text = self._last
        if known != made_for:
            preview = None if job.preview is None else as_base64(job.preview)
            place = {"state": job.state, "position": position}
            text = _event("progress", job.version, {**place, **job.progress, "preview": preview})
            self._last = made_for, text
        return text


def _end(job: Job) -> str:
    if job.fault is not None:
        return _event("error", job.version, job.fault.body(job.request_id))
    return _event("result", job.version, JobAnswer.of(job, None).model_dump(mode="json"))


def _event(name: str, number: int, data: dict[str, Any]) -> str:
    return f"event: {name}\nid: {number}\ndata: {json.dumps(data)}\n\n"
