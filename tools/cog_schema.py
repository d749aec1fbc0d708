"""Write the schema of ``predict.py`` for Cog's HTTP server; ``cog build`` makes its own, this one needs no Docker.

python tools/cog_schema.py          writes .cog/openapi_schema.json
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
PLACE = Path(".cog") / "openapi_schema.json"
_LIMITS = {"ge": "minimum", "le": "maximum"}


def schema() -> dict[str, Any]:
    """The OpenAPI document of the predictor at the root of the project."""
    if str(PROJECT) not in sys.path:
        sys.path.insert(0, str(PROJECT))
    from cog._inspector import create_predictor  # type: ignore[import-not-found]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the name predict(), which callers know
        info = create_predictor("predict", "Predictor")
    fields = sorted(info.inputs.values(), key=lambda field: field.order)
    schemas: dict[str, Any] = {
        "Input": {
            "title": "Input",
            "type": "object",
            "properties": {field.name: _property(field) for field in fields},
            "required": [field.name for field in fields if field.default is None],
        },
        "Output": info.output.json_type(),
    }
    schemas |= {field.name: _choices(field) for field in fields if field.choices}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": _paths(),
        "components": {"schemas": schemas | _envelopes()},
    }


def _choices(field: Any) -> dict[str, Any]:
    described = "An enumeration."
    return {"title": field.name, "description": described, "enum": field.choices, **field.type.json_type()}


def _property(field: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"x-order": field.order}
    if field.choices:
        made["allOf"] = [{"$ref": f"#/components/schemas/{field.name}"}]
    else:
        made |= {"title": field.name.replace("_", " ").title(), **field.type.json_type()}
    limits = {theirs: getattr(field, ours) for ours, theirs in _LIMITS.items()}
    made |= {name: int(limit) if limit == int(limit) else limit for name, limit in limits.items() if limit is not None}
    if field.default is not None:
        made["default"] = field.default
    return made | ({"description": field.description} if field.description else {})


def _envelopes() -> dict[str, Any]:
    """What is around inputs and output, the same for every model."""
    request = {"id": {"type": "string"}, "input": {"$ref": "#/components/schemas/Input"}, "webhook": {"type": "string"}}
    status = {"type": "string", "enum": ["starting", "processing", "succeeded", "canceled", "failed"]}
    texts = {name: {"type": "string"} for name in ("id", "error", "logs")}
    answer = {**texts, "status": status, "output": {"$ref": "#/components/schemas/Output"}}
    named = {"PredictionRequest": request, "PredictionResponse": answer}
    return {name: {"title": name, "type": "object", "properties": rows} for name, rows in named.items()}


def _paths() -> dict[str, Any]:
    def content(name: str) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}

    answer = {"200": {"description": "The prediction.", **content("PredictionResponse")}}
    return {"/predictions": {"post": {"requestBody": content("PredictionRequest"), "responses": answer}}}


def as_text() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    target = PROJECT / PLACE
    target.parent.mkdir(exist_ok=True)
    target.write_text(as_text(), encoding="utf-8")
