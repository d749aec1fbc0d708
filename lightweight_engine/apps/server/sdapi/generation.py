"""``txt2img`` and ``img2img``: one request, one job, one answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request, Response

from ....config import EngineConfig
from ....errors import EngineError
from ..asking import CLIENT_GONE, JobFailed, finished, submit
from ..bodies import read_json
from ..faults import Fault
from ..native import errors
from ..queries import without_effect
from .answers import generation_answer
from .catalogue import Catalogue
from .models import GenerationResponse, ImageToImageRequest, TextToImageRequest
from .options import Options
from .session import PREFIX, Session
from .translate import Body, Translation, names_of, renamed, translate

FAILURES = errors(400, 401, 403, 404, 408, 409, 413, 415, 422, 424, 429, 499, 501, 503, 504, 507)


@contextmanager
def faults_renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Faults that name a field name it as callers of this API do: ``names`` are theirs by ours."""
    try:
        yield
    except EngineError as error:
        raise JobFailed(renamed(Fault.of(error), names)) from None
    except JobFailed as failed:
        raise JobFailed(renamed(failed.fault, names)) from None


def json_answer(data: Any) -> Response:
    """An answer that may be long: it is to be made in a thread, and is not looked through once more."""
    return Response(json.dumps(data), media_type="application/json")


def generation_routes(session: Session) -> APIRouter:
    """The two ways of drawing."""
    router = APIRouter(prefix=PREFIX)

    @router.post(
        "/txt2img", response_model=GenerationResponse, responses=FAILURES, openapi_extra=TextToImageRequest.openapi()
    )
    async def txt2img(request: Request) -> Response:
        """Draw from a prompt, and wait. A caller who hangs up cancels the job."""
        return await _drawn(session, request, TextToImageRequest)

    @router.post(
        "/img2img", response_model=GenerationResponse, responses=FAILURES, openapi_extra=ImageToImageRequest.openapi()
    )
    async def img2img(request: Request) -> Response:
        """Draw from pictures, wholly or where a mask is white, and wait likewise."""
        return await _drawn(session, request, ImageToImageRequest)

    return router


def _asked(
    model: type[TextToImageRequest | ImageToImageRequest],
    raw: Mapping[str, Any],
    names: dict[str, str],
    options: Options,
    catalogue: Catalogue,
    config: EngineConfig,
) -> tuple[Body, Translation]:
    """A body, and what it asks for; ``names`` are filled first. For a thread, as its texts may be long."""
    body: Body = model.read(raw)
    names |= names_of(body)
    return body, translate(body, raw, options, catalogue, config)


async def _drawn(session: Session, request: Request, model: type[TextToImageRequest | ImageToImageRequest]) -> Response:
    service = session.service
    names: dict[str, str] = {}
    with faults_renamed(names):
        raw = await read_json(request, service.max_body)
        catalogue = Catalogue.of(service)
        body, asked = await asyncio.to_thread(_asked, model, raw, names, session.options, catalogue, service.config)
        asked.warnings.extend(without_effect(request))
        job = await submit(service, request, asked.request, asked.options.preview_every, save=body.save_images)
        session.follow(job, body.force_task_id, body.n_iter or 1)
        if not await finished(service, request, job):
            return Response(status_code=CLIENT_GONE)
    return await asyncio.to_thread(lambda: json_answer(generation_answer(body, asked, job)))
