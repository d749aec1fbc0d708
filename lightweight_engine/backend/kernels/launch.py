"""Whether Triton's programs can run here, and starting one."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FOLDER = "TRITON_CACHE_DIR"

# A product and a sum that Triton joins are rounded once, where the twins round twice.
ROUNDED_EACH = {"enable_fp_fusion": False}


@cache
def available() -> bool:
    """Whether programs can be run: on a GPU with Triton and what it needs, or in Triton's interpreter.

    Triton builds its connection to the driver with the system's C compiler; where that fails the twins do the work, and
    one warning says so.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return torch.cuda.is_available() and _driver_works()


def keep_in(folder: Path) -> None:
    """Keep compiled programs in a folder, unless the environment names another; says so before the first is used.

    Triton tells them apart by its version, the program and the GPU, so that many may share the folder.
    """
    os.environ.setdefault(FOLDER, str(folder))


def kept_in() -> Path:
    """The folder that compiled programs are kept in."""
    return Path(os.environ.get(FOLDER) or Path.home() / ".triton" / "cache")


def _driver_works() -> bool:
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(
            "Triton cannot reach the GPU (%s): quantised weights are read by plain torch, which is slower; "
            "it usually lacks a C compiler (gcc) or the headers of Python",
            error,
        )
        return False
    return True


def launch(program: Any, grid: tuple[int, ...], *arguments: Tensor | int, **constants: Any) -> None:
    """Queue ``grid`` programs on the device of the first argument, which need not be the current one."""
    with torch.cuda.device_of(arguments[0]):
        program[grid](*arguments, **constants)
