"""``/options``: what holds for all requests that do not say otherwise, until the service ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request

from ....request import GenerationRequest
from ..bodies import read_json
from ..native import errors
from ..service import Service
from ..tasks import check
from .catalogue import Catalogue
from .generation import faults_renamed
from .options import Options, options_by_field, without_effect
from .session import PREFIX, Session

_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
}

log = logging.getLogger(__name__)


def settings_routes(session: Session) -> APIRouter:
    """``GET`` and ``POST /options``."""
    router = APIRouter(prefix=PREFIX)
    turn = asyncio.Lock()

    @router.get("/options", responses=errors(401))
    async def get_options() -> dict[str, Any]:
        """The options that there are; others of Forge's do not exist here."""
        return shown_options(session)

    @router.post("/options", responses=errors(400, 401, 403, 404, 408, 413, 415, 422), openapi_extra=_BODY)
    async def set_options(request: Request) -> None:
        """Let options hold from now on, in memory alone. A model is loaded by the next request that draws.

        Names that do not exist here are ignored, and listed in the log.
        """
        given = await read_json(request, session.service.max_body)
        async with turn:  # what is changed are the options as the last caller left them
            session.options = await asyncio.to_thread(_changed, session, given)

    return router


def _changed(session: Session, given: Mapping[str, Any]) -> Options:
    """The options with those that a body has. For a thread, as folders are looked at for them.

    Raises:
        EngineError, JobFailed: one cannot be had; names it.
    """
    shown = shown_options(session)
    fresh = {name: value for name, value in given.items() if name not in shown or shown[name] != value}
    changed = session.options.changed(fresh, "")
    Catalogue.of(session.service).fields(changed)  # refuses names of models that are none
    _check(session.service, changed)
    for sentence in without_effect(fresh, changed):
        log.warning("POST /sdapi/v1/options: %s", sentence)
    return changed


def _check(service: Service, options: Options) -> None:
    """Refuse options that no picture could be drawn with: they would hold for every caller.

    Raises:
        JobFailed: with the fault of the first, by the option's name.
    """
    with faults_renamed(options_by_field()):
        request = GenerationRequest(image="any", **options.fields())  # with one, what acts on it is looked at too
        check(request, service.config, is_tiny=service.supervisor.facts.get("demonstration"))


def shown_options(session: Session) -> dict[str, Any]:
    """The options as they hold, with the title and the hash of the checkpoint."""
    catalogue = Catalogue.of(session.service)
    row = catalogue.checkpoint(session.options.sd_model_checkpoint)
    shown = session.options.model_dump()
    return {
        **shown,
        "sd_model_checkpoint": row["title"] if row else None,
        "sd_checkpoint_hash": (row.get("sha256") or "") if row else "",
    }
