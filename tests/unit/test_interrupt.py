"""A job that is ended early with what there is: what is kept of it, and what is left out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from lightweight_engine import GenerationRequest, GenerationResult, LightweightEngine, Progress
from lightweight_engine.core.describe import pixels_sha256, sidecar
from lightweight_engine.core.engine import ENDED_EARLY
from lightweight_engine.core.progress import Interrupt
from tools.tiny.draw import training_drawing

SMALL = {"prompt": "a smiling woman", "width": 64, "height": 64, "steps": 4, "seed": 7}
When = Callable[[Progress], bool]


def run(
    engine: LightweightEngine, when: When | None = None, *, skip: bool = False, **fields: object
) -> GenerationResult:
    """A job that is interrupted as soon as its progress is as ``when`` says."""
    interrupt = Interrupt()

    def follow(progress: Progress) -> None:
        if when is not None and when(progress):
            interrupt.skip() if skip else interrupt.stop()

    return engine.run(GenerationRequest(**{**SMALL, **fields}), on_progress=follow, interrupt=interrupt)


def at(stage: str, step: int = 1, picture: int = 0) -> When:
    return lambda now: (now.stage, now.step, now.image_index) == (stage, step, picture)


def levels(result: GenerationResult, index: int = 0) -> np.ndarray:
    return np.asarray(result.images[index].convert("RGB")).astype(int)


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DPM adaptive", "DPM++ SDE", "Restart"])
def test_what_is_sampled_is_decoded_as_it_is_now(engine: LightweightEngine, sampler: str) -> None:
    stopped = run(engine, at("sample"), sampler=sampler, steps=8)
    assert stopped.interrupted and len(stopped.images) == len(stopped.infotexts) == len(stopped.seeds) == 1
    if sampler == "Euler":  # whose only step ends at what the network makes of the noise
        assert np.abs(levels(stopped) - levels(run(engine, steps=1))).max() <= 1
    assert sidecar(stopped, 0)["interrupted"] is True and ENDED_EARLY in stopped.warnings


def test_nothing_is_interrupted_where_nothing_is_left_out(engine: LightweightEngine) -> None:
    whole, late = run(engine), run(engine, at("sample", step=4))
    assert not whole.interrupted and not late.interrupted and ENDED_EARLY not in whole.warnings
    assert pixels_sha256(whole.images[0]) == pixels_sha256(late.images[0])


def test_later_pictures_are_left_out(engine: LightweightEngine) -> None:
    whole, stopped = run(engine, num_outputs=3), run(engine, at("sample", picture=1), num_outputs=3)
    assert stopped.interrupted and stopped.seeds == (7, 8) and len(stopped.images) == 2
    assert pixels_sha256(stopped.images[0]) == pixels_sha256(whole.images[0])
    assert pixels_sha256(stopped.images[1]) != pixels_sha256(whole.images[1])


def test_before_the_first_step_there_is_no_picture(engine: LightweightEngine) -> None:
    interrupt = Interrupt()
    interrupt.stop()
    result = engine.run(GenerationRequest(**SMALL), interrupt=interrupt)
    assert result.interrupted and result.images == result.seeds == result.infotexts == ()


def test_a_skip_is_for_one_batch(engine: LightweightEngine) -> None:
    whole = run(engine, num_outputs=3)
    skipped = run(engine, at("sample", picture=1), skip=True, num_outputs=3)
    same = [pixels_sha256(a) == pixels_sha256(b) for a, b in zip(whole.images, skipped.images, strict=True)]
    assert skipped.interrupted and same == [True, False, True]


@pytest.mark.parametrize(
    ("when", "side", "is_whole"),
    [
        (lambda now: now.stage == "sample" and now.fraction > 0.1, 64, False),
        (lambda now: now.stage == "upscale" and now.step > 0, 64, True),
        (lambda now: now.stage == "sample" and now.fraction > 0.7, 128, False),
    ],
    ids=["in the first pass", "while it is enlarged", "in the second pass"],
)
def test_a_hires_pass_is_left_out_or_cut_short(
    engine: LightweightEngine, when: When, side: int, is_whole: bool
) -> None:
    hires = {"hr_scale": 2.0, "hr_steps": 4, "hr_upscaler": "4x_tiny", "steps": 2, "denoising_strength": 0.6}
    stopped = run(engine, when, **hires)
    assert stopped.interrupted and stopped.images[0].size == (side, side)
    whole = run(engine, **{**hires, "hr_scale": 1.0} if side == 64 else hires)
    assert (pixels_sha256(stopped.images[0]) == pixels_sha256(whole.images[0])) == is_whole


def test_a_latent_hires_pass_is_left_out(engine: LightweightEngine) -> None:
    stopped = run(engine, at("sample"), hr_scale=2.0, hr_steps=2, hr_upscaler="Latent", denoising_strength=0.6)
    assert stopped.interrupted and stopped.images[0].size == (64, 64)


def detail(engine: LightweightEngine, when: When | None = None, *, skip: bool = False) -> GenerationResult:
    one = {"ad_model": "face_tiny", "ad_denoising_strength": 0.5, "ad_use_steps": True, "ad_steps": 4}
    fields = {"image": person(), "skip_img2img": True, "width": 256, "height": 256}
    return run(engine, when, skip=skip, adetailer_passes=[one, {**one, "ad_model": "hand_tiny"}], **fields)


def person() -> Image.Image:
    """A drawing of one whose face and hands are found."""
    drawings = (training_drawing(7, number, (256, 256)) for number in range(100))
    return next(each.image for each in drawings if sorted(m.what for m in each.marks).count("hand") == 2)


def test_an_interrupted_pass_of_the_detailer_leaves_the_picture_as_it_was(engine: LightweightEngine) -> None:
    stopped = detail(engine, lambda now: now.stage == "detail" and now.step > 0)
    assert stopped.interrupted and [row["painted"] for row in stopped.details[0].passes] == [0, 0]
    assert pixels_sha256(stopped.images[0]) == pixels_sha256(person())


def test_a_pass_before_the_interrupted_one_stays(engine: LightweightEngine) -> None:
    entered: list[int] = []

    def in_second(now: Progress) -> bool:
        if now.stage == "detect":
            entered.append(1)
        return now.stage == "detail" and now.step > 0 and len(entered) == 3  # by then a hand is painted

    stopped = detail(engine, in_second, skip=True)
    faces, hands = stopped.details[0].passes
    assert stopped.interrupted and faces["painted"] == 1 and hands["painted"] == 0


def test_the_detailer_leaves_an_interrupted_picture_alone(engine: LightweightEngine) -> None:
    result = run(engine, at("sample"), adetailer_passes=[{"ad_model": "face_tiny"}], num_outputs=2, batch_size=2)
    assert result.interrupted and len(result.images) == 2 and [each.passes for each in result.details] == [(), ()]
