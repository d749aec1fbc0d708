"""What the front knows of a task before it is done: whether it may be, how long it will take, which others equal it."""

from __future__ import annotations

import hashlib
import json

from ...config import EngineConfig
from ...core.limits import check_fields, check_upscale
from ...core.named import check_named
from ...request import GenerationRequest, Task
from .names import check_names

_USUAL_SIDE = 1024  # of a picture whose size the model chooses, or of one that is not read yet


def check(task: Task, config: EngineConfig, *, is_tiny: bool | None = None) -> None:
    """Refuse now what the engine would refuse as soon as the job's turn comes, as far as no model is needed for it.

    Args:
        is_tiny: the demonstration model draws; None where that is not known yet.

    Raises:
        EngineError: a field is wrong or over a limit, or a name is none.
    """
    check_names(task, config.models_dir)
    if isinstance(task, GenerationRequest):
        check_fields(task, config)
    else:
        check_upscale(task, config)
    if is_tiny is not None:
        check_named(task, config, is_tiny=is_tiny)


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
