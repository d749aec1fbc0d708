"""What a request sets in vain is told."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from lightweight_engine import GenerationRequest
from lightweight_engine.core.idle_fields import lost_start, without_effect
from lightweight_engine.core.processing import denoising_strength, plan_schedule
from lightweight_engine.extensions.hires_fix import second_pass
from lightweight_engine.flux.schedules import ScheduleOptions, make_sigmas, options_of
from lightweight_engine.labels import scheduler_labels


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"ad_prompt": "a face"}, "ad_prompt had no effect without adetailer"),
        ({"color_correction": True}, "color_correction had no effect without image"),
        ({"hr_prompt": "a cat"}, "hr_prompt had no effect without a hires pass"),
        ({"negative_prompt": "a dog"}, "negative_prompt had no effect at cfg_scale 1"),
        ({"negative_prompt": "a dog", "enable_hr": True, "hr_cfg": 1.0}, "negative_prompt had no effect"),
        ({"hr_steps": 10, "hr_upscaler": "4x-UltraSharp"}, "hr_steps, hr_upscaler had no effect without a hires pass"),
        (
            {"hr_steps": 9},
            "hr_steps had no effect without a hires pass (enable_hr, or hr_scale over 1, switches it on)",
        ),
        (
            {"hr_resize_x": 96, "hr_steps": 9},
            "hr_resize_x, hr_steps had no effect without a hires pass (enable_hr switches it on)",
        ),
        ({"hr_cfg": 2.0, "enable_hr": False}, "hr_cfg had no effect without a hires pass (enable_hr is false)"),
        ({"hr_scale": 1.5, "enable_hr": False}, "hr_scale had no effect without a hires pass (enable_hr is false)"),
        (
            {"hr_steps": 3, "enable_hr": False, "image": "x"},
            "hr_steps had no effect without a hires pass (there is none",
        ),
        (
            {"hr_scale": 2.0, "hr_resize_x": 96, "enable_hr": True},
            "hr_scale had no effect beside hr_resize_x, which says",
        ),
        (
            {"hr_scale": 2.0, "hr_resize_x": 96, "hr_resize_y": 96},
            "hr_scale had no effect but to switch the pass on, as enable_hr does, beside hr_resize_x and hr_resi",
        ),
        ({"seed_resize_from_w": 64}, "seed_resize_from_w had no effect alone; give width and height"),
        ({"seed_resize_from_h": 64, "seed_resize_from_w": -1}, "seed_resize_from_h had no effect alone"),
        ({"denoising_strength": 0.5}, "denoising_strength had no effect without image or a hires pass"),
        ({"initial_noise_multiplier": 0.9}, "initial_noise_multiplier had no effect without image"),
        ({"inpaint_full_res": True, "mask_blur_x": 3}, "inpaint_full_res, mask_blur_x had no effect without mask"),
        ({"batch_size": 4}, "batch_size had no effect with one picture; num_outputs says how many are drawn"),
        ({"subseed": 5}, "subseed had no effect without subseed_strength"),
        ({"eta": 0.5}, "eta had no effect with the sampler Euler"),
        ({"s_noise": 2.0, "s_tmin": 0.1}, "s_tmin, s_noise had no effect without s_churn"),
        ({"s_noise": 2.0, "hr_sampler": "Heun", "enable_hr": True}, "s_noise had no effect without s_churn"),
        (
            {"eta_noise_seed_delta": 4},
            "eta_noise_seed_delta had no effect with the sampler Euler, which draws no noise",
        ),
        ({"s_min_uncond": 1.0, "skip_early_cond": 0.1}, "s_min_uncond, skip_early_cond had no effect at cfg_scale 1"),
        ({"save_stages": True}, "save_stages had no effect without a hires pass or the detailer"),
        ({"s_churn": 1.0, "sampler": "euler a"}, "s_churn had no effect with the sampler Euler a"),
        ({"rho": 5.0, "sigma_min": 0.1}, "sigma_min, rho had no effect with the scheduler Simple"),
        (
            {"rho": 5.0, "enable_hr": True, "hr_scheduler": "Beta"},
            "rho had no effect with the scheduler Simple and Beta",
        ),
        (
            {"steps": 9, "sampler": "k_dpm_ad"},
            "steps had no effect with the sampler DPM adaptive, which chooses its own",
        ),
        (
            {"steps": 9, "sampler": "DPM adaptive", "enable_hr": True, "hr_steps": 3, "hr_sampler": "Euler"},
            "steps had no effect with the sampler DPM adaptive",
        ),
        ({"beta_alpha": 0.5, "scheduler": "Karras"}, "beta_alpha had no effect with the scheduler Karras"),
    ],
)
def test_fields_without_effect(fields: dict[str, object], told: str) -> None:
    (sentence,) = without_effect(GenerationRequest(**fields))
    assert sentence.startswith(told)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"negative_prompt": "a dog", "cfg_scale": 2.0},
        {"negative_prompt": "a dog", "enable_hr": True, "hr_cfg": 3.0},
        {"enable_hr": True, "hr_steps": 3, "denoising_strength": 0.5, "eta": 1.0, "hr_sampler": "Euler a"},
        {"batch_size": 4, "num_outputs": 2},
        {"seed_resize_from_w": -1, "seed_resize_from_h": -1},
        {"seed_resize_from_w": 64, "seed_resize_from_h": 64},
        {"batch_size": 1, "subseed": -1, "eta": None},
        {"subseed": 5, "subseed_strength": 0.1},
        {"subseed_strength": 0.1},
        {"s_churn": 0.5, "s_noise": 2.0, "eta_noise_seed_delta": 4},
        {"sampler": "DPM2 a", "s_noise": 2.0, "eta_noise_seed_delta": 4},
        {"s_min_uncond": 1.0, "cfg_scale": 2.0},
        {"save_stages": True, "enable_hr": True},
        {"hr_scale": 2.0, "enable_hr": True},
        {"hr_resize_x": 96, "enable_hr": True},
        {"save_stages": True, "s_min_uncond": 1.0, "adetailer": True},
        {"sampler": "DPM adaptive", "sigma_min": 0.1, "eta": 0.5},
        {"sampler": "DPM adaptive", "steps": 9, "image": "x"},
        {"sampler": "DPM adaptive", "steps": 9, "enable_hr": True, "hr_steps": 0},
        {"sampler": "DPM adaptive", "steps": 9, "adetailer": True},
        {"sampler": "DPM adaptive", "steps": 9, "scheduler": "DDIM"},  # which starts lower with fewer of them
        {"sampler": "DPM adaptive", "steps": 9, "prompt": "[a cat:a dog:0.5]"},
        {"sampler": "DPM adaptive", "steps": 9, "prompt": "a", "negative_prompt": "[x|y]", "cfg_scale": 2.0},
        {"sampler": "DPM adaptive", "steps": 9, "skip_early_cond": 0.2, "cfg_scale": 2.0},
        {"sampler": "DPM fast", "steps": 9},
        {"sampler": "DPM++ 2M", "scheduler": "Automatic", "rho": 5.0},
        {"eta": 0.5, "adetailer": True},
        {"hr_scale": 1.0, "hr_steps": 10, "hr_upscaler": "4x-UltraSharp"},
        GenerationRequest().model_dump(),
    ],
    ids=str,
)
def test_what_acts_is_not_told(fields: dict[str, object]) -> None:
    assert without_effect(GenerationRequest(**fields)) == []


def lost(*, hires: bool = False, **fields: Any) -> list[str]:
    asked = GenerationRequest(**{"image": None if hires else "x", **fields})
    request = second_pass(asked) if hires else asked
    strength = denoising_strength(request)
    return lost_start(request, plan_schedule(request, "Euler", "Simple", 1.15, entered=True), strength, hires=hires)


FIX = {"img2img_fix_steps": True}


@pytest.mark.parametrize(
    ("fields", "remedies"),
    [
        ({"steps": 2}, ["5 or more steps", "a denoising_strength of 0.49 or less"]),
        (
            {"steps": 2, "denoising_strength": 0.5},
            ["3 or more steps", "img2img_fix_steps", "a denoising_strength of 0.49 or less"],
        ),
        ({"steps": 4}, ["5 or more steps", "img2img_fix_steps", "a denoising_strength of 0.74 or less"]),
        ({"steps": 2, **FIX}, ["3 or more steps", "a denoising_strength of 0.66 or less"]),
        ({"steps": 1, "denoising_strength": 0.5}, ["3 or more steps", "img2img_fix_steps"]),
        ({"steps": 50, "denoising_strength": 0.99}, ["101 or more steps", "a denoising_strength of 0.97 or less"]),
        ({"hr_steps": 2, "hires": True}, ["3 or more hr_steps", "a denoising_strength of 0.66 or less"]),
    ],
    ids=str,
)
def test_a_pass_that_begins_at_pure_noise_is_told_with_what_helps(fields: dict[str, Any], remedies: list[str]) -> None:
    (told,) = lost(**fields)
    *first, last = remedies
    assert "begin at pure noise" in told and told.endswith(f"; give {', '.join(first)} or {last}")
    field = "hr_steps" if fields.get("hires") else "steps"
    for remedy in remedies:
        number = next((float(word) for word in remedy.split() if word[0].isdigit()), 0)
        change = FIX if remedy == "img2img_fix_steps" else {"denoising_strength": number}
        change = {field: int(number)} if field in remedy.split() else change
        assert lost(**{**fields, **change}) == []
        if number:  # no weaker one would do
            nearly = {name: value + (0.01 if value < 1 else -1) for name, value in change.items()}
            assert lost(**{**fields, **nearly})


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 2, "denoising_strength": 1},
        {"steps": 2, "denoising_strength": 0},
        {"steps": 2, "mask": "x"},
        {"hr_steps": 8, "hires": True},
        {"hr_steps": 2, "hires": True, "denoising_strength": 1},
    ],
    ids=str,
)
def test_one_that_was_asked_for_or_keeps_something_is_not(fields: dict[str, Any]) -> None:
    assert lost(**fields) == []


def test_colours_that_are_kept_are_an_effect() -> None:
    assert lost(steps=2, color_correction=True)[0].startswith("image had no effect but for its colours at 2 steps")


def test_what_nobody_sent_is_not_told() -> None:
    """Settings, profiles and what a picture was made with are no slips."""
    usual = {"hr_steps": 3, "eta": 0.5, "batch_size": 4}
    assert without_effect(GenerationRequest.over(usual, {"prompt": "a cat"})) == []
    assert without_effect(GenerationRequest.from_profile("cog", {"enable_hr": False, "hr_steps": 8})) == []
    (sentence,) = without_effect(GenerationRequest.over(usual, {"hr_steps": 3}))
    assert sentence.startswith("hr_steps had no effect")
    assert pickle.loads(pickle.dumps(GenerationRequest.over(usual, {}))).model_fields_set == set()


@pytest.mark.parametrize("scheduler", [label for label in scheduler_labels() if label != "Automatic"])
@pytest.mark.parametrize("option", ["sigma_min", "sigma_max", "rho", "beta_alpha", "beta_beta", "use_old_karras"])
def test_options_of_schedulers(scheduler: str, option: str) -> None:
    changed = make_sigmas(scheduler, 8, 1.15, options=ScheduleOptions(**{option: 0.5}))
    assert (changed != make_sigmas(scheduler, 8, 1.15)) == (option in options_of(scheduler))
