"""A head start in a process of its own, where torch is not imported yet."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

from lightweight_engine.apps.console import Console
from lightweight_engine.apps.session import check_request, start_engine
from lightweight_engine.config import EngineConfig
from lightweight_engine.core import head_start, models
from lightweight_engine.core.head_start import begin, library_of
from lightweight_engine.core.models import ModelLibrary
from lightweight_engine.request import GenerationRequest


def started(models_dir: str) -> list[object]:
    """Names of its threads, whether torch is here afterwards, and what they raised."""
    errors: list[str] = []
    threading.excepthook = lambda args: errors.append(str(args.exc_value))
    threads = begin(EngineConfig(models_dir=Path(models_dir), device="auto", offline=True))
    for thread in threads:
        thread.join(20)
    return [sorted(thread.name for thread in threads), "torch" in sys.modules, errors]


def read_for_a_request(models_dir: str) -> list[int]:
    """Files whose headers are read, once or more, by the check of a request, the start that follows it, and its engine;
    and how often they were, in all."""
    real, read = models.read_entry, []

    def noted(path: Path, name: str, **options: bool) -> models.Entry:
        read.append(path)
        return real(path, name, **options)

    models.read_entry = noted
    config = EngineConfig(models_dir=Path(models_dir), device="cpu", offline=True)
    begin(config, check_request(GenerationRequest(prompt="a"), config))
    library_of(config).refresh().choose()
    return [len(set(read)), len(read)]


def headers_read(models_dir: str) -> list[bool]:
    """Whether the libraries of two engines know headers before they are asked for any."""
    config = EngineConfig(models_dir=Path(models_dir), device="cpu", offline=True)
    begin(config)
    return [bool(library_of(config)._read) for _ in range(2)]


def waited_for(models_dir: str) -> list[bool]:
    """Whether headers are read when a start has begun: where they can be, and where they take longer than it waits."""
    read: list[bool] = []
    real, may_go_on = ModelLibrary.of, threading.Event()

    def slow(config: EngineConfig) -> ModelLibrary:
        may_go_on.wait(20)
        return real(config)

    for name, patience, of in (("auto", 20, real), ("cuda", 0.05, slow)):
        may_go_on.clear()
        head_start.PATIENCE, ModelLibrary.of = patience, of  # type: ignore[method-assign]
        config = EngineConfig(models_dir=Path(models_dir), device=name, offline=True)
        files, *_ = begin(config)
        read.append(not files.is_alive())
        may_go_on.set()
        library_of(config)  # as the engine does, which a start begins once
        files.join(20)
    return read


def left_to_the_collector(models_dir: str) -> list[bool]:
    """Of passes of the collector, once an engine has started: whether they happen, leave out imports, and its model."""
    engine = start_engine(Console(quiet=True), EngineConfig(models_dir=Path(models_dir), device="cpu", offline=True))
    looked_at = {id(each) for each in gc.get_objects()}
    imported, model = sys.modules["torch"].__dict__, engine.networks.load("transformer").__dict__
    return [gc.isenabled(), id(imported) not in looked_at, id(model) not in looked_at]
