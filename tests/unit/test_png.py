"""PNG files of our own writing: Pillow reads the picture that they were given, and they are no larger than its own."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image

from lightweight_engine.core.images import encode
from lightweight_engine.core.png import _BAND, LEVEL, can_write, png
from lightweight_engine.core.png import _filtered as filtered
from lightweight_engine.core.png import _paeth as paeth


def picture(size: tuple[int, int], mode: str = "RGB", noise: float = 4.0) -> Image.Image:
    """Soft waves, and noise over them."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    channels = len(mode) if mode != "L" else 1
    random = np.random.default_rng(0)
    planes = [127 + 80 * np.sin(x / 40 + i) + 40 * np.cos(y / 60 * (i + 1)) for i in range(channels)]
    levels = (np.stack(planes, -1) + random.normal(0, noise, (height, width, channels))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if channels == 1 else levels)


def by_pillow(image: Image.Image, level: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (300, 1), (33, 64), (50, 65), (90, 128), (120, 301)])
def test_pillow_reads_what_was_written(size: tuple[int, int], mode: str) -> None:
    image = picture(size, mode)
    read = Image.open(io.BytesIO(png(image)))
    read.load()
    assert read.mode == mode and np.array_equal(np.asarray(read), np.asarray(image))


def test_every_filter_is_taken_back() -> None:
    """Rows that repeat themselves, the row above, or a slope, so that each filter is the best of some rows."""
    random = np.random.default_rng(0)
    rows = [random.integers(0, 256, 96), np.arange(96) * 2]
    for i in range(200):
        step = random.integers(0, 3, 96)
        rows.append([rows[-1], rows[-1] + step, np.cumsum(step), random.integers(0, 256, 96)][i % 4])
    image = Image.fromarray(np.stack(rows).astype(np.uint8).reshape(len(rows), -1, 3))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(image)))), np.asarray(image))


def test_paeth_is_that_of_the_specification() -> None:
    """PNG, section 9.4: of equal distances the left neighbour goes before the one above, and that before the third."""

    def plain(left: int, above: int, corner: int) -> int:
        wanted = left + above - corner
        return min((left, above, corner), key=lambda each: abs(wanted - each))

    steps = [0, 1, 2, 3, 64, 100, 127, 128, 129, 200, 252, 253, 254, 255]
    left, above, corner = (each.ravel().astype(np.uint8) for each in np.meshgrid(steps, steps, steps))
    wanted = [plain(*map(int, each)) for each in zip(left, above, corner, strict=True)]
    assert paeth(left, above, corner).tolist() == wanted


@pytest.mark.parametrize("noise", [0.0, 4.0, 60.0])
def test_each_row_has_the_filter_whose_differences_are_smallest(noise: float) -> None:
    """In plain numbers, byte by byte as the specification writes them, for bands that begin and do not begin a file."""
    rows = np.asarray(picture((40, 100), noise=noise)).reshape(100, -1).astype(int)
    black = np.zeros_like(rows[0])
    for start in (0, 64):
        bands = b"".join(filtered(rows.astype(np.uint8), 3, start))
        band = np.frombuffer(bands, np.uint8).reshape(-1, 1 + rows.shape[1])
        for row, (number, *differences) in enumerate(band.tolist(), start):
            above = rows[row - 1] if row else black
            left, corner = (np.concatenate([black[:3], each[:-3]]) for each in (rows[row], above))
            third = paeth(*(each.astype(np.uint8) for each in (left, above, corner)))
            ways = [(rows[row] - each) % 256 for each in (black, left, above, (left + above) // 2, third.astype(int))]
            sums = [np.minimum(way, 256 - way).sum() for way in ways]
            assert sums[number] == min(sums) and number == sums.index(min(sums))
            assert differences == ways[number].tolist()


@pytest.mark.parametrize("noise", [0.0, 0.5, 4.0, 60.0])
def test_files_are_no_larger_than_those_of_pillow(noise: float) -> None:
    image = picture((384, 672), noise=noise)
    assert len(png(image)) <= 1.005 * len(by_pillow(image, LEVEL))


def test_what_repeats_itself_is_found_across_bands() -> None:
    """A pattern in few colours as high as a band: each band is what the one before was."""
    pattern = np.random.default_rng(0).integers(0, 2, (_BAND, 192, 3), np.uint8) * 255
    image = Image.fromarray(np.tile(pattern, (12, 1, 1)))
    made = png(image)
    assert len(made) <= 1.05 * len(by_pillow(image, LEVEL))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(made))), np.asarray(image))


@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_the_bytes_do_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    image = picture((200, 300), noise=noise)
    made = set[bytes]()
    for cores in (1, 2, 8, None):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        made.add(png(image))
    assert len(made) == 1


def test_what_only_pillow_writes_is_left_to_it() -> None:
    profiled, palette = picture((20, 20)), picture((20, 20)).quantize(8)
    profiled.info["icc_profile"] = b"a profile"
    assert not can_write(profiled) and not can_write(palette) and can_write(picture((20, 20)))
    assert Image.open(io.BytesIO(encode(profiled, "png", "text").data)).info["icc_profile"] == b"a profile"
