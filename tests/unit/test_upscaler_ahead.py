"""The first network of a process is read beside other work: the same result, and told of as soon as it is known."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from first_upscale import what_is_imported
from fresh import called_fresh
from safetensors.torch import save_file
from test_hires_fix import compact_state

from lightweight_engine import Config, LightweightEngine, Progress
from lightweight_engine.core import warm_up
from lightweight_engine.core.describe import pixels_sha256
from lightweight_engine.core.warm_up import draw_once
from lightweight_engine.errors import EngineError, UnsupportedCheckpointError
from lightweight_engine.upscalers import networks
from lightweight_engine.upscalers.library import Coming, UpscalerLibrary

pytest.importorskip("spandrel")

JOB = {"prompt": "a", "width": 64, "height": 64, "steps": 2, "hr_steps": 1, "hr_scale": 1.5, "seed": 3}


class Reading:
    """``open_network``, which begins to read when it may."""

    def __init__(self, read: Callable[[Path], Any]) -> None:
        self.read, self.threads = read, []
        self.began, self.may = threading.Event(), threading.Event()

    def __call__(self, path: Path) -> Any:
        self.threads.append(threading.current_thread())
        self.began.set()
        assert self.may.wait(60)
        return self.read(path)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    """As in a process that has not imported spandrel."""
    made = Reading(networks.open_network)
    monkeypatch.setattr(networks, "open_network", made)
    monkeypatch.setattr(networks, "is_imported", lambda: False)
    return made


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "ESRGAN").mkdir()
    save_file(compact_state(), tmp_path / "ESRGAN" / "4x-Small.safetensors")
    return tmp_path


def engine_of(models: Path, **settings: Any) -> LightweightEngine:
    return LightweightEngine(
        Config(models_dir=models, cache_dir=models / "cache", device="cpu", offline=True, **settings)
    )


def test_nobody_waits_for_a_network_before_it_is_used(models: Path, reading: Reading) -> None:
    library, told = UpscalerLibrary([models]), []
    coming = library.begin("4x-small", after_tile=lambda done, total: told.append((done, total)))
    assert isinstance(coming, Coming)
    coming.check()
    reading.may.set()
    levels = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    assert torch.equal(coming.upscale(levels, 2), library.find("4x-Small").upscale(levels, 2))
    assert coming.scale == 4 and told == [(1, 1)]
    assert len(reading.threads) == 1 and reading.threads[0] is not threading.current_thread()


def test_what_needs_no_network_is_there_at_once(models: Path, reading: Reading) -> None:
    assert UpscalerLibrary([models]).begin("Lanczos").name == "Lanczos"
    assert reading.threads == []


def test_a_network_that_is_being_read_is_dropped_too(models: Path, reading: Reading) -> None:
    library = UpscalerLibrary([models])
    library.begin("4x-Small")
    threading.Timer(0.05, reading.may.set).start()
    library.release()
    assert library.held == 0 and len(reading.threads) == 1


def test_later_ones_are_read_in_their_turn(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "is_imported", lambda: True)
    assert not isinstance(UpscalerLibrary([models]).begin("4x-Small"), Coming)


def test_a_bad_network_is_told_with_its_field(models: Path) -> None:
    save_file({"x": torch.zeros(2)}, models / "ESRGAN" / "4x-Bad.safetensors")
    library = UpscalerLibrary([models])
    with pytest.raises(UnsupportedCheckpointError, match="^hr_upscaler: 4x-Bad") as caught:
        library.begin("4x-Bad", field="hr_upscaler")
        library.find("4x-Bad", field="hr_upscaler")
    assert caught.value.field == "hr_upscaler"


def test_a_job_samples_meanwhile(models: Path, reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network may be read only once the first pass is over; were it waited for, the job would never end."""
    engine = engine_of(models)

    def watch(report: Progress) -> None:
        if report.stage == "sample" and report.step == 2:
            reading.may.set()

    asked = engine.request(**JOB, hr_upscaler="4x-Small")
    first = engine.run(asked, on_progress=watch)
    monkeypatch.undo()
    assert pixels_sha256(engine.run(asked).images[0]) == pixels_sha256(first.images[0])


def test_a_bad_file_ends_the_job_at_the_next_step(models: Path, reading: Reading) -> None:
    save_file({"x": torch.zeros(2)}, models / "ESRGAN" / "4x-Bad.safetensors")
    engine, steps = engine_of(models), []

    def watch(report: Progress) -> None:
        if report.stage == "sample":
            steps.append(report.step)
            assert reading.began.wait(60)
            reading.may.set()
            reading.threads[0].join(60)

    with pytest.raises(UnsupportedCheckpointError, match="4x-Bad"):
        engine.run(engine.request(**{**JOB, "steps": 50}, hr_upscaler="4x-Bad"), on_progress=watch)
    assert len(steps) <= 2


def test_a_warm_up_reads_the_upscaler_of_the_settings(models: Path, reading: Reading) -> None:
    reading.may.set()
    engine = engine_of(models, hr_upscaler="4x-Small")
    draw_once(engine)
    assert engine.upscalers.held > 0
    assert len(reading.threads) == 1 and reading.threads[0] is not threading.current_thread()


@pytest.mark.parametrize("name", ["4x-Missing", "Lanczos"])
def test_a_warm_up_reads_no_other(models: Path, reading: Reading, name: str) -> None:
    draw_once(engine_of(models, hr_upscaler=name))
    assert reading.threads == []


def test_a_bad_upscaler_is_no_fault_of_a_start(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(warm_up.log, "warning", lambda text, *values: told.append(text % values))
    save_file({"x": torch.zeros(2)}, models / "ESRGAN" / "4x-Bad.safetensors")
    engine = engine_of(models, hr_upscaler="4x-Bad")
    assert sum(draw_once(engine).values()) > 0
    assert len(told) == 1 and told[0].startswith("the upscaler of the settings cannot be used: hr_upscaler: 4x-Bad")
    with pytest.raises(EngineError, match="4x-Bad"):
        engine.run(engine.request(**JOB))


def test_jobs_that_need_no_network_import_none(models: Path) -> None:
    assert called_fresh(what_is_imported, str(models)) == {
        **dict.fromkeys(("an engine", "a plain job", "Latent", "Lanczos"), False),
        "4x-Small": True,
    }
