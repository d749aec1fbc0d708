"""The part of a picture that is drawn for a mask."""

from __future__ import annotations

from goldens import Case

from checks.fill import mask_of
from lightweight_engine.extensions.masks import crop_region, expand_region


def check(case: Case) -> None:
    whole = case["mask_w"], case["mask_h"]
    box = crop_region(mask_of(whole, case["rects"]), case["pad"])
    assert box == (case["crop_v2"] and tuple(case["crop_v2"]))
    if box is not None:
        assert list(expand_region(box, (case["proc_w"], case["proc_h"]), whole)) == case["expanded"]
