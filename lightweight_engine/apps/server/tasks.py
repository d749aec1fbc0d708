"""What the front knows of a task before it is done: whether it may be, how long it will take, which others equal it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from ...config import EngineConfig
from ...core.limits import check_fields, check_upscale
from ...core.models import SLOTS
from ...core.named import check_named
from ...errors import ModelNotFoundError, RequestError
from ...request import GenerationRequest, Task
from .faults import ForbiddenError

MODEL_FILES = tuple(slot.setting for slot in SLOTS.values())
"""Fields that name a file of a model; clients of Forge send absolute paths of the models folder too."""

_USUAL_SIDE = 1024  # of a picture whose size the model chooses, or of one that is not read yet


def check(task: Task, config: EngineConfig, *, is_tiny: bool | None = None) -> None:
    """Refuse now what the engine would refuse as soon as the job's turn comes, as far as no model is needed for it.

    Args:
        is_tiny: the demonstration model draws; None where that is not known yet.

    Raises:
        EngineError: a field is wrong or over a limit, or a name is none.
    """
    _check_names(task, config.models_dir)
    if isinstance(task, GenerationRequest):
        check_fields(task, config)
    else:
        check_upscale(task, config)
    if is_tiny is not None:
        check_named(task, config, is_tiny=is_tiny)


def _check_names(task: Task, models_dir: Path) -> None:
    """Refuse names that are meant as paths to other places: files are looked up by name in lists of what is there.

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


def cost_of(task: Task) -> float:
    """Megapixel-steps of a task, roughly: what waiting is reckoned by. An upscaler is as one step on its picture."""
    if not isinstance(task, GenerationRequest):
        return _USUAL_SIDE**2 / 1e6 * len(task.images) * (1 if task.upscaler_2 is None else 2)
    megapixels = (task.width or _USUAL_SIDE) * (task.height or _USUAL_SIDE) / 1e6
    steps = float(task.steps)
    if task.hires:
        steps += (task.hr_steps or task.steps) * task.hr_scale**2
    return megapixels * steps * task.num_outputs


def digest_of(task: Task, *, save: bool = False) -> str:
    """The same for equal tasks whose pictures are kept alike, and for no others."""
    kind = type(task).__name__
    return hashlib.sha256(json.dumps([kind, save, task.model_dump()], sort_keys=True).encode()).hexdigest()
