"""Parts that were quantised on load, kept as files: the next start reads a third of the bytes and converts nothing.

A file is named by what it was made from and how; whoever finds it uses it. Files appear whole or not at all, so that
several processes may share the folder: who loses a race has only done work twice.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..backend.host_memory import GIB
from ..backend.model_files import open_model
from ..backend.satellites import WRITABLE
from ..config import EngineConfig
from ..errors import EngineError, OutputError
from ..flux.convert import convert_part, converted_size, rounded_already
from ..flux.keymaps import Part, Role, find_parts
from ..flux.load import PLAIN, Storage
from .folders import quantized_folder
from .models import ModelSet
from .precision import Precision
from .quantized_names import file_name

log = logging.getLogger(__name__)

ABANDONED = 24 * 3600
"""Seconds after which an unfinished file belongs to no process any more."""

CACHED: tuple[Role, ...] = ("transformer", "t5", "clip")


class QuantizedCache:
    """A folder of converted parts.

    Args:
        limit: bytes that its files may take together; those used longest ago go first.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    @classmethod
    def of(cls, config: EngineConfig) -> QuantizedCache:
        """The one that the settings name."""
        return cls(quantized_folder(config.cache_dir), int(config.quantized_cache_gib * GIB))

    def ls(self) -> list[tuple[Path, os.stat_result]]:
        """The files with their state, last used first."""
        return sorted(_states(self.folder, "*.safetensors"), key=lambda item: -item[1].st_mtime)

    def prune(self, limit: int | None = None, before: float = 0.0) -> int:
        """Remove files last used before a moment, then those used longest ago until the rest fits; bytes removed.

        Processes that have one open keep theirs. Unfinished files that belong to nobody any more go too.
        """
        gone, left = 0, sum(stat.st_size for _, stat in self.ls())
        for path, stat in reversed(self.ls()):
            if stat.st_mtime < before or (limit is not None and left > limit):
                log.info("%s leaves the cache", path.name)
                _remove(path)
                gone, left = gone + stat.st_size, left - stat.st_size
        for path, stat in _states(self.folder, "*.part"):
            if time.time() - stat.st_mtime > ABANDONED:
                _remove(path)
                gone += stat.st_size
        return gone

    def part(self, part: Part, format: str, device: torch.device) -> Part:
        """The same part, read from a file in which it is quantised already; that is written where there is none.

        Raises:
            OutputError: it is larger than the cache may be, the folder cannot be written to, or the part's file is
                replaced meanwhile.
            CorruptCheckpointError: numbers that cannot be quantised.
        """
        path = self.folder / file_name(part, format)
        found = self._open(path, part)
        if found is not None:
            return found
        size = converted_size(part, format)
        if size > self.limit:
            raise OutputError(
                f"{size / GIB:.1f} GiB are more than quantized_cache_gib = {self.limit / GIB:g} allows; raise it"
            )
        self.prune(self.limit - size)
        log.info("quantising %s once, into %s", part.checkpoint.path.name, path)
        convert_part(part, format, path, device=device)
        if file_name(part, format) != path.name:
            _remove(path)
            raise OutputError("the file was replaced as it was read; start again")
        made = self._open(path, part)
        if made is None:
            raise OutputError(f"{path} was removed or changed as soon as it was written; check the disk")
        return made

    def _open(self, path: Path, part: Part) -> Part | None:
        """The part in a file of the cache, which counts as used now; None where there is none that can be read."""
        try:
            if not path.exists():
                return None
            found = find_parts(open_model(path))[part.role]
            found.checkpoint.tensor(
                next(iter(found.checkpoint.tensors))
            )  # mapped, it may be removed by another process
            os.utime(path)
        except (EngineError, KeyError, OSError) as error:
            log.warning("%s is made anew: %s", path.name, error)
            _remove(path)
            return None
        return replace(found, given=part.given)


def _states(folder: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    """Files with their state; one that another process removes meanwhile is none."""
    for path in folder.glob(pattern):
        try:
            yield path, path.stat()
        except OSError:
            continue


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s stays in the cache: %s", path, error)


def through_cache(
    config: EngineConfig, models: ModelSet, precision: Precision, device: torch.device, notes: list[str]
) -> tuple[ModelSet, Precision]:
    """The model and its precision with stand-ins for the parts that would be quantised on load, where that is set.

    Args:
        notes: gets a sentence where a part is quantised on load all the same. A cache that cannot be used costs time
            and never a job.
    """
    if not config.quantized_cache:
        return models, precision
    cache = QuantizedCache.of(config)
    stand_ins: dict[Role, Part] = {}
    for role in CACHED:
        part, storage = models.parts[role], getattr(precision, role)
        try:
            if _is_quantised_on_load(part, storage):
                stand_ins[role] = cache.part(part, storage.format, device)
        except (OutputError, OSError) as error:
            notes.append(f"quantized_cache: {part.checkpoint.path.name} is quantised at each start: {error}")
    kept = {role: Storage("auto", getattr(precision, role).compute) for role in stand_ins}
    notes += _not_cached(models, precision, stand_ins)
    return models.with_stand_ins(stand_ins), replace(precision, **kept)


def _is_quantised_on_load(part: Part, storage: Storage) -> bool:
    """Whether all of it is, by a format that the cache can hold: what is quantised in the file is not read better."""
    return storage.format in WRITABLE and part.storage == "plain" and not rounded_already(part, storage.format)


def _not_cached(models: ModelSet, precision: Precision, cached: dict[Role, Part]) -> Iterator[str]:
    for role in CACHED:
        format, part = getattr(precision, role).format, models.parts[role]
        if role not in cached and format not in ("auto", "file", *PLAIN, *WRITABLE) and part.storage == "plain":
            yield f"quantized_cache has no effect on {part.checkpoint.path.name}: files in {format} are not written"
