"""Resize modes without an upscaler, byte for byte."""

from __future__ import annotations

import numpy as np
from goldens import Case
from PIL import Image

from lightweight_engine.upscalers.resizing import resize


def check(case: Case) -> None:
    source = Image.fromarray(case.array(f"in_{case.id}"))
    assert source.mode == case["src_mode"]
    made = resize(source, tuple(case["target"]), case["resize_mode"])
    assert (made.mode, list(made.size)) == (case["out_mode"], case["out_size"])
    np.testing.assert_array_equal(np.array(made), case.array(f"out_{case.id}"))
