"""What can be asked about the service itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import SecretStr
from starlette.responses import PlainTextResponse

from ... import __version__
from ...config import EngineConfig
from ...labels import LATENT_UPSCALERS, STORAGE, sampler_labels, scheduler_labels
from ...request import MAX_DETAILER_PASSES, MAX_LORAS
from .asking import tended
from .bodies import refuse_fields
from .guards import ANYONE, METRICS_PATH
from .messages import Tend
from .metrics import CONTENT_TYPE
from .native import errors
from .queries import refuse_unknown
from .schemas import MEDIA_TYPES, Health, request_schemas
from .service import Service
from .tasks import MODEL_FILES


def status_routes(service: Service) -> APIRouter:
    """Health, settings, models, capabilities, metrics."""
    router = APIRouter(tags=["service"])
    _add_health(router, service)  # probes may send whatever they like
    facts = APIRouter(dependencies=[Depends(refuse_unknown)], responses=errors(422))
    _add_facts(facts, service)
    router.include_router(facts)
    return router


def _add_health(router: APIRouter, service: Service) -> None:
    @router.get("/", include_in_schema=False)
    async def root() -> dict[str, str]:
        return {"name": "lightweight-engine", "version": __version__, "api": "/openapi.json"}

    @router.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        """The service runs; it may not be ready."""
        return "ok"

    @router.get("/readyz", response_class=PlainTextResponse, responses={503: {"content": {"text/plain": {}}}})
    async def readyz(response: Response) -> str:
        """A job would be accepted now."""
        reason = service.not_ready
        response.status_code = 503 if reason else 200
        return reason or "ok"

    @router.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health(request: Request, response: Response) -> Health:
        """The same with words. Where callers need a key, those who send one are told the model and the notes."""
        reason = service.not_ready
        response.status_code = 503 if reason else 200
        return Health(
            status="not ready" if reason else "ready",
            reason=reason,
            version=__version__,
            waiting=len(service.waiting),
            running=service.running is not None,
            **_model_of(service, request.state.caller),
        )

    for path, text in (("/livez", livez), ("/readyz", readyz)):  # monitors ask for the head alone
        router.head(path, response_class=PlainTextResponse, include_in_schema=False)(text)
    router.head("/health", include_in_schema=False)(health)


def _add_facts(router: APIRouter, service: Service) -> None:
    @router.get("/config", responses=errors(401))
    async def config() -> dict[str, dict[str, Any] | None]:
        """The settings, by section; without folders and secrets. `in_effect` has what holds, with the configured model
        on its device, of those that files and device may outvote; null until that model is loaded."""
        return {**settings_of(service.config), "in_effect": service.supervisor.facts.get("in_effect")}

    @router.get("/models", responses=errors(401))
    async def models() -> dict[str, list[dict[str, Any]]]:
        """The files that a request may name, by their place in the models folder, as of the last job. Hashes are told
        of files that a job has read."""
        facts = service.supervisor.facts
        return {kind: list(facts.get(kind, ())) for kind in ("checkpoints", "modules", "loras", "upscalers")}

    @router.get("/models/status", responses=errors(401))
    async def models_status() -> dict[str, Any]:
        """The model in use and its files, as of the last job; memory of the worker as it is now. `state` is `starting`,
        `ready`, `unloaded` where the next job that draws loads the model first, `failed` or `stopped`."""
        return status_of(service)

    @router.post("/models/refresh", responses=errors(401, 503), dependencies=[Depends(refuse_fields)])
    async def refresh_models() -> dict[str, Any]:
        """List the models folder anew, when the job that runs is over; every job does so at its end."""
        return await _tended(service, Tend())

    @router.post("/models/unload", responses=errors(401, 503), dependencies=[Depends(refuse_fields)])
    async def unload_models() -> dict[str, Any]:
        """Give the memory of the model in use back, when the job that runs is over. The next job loads it again."""
        return await _tended(service, Tend("unload"))

    @router.post("/models/load", responses=errors(401, 503, 507), dependencies=[Depends(refuse_fields)])
    async def load_models() -> dict[str, Any]:
        """Load the model in use again, when the job that runs is over."""
        return await _tended(service, Tend("load"))

    @router.get("/capabilities", responses=errors(401))
    async def capabilities() -> dict[str, Any]:
        """What a request may name, its limits, and its schema."""
        facts = service.supervisor.facts
        return {
            "version": __version__,
            "samplers": sampler_labels(),
            "schedulers": scheduler_labels(),
            **{field: names_of(facts, field) for field in MODEL_FILES},
            "storage_dtypes": list(STORAGE),
            **{kind: [row["name"] for row in facts.get(kind, ())] for kind in ("upscalers", "loras")},
            "latent_upscalers": list(LATENT_UPSCALERS),
            "detectors": facts.get("detectors", []),
            "formats": list(MEDIA_TYPES),
            "limits": limits_of(service.config),
            "request": request_schemas()["GenerationRequest"],
        }

    @router.get(METRICS_PATH, response_class=PlainTextResponse, responses=errors(401))
    async def metrics() -> PlainTextResponse:
        """Counters and gauges in Prometheus' text format."""
        return PlainTextResponse(service.metrics.text(service.gauges(), service.facts()), media_type=CONTENT_TYPE)


