"""The engine's own API: a request as ``GenerationRequest`` has it, done at once or as a job."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.responses import StreamingResponse

from ...request import MAX_STEPS, GenerationRequest, Task, UpscaleRequest
from .asking import CLIENT_GONE, finished, owner_of, seconds_of, submit
from .bodies import read_json, refuse_fields, without_nulls
from .events import Events
from .faults import ConflictError, NotAcceptableError, UnknownJobError
from .jobs import Job
from .queries import refuse_unknown
from .schemas import EXAMPLE, MEDIA_TYPES, UPSCALE_EXAMPLE, ErrorAnswer, Generated, JobAnswer, JobList, Upscaled
from .service import Service


def _body(schema: str, example: dict[str, Any]) -> dict[str, Any]:
    """What OpenAPI says of the body of a route."""
    content = {"schema": {"$ref": f"#/components/schemas/{schema}"}, "example": example}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


_DRAWN = _body("GenerationRequest", EXAMPLE)
_PICTURES = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()}
PICTURE_HEADERS: dict[str, Any] = {
    name: {"description": told, "schema": {"type": kind}}
    for name, kind, told in (
        ("X-Job-ID", "string", "The job, for /jobs/{job_id}."),
        ("X-Seed", "integer", "Of an answer that is a picture: the seed that it was drawn with."),
        ("X-Warnings", "integer", "Likewise: how many warnings there are."),
        ("X-Warnings-Text", "string", "The warnings, a JSON list in ASCII; not all, where they are longer than 4 KiB."),
    )
}
_BARE: dict[str, Any] = {"dependencies": [Depends(refuse_fields)]}  # a route that takes no body
MAX_LISTED = 1000  # jobs in one answer
MAX_WARNINGS_TEXT = 4096  # bytes in a header, as proxies take no more than some KiB of all

_WAITING = (400, 401, 404, 406, 408, 409, 413, 415, 422, 424, 429, 499, 501, 503, 504, 507)
"""What may become of a job that is waited for."""

_FORMATS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/*": None}
_JSON = ("application/json", "application/*", "*/*")


def native_routes(service: Service) -> APIRouter:
    """``/generate``, ``/upscale`` and ``/jobs``."""
    router = APIRouter(tags=["pictures"], dependencies=[Depends(refuse_unknown)], responses=errors(422))
    _add_generate(router, service)
    _add_upscale(router, service)
    _add_jobs(router, service)
    _add_endings(router, service)
    _add_results(router, service)
    return router


def _add_generate(router: APIRouter, service: Service) -> None:
    @router.post(
        "/generate",
        response_model=Generated,
        responses={200: {"content": _PICTURES, "headers": PICTURE_HEADERS}, **errors(*_WAITING)},
        openapi_extra=_DRAWN,
    )
    async def generate(request: Request) -> Response:
        """Draw pictures and wait for them. `Accept: image/png` (or jpeg, webp, *) gives one as it is.

        Headers: `X-Request-Timeout` (seconds that the job may wait and run), `Idempotency-Key`. A caller who hangs up
        cancels the job, unless it has such a key.
        """
        wanted = wanted_forms(request.headers.get("accept", "*/*"))
        fields = await _fields_of(service, request, GenerationRequest)
        drawn = await asyncio.to_thread(_as_request, service, fields)
        form = form_of(wanted, drawn.num_outputs, drawn.output_format if "output_format" in fields else None)
        return await _made(service, request, drawn, form, Generated)


def _add_upscale(router: APIRouter, service: Service) -> None:
    @router.post(
        "/upscale",
        response_model=Upscaled,
        responses={200: {"content": _PICTURES, "headers": PICTURE_HEADERS}, **errors(*_WAITING)},
        openapi_extra=_body("UpscaleRequest", UPSCALE_EXAMPLE),
    )
    async def upscale(request: Request) -> Response:
        """Make pictures larger and wait for them; headers and answers are as of `/generate`."""
        wanted = wanted_forms(request.headers.get("accept", "*/*"))
        fields = await _fields_of(service, request, UpscaleRequest)
        task = await asyncio.to_thread(lambda: UpscaleRequest(**fields))
        form = form_of(wanted, len(task.images), task.output_format if "output_format" in fields else None)
        return await _made(service, request, task, form, Upscaled)


async def _made(
    service: Service, request: Request, task: Task, form: str | None, whole: type[Generated] | type[Upscaled]
) -> Response:
    """What came of a task that is waited for, in the form that is wanted: ``whole`` as JSON, or its picture."""
    if form not in (None, "json"):
        task = task.model_copy(update={"output_format": form})
    job = await submit(service, request, task)
    if not await finished(service, request, job):
        return Response(status_code=CLIENT_GONE)
    return await asyncio.to_thread(_told, whole, job) if form == "json" else _picture(job, 0)


def _add_jobs(router: APIRouter, service: Service) -> None:
    @router.post(
        "/jobs",
        status_code=202,
        response_model=JobAnswer,
        responses=errors(400, 401, 404, 408, 409, 413, 415, 422, 429, 503),
        openapi_extra=_DRAWN,
    )
    async def create_job(
        request: Request, response: Response, preview_every: Annotated[int, Query(ge=0, le=MAX_STEPS)] = 0
    ) -> JobAnswer:
        """Take a request, and answer at once. `preview_every`: steps between previews in the stream of events."""
        fields = await _fields_of(service, request, GenerationRequest)
        drawn = await asyncio.to_thread(_as_request, service, fields)
        job = await submit(service, request, drawn, preview_every)
        response.headers["Location"] = f"/jobs/{job.id}"
        return _state_of(service, job)

    @router.get("/jobs", response_model=JobList, responses=errors(401))
    async def list_jobs(request: Request, limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100) -> JobList:
        """The jobs that are remembered, the newest first; where keys are needed, those of the caller's key."""
        newest = service.jobs.newest(limit, owner_of(service, request))
        return JobList.of(newest, service.waiting, busy=service.running is not None)

    @router.get("/jobs/{job_id}", response_model=JobAnswer, responses=errors(401, 404))
    async def get_job(request: Request, job_id: str) -> JobAnswer:
        """Where a job is, and what came of it."""
        return _state_of(service, _own(service, request, job_id))


