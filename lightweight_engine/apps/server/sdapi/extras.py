"""``extra-single-image`` and ``extra-batch-images``: pictures enlarged, with nothing drawn."""

from __future__ import annotations

import asyncio
import html
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from ....errors import RequestError
from ....request import UpscaleRequest
from ..asking import CLIENT_GONE, finished, submit
from ..bodies import read_json
from ..jobs import Job
from ..queries import without_effect
from ..schemas import as_base64
from .generation import FAILURES, faults_renamed, json_answer
from .models import ExtraBatchRequest, ExtraBatchResponse, ExtraRequest, ExtraSingleRequest, ExtraSingleResponse
from .options import NO_CHOICE
from .session import PREFIX, Session

NAMES = {
    "by": "upscaling_resize",
    "width": "upscaling_resize_w",
    "height": "upscaling_resize_h",
    "upscaler": "upscaler_1",
    "upscaler_2_visibility": "extras_upscaler_2_visibility",
}
"""What a caller of this API knows the fields of ``UpscaleRequest`` as, but for the pictures."""
_PICTURES = {ExtraSingleRequest: "image", ExtraBatchRequest: "imageList[].data"}

_OF_SCALE = ("upscaling_resize",)
_OF_SIZE = ("upscaling_resize_w", "upscaling_resize_h", "upscaling_crop")
_FACES = ("gfpgan_visibility", "codeformer_visibility")


def extras_routes(session: Session) -> APIRouter:
    """The two ways of enlarging."""
    router = APIRouter(prefix=PREFIX)

    @router.post(
        "/extra-single-image",
        response_model=ExtraSingleResponse,
        responses=FAILURES,
        openapi_extra=ExtraSingleRequest.openapi(),
    )
    async def extra_single_image(request: Request) -> Response:
        """Enlarge a picture by one upscaler, or by two blended, and wait. A caller who hangs up cancels the job."""
        return await _enlarged(session, request, ExtraSingleRequest)

    @router.post(
        "/extra-batch-images",
        response_model=ExtraBatchResponse,
        responses=FAILURES,
        openapi_extra=ExtraBatchRequest.openapi(),
    )
    async def extra_batch_images(request: Request) -> Response:
        """Enlarge several pictures likewise."""
        return await _enlarged(session, request, ExtraBatchRequest)

    return router


async def _enlarged(
    session: Session, request: Request, model: type[ExtraSingleRequest | ExtraBatchRequest]
) -> Response:
    service = session.service
    with faults_renamed({**NAMES, "images": _PICTURES[model]}):
        raw = await read_json(request, service.max_body)
        body, task = await asyncio.to_thread(_asked, model, raw, session.options.output_format)
        job = await submit(service, request, task)
        session.follow(job)
        if not await finished(service, request, job):
            return Response(status_code=CLIENT_GONE)
    idle = [*_idle(body, raw), *without_effect(request)]
    return await asyncio.to_thread(lambda: json_answer(_answer(body, idle, job)))


def _asked(
    model: type[ExtraSingleRequest | ExtraBatchRequest], raw: Mapping[str, Any], output_format: str
) -> tuple[ExtraSingleRequest | ExtraBatchRequest, UpscaleRequest]:
    """A body, and what it asks for. For a thread, as it may be long."""
    body = model.read(raw)
    return body, upscale_request(body, output_format)


def upscale_request(body: ExtraSingleRequest | ExtraBatchRequest, output_format: str) -> UpscaleRequest:
    """A body as our own request. Raises RequestError, which names a field that is wrong."""
    single = isinstance(body, ExtraSingleRequest)
    if single and not body.image:
        raise RequestError("image: there is no picture; send one in base64", field="image")
    pictures = [body.image] if single else [each.data for each in body.imageList]
    fields: dict[str, Any] = {"images": pictures, "upscaler": body.upscaler_1, "output_format": output_format}
    if body.resize_mode == 1:
        sides = {"width": body.upscaling_resize_w, "height": body.upscaling_resize_h}
        fields |= {**sides, "crop": body.upscaling_crop}
    else:
        fields["by"] = body.upscaling_resize
    if _second(body):
        fields |= {"upscaler_2": body.upscaler_2, "upscaler_2_visibility": body.extras_upscaler_2_visibility}
    return UpscaleRequest(**fields)


def _second(body: ExtraRequest) -> bool:
    """Whether a second upscaler is blended in."""
    return body.upscaler_2.lower() not in NO_CHOICE and body.extras_upscaler_2_visibility != 0


def _answer(body: ExtraRequest, idle: Sequence[str], job: Job) -> dict[str, Any]:
    outcome = job.result()
    images = [as_base64(image) for image in outcome.images]
    warnings = [*idle, *outcome.told.get("warnings", ())]
    lines = [_what_was_done(body, outcome.told["upscalers"]), *warnings]
    told = {"html_info": "".join(f"<p>{html.escape(line)}</p>" for line in lines), "warnings": warnings}
    if isinstance(body, ExtraSingleRequest):
        return {**told, "image": images[0] if images else None}
    return {**told, "images": images}


def _what_was_done(body: ExtraRequest, upscalers: Sequence[str]) -> str:
    """A line as WebUI's pages have it below an enlarged picture."""
    size = f"to: {body.upscaling_resize_w}x{body.upscaling_resize_h}"
    how = size if body.resize_mode == 1 else f"by: {body.upscaling_resize:g}"
    names = (f"Postprocess upscaler{label}: {name}" for label, name in zip(("", " 2"), upscalers, strict=False))
    return ", ".join([f"Postprocess upscale {how}", *names])


def _idle(body: ExtraRequest, raw: Mapping[str, Any]) -> Sequence[str]:
    """A sentence for all fields that the model leaves out, and one for those without effect."""
    asked = [name for name in _FACES if getattr(body, name) > 0]
    return [
        *type(body).without_effect(raw),
        *(f"{name} had no effect: faces are painted anew by ADetailer alone" for name in asked),
        *_idle_sizes(body),
        *_idle_second(body),
    ]


def _idle_sizes(body: ExtraRequest) -> list[str]:
    """A sentence for what is of the other ``resize_mode``; its defaults ask for nothing."""
    other = _OF_SIZE if body.resize_mode == 0 else _OF_SCALE
    usual = type(body).model_fields
    asked = [name for name in other if getattr(body, name) != usual[name].default]
    return [f"{', '.join(asked)} had no effect with resize_mode {body.resize_mode}"] if asked else []


def _idle_second(body: ExtraRequest) -> list[str]:
    """A sentence for one half of a second upscaler."""
    named, seen = body.upscaler_2.lower() not in NO_CHOICE, body.extras_upscaler_2_visibility != 0
    if named and not seen:
        return ["upscaler_2 had no effect: extras_upscaler_2_visibility is 0"]
    return ["extras_upscaler_2_visibility had no effect without upscaler_2"] if seen and not named else []
