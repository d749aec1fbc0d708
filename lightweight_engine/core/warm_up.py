"""A tiny job through every stage: what only the first job does is done before somebody waits for it.

Triton's programs are compiled and kept for later processes; libraries make their handles and choose how to multiply.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backend import kernels
from ..errors import EngineError
from ..request import GenerationRequest
from ..upscalers.dense import build_programs
from ..upscalers.files import HIRES

if TYPE_CHECKING:
    from .engine import LightweightEngine

log = logging.getLogger(__name__)

WARM_UP: Mapping[str, Any] = {"prompt": "", "width": 256, "height": 256, "steps": 1, "enable_hr": False, "seed": 0}


@dataclass(frozen=True)
class WarmedUp:
    """What it took.

    Attributes:
        folder: where compiled programs are kept; None where there is nothing to compile.
        compiled: programs that the job needed and were not there yet.
        kept: programs in the folder.
        first: seconds of each stage.
        again: seconds of the same job once more.
    """

    folder: Path | None
    compiled: int
    kept: int
    first: Mapping[str, float]
    again: Mapping[str, float]


def warm_up(engine: LightweightEngine) -> WarmedUp:
    """Draw with the model of the settings, twice.

    Raises:
        EngineError: as ``LightweightEngine.run``.
    """
    on_gpu = engine.networks.device.type == "cuda" and kernels.available()
    folder = kernels.kept_in() if on_gpu else None
    before = _programs(folder)
    first, again = draw_once(engine), engine.run(GenerationRequest(**WARM_UP), hashed=False).timings
    kept = _programs(folder)
    log.info("a tiny job took %.2f s, and once more %.2f s", sum(first.values()), sum(again.values()))
    return WarmedUp(folder, kept - before, kept, first, again)


def draw_once(engine: LightweightEngine) -> Mapping[str, float]:
    """Draw with the model of the settings, and get their upscaler ready where its file is there.

    The tiny job is not enlarged: it runs while the network is read and its package imported, which is seconds.

    Returns:
        Seconds of each stage.

    Raises:
        EngineError: as ``LightweightEngine.run``.
    """
    name, device = engine.config.hr_upscaler, engine.networks.device
    engine.upscalers.device = device
    wanted = any(entry.name == name for entry in engine.upscalers.entries())
    with ThreadPoolExecutor(1, "upscaler") as beside:
        reading = beside.submit(engine.upscalers.find, name, field=HIRES) if wanted else None
        if wanted and device.type == "cuda" and kernels.available():
            build_programs(device)
        timings = engine.run(GenerationRequest(**WARM_UP), hashed=False).timings
        engine.networks.build_programs()
    try:
        if reading is not None:
            reading.result()
    except EngineError as error:  # whoever asks for it is told
        log.warning("the upscaler of the settings cannot be used: %s", error)
    return timings


def _programs(folder: Path | None) -> int:
    return sum(1 for _ in folder.rglob("*.cubin")) if folder is not None else 0
