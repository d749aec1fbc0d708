"""Files that can be asked for by name, in the shapes of Forge's lists, and memory; as of the worker's last job.

And what makes the worker look again, or give the memory of its model back.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ..asking import tended
from ..messages import Tend
from ..native import errors
from .catalogue import Catalogue
from .models import MemoryResponse
from .session import PREFIX, Session

_REAL_ESRGAN = "R-ESRGAN"


def file_routes(session: Session) -> APIRouter:
    """Lists of model files, and memory."""
    router = APIRouter(prefix=PREFIX, responses=errors(401))
    _add_models(router, session)
    _add_helpers(router, session)
    _add_chores(router, session)
    return router


def _add_models(router: APIRouter, session: Session) -> None:
    @router.get("/sd-models")
    async def sd_models() -> list[dict[str, Any]]:
        """Checkpoints. Hashes are told where they are known: hashing a large file takes a minute."""
        rows = Catalogue.of(session.service).checkpoints
        names = ("title", "model_name", "hash", "sha256", "filename")
        return [{**{name: row.get(name) for name in names}, "config": None} for row in rows]

    @router.get("/sd-modules")
    async def sd_modules() -> list[dict[str, Any]]:
        """Text encoders and autoencoders: values of forge_additional_modules."""
        return [_module(row) for row in Catalogue.of(session.service).modules]

    @router.get("/sd-vae")
    async def sd_vae() -> list[dict[str, Any]]:
        """Autoencoders: values of sd_vae."""
        return [_module(row) for row in Catalogue.of(session.service).autoencoders()]


def _module(row: Any) -> dict[str, Any]:
    return {"model_name": row["model_name"], "filename": row["filename"]}


def _add_chores(router: APIRouter, session: Session) -> None:
    """What is done between jobs; the call is answered when it is."""

    async def refresh() -> None:
        """List the models folder anew; every job does so at its end."""
        await tended(session.service, Tend())

    for name in ("refresh-checkpoints", "refresh-vae", "refresh-loras"):
        router.add_api_route(f"/{name}", refresh, methods=["POST"], name=name, responses=errors(503))

    @router.post("/unload-checkpoint", responses=errors(503))
    async def unload_checkpoint() -> dict[str, Any]:
        """Give the memory of the model in use back; the next job loads it again."""
        await tended(session.service, Tend("unload"))
        return {}

    @router.post("/reload-checkpoint", responses=errors(503, 507))
    async def reload_checkpoint() -> dict[str, Any]:
        """Load the model in use again."""
        await tended(session.service, Tend("load"))
        return {}


def _add_helpers(router: APIRouter, session: Session) -> None:
    def facts(name: str) -> list[dict[str, Any]]:
        return list(session.service.supervisor.facts.get(name, ()))

    @router.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """LoRAs that prompts may name; very long values of their metadata are left out."""
        return facts("loras")

    @router.get("/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        """Upscalers; the scale of a network is known as far as its name tells it."""
        return [
            {
                "name": row["name"],
                "model_name": None,
                "model_path": row["path"],
                "model_url": None,
                "scale": row["scale"],
            }
            for row in facts("upscalers")
        ]

    @router.get("/realesrgan-models")
    async def realesrgan_models() -> list[dict[str, Any]]:
        """Those of the family Real-ESRGAN."""
        rows = [row for row in facts("upscalers") if row["name"].startswith(_REAL_ESRGAN)]
        return [{"name": row["name"], "path": row["path"], "scale": row["scale"]} for row in rows]

    @router.get("/memory", response_model=MemoryResponse)
    async def memory() -> MemoryResponse:
        """Bytes of the machine and of the worker there, and on a GPU of it and of the allocator."""
        told = session.service.supervisor.facts.get("memory", {})
        return MemoryResponse(ram=told.get("ram", {}), cuda=told.get("cuda", {"error": "the device is no GPU"}))
