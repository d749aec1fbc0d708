"""How a route has a job done: submitted as its headers say, waited for, and cancelled where its caller hangs up."""

from __future__ import annotations

import asyncio
import math

from starlette.requests import Request

from ...errors import RequestError
from ...request import Task
from .faults import Fault, MalformedBodyError
from .guards import address_of
from .jobs import Job
from .messages import Tend
from .service import Service

CLIENT_GONE = 499  # nobody reads it; it is for the log
MAX_KEY = 255  # characters of an idempotency key


class JobFailed(Exception):
    """A job ended with a fault, which is the answer."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


async def submit(service: Service, request: Request, task: Task, preview_every: int = 0, *, save: bool = False) -> Job:
    """Have the service accept a job, with the idempotency key and the time that the headers give.

    Raises:
        EngineError: a header is wrong, or as of ``Service.submit``.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY:
        raise MalformedBodyError(f"an Idempotency-Key has 1 to {MAX_KEY} characters", param="Idempotency-Key")
    text = request.headers.get("x-request-timeout")
    seconds = None if text is None else seconds_of(text)
    if text is not None and not seconds:
        raise RequestError("X-Request-Timeout: give seconds, more than 0", field="X-Request-Timeout")
    return await service.submit(
        task,
        request_id=request.state.request_id,
        seconds=seconds,
        key=None if key is None else f"{request.state.caller}:{key}",
        caller=_who_waits(service, request),
        client=address_of(request.scope),
        preview_every=preview_every,
        save=save,
    )


def owner_of(service: Service, request: Request) -> str | None:
    """Whose jobs a caller may know of: its key's; None where there are no keys, and so anybody's."""
    return request.state.caller if service.config.api_keys else None


def _who_waits(service: Service, request: Request) -> str:
    """Whose share of the queue a job takes: a key's, or where there are none, an address'."""
    return owner_of(service, request) or address_of(request.scope)


def seconds_of(text: str) -> float | None:
    """A number above 0; None where a text is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None


async def finished(service: Service, request: Request, job: Job) -> bool:
    """Wait until the job is over. False: the caller has hung up, and the job is cancelled unless it has a key.

    Raises:
        JobFailed: it ended with a fault.
    """
    if not await _wait(request, job):
        if not job.keyed and not job.over:
            service.cancel(job)
        return False
    if job.fault is not None:
        raise JobFailed(job.fault)
    return True


async def tended(service: Service, tend: Tend) -> None:
    """Have the worker do what is done between jobs, and wait for it.

    Raises:
        JobFailed: it ended with a fault.
        UnavailableError: as of ``Supervisor.tend``.
    """
    done = await service.supervisor.tend(tend)
    if done.fault is not None:
        raise JobFailed(done.fault)


async def _wait(request: Request, job: Job) -> bool:
    """Wait until the job is over, and say so; or that the caller has hung up before."""
    over, gone = asyncio.create_task(job.ended()), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({over, gone}, return_when=asyncio.FIRST_COMPLETED)
        return over.done()
    finally:
        over.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
