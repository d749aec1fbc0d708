"""What clients ask of the ADetailer extension: whose version is spoken, its arguments, its detectors."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ....extensions.detailer_args import ADetailerArgs
from ....extensions.detailer_infotext import VERSION
from ..native import errors
from .session import Session


def adetailer_routes(session: Session) -> APIRouter:
    """``/adetailer/v1``."""
    router = APIRouter(prefix="/adetailer/v1", responses=errors(401))

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The version of ADetailer that this detailer is like."""
        return {"version": VERSION}

    @router.get("/schema")
    async def schema() -> dict[str, Any]:
        """The arguments of a pass, as a JSON schema."""
        return ADetailerArgs.model_json_schema()

    @router.get("/ad_model")
    async def ad_model() -> dict[str, list[str]]:
        """Values of ad_model, as of the last job."""
        return {"ad_model": list(session.service.supervisor.facts.get("detectors", []))}

    return router