def _add_endings(router: APIRouter, service: Service) -> None:
    @router.delete("/jobs/{job_id}", response_model=JobAnswer, responses=errors(401, 404, 409), **_BARE)
    async def cancel_job(request: Request, job_id: str) -> JobAnswer:
        """Cancel a job: at once if it waits, within a step if it runs. Once more changes nothing."""
        job = _own(service, request, job_id)
        service.cancel(job)
        return _state_of(service, job)

    @router.post("/jobs/{job_id}/interrupt", response_model=JobAnswer, responses=errors(401, 404, 409), **_BARE)
    async def interrupt_job(request: Request, job_id: str) -> JobAnswer:
        """End a running job within a step with the pictures so far: the one being drawn is taken as it is then."""
        job = _own(service, request, job_id)
        service.interrupt(job)
        return _state_of(service, job)

    @router.post("/jobs/{job_id}/skip", response_model=JobAnswer, responses=errors(401, 404, 409), **_BARE)
    async def skip_batch(request: Request, job_id: str) -> JobAnswer:
        """End the batch that is being drawn likewise, and go on with the next."""
        job = _own(service, request, job_id)
        service.skip(job)
        return _state_of(service, job)


def _add_results(router: APIRouter, service: Service) -> None:
    events = Events(service)

    @router.get(
        "/jobs/{job_id}/events",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}, **errors(401, 404)},
    )
    async def job_events(request: Request, job_id: str) -> StreamingResponse:
        """Server-sent events: `progress` (state, position, stage, step, ETA, preview), then `result` or `error`.

        Previews are JPEGs in base64. Whoever reads slowly is told the latest, not everything.
        """
        return StreamingResponse(events.of(_own(service, request, job_id)), media_type="text/event-stream")

    @router.get(
        "/jobs/{job_id}/images/{n}",
        response_class=Response,
        responses={
            200: {"content": {kind: {} for kind in MEDIA_TYPES.values()}, "headers": PICTURE_HEADERS},
            **errors(401, 404, 409, 410),
        },
    )
    async def job_image(request: Request, job_id: str, n: int) -> Response:
        """A picture of a finished job, as a file."""
        return _picture(_own(service, request, job_id), n)