def _model_of(service: Service, caller: str) -> dict[str, Any]:
    """What health says of the model. It may be asked without a key: where one is needed elsewhere, names of files are
    not told then."""
    facts = service.supervisor.facts
    told = {"demonstration": facts.get("demonstration"), "loaded": service.loaded}
    if service.config.api_keys and caller == ANYONE:
        return told
    return {**told, "model": facts.get("model"), "notes": facts.get("notes", [])}


async def _tended(service: Service, tend: Tend) -> dict[str, Any]:
    await tended(service, tend)
    return status_of(service)


def status_of(service: Service) -> dict[str, Any]:
    """The model in use, as JSON data."""
    supervisor = service.supervisor
    state = "unloaded" if service.loaded is False else supervisor.state
    facts = {name: supervisor.facts.get(name) for name in ("model", "demonstration", "device", "files", "notes")}
    memory = {"device_bytes": supervisor.facts.get("held_bytes"), "host_bytes": supervisor.resident_bytes()}
    return {"state": state, **facts, "memory": memory, "restarts": supervisor.restarts}


def names_of(facts: Mapping[str, Any], field: str) -> list[str]:
    """What a field that names a file of a model takes."""
    modules = (row["filename"] for row in facts.get("modules", ()) if row["field"] == field)
    return list(modules) if field != "checkpoint" else [row["title"] for row in facts.get("checkpoints", ())]


def settings_of(config: EngineConfig) -> dict[str, dict[str, Any]]:
    """The settings by section, as they may be shown to a caller."""
    sections: dict[str, dict[str, Any]] = {}
    for section, name, value, _ in config.rows():
        sections.setdefault(section, {})[name] = _shown(section, value)
    return sections


def _shown(section: str, value: Any) -> Any:
    if isinstance(value, SecretStr):
        return "***"
    if isinstance(value, dict):
        return {key: _shown(section, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(section, each) for each in value]
    return Path(value).name if isinstance(value, Path) or (section == "files" and isinstance(value, str)) else value


def limits_of(config: EngineConfig) -> dict[str, float]:
    """What one request may ask for at most."""
    names = [name for section, name, _, _ in config.rows() if section == "limits"]
    own = {"max_loras": MAX_LORAS, "max_detailer_passes": MAX_DETAILER_PASSES, "max_body_mib": config.max_body_mib}
    queue = {name: getattr(config, name) for name in ("queue_max", "queue_max_per_key")}
    return {**{name: getattr(config, name) for name in names}, **queue, **own}
