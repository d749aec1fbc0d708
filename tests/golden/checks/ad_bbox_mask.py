"""The mask of a box."""

from __future__ import annotations

import numpy as np
from goldens import Case

from lightweight_engine.extensions.detailer_masks import box_mask


def check(case: Case) -> None:
    mask = box_mask(tuple(case["bbox"]), (case["w"], case["h"]))
    assert np.array_equal(np.asarray(mask), case.array(f"out_{case.id}"))
