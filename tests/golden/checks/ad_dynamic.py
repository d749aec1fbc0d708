"""Strength and size that follow the box."""

from __future__ import annotations

import pytest
from goldens import Case

from lightweight_engine.extensions.detailer_masks import dynamic_strength, matching_sdxl_size, matching_size


def check(case: Case) -> None:
    box = tuple(case["bbox"])
    strength = dynamic_strength(case["power"], case["strength"], box, tuple(case["image"]))
    assert strength == pytest.approx(case["denoise"], rel=1e-9)
    assert matching_size(tuple(case["inpaint"]), box) == tuple(case["free"])
    assert matching_sdxl_size(box) == tuple(case["sdxl"])
