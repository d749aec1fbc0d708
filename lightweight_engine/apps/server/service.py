"""The heart of the front: which jobs are accepted, in which order they are done, and how they end."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ...config import EngineConfig
from ...core.images import check_folder
from ...errors import EngineError, GenerationCancelled, about
from ...request import GenerationRequest, Task
from .canary import Canary
from .estimate import Pace
from .faults import ConflictError, DeadlineError, Fault, QueueFullError, Refusal, UnavailableError
from .jobs import Job, JobStore
from .logs import JOB_ID, REQUEST_ID
from .messages import Ended, Moved, Work
from .metrics import Metrics
from .sources import Sources
from .supervisor import Child, Supervisor
from .tasks import check, cost_of, digest_of

CANCEL_SECONDS = 60.0
"""That a worker is given to end a cancelled job, before it is ended itself: a step and a decode may take as long."""
_TICK = 0.5  # seconds between looks at the clock

log = logging.getLogger(__name__)


class Service:
    """Accepts jobs, and has them done one after another by the worker."""

    def __init__(self, config: EngineConfig, start: Callable[[], Child], child: Child) -> None:
        self.config = config
        self.metrics = Metrics()
        self.jobs = JobStore(int(config.keep_results_mib * 2**20), config.keep_results_seconds)
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None
        self.draining = False
        self.ended = asyncio.Event()
        self.fatal: int | None = None  # exit code of an end that nobody asked for
        self.pace = Pace()
        self.supervisor = Supervisor(start, child, self._give_up)
        self.canary = Canary(config, self.supervisor, self.metrics)
        self._sources = Sources(config)
        self._arrived = asyncio.Event()
        self._tasks = [asyncio.create_task(self._dispatch()), asyncio.create_task(self._watch_clock())]

    @property
    def not_ready(self) -> str | None:
        """Why a job would not be accepted now; None if it would."""
        if self.draining or self.fatal:
            return "the service is ending"
        if self.supervisor.state != "ready":
            return "the model is being loaded"
        if reason := self.canary.reason:
            return reason
        return "the queue is full" if len(self.waiting) >= self.config.queue_max else None

    @property
    def loaded(self) -> bool | None:
        """Whether the model in use is in memory, or is brought there by the job that runs; None: there is no worker."""
        if self.supervisor.state != "ready":
            return None
        drawing = self.running is not None and isinstance(self.running.request, GenerationRequest)
        return drawing or self.supervisor.facts["held_bytes"] > 0

    @property
    def max_body(self) -> int:
        """Bytes of a request's body."""
        return int(self.config.max_body_mib * 2**20)

    def position(self, job: Job) -> int | None:
        """How many jobs are done before one that waits."""
        return self.waiting.index(job) + (self.running is not None) if job in self.waiting else None

    def gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """What can be measured now: name -> (help, value)."""
        return {
            "lwe_ready": ("Whether a job would be accepted.", lambda: float(self.not_ready is None)),
            "lwe_jobs_waiting": ("Jobs that wait.", lambda: len(self.waiting)),
            "lwe_jobs_running": ("Jobs that run.", lambda: float(self.running is not None)),
            "lwe_queue_seconds": ("Seconds that a job which came now would wait.", self.seconds_ahead),
            "lwe_results_bytes": ("Finished pictures that are kept.", lambda: self.jobs.kept_bytes),
            "lwe_worker_restarts": (
                "Workers that were started in place of dead ones.",
                lambda: self.supervisor.restarts,
            ),
            "lwe_worker_resident_bytes": ("Memory of the worker on the host.", self.supervisor.resident_bytes),
            "lwe_device_held_bytes": (
                "Weights on the device, as of the last job.",
                lambda: float(self.supervisor.facts.get("held_bytes", 0)),
            ),
        }

    def facts(self) -> dict[str, tuple[str, dict[str, str]]]:
        """What is told by labels: name -> (help, labels), which are none until the worker is ready."""
        told = self.supervisor.facts
        labels = {"name": told["model"], "demonstration": str(told["demonstration"]).lower()} if told else {}
        return {"lwe_model_info": ("The model in use, as of the last job.", labels)}

    async def submit(
        self,
        task: Task,
        *,
        request_id: str,
        seconds: float | None = None,
        key: str | None = None,
        caller: str = "",
        preview_every: int = 0,
        save: bool = False,
        client: str = "",
    ) -> Job:
        """Accept a job, or find the one that its idempotency key stands for.

        What the task says, names and brings is looked at in a thread, as folders may be slow and pictures large: a job
        that would be refused when its turn comes does not wait for that.

        Args:
            seconds: that it may wait and run, if less than is configured.
            key: of idempotency, unique to its caller.
            caller: who is asking, of whose jobs only some may wait at once.
            save: keep what is drawn in the folder of outputs too.
            client: where the request came from, for the log.

        Raises:
            EngineError: a field is wrong, or what it names is not there.
            OutputError: what is drawn is to be kept, and cannot be.
            Refusal: the queue is full, or its caller's share of it; the service ends; or the key stands for another
                request.
        """
        is_tiny = self.supervisor.facts.get("demonstration")
        await asyncio.to_thread(check, task, self.config, is_tiny=is_tiny)
        digest = await asyncio.to_thread(digest_of, task, save=save) if key is not None else ""
        if key is not None and (known := self.jobs.of_key(key, digest)):
            return known
        await asyncio.to_thread(self._check_files, task, save)
        if key is not None and (known := self.jobs.of_key(key, digest)):  # of the same caller, meanwhile
            return known
        self._check_room(caller)
        job = Job(
            id=secrets.token_hex(8),
            request=task,
            request_id=request_id,
            deadline=time.monotonic() + min(seconds or math.inf, self.config.job_seconds),
            bound=_bound(seconds, self.config.job_seconds),
            hurried=seconds is not None and seconds < self.config.job_seconds,
            cost=cost_of(task),
            caller=caller,
            client=client,
            preview_every=preview_every,
            save=save,
            keyed=key is not None,
        )
        self.jobs.add(job, key, digest)
        self.waiting.append(job)
        self._arrived.set()
        log.info("accepted", extra={"job": job.id, "waiting": len(self.waiting)})
        return job

    def cancel(self, job: Job) -> None:
        """End a job: at once if it waits, within a step if it runs.

        Raises:
            ConflictError: it is over already.
        """
        if job.over:
            if job.state == "cancelled":
                return
            raise ConflictError(f"{job.told} already")
        job.cancelled = True
        if job in self.waiting:
            self.waiting.remove(job)
            self._finish(job, Fault.of(GenerationCancelled("the job was cancelled by its caller")))
        else:
            self.supervisor.cancel(job.id)

    def interrupt(self, job: Job) -> None:
        """End a running job within a step, with the pictures so far.

        Raises:
            ConflictError: it is over, or has not begun.
        """
        self._interrupt(job, skip=False)

    def skip(self, job: Job) -> None:
        """End the batch that a job draws within a step, as it is then, and go on with the next.

        Raises:
            ConflictError: it is over, or has not begun.
        """
        self._interrupt(job, skip=True)

    def _interrupt(self, job: Job, *, skip: bool) -> None:
        if job.over:
            raise ConflictError(f"{job.told} already")
        if job in self.waiting:
            raise ConflictError(f"job {job.id} has not begun, and has no pictures yet; cancel it instead")
        self.supervisor.interrupt(job.id, skip=skip)

    def seconds_ahead(self) -> float:
        """How long a job that came now would wait, roughly."""
        return self._seconds_of(self.waiting)

    def _seconds_of(self, jobs: Iterable[Job]) -> float:
        """How long these take after what is left of the running job, roughly."""
        left = _left(self.running, self.pace) if self.running else 0.0
        return left + sum(self.pace.seconds(job.cost) for job in jobs)

    async def drain(self) -> None:
        """Accept nothing more, send away what waits, let the running job end or cancel it, and end the worker."""
        if self.draining:
            return
        self.draining = True
        log.info("draining", extra={"waiting": len(self.waiting), "running": bool(self.running)})
        while self.waiting:
            self._finish(self.waiting.popleft(), Fault.of(_ending()))
        if (job := self.running) is not None:
            await _within(job.ended(), self.config.drain_seconds)
            if not job.over:
                self.supervisor.cancel(job.id)
                await _within(job.ended(), 5.0)
                self._finish(job, Fault.of(_ending()), cancelled=True)
        for task in self._tasks:
            task.cancel()
        await self.supervisor.stop()
        self.ended.set()

    def _check_files(self, task: Task, save: bool) -> None:
        """Refuse a task for what it names and brings, and for what it is to be kept in."""
        self._sources.check(task)
        if save:
            with about("save_images"):
                check_folder(self.config.output_dir)

    def _check_room(self, caller: str) -> None:
        if self.draining or self.fatal:
            raise _ending()
        if self.supervisor.state != "ready":
            raise UnavailableError("the model is being loaded; try again", headers={"Retry-After": "5"})
        own = [job for job in self.waiting if job.caller == caller]
        if len(self.waiting) >= self.config.queue_max:
            raise self._full("queue_full", f"{_jobs_wait(self.waiting)} already (setting queue_max)", self.waiting)
        if 0 < self.config.queue_max_per_key <= len(own):
            raise self._full("caller_full", f"{_jobs_wait(own, ' of yours')} already (setting queue_max_per_key)", own)

    def _full(self, reason: str, told: str, those: Sequence[Job]) -> QueueFullError:
        """A refusal that says when the first of those that wait will do so no more."""
        self.metrics.refused.add(reason=reason)
        before = list(self.waiting)[: self.waiting.index(those[0])]
        again = str(max(math.ceil(self._seconds_of(before)), 1))
        return QueueFullError(f"{told}; try again in about {again} s", headers={"Retry-After": again})

    async def _dispatch(self) -> None:
        while True:
            await self.supervisor.ready()
            if not self.waiting and self.canary.seconds_until_due == 0:
                await self.canary.send()
                continue
            if not self.waiting:
                self._arrived.clear()
                await _within(self._arrived.wait(), self.canary.seconds_until_due)
                continue  # the worker may have died meanwhile, or the job been cancelled
            job = self.running = self.waiting.popleft()
            REQUEST_ID.set(job.request_id)
            JOB_ID.set(job.id)
            try:
                await self._do(job)
            except Exception:  # the loop goes on, whatever a job did to it
                log.exception("a job could not be dispatched")
                self._finish(job, Fault.unexpected())
            finally:
                self.running = None

    async def _do(self, job: Job) -> None:
        """Have one job done, within its deadline."""
        assert job.request is not None
        begin = time.monotonic()
        self.metrics.waited.observe(time.time() - job.accepted)
        work = Work(job.id, job.request, job.request_id, job.preview_every, job.save)
        job.start()

        def moved(by: Moved) -> None:
            job.move(by)
            if by.progress["step"]:
                self.canary.lives()

        running = self.supervisor.run(work, moved)
        try:
            done, _ = await asyncio.wait([running], timeout=max(job.deadline - begin, 0.0))
            late = not done
            if late and await self._stop(job, running):
                return
            ended = await running
            self.canary.saw(work, ended)
            self._end(job, ended, late)
            if job.state == "succeeded" and not job.interrupted:  # others did not do all of their work
                self.pace.saw(job.cost, time.monotonic() - begin)
        except EngineError as error:
            self._finish(job, Fault.of(error))

    async def _stop(self, job: Job, running: asyncio.Future[Ended]) -> bool:
        """Cancel a job that is late; whether the worker had to be ended for it."""
        self.supervisor.cancel(job.id)
        done, _ = await asyncio.wait([running], timeout=CANCEL_SECONDS)
        if done:
            return False
        self.supervisor.kill(counts=False)  # a caller may have chosen the time: it is not to end the service
        self._finish(job, Fault.of(_late("took", job)))
        await asyncio.wait([running])
        running.exception()
        return True

    def _end(self, job: Job, ended: Ended, late: bool) -> None:
        fault = ended.fault
        cancelled = fault is not None and fault.type == "GenerationCancelled"
        if cancelled and not job.cancelled:
            fault, cancelled = Fault.of(_late("took", job) if late else _ending()), not late
        self._finish(job, fault, ended, cancelled=cancelled)

    def _finish(self, job: Job, fault: Fault | None, ended: Ended | None = None, *, cancelled: bool = False) -> None:
        if job.over:
            return
        if ended is not None and ended.outcome is not None:
            job.succeed(ended.outcome)
            self.metrics.made(ended.outcome)
        else:
            job.fail(fault or Fault.unexpected(), cancelled=cancelled)
        self.metrics.jobs.add(state=job.counted_as)
        told = {"state": job.state, "seconds": round(time.time() - job.accepted, 3), "client": job.client or None}
        whose = {"job": job.id, "request_id": job.request_id}
        log.info("finished", extra={**whose, **told, **(job.fault.logged if job.fault else {})})
        self.jobs.tidy()

    async def _watch_clock(self) -> None:
        """Jobs that waited longer than they were given end, and pictures that were kept as long go."""
        while True:
            await asyncio.sleep(_TICK)
            self.jobs.tidy()
            for job in [job for job in self.waiting if job.deadline <= time.monotonic()]:
                self.waiting.remove(job)
                self._finish(job, Fault.of(_late("waited", job)))

    def _give_up(self, reason: str, exit_code: int) -> None:
        """No worker can be had: what waits is told so, and the service ends."""
        log.error("the service ends: %s", reason)
        self.fatal = exit_code
        while self.waiting:
            self._finish(self.waiting.popleft(), Fault.of(_ending()))
        if self.running is not None:
            self._finish(self.running, Fault.of(_ending()))
        self.ended.set()


