"""The fields of txt2img and img2img, as tables: what each is for us, or why it is nothing."""

from __future__ import annotations

from typing import Any

SAME = ("", "use same sampler", "use same scheduler", "use same checkpoint", "use same choices", "none")
"""Values that leave a field of the second pass as in the first, in lower case."""

# Fields that mean the same, ours by theirs: of all requests, of a second pass, of image-to-image.
SHARED = {
    **{name: name for name in ("prompt", "negative_prompt", "seed", "subseed", "subseed_strength", "steps")},
    **{name: name for name in ("seed_resize_from_h", "seed_resize_from_w", "cfg_scale", "distilled_cfg_scale")},
    **{name: name for name in ("width", "height", "batch_size", "scheduler", "denoising_strength")},
    **{name: name for name in ("eta", "s_min_uncond", "s_churn", "s_tmax", "s_tmin", "s_noise")},
}
HIRES = {
    "hr_scale": "hr_scale",
    "hr_upscaler": "hr_upscaler",
    "hr_second_pass_steps": "hr_steps",
    "hr_resize_x": "hr_resize_x",
    "hr_resize_y": "hr_resize_y",
    "hr_prompt": "hr_prompt",
    "hr_negative_prompt": "hr_negative_prompt",
    "hr_cfg": "hr_cfg",
    "hr_distilled_cfg": "hr_distilled_cfg",
}
IMAGE = {
    **{name: name for name in ("resize_mode", "mask", "mask_blur_x", "mask_blur_y", "mask_round", "inpainting_fill")},
    **{name: name for name in ("inpaint_full_res", "inpaint_full_res_padding", "inpainting_mask_invert")},
    "initial_noise_multiplier": "initial_noise_multiplier",
}

# What is for a second pass or a mask alone, beside the rows of the tables above.
OF_HIRES = (
    *HIRES,
    *("hr_sampler_name", "hr_scheduler", "hr_checkpoint_name", "hr_additional_modules"),
    *("firstphase_width", "firstphase_height"),
)
OF_MASK = (*(name for name in IMAGE if "mask" in name or "inpaint" in name), "mask_blur")

USUAL = {"hr_upscaler": "Latent", "mask_blur": 4}
"""What clients send as the default of a field whose default is null."""

# Our fields that some options are, and that act on a start picture alone: txt2img has none.
OF_PICTURES = ("img2img_upscaler", "background_color", "color_correction", "img2img_fix_steps")

# What null stands for: a setting of the service, or Forge's default. Others are left to the options.
CONFIGURED = ("width", "height", "steps", "cfg_scale", "distilled_cfg_scale")
DEFAULTED = (
    *("scheduler", "hr_upscaler", "hr_scale", "hr_cfg", "hr_distilled_cfg"),
    *("inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding"),
)

# Fields without effect: values that ask for nothing, and why others do nothing.
IDLE: dict[str, tuple[tuple[Any, ...], str]] = {
    "styles": ((None, []), "there are no styles here"),
    "restore_faces": ((None, False), "faces are painted anew by ADetailer alone"),
    "tiling": ((None, False), "Flux draws no tiles"),
    "refiner_checkpoint": ((None, "", "None"), "Flux has no refiner"),
    "refiner_switch_at": ((None,), "Flux has no refiner"),
    "comments": ((None, {}), "they are Forge's own"),
    "image_cfg_scale": ((None, 0.0, 1.0, 1.5), "Flux does not know it"),
    "script_args": (([],), "there is no script that they are for"),
    "override_settings_restore_afterwards": (
        (None, True),
        "override_settings hold for one request; POST /sdapi/v1/options changes what holds for all",
    ),
}
SETTLED = ("do_not_save_samples", "do_not_save_grid")
"""Fields that Forge overwrites itself: ``save_images`` alone decides, and no grid is made."""

# Fields that would change the picture into another one: values that ask for nothing, and what to do instead.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "script_name": ((None, "", "None"), "selectable scripts do not exist here; leave it out"),
    "firstpass_image": ((None, ""), "a second pass alone does not exist here; send the picture to img2img"),
    "latent_mask": ((None, ""), "send the mask as mask"),
}
NAMES = {
    "num_outputs": "n_iter",
    "sampler": "sampler_name",
    "hr_sampler": "hr_sampler_name",
    "hr_steps": "hr_second_pass_steps",
    "image": "init_images[]",
    "checkpoint": "override_settings.sd_model_checkpoint",
    "vae": "override_settings.sd_vae",
    "t5": "override_settings.forge_additional_modules",
    "clip": "override_settings.forge_additional_modules",
    "storage_dtype": "override_settings.forge_unet_storage_dtype",
    "adetailer_passes": "alwayson_scripts.ADetailer",
    "img2img_upscaler": "override_settings.upscaler_for_img2img",
    "noise_source": "override_settings.randn_source",
    "background_color": "override_settings.img2img_background_color",
}
"""What a caller of this API knows our fields as, where that is another name; see ``wording.their_name``."""
