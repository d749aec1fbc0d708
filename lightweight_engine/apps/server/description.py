"""What ``/openapi.json`` tells beside what FastAPI knows: bodies that are read by us, headers, keys, and errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from .asking import MAX_KEY
from .guards import OPEN_PATHS, REQUEST_ID_FORM
from .schemas import request_schemas
from .sdapi.models import body_schemas

# Headers by the status that only routes which read them may answer; None is every route.
_HEADERS: tuple[tuple[str, str | None, str, dict[str, Any]], ...] = (
    (
        "X-Request-ID",
        None,
        "Stands in the log and in errors; another form of id is replaced by one that is made up.",
        {"type": "string", "pattern": f"^{REQUEST_ID_FORM}$"},
    ),
    (
        "X-Request-Timeout",
        "429",
        "Seconds that the job may wait and run, if fewer than the setting job_seconds; then 504.",
        {"type": "number", "exclusiveMinimum": 0},
    ),
    (
        "Idempotency-Key",
        "429",
        "For 24 hours the same request gets the same job; another request gets 409, unless the job failed.",
        {"type": "string", "minLength": 1, "maxLength": MAX_KEY},
    ),
)

_KEYS: dict[str, dict[str, Any]] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "basic": {"type": "http", "scheme": "basic", "description": "The key is the password; any user name will do."},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
"""How a caller may send its key."""


def describe(app: FastAPI, *, keys: bool) -> None:
    """Complete the description of an application.

    Args:
        keys: callers need one.
    """
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        description = made()
        components = description.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        schemas |= request_schemas() | body_schemas()
        if keys:
            components["securitySchemes"] = _KEYS
        for path, operations in description["paths"].items():
            for operation in operations.values():
                _complete(operation, keys=keys and path not in OPEN_PATHS)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        return description

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(operation: dict[str, Any], *, keys: bool) -> None:
    answers = operation["responses"]
    if "HTTPValidationError" in str(answers.get("422")):
        answers["422"] = answers["403"] | {"description": "A field is wrong"}
    if keys:
        operation["security"] = [{name: []} for name in _KEYS]
    operation.setdefault("parameters", []).extend(
        {"name": name, "in": "header", "required": False, "description": told, "schema": schema}
        for name, status, told, schema in _HEADERS
        if status is None or status in answers
    )