def _left(job: Job, pace: Pace) -> float:
    """Seconds that a running job takes still: as it says itself, once it has done a step."""
    told = job.progress.get("eta_seconds")
    return pace.seconds(job.cost) * (1 - job.progress.get("fraction", 0.0)) if told is None else told


def _ending() -> Refusal:
    return UnavailableError("the service is ending; send the request again", headers={"Retry-After": "10"})


def _late(what: str, job: Job) -> Refusal:
    return DeadlineError(f"the job {what} longer than it was given: {job.bound}")


def _jobs_wait(jobs: Sequence[Job], whose: str = "") -> str:
    return f"1 job{whose} waits" if len(jobs) == 1 else f"{len(jobs)} jobs{whose} wait"


def _bound(seconds: float | None, most: float) -> str:
    """Which time a job has, of that which its caller gave and that of the settings."""
    if seconds is not None and seconds < most:
        return f"the header X-Request-Timeout has {seconds:g} s"
    given = "" if seconds is None else f"; the header X-Request-Timeout asked for {seconds:g} s, and shortens it only"
    return f"the setting job_seconds is {most:g} s{given}"


async def _within(waiting: object, seconds: float | None) -> None:
    try:
        await asyncio.wait_for(waiting, seconds)  # type: ignore[arg-type]
    except TimeoutError:
        pass
