"""All of the API, in one place."""

from __future__ import annotations

from fastapi import APIRouter

from ..service import Service
from .extras import extras_routes
from .files import file_routes
from .generation import generation_routes
from .lists import adetailer_routes, list_routes
from .pictures import controlnet_routes, picture_routes
from .progress import internal_routes, progress_routes
from .session import Session
from .settings import settings_routes


def sdapi_routes(service: Service) -> APIRouter:
    """``/sdapi/v1`` and what belongs to it."""
    session = Session(service)
    router = APIRouter(tags=["Forge's API"])
    drawing = (generation_routes, extras_routes, progress_routes, picture_routes)
    facts = (settings_routes, list_routes, file_routes)
    for routes in (*drawing, *facts, internal_routes, adetailer_routes, controlnet_routes):
        router.include_router(routes(session))
    return router
