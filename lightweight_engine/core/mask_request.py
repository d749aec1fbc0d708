"""What a mask of the detailer is painted with: a request like any other, image-to-image on one picture, with a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..flux.prompt import parse_networks
from ..request import GenerationRequest

if TYPE_CHECKING:
    from ..extensions.adetailer import Repaint

# What an inner job does not take over from the outer one.
ONE_PICTURE: Mapping[str, Any] = {
    "num_outputs": 1, "batch_size": 1, "enable_hr": False, "adetailer": False, "adetailer_passes": (),
    "save_stages": False, "skip_img2img": False, "color_correction": False, "subseed_strength": 0.0,
    "resize_mode": 0, "inpainting_fill": 1, "inpainting_mask_invert": False, "mask_round": True,
    "mask_blur_x": None, "mask_blur_y": None, "img2img_upscaler": "None", "img2img_extra_noise": 0.0,
    "img2img_fix_steps": False, "initial_noise_multiplier": 1.0, "seed_resize_from_w": 0, "seed_resize_from_h": 0,
}  # fmt: skip


def request_of(request: GenerationRequest, repaint: Repaint, outer_prompt: str) -> GenerationRequest:
    """The request that paints a mask. None of its fields counts as sent: what has no effect here was no slip."""
    update = {
        **ONE_PICTURE,
        "image": repaint.picture,
        "mask": repaint.mask,
        "prompt": with_outer_loras(request, repaint.prompt, outer_prompt),
        "negative_prompt": repaint.negative_prompt,
        "seed": repaint.seed,
        "subseed": repaint.subseed,
        "denoising_strength": repaint.denoising_strength,
        "width": repaint.size[0],
        "height": repaint.size[1],
        "steps": repaint.steps,
        "cfg_scale": repaint.cfg_scale,
        "distilled_cfg_scale": repaint.distilled_cfg_scale,
        "sampler": repaint.sampler,
        "scheduler": repaint.scheduler,
        "mask_blur": repaint.mask_blur,
        "inpaint_full_res": repaint.only_masked,
        "inpaint_full_res_padding": repaint.padding,
    }
    if repaint.noise_multiplier is not None:
        update["initial_noise_multiplier"] = repaint.noise_multiplier
    return GenerationRequest.model_construct(_fields_set=set(), **{**dict(request), **update})


def with_outer_loras(request: GenerationRequest, prompt: str, outer_prompt: str) -> str:
    """The prompt of a mask: LoRAs of the outer prompt act, unless its own names some."""
    tags = [tag for tag in parse_networks(outer_prompt)[1] if tag.kind == "lora"]
    if request.compat == "fixed" and not any(tag.kind == "lora" for tag in parse_networks(prompt)[1]):
        prompt += "".join(map(str, tags))
    return prompt
