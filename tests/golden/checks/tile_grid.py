"""Where tiles lie, and flat coloured tiles put together, byte for byte."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from goldens import Case

from lightweight_engine.upscalers.tiles import combine, split


def check(case: Case) -> None:
    grid = split((case["w"], case["h"]), case["tile"], case["overlap"])
    assert list(grid.tops) == [row["y"] for row in case["tiles"]]
    for row in case["tiles"]:
        assert [[left, grid.tile, [grid.tile] * 2] for left in grid.lefts] == row["cols"]
    colours = [((n * 67) % 256, (n * 31 + 9) % 256, (n * 113 + 50) % 256) for n in range(len(grid))]
    tiles = [torch.tensor(c, dtype=torch.uint8).view(3, 1, 1).expand(3, grid.tile, grid.tile) for c in colours]
    made = combine(tiles, grid, 1).permute(1, 2, 0).contiguous().numpy()
    if f"flat_comb_{case.id}" in case.arrays():
        np.testing.assert_array_equal(made, case.array(f"flat_comb_{case.id}"))
    assert hashlib.sha256(made.tobytes()).hexdigest() == case["comb_sha"]
