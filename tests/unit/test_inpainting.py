"""Start pictures and masks: their arithmetic, and through the engine on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lightweight_engine import GenerationRequest, LightweightEngine
from lightweight_engine.core.replay import read_recipe, replay, save_result, with_pictures
from lightweight_engine.errors import ModelNotFoundError, RequestError
from lightweight_engine.extensions import inpainting
from lightweight_engine.extensions.inpainting import (
    NOISE,
    NOTHING,
    Masking,
    Prepared,
    laid_over,
    latent_mask,
    paste_back,
    prepare,
    read_mask,
    start_content,
)
from lightweight_engine.extensions.masks import _blurred_rows, blur
from lightweight_engine.upscalers import resampling, resizing
from lightweight_engine.upscalers.picture import Picture
from lightweight_engine.upscalers.resizing import CROP, resize

HOST = resampling.HOST
WIDTH, HEIGHT = 96, 128
SMALL = {"prompt": "a smiling woman with red hair", "width": WIDTH, "height": HEIGHT, "steps": 4, "seed": 7}


def picture(width: int = WIDTH, height: int = HEIGHT, seed: int = 1) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def mask(
    box: tuple[int, int, int, int] = (32, 40, 64, 80), size: tuple[int, int] = (WIDTH, HEIGHT), level: int = 255
) -> Image.Image:
    made = Image.new("L", size)
    made.paste(level, box)
    return made


def request(**fields: object) -> GenerationRequest:
    return GenerationRequest(**{**SMALL, "image": picture(), **fields})


def pixels(image: Image.Image) -> np.ndarray:
    return np.array(image).astype(int)


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_masks_of_every_mode() -> None:
    alpha = Image.merge("RGBA", [mask()] * 3 + [Image.new("L", (WIDTH, HEIGHT), 128)])
    assert read_mask(alpha).getextrema() == (0, 0)  # the transparency counts, and 128 is not over the half
    assert read_mask(alpha, round=False).getextrema() == (128, 128)
    opaque = mask().convert("RGBA")
    assert np.array_equal(pixels(read_mask(opaque)), pixels(mask()))


def test_the_latent_mask_is_rounded_where_asked() -> None:
    soft = latent_mask(blur(mask(), 8, 8), (16, 12), round=False)
    hard = latent_mask(blur(mask(), 8, 8), (16, 12))
    assert set(hard.unique().tolist()) == {0.0, 1.0} and len(soft.unique()) > 10
    assert hard.shape == (16, 12)


@pytest.mark.parametrize("round", [True, False])
@pytest.mark.parametrize("level", [76, 127, 128, 255])
def test_a_latent_mask_that_stays_on_a_device_has_the_numbers_of_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch, level: int, round: bool
) -> None:
    soft = blur(mask(level=level), 8, 3)
    soft.paste(level, (70, 0, 96, 60))
    here = latent_mask(soft, (16, 12), round=round)
    monkeypatch.setattr(inpainting, "HOST", torch.device("meta"))  # a CPU's tensors lie on a device, then
    monkeypatch.setattr(inpainting, "resample", Mock(side_effect=AssertionError("a host's")))
    there = latent_mask(soft, (16, 12), round=round, device=torch.device("cpu"))
    assert here.dtype == there.dtype and torch.equal(here, there)


def test_a_device_lays_a_picture_over_a_result_as_pillow_does() -> None:
    """Every level that is kept, over every level of a result, under every level of a mask."""
    kept = torch.arange(256, dtype=torch.uint8)[None, :, None].expand(3, 256, 256).contiguous()
    result = kept.transpose(1, 2).contiguous()
    for level in range(256):
        mask = Image.new("L", (256, 256), level)
        overlay = Prepared(kept, kept=Picture(kept), overlay_mask=mask).overlay
        assert overlay is not None
        canvas = resampling.to_image(result).convert("RGBA")
        canvas.alpha_composite(overlay)
        expected = resampling.to_levels(canvas.convert("RGB"))
        assert torch.equal(laid_over(result, kept, resampling.to_levels(mask)), expected), level


def test_a_result_on_a_device_is_put_in_its_place_with_the_bytes_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    given = picture(90, 150)
    made = prepare(given, mask((30, 40, 60, 90), (90, 150)), (96, 128), 0, Masking(only_masked=True, padding=8))
    result = resampling.to_levels(picture(96, 128, 2))
    assert made.kept is not None
    host = paste_back(result, made)
    for module in (resampling, resizing, inpainting):
        monkeypatch.setattr(module, "HOST", torch.device("meta"))  # a CPU's tensors lie on a device, then
    placed = paste_back(result, made, device=torch.device("cpu"))
    assert isinstance(placed.made, torch.Tensor) and isinstance(host.made, Image.Image)
    assert np.array_equal(pixels(placed.image), pixels(host.image))
    assert np.array_equal(pixels(made.kept.image), pixels(given)), "what is kept is not written to"


def test_what_painting_starts_from() -> None:
    latent, noise = torch.full((2, 16, 4, 4), 5.0), torch.full((2, 16, 4, 4), 7.0)
    painted = torch.zeros(1, 1, 4, 4)
    painted[..., :2] = 1
    assert start_content(latent, painted, noise, NOISE)[0, 0, 0].tolist() == [7, 7, 5, 5]
    assert start_content(latent, painted, noise, NOTHING)[0, 0, 0].tolist() == [0, 0, 5, 5]
    assert start_content(latent, painted, noise, 1) is latent


@pytest.mark.parametrize("box", [(0, 0, 8, 8), (88, 120, 96, 128), (0, 60, 96, 64), (47, 63, 48, 64)])
def test_any_masked_part_is_drawn_at_the_full_size(box: tuple[int, int, int, int]) -> None:
    made = prepare(picture(), mask(box), (64, 64), masking=Masking(only_masked=True, padding=8))
    assert made.picture.size == (64, 64) and made.mask is not None and made.mask.size == (64, 64)
    assert made.overlay is not None and made.overlay.size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (95, 127, 96, 128), (0, 40, 96, 60), (30, 30, 33, 33), (0, 0, 96, 128)])
def test_working_on_a_part_gives_the_bytes_of_the_whole(box: tuple[int, int, int, int]) -> None:
    levels = np.asarray(mask(box))
    whole = _blurred_rows(_blurred_rows(levels, 4).T, 9).T
    assert np.array_equal(pixels(blur(mask(box), 4, 9)), whole)
    made = prepare(picture(), mask(box), (64, 64), masking=Masking(only_masked=True, padding=0))
    result = picture(64, 64, seed=5)
    assert made.overlay is not None and made.paste_to is not None
    left, top, right, bottom = made.paste_to
    canvas = Image.new("RGBA", (WIDTH, HEIGHT))
    canvas.paste(resize(result, (right - left, bottom - top), CROP), (left, top))
    canvas.alpha_composite(made.overlay)
    assert np.array_equal(pixels(paste_back(result, made).image), pixels(canvas.convert("RGB")))


def ways(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], mode: int, masking: Masking) -> list[list[np.ndarray]]:
    """All that is made of a start picture and a result, as on the host, and as on a device that a CPU stands for."""
    result, made, resized = picture(*size, seed=5), [], Mock(wraps=resampling.lanczos)
    monkeypatch.setattr(resampling, "lanczos", resized)
    for host in (HOST, torch.device("meta")):  # where "meta" is the host, a CPU's tensors lie on a device
        for module in (resampling, resizing, inpainting):
            monkeypatch.setattr(module, "HOST", host)
        begin = prepare(picture(), mask(), size, mode, masking, device=torch.device("cpu"))
        assert begin.mask is not None and begin.kept is not None and begin.overlay_mask is not None
        backs = [
            paste_back(each, begin, device=torch.device("cpu")).image for each in (result, resampling.to_levels(result))
        ]
        assert resized.called == (host != HOST)
        made.append(
            [pixels(each) for each in (begin.picture, begin.mask, begin.kept.image, begin.overlay_mask, *backs)]
        )
    return made


@pytest.mark.parametrize("content", [0, 1])
@pytest.mark.parametrize("only_masked", [True, False])
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("size", [(64, 64), (72, 96), (90, 40)])
def test_pictures_that_stay_on_a_device_have_the_bytes_of_those_that_do_not(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], mode: int, only_masked: bool, content: int
) -> None:
    host, device = ways(monkeypatch, size, mode, Masking(content=content, only_masked=only_masked, padding=8))
    assert all(np.array_equal(one, other) for one, other in zip(host, device, strict=True))
    assert np.array_equal(device[-1], device[-2])


# --- image-to-image through the engine ----------------------------------------------------------------------------


def test_strength_decides_how_far_the_picture_goes(engine: LightweightEngine) -> None:
    base = pixels(picture())
    far = [np.abs(pixels(engine.run(request(denoising_strength=d)).images[0]) - base).mean() for d in (0.1, 0.5, 1)]
    assert far[0] < far[1] < far[2]


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(200, 60), (61, 203)])
def test_every_resize_mode_gives_the_size(engine: LightweightEngine, mode: int, size: tuple[int, int]) -> None:
    result = engine.run(request(image=picture(*size), resize_mode=mode, denoising_strength=0.3))
    assert result.images[0].size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"width": None, "height": None}, True),
        ({"width": None}, True),
        ({}, False),
        ({"width": None, "height": None, "resize_mode": 1}, False),
        ({"width": None, "height": None, "image": picture(64, 64)}, False),
    ],
)
def test_a_picture_that_is_stretched_to_a_size_nobody_gave(
    engine: LightweightEngine, given: dict[str, object], told: bool
) -> None:
    fields = {"image": picture(200, 60), "denoising_strength": 0.1, "steps": 1, **given}
    warnings = engine.run(request(**fields)).warnings
    assert any("start picture of 200x60 is stretched" in each for each in warnings) == told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"steps": 2}, True),
        ({"steps": 2, "denoising_strength": 0.49}, False),
        ({"steps": 4}, True),
        ({"steps": 4, "img2img_fix_steps": True}, False),
        ({"steps": 5}, False),
    ],
    ids=str,
)
def test_a_start_picture_of_which_nothing_is_seen(
    engine: LightweightEngine, given: dict[str, object], told: bool
) -> None:
    results = [engine.run(request(image=picture(seed=seed), **given)) for seed in (1, 2)]
    first, second = (pixels(result.images[0]) for result in results)
    assert np.array_equal(first, second) == told
    assert any(each.startswith("image had no effect at") for each in results[0].warnings) == told


def test_a_picture_that_is_only_detailed_begins_nowhere(engine: LightweightEngine) -> None:
    fields = {"steps": 2, "skip_img2img": True, "adetailer": True}
    assert not any("pure noise" in each for each in engine.run(request(**fields)).warnings)


def test_one_picture_for_each_output(engine: LightweightEngine) -> None:
    several = [picture(seed=1), picture(seed=2)]
    together = engine.run(request(image=several, num_outputs=2, batch_size=2, denoising_strength=0.3))
    alone = engine.run(request(image=several[1], seed=8, denoising_strength=0.3))
    assert np.abs(pixels(together.images[1]) - pixels(alone.images[0])).max() <= 1
    with pytest.raises(RequestError, match="image: 2 pictures for 3 outputs"):
        engine.run(request(image=several, num_outputs=3))
    with pytest.raises(RequestError, match="image: 2 pictures for 1 output; give one"):
        engine.run(request(image=several))
    with pytest.raises(RequestError, match="the list is empty"):
        engine.run(request(image=[]))


def test_transparent_parts_show_the_background(engine: LightweightEngine) -> None:
    clear = Image.new("RGBA", (WIDTH, HEIGHT))
    on_red = engine.run(request(image=clear, background_color="#ff0000", denoising_strength=0.1)).images[0]
    red = engine.run(request(image=Image.new("RGB", (WIDTH, HEIGHT), "red"), denoising_strength=0.1)).images[0]
    assert np.array_equal(pixels(on_red), pixels(red))


def test_colours_of_the_start_picture(engine: LightweightEngine) -> None:
    green = Image.merge("RGB", [Image.new("L", (WIDTH, HEIGHT), 30), mask(), Image.new("L", (WIDTH, HEIGHT), 30)])
    plain, corrected = (
        pixels(engine.run(request(image=green, denoising_strength=0.9, color_correction=on)).images[0])
        for on in (False, True)
    )
    greenish = [each[..., 1].mean() - each[..., 0].mean() for each in (plain, corrected)]
    assert greenish[1] > greenish[0]


def test_a_sidecar_makes_the_picture_again(engine: LightweightEngine, tmp_path: Path) -> None:
    picture(120, 90).save(tmp_path / "start.png")
    mask(size=(120, 90)).save(tmp_path / "mask.png")
    asked = request(
        image=str(tmp_path / "start.png"), mask=str(tmp_path / "mask.png"), inpaint_full_res=True, mask_blur=2
    )
    saved = save_result(engine.run(asked), tmp_path / "out")
    assert replay(engine, saved[0].path).identical


@pytest.mark.parametrize("kept", ["paths", "hashes"])
def test_each_picture_of_a_list_is_made_again_from_its_own_start(
    engine: LightweightEngine, tmp_path: Path, kept: str
) -> None:
    starts = [picture(seed=number) for number in (1, 2)]
    files = [tmp_path / f"start-{number}.png" for number in (1, 2)]
    for start, file in zip(starts, files, strict=True):
        start.save(file)
    given = list(map(str, files)) if kept == "paths" else starts
    result = engine.run(request(image=given, num_outputs=2, steps=2, denoising_strength=0.5))
    for number, (saved, file) in enumerate(zip(save_result(result, tmp_path / "made"), files, strict=True), 1):
        recipe = read_recipe(saved.path)
        if kept == "hashes":
            with pytest.raises(RequestError, match=f"began with number {number} of 2 that were sent, and 2 files"):
                with_pictures(recipe, {"image": files}, [])
            recipe = with_pictures(recipe, {"image": [file]}, doubts := [])
            assert not doubts
        again = replay(engine, saved.path, recipe)
        assert again.identical and not again.differences, number
        data = json.loads(saved.sidecar.read_text())  # type: ignore[union-attr]
        saved.sidecar.write_text(json.dumps({**data, "index": 2}))  # type: ignore[union-attr]
        with pytest.raises(RequestError, match="not one of this engine"):
            read_recipe(saved.path)


def test_a_start_picture_that_lies_elsewhere(engine: LightweightEngine, tmp_path: Path) -> None:
    start, moved = tmp_path / "start.png", tmp_path / "moved.png"
    picture().save(start)
    (saved,) = save_result(engine.run(request(image=str(start), denoising_strength=0.3)), tmp_path / "out")
    recipe = read_recipe(saved.path)
    start.rename(moved)
    with pytest.raises(RequestError, match=r"start.png is not there any more; say where it is now by --image FILE"):
        with_pictures(recipe, {}, [])
    with pytest.raises(RequestError, match="image: the picture was made with 1, and 2 files were given"):
        with_pictures(recipe, {"image": [moved, moved]}, [])
    with pytest.raises(RequestError, match="mask: the picture was made with none, and 1 file was given"):
        with_pictures(recipe, {"image": [moved], "mask": [moved]}, [])
    recipe = with_pictures(recipe, {"image": [moved]}, doubts := [])
    again = replay(engine, saved.path, recipe)
    assert again.identical and again.differences == () and not doubts
    picture(seed=2).save(moved)
    again = replay(engine, saved.path, recipe)
    assert not again.identical and again.differences == ("another image: its file is not what it was",)
    data = json.loads(saved.sidecar.read_text())  # type: ignore[union-attr]
    del data["pictures"]  # as of versions before
    saved.sidecar.write_text(json.dumps(data))  # type: ignore[union-attr]
    with_pictures(read_recipe(saved.path), {"image": [moved]}, doubts)
    assert doubts == [f"image: {moved} stands for {start}; whether it is the same is not known"]


def test_pictures_that_were_drawn_at_once_are_made_again_alone_and_say_so(
    engine: LightweightEngine, tmp_path: Path
) -> None:
    result = engine.run(request(image=None, num_outputs=3, batch_size=2, steps=1))
    told = [replay(engine, saved.path).differences for saved in save_result(result, tmp_path)]
    assert told == [*[("drawn alone: 2 at once then, which rounds otherwise",)] * 2, ()]


# --- inpainting through the engine --------------------------------------------------------------------------------


@pytest.mark.parametrize("only_masked", [False, True])
@pytest.mark.parametrize("fill", [0, 1, 2, 3])
def test_what_is_not_masked_stays_to_the_byte(engine: LightweightEngine, only_masked: bool, fill: int) -> None:
    result = engine.run(
        request(mask=mask(), mask_blur=2, inpainting_fill=fill, inpaint_full_res=only_masked, denoising_strength=1)
    )
    before, after = pixels(picture()), pixels(result.images[0])
    reach = pixels(blur(mask(), 2, 2)) > 0
    assert np.array_equal(before[~reach], after[~reach])
    assert np.abs(before - after)[44:76, 36:60].mean() > 5


def test_only_the_masked_part_keeps_the_size_of_the_picture(engine: LightweightEngine) -> None:
    large = picture(300, 200)
    result = engine.run(request(image=large, mask=mask((200, 100, 240, 150), (300, 200)), inpaint_full_res=True))
    assert result.images[0].size == (300, 200)
    assert np.array_equal(pixels(result.images[0])[:60], pixels(large)[:60])
    assert "Inpaint area: Only masked, Masked area padding: 32" in result.infotexts[0]
    assert f"Size: {WIDTH}x{HEIGHT}" in result.infotexts[0]


def test_an_inverted_mask_is_the_mask_of_the_rest(engine: LightweightEngine) -> None:
    inverted = engine.run(request(mask=mask(), inpainting_mask_invert=True, mask_blur=0)).images[0]
    rest = engine.run(request(mask=ImageOps.invert(mask()), mask_blur=0)).images[0]
    assert np.array_equal(pixels(inverted), pixels(rest))


@pytest.mark.parametrize("only_masked", [False, True])
def test_a_black_mask_changes_nothing_and_says_so(engine: LightweightEngine, only_masked: bool) -> None:
    result = engine.run(request(mask=Image.new("L", (WIDTH, HEIGHT)), inpaint_full_res=only_masked))
    assert np.array_equal(pixels(result.images[0]), pixels(picture()))
    assert any("blank" in warning and "all steps run" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"mask": mask(level=76)}, True),  # as red paint is
        ({"mask": mask((60, 60, 61, 61))}, True),
        ({"mask": mask(level=76), "mask_round": False}, False),
        ({"mask": mask()}, False),
        ({"mask": mask((0, 0, WIDTH, HEIGHT))}, False),
        ({"mask": Image.new("L", (WIDTH, HEIGHT))}, False),  # blank, which is told otherwise
    ],
)
def test_a_mask_that_no_cell_of_the_latent_sees_is_told(
    engine: LightweightEngine, given: dict[str, object], told: bool
) -> None:
    warnings = engine.run(request(**given, steps=1)).warnings
    assert any("less than half white in every cell" in each for each in warnings) == told


def test_a_white_mask_paints_all(engine: LightweightEngine) -> None:
    masked = engine.run(request(mask=Image.new("L", (WIDTH, HEIGHT), 255))).images[0]
    assert np.abs(pixels(masked) - pixels(engine.run(request()).images[0])).max() <= 1


def test_a_mask_of_another_size_is_resized_and_said(engine: LightweightEngine) -> None:
    result = engine.run(request(mask=mask().resize((48, 64)), mask_blur=0, denoising_strength=1))
    assert any("the mask of 48x64 was resized to the picture's 96x128" in warning for warning in result.warnings)
    assert np.array_equal(pixels(result.images[0])[:30], pixels(picture())[:30])


def test_masked_pictures_repeat_and_touch_no_global_state(engine: LightweightEngine) -> None:
    asked = request(mask=mask(), inpainting_fill=2, sampler="Euler a")
    torch.manual_seed(1)
    first = engine.run(asked).images[0]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert np.array_equal(pixels(first), pixels(engine.run(asked).images[0]))
    assert torch.equal(state, torch.get_rng_state())


def test_the_latent_of_the_smallest_picture_is_resized(engine: LightweightEngine) -> None:
    small = {"image": picture(17, 16), "resize_mode": 3, "steps": 1}
    assert engine.run(request(**small)).images[0].size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": None, "mask": mask()}, "mask: there is no picture"),
        ({"mask": mask(), "resize_mode": 3}, "resize_mode: 3 cannot be had with a mask"),
        ({"image": picture(200, 15), "resize_mode": 3}, "own size, 200x15, and 16 pixels a side are the least"),
        ({"image": picture(4097, 16), "resize_mode": 3}, "4096 pixels a side are the most (setting max_side)"),
        ({"mask": "nowhere.png"}, "there is no such file"),
        ({"image": "nowhere.png"}, "there is no such file"),
    ],
)
def test_what_cannot_be_is_refused(engine: LightweightEngine, fields: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.run(request(**fields))
    assert said in str(caught.value)


def test_an_upscaler_that_is_not_there_is_refused(engine: LightweightEngine) -> None:
    with pytest.raises(ModelNotFoundError, match="img2img_upscaler: there is no upscaler 'Foo'"):
        engine.run(request(img2img_upscaler="Foo"))
