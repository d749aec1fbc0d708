"""What a picture says of itself; and what other pages of WebUI would do with one, which is not offered here."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NoReturn

from fastapi import APIRouter, Request

from ....core.infotext_parse import parse_infotext
from ..bodies import read_json
from ..faults import NotOfferedError, NotSupportedError
from ..native import errors
from .models import LONGEST_INFOTEXT, PngInfoRequest, PngInfoResponse
from .session import PREFIX, Session

if TYPE_CHECKING:
    from ....core.pictures import PictureReader

_NO_TEXT = ("exif", "icc_profile", "dpi", "photoshop", "jfif", "jfif_version", "jfif_unit", "jfif_density", "gamma")
"""What Pillow tells beside texts, and is of no use to a caller."""


def picture_routes(session: Session) -> APIRouter:
    """``/png-info``, and an honest refusal of ``/interrogate``."""
    router = APIRouter(prefix=PREFIX)

    @router.post(
        "/png-info",
        response_model=PngInfoResponse,
        responses=errors(400, 401, 403, 408, 413, 415, 422),
        openapi_extra=PngInfoRequest.openapi(),
    )
    async def png_info(request: Request) -> PngInfoResponse:
        """The text that a picture carries, as it is and taken apart: png, jpg or webp."""
        asked = PngInfoRequest.read(await read_json(request, session.service.max_body))
        return await asyncio.to_thread(_read, session, asked.image)

    @router.post("/interrogate", response_model=None, responses=errors(401, 501))
    async def interrogate() -> NoReturn:
        """Not offered."""
        raise NotOfferedError("pictures are not described here: the engine has no model for that")

    return router


def controlnet_routes(session: Session) -> APIRouter:
    """What clients ask of the ControlNet extension: there is none."""
    router = APIRouter(prefix="/controlnet")

    async def controlnet(path: str) -> NoReturn:
        """Not there."""
        raise NotSupportedError("ControlNet is not supported: nothing here draws by control pictures; leave it out")

    for method in ("GET", "POST"):
        router.add_api_route(
            "/{path:path}", controlnet, methods=[method], response_model=None, responses=errors(401, 404)
        )
    return router


def _read(session: Session, given: str) -> PngInfoResponse:
    picture = _reader(session).open(given)
    from ....core.images import read_infotext

    text = read_infotext(picture) or ""
    items = {
        str(name): value for name, value in picture.info.items() if isinstance(value, str) and name not in _NO_TEXT
    }
    items.pop("parameters", None)
    parsed: dict[str, Any] = parse_infotext(text) if 0 < len(text) <= LONGEST_INFOTEXT else {}
    return PngInfoResponse(info=text, items=items, parameters=parsed)


def _reader(session: Session) -> PictureReader:
    """Reads pictures that come in requests; loaded with the first one, as it brings Pillow along."""
    from ....core.pictures import PictureReader

    return PictureReader(None, False, PictureReader.of(session.service.config, paths=False).max_pixels)
