"""What a start does while torch is imported: the GPU's driver gets ready, and fetches the model.

All are waits for the system, in threads, during which Python's lock is free. Nothing depends on them: where there is no
driver or no file, whoever needs it says so later. Loads no torch. What reads files is imported by the thread that does,
as the driver takes longest and is to begin at once.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from ..backend.early_fetch import buffered, can_fetch, early_fetch
from ..backend.gpu_driver import Driver, hold_context
from ..backend.host_memory import GIB, host_available, host_total
from ..backend.read_ahead import Span, joined, read_ahead
from ..backend.reader import build_later, read_pieces
from ..errors import EngineError
from .folders import kernels_folder

if TYPE_CHECKING:
    from ..config import EngineConfig
    from ..flux.keymaps import Part, Role
    from .models import ModelLibrary

MEMORY_SHARE = 0.5
"""Of the memory that this process may have: were more read, the first bytes would be gone before they are used."""

PATIENCE = 0.4
"""Seconds that imports wait for the headers, which say what a GPU is to fetch: read beside imports, with which they
share Python's lock, they take ten times as long. From a slow disk they take longer than this."""

BESIDE = 2 * GIB
"""Of a GPU that both the model and what was fetched of it leave: contexts, and converting a weight."""

SETTING: dict[Role, str] = {"transformer": "storage_dtype", "t5": "text_storage_dtype", "clip": "text_storage_dtype"}


def begin(config: EngineConfig, library: ModelLibrary | None = None) -> list[threading.Thread]:
    """Start at once what takes the system time; nothing where torch is here already, as then nothing is gained.

    Args:
        library: that of the settings' folder, where somebody has read its headers.

    Returns:
        The threads, which nobody has to wait for.
    """
    if "torch" in sys.modules:
        return []
    found: SimpleQueue[list[Span]] = SimpleQueue()
    left = _begun().begin(config.models_dir)
    jobs = [
        threading.Thread(target=lambda: found.put(_read(config, left, library)), name="head start: files", daemon=True)
    ]
    index = _index(config.device)
    if index is not None:

        def ready_gpu() -> None:
            driver = hold_context(index)
            if driver is not None:
                _fetch(config, driver, found.get())

        jobs.append(threading.Thread(target=ready_gpu, name="head start: GPU", daemon=True))
    for job in reversed(jobs):  # the driver first: the files' headers are read with Python's lock held
        job.start()
    if index is not None:
        jobs[0].join(PATIENCE)
    return jobs


def _index(device: str) -> int | None:
    """The number of the GPU that a device's name means; None for a CPU and what is no device."""
    name, _, number = device.partition(":")
    if name not in ("auto", "cuda"):
        return None
    return int(number) if number.isdecimal() else 0


def _fetch(config: EngineConfig, driver: Driver, found: Sequence[Span]) -> None:
    """Have the GPU fetch what will stay there, as far as it has room for that beside what is loaded from it.

    Weights that pass through wait in buffers of their own.
    """
    streams = config.vram_state in ("LOW_VRAM", "NO_VRAM") or not config.pinned_memory
    if streams or not can_fetch() or buffered() > host_available() * MEMORY_SHARE:
        return
    with suppress(OSError, AttributeError):
        room = driver.free() if driver.enter() else 0
        if config.vram_limit is not None:
            room = min(room, int(config.vram_limit * GIB))
        room -= sum(span.end - span.start for span in found) + BESIDE
        early_fetch().fetch(driver, found, room, read_pieces(kernels_folder(config.cache_dir)))


def stand(device: str) -> None:
    """A model is going to be loaded to a device of this type: what has not begun by now is not begun any more."""
    if device == "cuda":
        early_fetch().stand()
    else:
        end()


def end(*, wait: bool = False) -> bool:
    """The model is loaded, or cannot be: the memory of the GPU that a start took is given back; whether there was any.

    Args:
        wait: see ``EarlyFetch.close``.
    """
    took = early_fetch().nbytes > 0
    early_fetch().close(wait=wait)
    return took


def leave(config: EngineConfig, device: str) -> None:
    """A model has been loaded to a device of this type: where that was a start, what makes the next one quicker is
    left for it, beside other work."""
    if device == "cuda" and _begun().take_turn():
        build_later(kernels_folder(config.cache_dir))


class _Begun:
    """What a start leaves for the engine: the library whose headers it has read."""

    def __init__(self) -> None:
        self._libraries: dict[Path, Future[ModelLibrary | None]] = {}
        self._is_start = False

    def take_turn(self) -> bool:
        """Whether this process has begun with a start; once."""
        turn, self._is_start = self._is_start, False
        return turn

    def begin(self, folder: Path) -> Future[ModelLibrary | None]:
        self._is_start = True
        return self._libraries.setdefault(folder, Future())

    def take(self, config: EngineConfig) -> ModelLibrary | None:
        """It is given away once; waited for, as to read the headers anew takes no less."""
        found = self._libraries.pop(config.models_dir, None)
        return None if found is None else found.result()


@cache
def _begun() -> _Begun:
    """That of this process, which starts once."""
    return _Begun()


def library_of(config: EngineConfig) -> ModelLibrary:
    """The files of the settings' folder, with their headers where a start has read them."""
    from .models import ModelLibrary

    return _begun().take(config) or ModelLibrary.of(config)


def _read(config: EngineConfig, left: Future[ModelLibrary | None], library: ModelLibrary | None = None) -> list[Span]:
    """Begin to read the model; what it is read from."""
    found: list[Span] = []
    try:
        from .models import ModelLibrary

        library = library or ModelLibrary.of(config)
        found = spans(config, library)
    except (EngineError, OSError, ValueError):
        pass  # told by whoever loads the model
    finally:
        left.set_result(library)  # somebody waits for it, whatever happened
    with suppress(OSError, ValueError, AttributeError):
        read_ahead(found, int(host_total() * MEMORY_SHARE))
    return found


def spans(config: EngineConfig, library: ModelLibrary | None = None) -> list[Span]:
    """The bytes that the model of the settings is loaded from, in the order in which that is done.

    Args:
        library: see ``choose_models``.

    Raises:
        ModelError: there is none, or it cannot be used.
    """
    from .choice import choose_models

    parts = choose_models(config, [], library).parts
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
    from .folders import quantized_folder
    from .quantized_names import file_name

    path = quantized_folder(config.cache_dir) / file_name(part, getattr(config, SETTING[role]))
    return path if path.is_file() else None
