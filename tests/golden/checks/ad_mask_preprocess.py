"""Masks moved, grown or shrunk, and merged."""

from __future__ import annotations

import numpy as np
from goldens import Case
from PIL import Image

from lightweight_engine.extensions.detailer_args import ADetailerArgs
from lightweight_engine.extensions.detailer_targets import Target, changed


def check(case: Case) -> None:
    masks = []
    for x1, y1, x2, y2, level in case["one_mask_per_rect"]:
        array = np.zeros((case["h"], case["w"]), np.uint8)
        array[y1:y2, x1:x2] = level
        masks.append(Image.fromarray(array))
    args = ADetailerArgs(
        ad_dilate_erode=case["kernel"],
        ad_x_offset=case["x_offset"],
        ad_y_offset=case["y_offset"],
        ad_mask_merge_invert=case["merge_invert"],
    )
    targets = [Target(mask.getbbox(), mask) for mask in masks]
    found = changed(targets, args, "forge")
    assert len(found) == case["n_out"]
    for number, target in enumerate(found):
        assert np.array_equal(np.asarray(target.mask), case.array(f"out_{case.id}_{number}"))
