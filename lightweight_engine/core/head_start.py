"""What a start does while torch is imported: the GPU's driver gets ready, and the model's bytes come nearer.

Both are waits for the system, in threads, during which Python's lock is free. Nothing depends on them: where there is
no driver or no file, whoever needs it says so later. Loads no torch.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from ..backend.read_ahead import Span, joined, read_ahead
from ..config import EngineConfig
from ..errors import EngineError
from ..flux.keymaps import Part, Role
from .choice import choose_models
from .folders import quantized_folder
from .quantized_names import file_name

MEMORY_SHARE = 0.5
"""Of the machine's memory: were more read, the first bytes would be gone before they are used."""

SETTING: dict[Role, str] = {"transformer": "storage_dtype", "t5": "text_storage_dtype", "clip": "text_storage_dtype"}


def begin(config: EngineConfig) -> list[threading.Thread]:
    """Start at once what takes the system time; nothing where torch is here already, as then nothing is gained.

    Returns:
        The threads, which nobody has to wait for.
    """
    if "torch" in sys.modules:
        return []
    jobs = [threading.Thread(target=_read, args=(config,), name="head start: files", daemon=True)]
    index = _index(config.device)
    if index is not None:
        jobs.append(threading.Thread(target=hold_context, args=(index,), name="head start: GPU", daemon=True))
    for job in reversed(jobs):  # the driver first: the files' headers are read with Python's lock held
        job.start()
    return jobs


def _index(device: str) -> int | None:
    """The number of the GPU that a device's name means; None for a CPU and what is no device."""
    name, _, number = device.partition(":")
    if name not in ("auto", "cuda"):
        return None
    return int(number) if number.isdecimal() else 0


def hold_context(index: int) -> bool:
    """Make the context of a GPU that all of this process shares, as torch does at its first use; whether it is there.

    Kernels are loaded as they are used, which torch asks for too, and which has to be said before.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    try:
        driver = ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        return (
            driver.cuInit(0) == 0
            and driver.cuDeviceGet(ctypes.byref(device), index) == 0
            and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
        )
    except (OSError, AttributeError):
        return False


def _read(config: EngineConfig) -> None:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        read_ahead(spans(config), int(memory * MEMORY_SHARE))
    except (EngineError, OSError, ValueError, AttributeError):
        return  # told by whoever loads the model


def spans(config: EngineConfig) -> list[Span]:
    """The bytes that the model of the settings is loaded from, in the order in which that is done.

    Raises:
        ModelError: there is none, or it cannot be used.
    """
    parts = choose_models(config, []).parts
    return joined(span for role, part in parts.items() for span in _spans_of(config, role, part))


def _spans_of(config: EngineConfig, role: Role, part: Part) -> Iterator[Span]:
    """Those of a part, or of the file in which it is quantised already."""
    quantised = _quantised(config, role, part)
    if quantised is not None:
        yield Span(quantised, 0, quantised.stat().st_size)
        return
    for source in part.sources.values():
        for stored, _ in source.pieces:
            for key in stored.keys:
                info = stored.checkpoint.tensors[key]
                yield Span(stored.checkpoint.file_of(key), info.start, info.end)


def _quantised(config: EngineConfig, role: Role, part: Part) -> Path | None:
    if not config.quantized_cache or role not in SETTING:
        return None
    path = quantized_folder(config.cache_dir) / file_name(part, getattr(config, SETTING[role]))
    return path if path.is_file() else None
