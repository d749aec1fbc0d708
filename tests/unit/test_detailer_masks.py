"""The detailer's masks: each operation, in bounds, at edges, and where ours differs from the reference on purpose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightweight_engine.extensions.detailer_masks import (
    box_mask,
    dilate_erode,
    dynamic_strength,
    in_order,
    matching_sdxl_size,
    matching_size,
    meet,
    merge,
    offset,
    top,
    within_ratio,
)

SIZE = (20, 10)


def mask(*box: int) -> Image.Image:
    levels = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    levels[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(levels)


def test_a_box_has_both_its_corners() -> None:
    assert box_mask((2, 3, 5, 6), SIZE).getbbox() == (2, 3, 6, 7)
    assert box_mask((2.9, 3.9, 5.9, 6.9), SIZE).getbbox() == (2, 3, 6, 7)
    assert box_mask((0, 0, 20, 10), SIZE).getextrema() == (255, 255)


@pytest.mark.parametrize(
    ("x", "y", "fixed", "forge"),
    [
        (3, 0, (5, 2, 9, 6), (5, 2, 9, 6)),
        (0, 1, (2, 1, 6, 5), (2, 1, 6, 5)),  # y goes up
        (-4, 0, (0, 2, 2, 6), (0, 2, 20, 6)),  # what leaves at the left is gone, or comes back at the right
        (0, 4, (2, 0, 6, 2), (2, 0, 6, 10)),
        (100, 0, None, (2, 2, 6, 6)),
        (0, -100, None, (2, 2, 6, 6)),
        (19, 9, None, (1, 3, 5, 7)),
    ],
)
def test_offsets(x: int, y: int, fixed: Any, forge: Any) -> None:
    whole = mask(2, 2, 6, 6)
    assert offset(whole, x, y).getbbox() == fixed
    assert offset(whole, x, y, "forge").getbbox() == forge
    if fixed:
        assert set(np.unique(np.asarray(offset(whole, x, y)))) == {0, 255}


@pytest.mark.parametrize(
    ("reach", "box"),
    [
        (0, (8, 4, 12, 8)),
        (1, (8, 4, 12, 8)),
        (3, (7, 3, 13, 9)),
        (4, (7, 3, 14, 10)),
        (-3, (9, 5, 11, 7)),
        (-2, (9, 5, 12, 8)),
    ],
)
def test_growing_and_shrinking(reach: int, box: Any) -> None:
    assert dilate_erode(mask(8, 4, 12, 8), reach).getbbox() == box


def test_the_edge_of_the_picture_has_no_say() -> None:
    assert dilate_erode(mask(0, 0, 20, 10), -5).getextrema() == (255, 255)
    assert dilate_erode(mask(0, 0, 0, 0), 5).getextrema() == (0, 0)
    assert dilate_erode(mask(0, 0, 1, 1), 4096).getextrema() == (255, 255)
    assert dilate_erode(mask(8, 4, 12, 8), -4096).getextrema() == (0, 0)


@pytest.mark.parametrize("reach", [-9, -4, -1, 1, 4, 9])
@pytest.mark.parametrize("box", [(0, 0, 3, 4), (13, 5, 20, 10), (5, 0, 12, 10), (8, 4, 9, 5), (0, 0, 20, 10)])
def test_the_part_that_is_worked_on_gives_the_whole(reach: int, box: Any) -> None:
    from scipy.ndimage import maximum_filter, minimum_filter

    grey = np.asarray(mask(*box)) // 255 * np.random.default_rng(0).integers(0, 256, SIZE[::-1], dtype=np.uint8)
    grown, outside = (maximum_filter, 0) if reach > 0 else (minimum_filter, 255)
    expected = grown(grey, size=abs(reach), mode="constant", cval=outside)
    assert np.array_equal(np.asarray(dilate_erode(Image.fromarray(grey), reach)), expected)


def test_merging() -> None:
    two = [mask(0, 0, 4, 4), mask(2, 2, 6, 6)]
    assert merge(two, "None") == two and merge([], "Merge") == [] == merge([], "Merge and Invert")
    (joined,), (rest,) = merge(two, "Merge"), merge(two, "Merge and Invert")
    assert joined.getbbox() == (0, 0, 6, 6) and np.count_nonzero(np.asarray(joined)) == 28
    assert np.array_equal(np.asarray(rest), 255 - np.asarray(joined))


def test_meeting() -> None:
    assert meet(mask(0, 0, 4, 4), mask(3, 3, 6, 6)) and not meet(mask(0, 0, 4, 4), mask(4, 4, 6, 6))
    grey = mask(0, 0, 4, 4).point([0] * 255 + [64])
    assert meet(grey, mask(3, 3, 6, 6))  # however grey


def test_filters_of_nothing() -> None:
    assert within_ratio([], SIZE, 0, 1) == top([], 3) == in_order([], SIZE, "Area (large to small)") == []


def test_shares_are_inclusive() -> None:
    boxes = [(0.0, 0.0, 2.0, 1.0), (0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 20.0, 10.0)]
    assert within_ratio(boxes, SIZE, 0.01, 0.5) == [0, 1]
    assert within_ratio(boxes, SIZE, 0.011, 1.0) == [1, 2]


def test_the_top_are_largest_first_even_if_all_are_kept() -> None:
    assert top([3, 9, 5], 0) == [0, 1, 2]
    assert top([3, 9, 5], 2) == [1, 2] and top([3, 9, 5], 9) == [1, 2, 0]


def test_orders() -> None:
    boxes = [(12.0, 0.0, 20.0, 4.0), (8.0, 4.0, 12.0, 6.0), (0.0, 0.0, 1.0, 1.0), (8.0, 4.0, 12.0, 6.0)]
    assert in_order(boxes, SIZE, "None") == [0, 1, 2, 3]
    assert in_order(boxes, SIZE, "Position (left to right)") == [2, 1, 3, 0]
    assert in_order(boxes, SIZE, "Position (center to edge)") == [1, 3, 0, 2]
    assert in_order(boxes, SIZE, "Area (large to small)") == [0, 1, 3, 2]


def test_strengths_and_sizes() -> None:
    box = (0.0, 0.0, 10.0, 5.0)
    assert dynamic_strength(0, 0.4, box, SIZE) == 0.4
    assert dynamic_strength(1, 0.4, box, SIZE) == pytest.approx(0.3)
    assert dynamic_strength(2, 0.4, box, SIZE) == pytest.approx(0.225)
    assert matching_size((512, 640), box) == (640, 320) and matching_size((512, 640), (0, 0, 3, 9)) == (216, 640)
    assert matching_sdxl_size(box) == (1344, 768) and matching_sdxl_size((0, 0, 1, 1)) == (1024, 1024)
