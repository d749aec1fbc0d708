"""Sizes of the hires pass, and what is cut away of its latent."""

from __future__ import annotations

import torch
from goldens import Case

from lightweight_engine.core.infotext import GenerationFacts, HiresFacts, hires_parameters
from lightweight_engine.extensions.hires_fix import target_size


def check(case: Case) -> None:
    resize = case["hr_resize_x"], case["hr_resize_y"]
    target = target_size(case["width"], case["height"], case["hr_scale"], *resize, 8)
    assert [target.width, target.height] == case["upscale_to"]
    assert [target.cut_width, target.cut_height] == case["truncate"]
    height, width = case["latent_before_crop_hw"]
    after = list(target.cut(torch.empty(1, 16, height, width)).shape[2:])
    assert after == list(target.cells(8)) == case["latent_after_crop_hw"]
    assert [8 * side for side in reversed(after)] == case["final_image_wh"]
    facts = HiresFacts(denoising_strength=0.5, scale=case["hr_scale"], resize=resize)
    first = GenerationFacts(prompt="", steps=1, sampler="Euler", seed=0, width=1, height=1)
    keys = {k: v for k, v in hires_parameters(facts, first).items() if k in ("Hires upscale", "Hires resize")}
    assert {key: value for key, value in keys.items() if value is not None} == case["infotext"]
