"""An engine in the hands of one command: started with words, run with progress, stopped by Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from ..backend.processes import collector_paused
from ..backend.torch_import import import_torch
from ..backend.urls import check_url
from ..errors import GenerationCancelled, about
from .console import Console
from .interrupts import INTERRUPTED, on_interrupt
from .options import check_models_dir
from .progress import reporter

if TYPE_CHECKING:
    from ..config import EngineConfig
    from ..core.engine import LightweightEngine
    from ..core.models import ModelLibrary
    from ..request import GenerationRequest
    from ..results import DetailReport


def check_request(request: GenerationRequest, config: EngineConfig) -> ModelLibrary:
    """Refuse now, before anything is loaded, what the engine would refuse as soon as it is ready.

    Returns:
        The model files, their headers read, for ``start_engine``.
    """
    from ..core.choice import choose_models
    from ..core.limits import check_fields
    from ..core.loras import check_loras, lora_library
    from ..core.models import ModelLibrary
    from ..core.named import check_named

    check_models_dir(config)
    library = ModelLibrary.of(config)
    check_fields(request, config)
    check_loras(request, config, partial(lora_library, config))
    check_named(request, config, is_tiny=choose_models(config.with_model_of(request), [], library).is_tiny)
    if request.image is not None or request.mask is not None:
        _check_pictures(request, config)
    return library


def _check_pictures(request: GenerationRequest, config: EngineConfig) -> None:
    from ..core.pictures import PictureReader  # numpy and Pillow, for which the GPU's driver need not wait

    reader = PictureReader.of(config)
    for field in ("image", "mask"):
        given = getattr(request, field)
        if reader.fetches(given):  # once, by the engine
            with about(field):
                check_url(given.strip(), config.allow_hosts)
        elif isinstance(given, str):
            reader.read(given, field)


def start_engine(console: Console, config: EngineConfig, library: ModelLibrary | None = None) -> LightweightEngine:
    """An engine that is ready; says which model it has, and that it is `tiny` where none was found.

    Args:
        library: see ``check_request``.
    """
    check_models_dir(config)
    begin = time.perf_counter()
    with collector_paused(keep=True):
        from ..core import head_start

        head_start.begin(config, library)
        _check_device(config)
        console.say("loading ...")
        import_torch()
        from ..core.engine import LightweightEngine
    with collector_paused():
        engine = LightweightEngine(config)
        engine.setup()
    took = time.perf_counter() - begin
    for note in engine.notes:  # now, as it may be worth stopping for
        console.warn(note)
    name = "tiny, the demonstration model" if engine.models.is_tiny else engine.models.name
    console.say(f"model: {name}; device: {engine.networks.device}; ready in {took:.1f} s")
    return engine


def _check_device(config: EngineConfig) -> None:
    """Refuse a GPU that is named and not there before "loading" is said; torch is imported for it, and only then."""
    if config.device not in ("auto", "cpu"):
        import_torch()
        from ..backend.devices import pick_device

        pick_device(config.device)


def tell_details(console: Console, details: Sequence[DetailReport]) -> None:
    """Say what the detailer found on each picture, and painted."""
    for number, report in enumerate(details, 1):
        where = f"picture {number}: " if len(details) > 1 else ""
        for each in report.passes:
            console.say(f"{where}{each['model']}: {len(each['found'])} found, {each['painted']} painted")


@contextmanager
def watched(console: Console, label: str = "") -> Iterator[dict[str, Any]]:
    """The options of ``LightweightEngine.run`` that show progress on stderr and stop within one step at Ctrl-C.

    A job stopped so ends the command with exit code 130.
    """
    cancel = threading.Event()
    with on_interrupt(cancel.set), reporter(console, label) as show:
        try:
            yield {"on_progress": show, "cancel": cancel}
        except GenerationCancelled:
            if cancel.is_set():
                console.fail(GenerationCancelled("stopped by Ctrl-C; this job saved nothing"), INTERRUPTED)
            raise
