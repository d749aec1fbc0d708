"""A head start in a process of its own, where torch is not imported yet."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from lightweight_engine.config import EngineConfig
from lightweight_engine.core.head_start import begin, library_of


def started(models_dir: str) -> list[object]:
    """Names of its threads, whether torch is here afterwards, and what they raised."""
    errors: list[str] = []
    threading.excepthook = lambda args: errors.append(str(args.exc_value))
    threads = begin(EngineConfig(models_dir=Path(models_dir), device="auto", offline=True))
    for thread in threads:
        thread.join(20)
    return [sorted(thread.name for thread in threads), "torch" in sys.modules, errors]


def headers_read(models_dir: str) -> list[bool]:
    """Whether the libraries of two engines know headers before they are asked for any."""
    config = EngineConfig(models_dir=Path(models_dir), device="cpu", offline=True)
    begin(config)
    return [bool(library_of(config)._read) for _ in range(2)]
