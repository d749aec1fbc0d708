"""Names of files in a request: they are looked up in lists of what is there, and are never paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from ...core.models import SLOTS
from ...errors import ModelNotFoundError, RequestError
from ...request import GenerationRequest
from .faults import ForbiddenError

MODEL_FILES = tuple(slot.setting for slot in SLOTS.values())
"""Fields that name a file of a model; clients of Forge send absolute paths of the models folder too."""


def check_names(request: GenerationRequest, models_dir: Path) -> None:
    """Refuse names that are meant as paths to other places; nothing is looked for.

    Raises:
        RequestError: one holds a NUL.
        ForbiddenError: one is an absolute path, and none of a model in the models folder.
        ModelNotFoundError: one climbs out of its folder.
    """
    for field, name in _names(request):
        if "\0" in name:
            raise RequestError(f"{field}: the name holds a NUL; send it without", field=field)
        inside = field in MODEL_FILES and _is_below(name, models_dir)
        if (PurePosixPath(name).is_absolute() and not inside) or PureWindowsPath(name).drive:
            raise ForbiddenError(f"{field}: files are named as /capabilities lists them, not by paths", param=field)
        if ".." in PureWindowsPath(name).parts:  # whose separators are both
            raise ModelNotFoundError(f"{field}: there is no file of that name; /capabilities lists them")


def _is_below(path: str, folder: Path) -> bool:
    """Whether a path is one of the folder, by its letters alone."""
    return Path(os.path.normpath(path)).is_relative_to(os.path.abspath(folder))


def _names(request: GenerationRequest) -> Iterator[tuple[str, str]]:
    yield "hr_upscaler", request.hr_upscaler
    yield "img2img_upscaler", request.img2img_upscaler
    for field in MODEL_FILES:
        yield field, getattr(request, field) or ""
    for spec in request.loras:
        if spec.name is not None:
            yield "loras", spec.name
