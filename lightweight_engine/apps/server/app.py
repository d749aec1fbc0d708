"""The application: routes, guards around them, and one form for every error."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from ... import __version__
from ...errors import EngineError
from ...fields import bounds_of, plain
from .asking import JobFailed
from .bodies import Intake
from .description import describe
from .faults import Fault
from .guards import METHODS, Guard, Rules, answer
from .native import PICTURE_HEADERS, errors, native_routes
from .sdapi.routes import sdapi_routes
from .service import Service
from .status import status_routes

DESCRIPTION = "Pictures from prompts. Errors have one form everywhere: see ErrorAnswer."


def build_app(service: Service) -> FastAPI:
    """The application of a service.

    The pages that draw an API's description load scripts from elsewhere, and are left out; the description is there.
    """
    app = FastAPI(
        title="lightweight-engine",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # they lead to http, whatever a proxy in front speaks
        responses=errors(403, 421, 500, 503),  # of the guard, which every request passes
    )
    app.include_router(native_routes(service))
    app.include_router(status_routes(service))
    app.include_router(sdapi_routes(service))
    _handle_errors(app, service)
    rules = Rules.of(service.config)
    app.add_middleware(Guard, rules=rules, intake=Intake.of(service.config), metrics=service.metrics)
    if rules.origins:  # outside the guard, as a browser asks for permission without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(rules.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[*PICTURE_HEADERS, "X-Request-ID", "Location", "Retry-After"],  # a page reads no others
        )
    describe(app, keys=bool(rules.keys))
    return app


def _handle_errors(app: FastAPI, service: Service) -> None:
    def told(request: Request, fault: Fault) -> JSONResponse:
        request.state.fault = fault  # for the log
        return answer(fault, getattr(request.state, "request_id", None), service.metrics)

    @app.exception_handler(EngineError)
    async def engine_error(request: Request, error: EngineError) -> JSONResponse:
        return told(request, Fault.of(error))

    @app.exception_handler(JobFailed)
    async def job_failed(request: Request, error: JobFailed) -> JSONResponse:
        return told(request, error.fault)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        allowed = _allowed(request) if error.status_code == 405 else ""
        known = {404: "there is no such address; see /openapi.json", 405: f"this address takes {allowed} alone"}
        message = known.get(error.status_code, str(error.detail))
        headers = {"Allow": allowed} if allowed else error.headers or {}
        return told(request, Fault("HTTPError", message, error.status_code, headers=headers))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        message = f"{name}: {plain(first, _limits(request, name))}"
        return told(request, Fault("RequestError", message, 422, name))


def _limits(request: Request, name: str) -> str:
    """What a parameter of an address may be."""
    route = request.scope["route"].dependant
    fields = {each.alias: each.field_info for each in (*route.path_params, *route.query_params)}
    return bounds_of(fields.get(name))


def _allowed(request: Request) -> str:
    """The methods that an address takes; the router knows those of the first route that fits."""
    routes: list[BaseRoute] = request.app.routes
    fitting = (
        method for method in METHODS if any(_takes(route, {**request.scope, "method": method}) for route in routes)
    )
    return ", ".join(fitting)


def _takes(route: BaseRoute, scope: Scope) -> bool:
    return route.matches(scope)[0] is Match.FULL
