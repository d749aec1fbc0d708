"""A job from acceptance to result, and the jobs that are remembered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from ...request import Task
from .faults import ConflictError, DeadlineError, Fault, GoneError, UnknownJobError
from .messages import Moved, Outcome

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
_SAID: dict[State, str] = {
    "queued": "waits",
    "running": "is running",
    "succeeded": "has succeeded",
    "failed": "has failed",
    "cancelled": "was cancelled",
}
"""How a sentence about a job goes on."""

KEY_SECONDS = 24 * 3600.0  # that an idempotency key is remembered
MAX_REMEMBERED = 10_000  # jobs that are over, and keys


class _Bell:
    """Wakes all who wait for it. Nothing is held while nobody waits, as thousands of jobs are remembered."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: asyncio.Event | None = None

    async def wait(self) -> None:
        self._event = self._event or asyncio.Event()
        await self._event.wait()

    def ring(self) -> None:
        event, self._event = self._event, None
        if event is not None:
            event.set()


@dataclass(eq=False)
class Job:
    """One request on its way.

    Attributes:
        deadline: on the clock of ``time.monotonic``.
        bound: what that comes from, in words: a header or a setting, and its seconds.
        hurried: it comes from the header, and so from its caller.
        cost: megapixel-steps, roughly.
        caller: who waits for it, as a name for a key or an address.
        client: the address that its request came from, as far as it is known.
        interrupted: its pictures are not all that was asked for, or not finished, as its caller wanted it.
        save: its pictures are to be kept in the folder of outputs too.
        keyed: it has an idempotency key, so that its caller may come back for it.
        version: counts changes, for those who watch.
    """

    id: str
    request: Task | None
    request_id: str
    deadline: float
    cost: float
    bound: str = ""
    hurried: bool = False
    caller: str = ""
    client: str = ""
    preview_every: int = 0
    save: bool = False
    keyed: bool = False
    accepted: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    state: State = "queued"
    progress: dict[str, Any] = field(default_factory=dict)
    preview: bytes | None = None
    outcome: Outcome | None = None
    fault: Fault | None = None
    gone: bool = False
    cancelled: bool = False
    interrupted: bool = False
    version: int = 0
    _on_change: _Bell = field(default_factory=_Bell)
    _on_end: _Bell = field(default_factory=_Bell)

    @property
    def over(self) -> bool:
        return self.state in ("succeeded", "failed", "cancelled")

    @property
    def cancelling(self) -> bool:
        """Whether it is about to end, as its caller asked: it still runs, within its step."""
        return self.cancelled and not self.over

    @property
    def counted_as(self) -> str:
        """Its state, or where it failed by what its caller asked for, and by no fault of the service, how."""
        if self.state != "failed" or self.fault is None:
            return self.state
        if self.hurried and self.fault.type == DeadlineError.__name__:
            return "timed_out"
        return "refused" if self.fault.status < 500 else self.state

    @property
    def to_repeat(self) -> bool:
        """Whether the same request may bring more another time."""
        ended = self.interrupted or self.state == "cancelled" or self.cancelling
        return ended or (self.fault is not None and self.fault.may_pass)

    @property
    def told(self) -> str:
        """What it is and where, as a sentence begins."""
        return f"job {self.id} {_SAID[self.state]}"

    def start(self) -> None:
        self.state, self.started = "running", time.time()
        self._tell()

    def move(self, moved: Moved) -> None:
        self.progress, self.preview = dict(moved.progress), moved.preview or self.preview
        self._tell()

    def succeed(self, outcome: Outcome) -> None:
        self.outcome, self.interrupted = outcome, bool(outcome.told.get("interrupted"))
        self._end("succeeded")

    def fail(self, fault: Fault, *, cancelled: bool = False) -> None:
        """End without pictures.

        Args:
            cancelled: it was, though the fault is the reason for that.
        """
        if not self.over:
            self.fault = fault
            self._end("cancelled" if cancelled or fault.type == "GenerationCancelled" else "failed")

    def _end(self, state: State) -> None:
        self.state, self.finished = state, time.time()
        self.request = self.preview = None  # pictures that it brought are of no more use
        self._tell()
        self._on_end.ring()

    def _tell(self) -> None:
        self.version += 1
        self._on_change.ring()

    async def changed(self, seen: int) -> int:
        """Wait until the version is another one than ``seen``, and say which. Changes between two calls are one."""
        while self.version == seen:
            await self._on_change.wait()
        return self.version

    async def ended(self) -> None:
        """Wait until the job is over."""
        if not self.over:
            await self._on_end.wait()

    def result(self) -> Outcome:
        """The pictures.

        Raises:
            ConflictError: it is not over, or has none.
            GoneError: they are not kept any more.
        """
        if self.gone:
            raise GoneError(f"the pictures of job {self.id} are not kept any more; send the request again")
        if self.outcome is None:
            raise ConflictError(f"{self.told} and has no pictures")
        return self.outcome


