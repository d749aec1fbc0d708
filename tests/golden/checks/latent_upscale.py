"""The six ways to resize a latent."""

from __future__ import annotations

import torch
from goldens import Case

from lightweight_engine.extensions.hires_fix import LATENT_MODES, LatentMode, Target, enlarge_latent


def check(case: Case) -> None:
    name = case.id.partition("|")[0]
    assert LATENT_MODES[name] == LatentMode(case["mode"], case["antialias"])
    height, width = case["size"]
    made = enlarge_latent(torch.from_numpy(case.array("in")), Target(8 * width, 8 * height), LATENT_MODES[name], 8)
    torch.testing.assert_close(made, torch.from_numpy(case.array(case.id)), rtol=0, atol=1e-5)
