"""A picture in two forms: the same bytes, and none of them copied in vain."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from lightweight_engine.upscalers.picture import Picture
from lightweight_engine.upscalers.resampling import HOST, to_levels

BOX = (2, 1, 7, 4)


def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def test_either_form_gives_the_other() -> None:
    given = image()
    of_image, of_levels = Picture(given), Picture(to_levels(given))
    assert of_image.size == of_levels.size == (of_levels.width, of_levels.height) == (9, 6)
    assert of_image.image is given and np.array_equal(of_levels.image, given)
    assert torch.equal(of_image.levels(HOST), of_levels.levels(HOST))


def test_what_is_there_is_not_made_again() -> None:
    levels = to_levels(image())
    of_image, of_levels = Picture(image()), Picture(levels)
    assert of_levels.levels(HOST) is levels and of_levels.image is of_levels.image
    assert of_image.levels(HOST) is of_image.levels(HOST) and Picture.of(of_image) is of_image


def test_a_part_is_cut_where_the_picture_is() -> None:
    given = image()
    of_image, of_levels = Picture(given).crop(BOX), Picture(to_levels(given)).crop(BOX)
    assert isinstance(of_image.made, Image.Image) and isinstance(of_levels.made, torch.Tensor)
    assert np.array_equal(of_image.image, given.crop(BOX)) and np.array_equal(of_levels.image, given.crop(BOX))
    sent = Picture(given)
    sent.levels(HOST)
    assert isinstance(sent.crop(BOX).made, torch.Tensor), "what is on a device is cut there"


def test_other_modes_are_rgb() -> None:
    assert Picture(image().convert("RGBA")).image.mode == "RGB"
