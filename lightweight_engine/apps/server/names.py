"""Names of files in a request: they are looked up in lists of what is there, and are never paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from ...core.models import SLOTS
from ...errors import ModelNotFoundError, RequestError
from ...request import GenerationRequest, Task
from .faults import ForbiddenError

MODEL_FILES = tuple(slot.setting for slot in SLOTS.values())
"""Fields that name a file of a model; clients of Forge send absolute paths of the models folder too."""


def check_names(task: Task, models_dir: Path) -> None:
    """Refuse names that are meant as paths to other places; nothing is looked for.

    Raises:
        RequestError: one holds a NUL.
        ForbiddenError: one is an absolute path, and none of a model in the models folder.
        ModelNotFoundError: one climbs out of its folder.
    """
    for field, name in _names(task):
        if "\0" in name:
            raise RequestError(f"{field}: the name holds a NUL; send it without", field=field)
        inside = field in MODEL_FILES and _is_below(name, models_dir)
        if (PurePosixPath(name).is_absolute() and not inside) or PureWindowsPath(name).drive:
            raise ForbiddenError(f"{field}: files are named as /capabilities lists them, not by paths", param=field)
        if ".." in PureWindowsPath(name).parts:  # whose separators are both
            raise ModelNotFoundError(f"{field}: there is no file of that name; /capabilities lists them", field=field)


def _is_below(path: str, folder: Path) -> bool:
    """Whether a path is one of the folder, by its letters alone."""
    return Path(os.path.normpath(path)).is_relative_to(os.path.abspath(folder))


def _names(task: Task) -> Iterator[tuple[str, str]]:
    if not isinstance(task, GenerationRequest):
        yield from (("upscaler", task.upscaler or ""), ("upscaler_2", task.upscaler_2 or ""))
        return
    yield "hr_upscaler", task.hr_upscaler
    yield "img2img_upscaler", task.img2img_upscaler
    for field in MODEL_FILES:
        yield field, getattr(task, field) or ""
    for spec in task.loras:
        if spec.name is not None:
            yield "loras", spec.name
