"""What a task names or brings: models, LoRAs, pictures. The front looks before a job waits, the worker again when its
turn comes, as files may come and go meanwhile. Loads no torch; Pillow and numpy with the first picture.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from ...backend.urls import check_url
from ...config import EngineConfig
from ...core.choice import choose_models
from ...core.loras import check_loras, lora_library
from ...core.models import ModelLibrary
from ...errors import about
from ...extensions.lora_library import LoraLibrary
from ...request import GenerationRequest, Task
from .tasks import MODEL_FILES

if TYPE_CHECKING:
    from ...core.pictures import PictureReader

PICTURES = ("image", "mask", "images")
"""Fields of tasks that hold pictures."""

T = TypeVar("T")


class Sources:
    """Refuses a task for what can be told of its sources at once: names by the folders as they are, files by their
    headers, pictures by the heads of theirs. Nothing is fetched, and no weight or pixel read.

    Calls from several threads take turns where they look at folders.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._models = ModelLibrary.of(config)
        self._loras: dict[bool, LoraLibrary] = {}
        self._turn = threading.Lock()

    def check(self, task: Task) -> None:
        """
        Raises:
            EngineError: the one that the worker would raise, which names the field.
        """
        if isinstance(task, GenerationRequest):
            with self._turn:
                self._check_files(task)
        if any(getattr(task, name, None) is not None for name in PICTURES):
            reader = reader_of(self._config)
            _each_picture(task, lambda given, field: self._check_picture(reader, given, field))

    def _check_files(self, request: GenerationRequest) -> None:
        chosen = cache(lambda: choose_models(self._config.with_model_of(request), [], self._models.refresh()))
        if any(getattr(request, setting) for setting in MODEL_FILES):
            check_models(request, self._models)
            chosen()
        check_loras(request, self._config, lambda: self._loras_with(chosen().is_tiny))

    def _loras_with(self, tiny: bool) -> LoraLibrary:
        if tiny not in self._loras:
            self._loras[tiny] = lora_library(self._config, with_tiny=tiny)
        return self._loras[tiny]

    def _check_picture(self, reader: PictureReader, given: Any, field: str) -> None:
        if reader.fetches(given):
            with about(field):
                check_url(given.strip(), self._config.allow_hosts)
        else:
            reader.check(given, field)


def check_models(request: GenerationRequest, library: ModelLibrary) -> None:
    """Refuse files that are not in the models folder, so that the engine is never given a name that could be a path.

    Raises:
        ModelNotFoundError: names the field, close names, and those that there are.
    """
    named = {setting: name for setting in MODEL_FILES if (name := getattr(request, setting)) is not None}
    if named:
        library.refresh()
    for setting, name in named.items():
        library.find(name, listed=True, field=setting)


def reader_of(config: EngineConfig) -> PictureReader:
    """Reads the pictures of callers, who may name no file of this machine, and URLs only where that is configured."""
    from ...core.pictures import PictureReader

    reader = PictureReader.of(config, paths=False)
    return reader if config.fetch_pictures else PictureReader(None, False, reader.max_pixels)


def with_pictures(task: Task, reader: PictureReader) -> Task:
    """The task with its pictures decoded, so that the engine is never given a text that could be a path.

    Raises:
        RequestError, DownloadError: as of ``PictureReader.read``; of a list they name the picture's number too.
    """
    read = _each_picture(task, reader.read)
    return task.model_copy(update=read) if read else task


def _each_picture(task: Task, read: Callable[[Any, str], T]) -> dict[str, T | list[T]]:
    """What ``read`` makes of every picture of a task, by its field; it is told the field, and the place in a list."""
    made: dict[str, T | list[T]] = {}
    for name in PICTURES:
        given = getattr(task, name, None)
        if isinstance(given, list | tuple):
            made[name] = [read(each, f"{name}[{number}]") for number, each in enumerate(given)]
        elif given is not None:
            made[name] = read(given, name)
    return made
