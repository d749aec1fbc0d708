"""The text of a picture from the fields of a job, as the manifest describes them.

No sampler ran in these cases, only the preparation of the passes: keys that a sampler adds are not in the texts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from goldens import Case

from lightweight_engine.core.infotext import (
    GenerationFacts,
    HiresFacts,
    InfotextOptions,
    build_parameters,
    format_infotext,
    hires_parameters,
)

VERSION = "f2.0.1v1.10.1-previous-669-gdfdcbab6"
SUBSEEDS = (5, 6)
ENSD_SAMPLERS = {"Euler a", "DPM2 a", "DPM++ 2S a", "DPM fast", "DPM adaptive"}


def check(case: Case) -> None:
    kw = {"prompt": "", "negative_prompt": "", "width": 512, "height": 512, "seed": -1, "subseed": -1, **case["kw"]}
    index, main = case.get("index", 0), case.get("use_main", False)
    facts = _facts(case, kw, index, main)
    parameters = build_parameters(facts, _options(case.get("opts", {})))
    assert format_infotext(facts.prompt, facts.negative_prompt, parameters, index) == case["infotext"]


def _facts(case: Case, kw: dict[str, Any], index: int, main: bool) -> GenerationFacts:
    opts, misc = case.get("opts", {}), case.get("misc", {})
    ensd = opts.get("eta_noise_seed_delta", 0) if kw["sampler_name"] in ENSD_SAMPLERS else 0
    plain = GenerationFacts(
        prompt=kw["prompt"],
        negative_prompt=kw["negative_prompt"],
        steps=kw["steps"],
        sampler=kw["sampler_name"],
        scheduler=kw.get("scheduler"),
        cfg_scale=kw.get("cfg_scale", 7.0),
        distilled_cfg_scale=None if case.get("schnell") else kw.get("distilled_cfg_scale", 3.5),
        seed=kw["seed"] if main else (kw["seed"], kw["seed"] + 1)[index],
        width=kw["width"],
        height=kw["height"],
        model_name=misc.get("_model", "flux1-dev"),
        model_hash=misc.get("_hash", "0123456789"),
        subseed=kw["subseed"] if main else SUBSEEDS[index],
        subseed_strength=kw.get("subseed_strength", 0),
        seed_resize_from=(kw.get("seed_resize_from_w", 0), kw.get("seed_resize_from_h", 0)),
        clip_skip=opts.get("CLIP_stop_at_last_layers", 1),
        ensd=ensd,
        rng=opts.get("randn_source", "GPU"),
        tiling=bool(misc.get("_tiling") or kw.get("tiling")),
        version=VERSION,
        user=kw.get("user"),
        low_bits=opts.get("forge_unet_storage_dtype", "Automatic"),
        modules=tuple(opts.get("forge_additional_modules", ())),
    )
    hires = hires_parameters(_hires(kw), plain) if case.get("hr") else {}
    return replace(plain, extra={**hires, **_extra(case)})


def _extra(case: Case) -> dict[str, Any]:
    extra = case.get("extra", {})
    return {key: (lambda i: f"cb{i}") if value == "__callable__" else value for key, value in extra.items()}


def _hires(kw: dict[str, Any]) -> HiresFacts:
    modules = kw.get("hr_additional_modules")
    checkpoint = kw.get("hr_checkpoint_name")
    return HiresFacts(
        denoising_strength=kw.get("denoising_strength", 0.75),
        scale=kw.get("hr_scale", 2.0),
        resize=(kw.get("hr_resize_x", 0), kw.get("hr_resize_y", 0)),
        steps=kw.get("hr_second_pass_steps", 0),
        upscaler=kw.get("hr_upscaler"),
        cfg_scale=kw.get("hr_cfg", 1.0),
        distilled_cfg_scale=kw.get("hr_distilled_cfg", 3.5),
        checkpoint=None if checkpoint == "Use same checkpoint" else checkpoint,
        modules=None if modules is None else tuple(modules),
        sampler=kw.get("hr_sampler_name"),
        prompt=kw.get("hr_prompt", ""),
        negative_prompt=kw.get("hr_negative_prompt", ""),
    )


def _options(opts: dict[str, Any]) -> InfotextOptions:
    return InfotextOptions(
        add_model_hash=opts.get("add_model_hash_to_info", True),
        add_model_name=opts.get("add_model_name_to_info", True),
        add_version=opts.get("add_version_to_infotext", True),
        add_user_name=opts.get("add_user_name_to_info", False),
    )
