"""Pictures enlarged without a model: to a scale, to a size, by two upscalers, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from first_device import threads_after
from fresh import called_fresh
from PIL import Image

from lightweight_engine import Config, LightweightEngine, Progress
from lightweight_engine.core.progress import Interrupt
from lightweight_engine.core.upscaling import target_of
from lightweight_engine.errors import ModelNotFoundError, RequestError
from lightweight_engine.request import UpscaleRequest


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LightweightEngine]:
    folder = tmp_path_factory.mktemp("upscaling")
    made = LightweightEngine(Config(models_dir=folder, cache_dir=folder / "cache", device="cpu", offline=True))
    yield made
    made.close()


def noise(width: int = 40, height: int = 24) -> Image.Image:
    return Image.effect_noise((width, height), 60).convert("RGB")


def upscaled(engine: LightweightEngine, *images: Image.Image, **fields: Any) -> list[Image.Image]:
    return list(engine.run_upscale(UpscaleRequest(images=images, **fields)).images)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({}, (80, 48)),
        ({"by": 1.5}, (60, 36)),
        ({"width": 100}, (100, 60)),
        ({"height": 12}, (20, 12)),
        ({"width": 100, "height": 100}, (167, 100)),
        ({"width": 100, "height": 100, "crop": True}, (100, 100)),
        ({"width": 33, "height": 5, "crop": True}, (33, 5)),
    ],
)
def test_sizes(engine: LightweightEngine, asked: dict[str, Any], size: tuple[int, int]) -> None:
    assert upscaled(engine, noise(), upscaler="Lanczos", **asked)[0].size == size


def test_what_is_cut_is_the_middle(engine: LightweightEngine) -> None:
    picture = noise()
    whole = upscaled(engine, picture, upscaler="4x_tiny", width=100, height=100)[0]
    cut = upscaled(engine, picture, upscaler="4x_tiny", width=100, height=100, crop=True)[0]
    assert same(cut, whole.crop((33, 0, 133, 100)))


def test_two_are_blended(engine: LightweightEngine) -> None:
    picture = noise()
    first, second = (upscaled(engine, picture, upscaler=name)[0] for name in ("Nearest", "4x_tiny"))
    request = UpscaleRequest(images=(picture,), upscaler="Nearest", upscaler_2="4x_tiny", upscaler_2_visibility=0.25)
    result = engine.run_upscale(request)
    assert result.upscalers == ("Nearest", "4x_tiny") and same(result.images[0], Image.blend(first, second, 0.25))


def test_at_a_scale_of_1_a_network_runs_all_the_same(engine: LightweightEngine) -> None:
    picture = noise()
    made = upscaled(engine, picture, upscaler="4x_tiny", by=1)[0]
    assert made.size == picture.size and not same(made, picture)
    assert same(upscaled(engine, picture, upscaler="Lanczos", by=1)[0], picture)


def test_each_of_several_equals_the_one_made_alone(engine: LightweightEngine) -> None:
    pictures = [noise(9, 30), noise().convert("L")]
    together = upscaled(engine, *pictures, upscaler="4x_tiny")
    assert all(same(a, upscaled(engine, b, upscaler="4x_tiny")[0]) for a, b in zip(together, pictures, strict=True))
    assert [each.mode for each in together] == ["RGB"] * 2


def test_progress_is_told_for_all_pictures(engine: LightweightEngine) -> None:
    seen: list[Progress] = []
    fields = {"upscaler": "4x_tiny", "upscaler_2": "Lanczos", "upscaler_2_visibility": 0.5}
    engine.run_upscale(UpscaleRequest(images=(noise(), noise()), **fields), on_progress=seen.append)
    fractions = [each.fraction for each in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert {each.image_index for each in seen} == {0, 1} and {each.image_count for each in seen} == {2}


@pytest.mark.parametrize("name", ["Lanczos", "Nearest"])
def test_pictures_of_a_few_pixels(engine: LightweightEngine, name: str) -> None:
    assert [each.size for each in upscaled(engine, noise(1, 1), noise(40, 2), upscaler=name, by=1.5)] == [
        (1, 1),
        (60, 3),
    ]


@pytest.mark.parametrize(
    ("call", "kept"), [(Interrupt.stop, 1), (Interrupt.skip, 2)], ids=["interrupted", "one left out"]
)
def test_interrupts(engine: LightweightEngine, call: Callable[[Interrupt], None], kept: int) -> None:
    interrupt = Interrupt()

    def follow(now: Progress) -> None:
        if now.image_index == 1 and now.step < now.steps:
            call(interrupt)

    request = UpscaleRequest(images=(noise(), noise(200, 24), noise()), upscaler="4x_tiny")
    result = engine.run_upscale(request, on_progress=follow, interrupt=interrupt)
    assert result.interrupted and len(result.images) == kept


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"images": ()}, "images"),
        ({"by": 2, "width": 100}, "give by, or width and height"),
        ({"width": 100, "crop": True}, "crop needs a size"),
        ({"upscaler_2_visibility": 0.5}, "name it in upscaler_2"),
        ({"upscaler_2": "Lanczos"}, "give upscaler_2_visibility"),
        ({"by": float("nan")}, "by:"),
        ({"by": 17}, "by:"),
        ({"width": 1000}, "width: 25 times"),
        ({"height": 2 << 20}, "max_side"),
        ({"by": 0.001}, "0x0 pixels"),
        ({"images": (noise(8, 8),) * 65}, "max_outputs"),
        ({"images": (noise(8, 8),) * 5000}, r"^images: 5000 is over the limit of 64 .setting max_outputs."),
        ({"images": ("none.png",)}, "there is no such file"),
        ({"scale": 2}, "no such field"),
    ],
)
def test_what_cannot_be(engine: LightweightEngine, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        engine.run_upscale(UpscaleRequest(**{"images": (noise(),), **fields}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"upscaler": "4x_tinny"}, "^upscaler: .*did you mean '4x_tiny'"),
        ({"upscaler": "Lanczos", "upscaler_2": "Lancos", "upscaler_2_visibility": 1}, "^upscaler_2: there is no"),
    ],
)
def test_an_upscaler_that_is_not_there(engine: LightweightEngine, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelNotFoundError, match=said):
        engine.run_upscale(UpscaleRequest(images=(noise(),), **fields))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"by": 2, "width": 100}, "by"),
        ({"width": 100, "crop": True}, "crop"),
        ({"upscaler_2_visibility": 0.5}, "upscaler_2_visibility"),
        ({"upscaler_2": "Lanczos"}, "upscaler_2"),
    ],
)
def test_fields_that_do_not_agree_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError) as told:
        UpscaleRequest(images=(noise(),), **fields)
    assert told.value.field == named


def test_the_short_form_is_the_same(engine: LightweightEngine) -> None:
    picture = noise()
    assert same(engine.upscale(picture, 2, "4x_tiny"), upscaled(engine, picture, upscaler="4x_tiny")[0])


def test_the_target_of_a_cut_of_odd_sides(engine: LightweightEngine) -> None:
    request = UpscaleRequest(images=(noise(),), width=100, height=33, crop=True)
    target = target_of(request, (40, 24), engine.config)
    assert target.size == (100, 60) and target.box == (0, 14, 100, 47)


@pytest.mark.parametrize("work", ["upscale", "find"])
def test_settings_of_the_device_hold_where_no_model_is_ready(tmp_path: Path, work: str) -> None:
    asked, used = called_fresh(threads_after, work, str(tmp_path))
    assert used == asked