@dataclass(frozen=True)
class _Key:
    digest: str
    job: Job
    until: float


class JobStore:
    """Jobs by id and by idempotency key. Pictures are kept up to a size and an age, the facts of jobs longer."""

    def __init__(self, max_bytes: int, max_seconds: float) -> None:
        self._max_bytes, self._max_seconds = max_bytes, max_seconds
        self._jobs: dict[str, Job] = {}
        self._keys: dict[str, _Key] = {}

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    @property
    def kept_bytes(self) -> int:
        return sum(job.outcome.nbytes for job in self if job.outcome)

    def add(self, job: Job, key: str | None = None, digest: str = "") -> None:
        self._jobs[job.id] = job
        if key is not None:
            self._keys[key] = _Key(digest, job, time.monotonic() + KEY_SECONDS)

    def get(self, job_id: str, caller: str | None = None) -> Job:
        """A job of one caller, or of any.

        Raises:
            UnknownJobError: there is none of that id, as far as that caller is to know.
        """
        job = self._jobs.get(job_id)
        if job is None or caller not in (None, job.caller):
            raise UnknownJobError(f"there is no job {job_id!r:.80}; it may be too long ago")
        return job

    def newest(self, limit: int, caller: str | None = None) -> list[Job]:
        """The jobs that were accepted last, the newest first: those of one caller, or of all."""
        fitting = (job for job in reversed(self._jobs.values()) if caller in (None, job.caller))
        return list(islice(fitting, limit))

    def of_key(self, key: str, digest: str) -> Job | None:
        """The job that an idempotency key stands for; one that failed by no fault of the request, or was
        interrupted, is to be done anew, and one whose pictures are not kept any more by its own request. One that
        failed by its request stands for that alone, as nothing came of it: the corrected one may have the key.

        Raises:
            ConflictError: it stands for another request.
        """
        known = self._keys.get(key)
        if known is None or known.until < time.monotonic() or known.job.to_repeat:
            return None
        if known.digest == digest:
            return None if known.job.gone else known.job
        if known.job.state == "failed":
            return None
        raise ConflictError("this Idempotency-Key was sent with another request; take a new one")

    def tidy(self) -> None:
        """Drop what is too old or too much."""
        now = time.monotonic()
        alive = [(key, each) for key, each in self._keys.items() if each.until > now]
        self._keys = dict(alive[-MAX_REMEMBERED:])
        over = [job for job in self if job.over]
        keyed = {each.job.id for each in self._keys.values()}
        for job in [job for job in over if job.id not in keyed][: max(len(over) - MAX_REMEMBERED, 0)]:
            del self._jobs[job.id]
        kept = [job for job in over if job.outcome]
        total = sum(job.outcome.nbytes for job in kept if job.outcome)
        newest = kept[-1] if kept else None
        for job in kept:
            assert job.outcome is not None and job.finished is not None
            too_old = time.time() - job.finished > self._max_seconds
            if too_old or (total > self._max_bytes and job is not newest):
                total -= job.outcome.nbytes
                job.outcome, job.gone = None, True
