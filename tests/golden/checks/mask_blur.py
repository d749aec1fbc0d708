"""The blur of a mask's edge, byte for byte."""

from __future__ import annotations

import numpy as np
from goldens import Case

from checks.fill import mask_of
from lightweight_engine.extensions.masks import blur


def check(case: Case) -> None:
    mask = mask_of((case["mask_w"], case["mask_h"]), case["rects"])
    np.testing.assert_array_equal(np.array(blur(mask, case["blur"], case["blur"])), case.array(f"out_{case.id}"))