def _own(service: Service, request: Request, job_id: str) -> Job:
    """A job that the caller may know of."""
    return service.jobs.get(job_id, owner_of(service, request))


def _state_of(service: Service, job: Job) -> JobAnswer:
    return JobAnswer.of(job, service.position(job))


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of the failures of a route."""
    told = {499: {"description": "The job was cancelled"}}  # a status of no standard, and so of no name
    return {status: {"model": ErrorAnswer, **told.get(status, {})} for status in statuses}


def wanted_forms(accept: str) -> list[str | None]:
    """What an Accept header asks for, the most wanted first: ``json``, a format, or None for a picture of any format.

    Raises:
        NotAcceptableError: nothing that can be given.
    """
    ranked = sorted((_weighed(part) for part in accept.split(",")), key=lambda row: -row[1])
    known = [kind for kind, weight in ranked if weight > 0 and kind in (*_JSON, *_FORMATS)]
    if not known:
        raise NotAcceptableError(f"{accept!r:.80} cannot be given; accept application/json, {', '.join(_FORMATS)}")
    return ["json" if kind in _JSON else _FORMATS[kind] for kind in known]


def form_of(wanted: Sequence[str | None], pictures: int, asked: str | None) -> str | None:
    """The form of an answer: the most wanted of those that its request leaves.

    Args:
        wanted: as ``wanted_forms`` has it.
        pictures: that are asked for; a picture is an answer to one.
        asked: the format that the request names, if it does.

    Raises:
        NotAcceptableError: it leaves none.
    """
    for form in wanted:
        if form == "json" or (pictures == 1 and (form is None or asked in (None, form))):
            return form
    if pictures > 1:
        raise NotAcceptableError("an answer that is a picture holds one; ask for one, or accept JSON")
    raise NotAcceptableError(f"output_format is {asked!r}, and not what is accepted")


def _weighed(part: str) -> tuple[str, float]:
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    weight = next((text[2:] for text in parameters if text.startswith("q=")), "1")
    return kind, seconds_of(weight) or 0.0


async def _fields_of(service: Service, request: Request, kind: type[Task]) -> dict[str, Any]:
    """What the body of a request says; raises as ``read_json``."""
    return without_nulls(kind, await read_json(request, service.max_body))


def _as_request(service: Service, fields: dict[str, Any]) -> GenerationRequest:
    """What a body asks for. For a thread: a body may have thousands of fields that are wrong."""
    return GenerationRequest.over(service.config.request_defaults(), fields)


def _told(kind: type[Generated] | type[Upscaled], job: Job) -> Response:
    """All of a result. It may be long: it is written in a thread of its own, and not looked through once more."""
    return Response(kind.of(job).model_dump_json(), media_type="application/json", headers={"X-Job-ID": job.id})


def _picture(job: Job, n: int) -> Response:
    outcome = job.result()
    if not outcome.images:
        raise ConflictError(f"job {job.id} was interrupted before its first picture")
    if not 0 <= n < len(outcome.images):
        raise UnknownJobError(
            f"job {job.id} has {len(outcome.images)} picture{'s' * (len(outcome.images) != 1)}, counted from 0"
        )
    warnings = outcome.told["warnings"]
    headers = {
        "Content-Disposition": f'inline; filename="{job.id}-{n}.{outcome.format}"',
        "X-Job-ID": job.id,
        "X-Warnings": str(len(warnings)),
    }
    if warnings:
        headers["X-Warnings-Text"] = as_header(warnings)
    if "seeds" in outcome.told:
        headers["X-Seed"] = str(outcome.told["seeds"][n])
    return Response(outcome.images[n], media_type=MEDIA_TYPES[outcome.format], headers=headers)


def as_header(texts: Sequence[str]) -> str:
    """Texts as a JSON list in ASCII, of at most ``MAX_WARNINGS_TEXT`` bytes: the last are left out, and
    a first that is too long alone is cut."""
    kept: list[str] = []
    for text in texts:
        while not kept and len(json.dumps([text])) > MAX_WARNINGS_TEXT:
            text = f"{text[: len(text) // 2]}…"
        if len(json.dumps([*kept, text])) > MAX_WARNINGS_TEXT:
            break
        kept.append(text)
    return json.dumps(kept)
