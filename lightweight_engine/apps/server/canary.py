"""Whether the worker can still draw: told by its jobs, and by a tiny one of our own where there are none for a while.

A device that has failed answers no question but that one: its process lives, holds its memory, and fails each job.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from typing import Any

from ...config import EngineConfig
from ...errors import EngineError
from ...request import MODEL_FIELDS, SMALLEST_SIDE, GenerationRequest
from .faults import DeadlineError
from .logs import JOB_ID, REQUEST_ID
from .messages import Ended, Work
from .metrics import Metrics
from .supervisor import Supervisor

CANARY_SECONDS = 120.0  # that it may take; a model that lies on the host has to be brought to the device first
_AGAIN_SECONDS = 5.0  # before the next one, where one failed, or before a look whether there is a model again

log = logging.getLogger(__name__)


class Canary:
    """Knows when the worker last did well.

    A job or canary that ends well and a step of a job are signs of health. They hold for ``canary_minutes``, and for
    the worker that gave them; a canary is due at half of that time, or at once where a job failed by no fault of its
    request. A model that is not kept, or was unloaded, is not brought back for it: then nothing is drawn or said.
    """

    def __init__(self, config: EngineConfig, supervisor: Supervisor, metrics: Metrics) -> None:
        self._seconds = config.canary_minutes * 60
        self._supervisor, self._metrics = supervisor, metrics
        self._well = -math.inf  # on the clock of time.monotonic, as the next two
        self._failed = -math.inf
        self._due = -math.inf
        self._worker: int | None = None
        self._model: dict[str, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why it is not known that a job would succeed now."""
        if not self._seconds or self._rests:
            return None
        if self._worker != self._supervisor.pid:
            return "the worker has drawn nothing yet"
        if self._failed > self._well:
            return "the last job or canary failed; see the log"
        if time.monotonic() - self._well > self._seconds:
            return f"no job or canary has gone well for {self._seconds / 60:g} min (setting canary_minutes)"
        return None

    @property
    def seconds_until_due(self) -> float | None:
        """Until the next canary is to be sent, or to be thought of again; None for never."""
        if not self._seconds:
            return None
        if self._rests:
            return min(self._seconds / 2, _AGAIN_SECONDS)
        return 0.0 if self._worker != self._supervisor.pid else max(self._due - time.monotonic(), 0.0)

    @property
    def _rests(self) -> bool:
        return not self._supervisor.facts.get("held_bytes")

    def lives(self) -> None:
        """A job has gone well, or on by a step."""
        self._worker, self._well = self._supervisor.pid, time.monotonic()
        self._due = self._well + self._seconds / 2

    def saw(self, work: Work, ended: Ended) -> None:
        """A caller's job is over."""
        if ended.outcome is not None:
            self.lives()
            if isinstance(work.request, GenerationRequest):  # so that a canary brings no other model back
                self._model = {name: getattr(work.request, name) for name in MODEL_FIELDS}
        elif ended.fault is not None and ended.fault.status == 500:
            self._fails(self._supervisor.pid, again=0.0)

    async def send(self) -> None:
        """Draw the smallest picture that there is, with the model in use."""
        smallest: dict[str, Any] = {
            "width": SMALLEST_SIDE,
            "height": SMALLEST_SIDE,
            "steps": 1,
            "seed": 0,
            "subseed": 0,
        }
        request = GenerationRequest(**self._model, **smallest, prompt="", enable_hr=False)
        work = Work(f"canary-{secrets.token_hex(4)}", request, hashed=False)
        worker = self._supervisor.pid
        REQUEST_ID.set(None)
        JOB_ID.set(work.job)
        try:
            ended = await self._drawn(work)
            problem = ended.fault.type if ended.fault else None
        except EngineError as error:
            problem = type(error).__name__
        self._metrics.canaries.add(result="failed" if problem else "well")
        if problem is None:
            self.lives()
        else:
            log.error("a canary failed", extra={"error": problem})
            self._fails(worker, again=_AGAIN_SECONDS)

    async def _drawn(self, work: Work) -> Ended:
        drawing = self._supervisor.run(work, lambda _: None)
        done, _ = await asyncio.wait([drawing], timeout=CANARY_SECONDS)
        if not done:  # it stands still, and will not listen either
            self._supervisor.kill()
            await asyncio.wait([drawing])
            drawing.exception()
            raise DeadlineError("the canary took too long")
        return await drawing

    def _fails(self, worker: int | None, again: float) -> None:
        self._worker, self._failed = worker, time.monotonic()
        self._due = self._failed + min(again, self._seconds / 2)
