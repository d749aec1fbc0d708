"""What can be asked for by name, in the shapes of Forge's lists and ADetailer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter

from ....extensions.detailer_args import ADetailerArgs
from ....extensions.detailer_infotext import VERSION
from ....labels import AUTOMATIC, LATENT_UPSCALERS, SAMPLERS, SCHEDULERS
from ..native import errors
from .scripts import SCRIPTS
from .session import PREFIX, Session

_RHO = {"karras": 7.0, "polyexponential": 1.0}
_BY_FORMULA = frozenset({"automatic", "karras", "exponential", "polyexponential"})
"""Schedules that follow from their ends alone; others look at the model's own table."""

# Lists of what does not exist here, which clients ask for all the same.
EMPTY: dict[str, Any] = {
    "hypernetworks": [],
    "face-restorers": [],
    "prompt-styles": [],
    "extensions": [],
    "embeddings": {"loaded": {}, "skipped": {}},
}


def list_routes(session: Session) -> APIRouter:
    """The lists that need no model, and those of its files."""
    router = APIRouter(prefix=PREFIX, responses=errors(401))
    _add_labels(router)
    _add_scripts(router)
    for name, content in EMPTY.items():
        router.add_api_route(f"/{name}", _constant(content), name=name, summary="There are none here.")

    @router.get("/cmd-flags")
    async def cmd_flags() -> dict[str, Any]:
        """How the service was started, as far as clients ask: it has an API, and no pages."""
        config = session.service.config
        return {"api": True, "nowebui": True, "port": config.port, "api_auth": "***" if config.api_keys else None}

    return router


def _constant(content: Any) -> Any:
    async def answer() -> Any:
        return content

    return answer


def _add_labels(router: APIRouter) -> None:
    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """Samplers that can be asked for; others of Forge's are not valid for Flux."""
        return [
            {"name": row.label, "aliases": list(row.aliases), "options": _sampler_options(row.scheduler)}
            for row in SAMPLERS.values()
            if row.valid
        ]

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """Noise schedules, likewise. Automatic is the sampler's own, else Simple."""
        return [
            {
                "name": row.name,
                "label": row.label,
                "aliases": list(row.aliases) or None,
                "default_rho": _RHO.get(row.name, -1.0),
                "need_inner_model": row.name not in _BY_FORMULA,
            }
            for row in SCHEDULERS.values()
            if row.valid
        ]

    @router.get("/latent-upscale-modes")
    async def latent_upscale_modes() -> list[dict[str, str]]:
        """Values of hr_upscaler that enlarge the latent."""
        return [{"name": name} for name in LATENT_UPSCALERS]


def _sampler_options(scheduler: str | None) -> Mapping[str, str]:
    return {} if scheduler in (None, AUTOMATIC) else {"scheduler": SCHEDULERS[scheduler].name}


def _add_scripts(router: APIRouter) -> None:
    @router.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        """Names that alwayson_scripts may hold."""
        return {"txt2img": list(SCRIPTS), "img2img": list(SCRIPTS)}

    @router.get("/script-info")
    async def script_info() -> list[dict[str, Any]]:
        """The same with words; what arguments there are is told by /adetailer/v1/schema."""
        return [
            {"name": name, "is_alwayson": True, "is_img2img": img2img, "args": []}
            for name in SCRIPTS
            for img2img in (False, True)
        ]


def adetailer_routes(session: Session) -> APIRouter:
    """What clients ask of the ADetailer extension: whose version is spoken, its arguments, its detectors."""
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
