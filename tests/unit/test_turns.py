"""Work with an engine is done one piece after another: none changes what another draws with, no wait is for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from lightweight_engine import EngineError, LightweightEngine, Progress
from lightweight_engine.core.describe import pixels_sha256
from lightweight_engine.core.progress import Watch
from lightweight_engine.core.turns import Turns
from lightweight_engine.errors import GenerationCancelled

SMALL = {"prompt": "a girl", "seed": 1, "width": 64, "height": 64, "steps": 3}


WORK: dict[str, Callable[[LightweightEngine], Any]] = {
    "run": lambda engine: engine.run(engine.request(**{**SMALL, "loras": []})),
    "generate": lambda engine: engine.generate(**SMALL),
    "upscale": lambda engine: engine.upscale(Image.new("RGB", (8, 8)), upscaler="Lanczos"),
    "find": lambda engine: engine.find(Image.new("RGB", (64, 64)), engine.request(**SMALL, adetailer=True)),
    "draw": lambda engine: engine.draw(engine.request(**SMALL)),
    "unload_models": lambda engine: engine.unload_models(),
    "load_models": lambda engine: engine.load_models(),
    "setup": lambda engine: engine.setup(),
    "use": lambda engine: engine.use(engine.networks),
    "close": lambda engine: engine.close(),
}


def test_none_begins_in_the_middle_of_another(engine: LightweightEngine) -> None:
    request = engine.request(**SMALL, loras=["night:1"])
    expected, refused = pixels_sha256(engine.run(request).images[0]), []

    def on_progress(progress: Progress) -> None:
        if progress.stage == "sample" and progress.step == 2:
            for name, work in WORK.items():
                with pytest.raises(EngineError, match="a job is being done in this thread"):
                    work(engine)
                refused.append(name)

    result = engine.run(request, on_progress=on_progress)
    assert refused == list(WORK) and pixels_sha256(result.images[0]) == expected


def test_to_look_is_no_work(engine: LightweightEngine) -> None:
    request, seen = engine.request(**SMALL), []

    def on_progress(progress: Progress) -> None:
        if progress.step == 1:
            seen.append((engine.models.name, engine.plan(request).stages, engine.notes))

    engine.run(request, on_progress=on_progress)
    assert len(seen) == 1


def test_what_waits_is_cancelled_while_it_waits(engine: LightweightEngine) -> None:
    """Until then it does not draw; the job before it goes on."""
    middle, may_go_on, cancel = threading.Event(), threading.Event(), threading.Event()

    def on_progress(progress: Progress) -> None:
        if progress.step == 1:
            middle.set()
            assert may_go_on.wait(60)

    drawn: list[Any] = []
    first = threading.Thread(target=lambda: drawn.append(engine.run(engine.request(**SMALL), on_progress=on_progress)))
    first.start()
    assert middle.wait(60)
    ended: list[str] = []

    def wait() -> None:
        try:
            engine.run(engine.request(**SMALL), cancel=cancel)
        except GenerationCancelled:
            ended.append("cancelled")

    second = threading.Thread(target=wait)
    second.start()
    second.join(0.3)
    assert second.is_alive() and not ended
    cancel.set()
    second.join(10)
    assert ended == ["cancelled"] and first.is_alive()
    may_go_on.set()
    first.join(60)
    assert len(drawn) == 1


def test_a_turn_is_given_back_whatever_happens() -> None:
    turns = Turns()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), turns.work():
            _ = 1 / 0
        with turns.work(Watch()), turns.look(), pytest.raises(EngineError, match="in this thread"), turns.work():
            pytest.fail("it is in the middle of another")
    free: list[bool] = []

    def take() -> None:
        with turns.work():
            free.append(True)

    other = threading.Thread(target=take)
    other.start()
    other.join(10)
    assert free == [True]
