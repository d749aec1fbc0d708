"""Names, types, defaults and nullability of the API's models.

Types are compared as texts in one form, as Python writes ``Optional[int]`` in more than one way.
"""

from __future__ import annotations

import re
from typing import Any

from goldens import Case
from pydantic import BaseModel

from lightweight_engine.apps.server.sdapi import models

MODELS: dict[str, type[BaseModel]] = {
    "txt2img": models.TextToImageRequest,
    "img2img": models.ImageToImageRequest,
    "extra_single": models.ExtraSingleRequest,
    "progress_request": models.ProgressRequest,
    "progress_response": models.ProgressResponse,
    "png_info_response": models.PngInfoResponse,
    "memory": models.MemoryResponse,
    "txt2img_response": models.GenerationResponse,
}


def check(case: Case) -> None:
    fields = MODELS[case.id].model_fields
    rows = {row["name"]: row for row in case["fields"]}
    assert set(fields) == set(rows)
    for name, row in rows.items():
        field = fields[name]
        assert normal_form(field.annotation) == normal_form(row["type"]), name
        assert field.is_required() == row["required"], name
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        assert default == row["default"], name
        assert repr(default) == row.get("repr", repr(default)), name


def normal_form(annotation: Any) -> str:
    """``<class 'str'>`` as ``str``, ``typing.Optional[int]`` as ``int | None``."""
    text = re.sub(r"<class '(.+)'>", r"\1", annotation if isinstance(annotation, str) else repr(annotation))
    text = text.replace("typing.", "")
    return re.sub(r"^Optional\[(.+)\]$", r"\1 | None", text)
