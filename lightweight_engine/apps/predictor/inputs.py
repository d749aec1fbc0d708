"""The inputs of ``predict()``: one table, from which values are checked. Loads no torch.

``predict.py`` repeats it as a literal signature, since Cog reads that without running it; tests hold both equal, and
its defaults equal to the profile ``cog`` of ``GenerationRequest``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import RequestError, closest

ASPECT_RATIOS: dict[str, tuple[int, int]] = {
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "21:9": (1536, 640),
    "3:2": (1216, 832),
    "2:3": (832, 1216),
    "4:5": (896, 1088),
    "5:4": (1088, 896),
    "3:4": (896, 1152),
    "4:3": (1152, 896),
    "9:16": (768, 1344),
    "9:21": (640, 1536),
}
"""Width and height of each."""

SAMPLERS = (
    *("Euler", "DEIS", "Euler a", "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE"),
    *("DPM++ 2M SDE Karras", "DPM++ 2M SDE Exponential", "DPM++ 3M SDE", "DPM++ 3M SDE Karras"),
    *("DPM++ 3M SDE Exponential", "[Forge] Flux Realistic"),
)
SCHEDULERS = (
    *("Simple", "Karras", "Exponential", "SGM Uniform", "SGM Karras", "SGM Exponential", "KL Optimal", "Normal"),
    *("DDIM", "Beta", "Turbo", "Align Your Steps", "Align Your Steps 11", "Align Your Steps 32"),
    "Align Your Steps GITS",
)
HR_UPSCALERS = (
    *("Latent", "Latent (antialiased)", "Latent (bicubic)", "Latent (bicubic antialiased)", "Latent (nearest)"),
    *("Latent (nearest-exact)", "None", "Lanczos", "Nearest", "ESRGAN_4x", "4x-UltraSharp", "LDSR", "R-ESRGAN 4x+"),
    *("R-ESRGAN 4x+ Anime6B", "ScuNET GAN", "ScuNET PSNR", "SwinIR 4x"),
)
AUTOMATIC = "Automatic"
FP16_LORA = " (fp16 LoRA)"
STORAGE = tuple(
    f"{name}{suffix}"
    for name in (AUTOMATIC, "FP16", "FP32", "bnb-nf4", "bnb-fp4", "float8-e4m3fn", "float8-e5m2")
    for suffix in ("", FP16_LORA)
)
FORMATS = ("webp", "jpg", "png")
ALL_LORAS = (1.0,)
"""The scales that stand for every LoRA, being the default."""


@dataclass(frozen=True)
class Row:
    """An input.

    Args:
        type: of its value; a list holds texts or numbers.
        default: None where it has to be given.
        bounds: least and greatest value.
        choices: all that it may be.
        field: of ``GenerationRequest`` that it becomes as it is.
    """

    type: type | Any
    default: Any = None
    bounds: tuple[float, float] | None = None
    choices: tuple[str, ...] | None = None
    field: str | None = None


INPUTS: dict[str, Row] = {
    "prompt": Row(str, field="prompt"),
    "width": Row(int, 0, (0, 1280)),
    "height": Row(int, 0, (0, 1280)),
    "num_outputs": Row(int, 1, (1, 4), field="num_outputs"),
    "sampler": Row(str, "Euler", choices=SAMPLERS, field="sampler"),
    "scheduler": Row(str, "Simple", choices=SCHEDULERS, field="scheduler"),
    "num_inference_steps": Row(int, 8, (1, 200), field="steps"),
    "guidance_scale": Row(float, 1.0, (1, 50), field="cfg_scale"),
    "distilled_guidance_scale": Row(float, 3.5, (0, 30), field="distilled_cfg_scale"),
    "seed": Row(int, -1, field="seed"),
    "enable_hr": Row(bool, True, field="enable_hr"),
    "hr_upscaler": Row(str, "4x-UltraSharp", choices=HR_UPSCALERS, field="hr_upscaler"),
    "hr_steps": Row(int, 8, (0, 100), field="hr_steps"),
    "hr_scale": Row(float, 1.3, (1, 4), field="hr_scale"),
    "denoising_strength": Row(float, 0.3, (0, 1), field="denoising_strength"),
    "debug_flux_checkpoint_url": Row(str, ""),
    "enable_clip_l": Row(bool, False),
    "enable_t5xxl_fp16": Row(bool, False),
    "enable_ae": Row(bool, False),
    "force_model_reload": Row(bool, False),
    "forge_unet_storage_dtype": Row(str, f"{AUTOMATIC}{FP16_LORA}", choices=STORAGE),
    "image": Row(str, ""),
    "prompt_strength": Row(float, 0.8, (0, 1)),
    "aspect_ratio": Row(str, "9:16", choices=tuple(ASPECT_RATIOS)),
    "output_format": Row(str, "webp", choices=FORMATS, field="output_format"),
    "lora_urls": Row(list[str], (), field="lora_urls"),
    "lora_scales": Row(list[float], ALL_LORAS),
    "ad_prompt": Row(str, "", field="ad_prompt"),
    "ad_hands_prompt": Row(str, "", field="ad_hands_prompt"),
    "postback_url": Row(str, ""),
    "adetailer": Row(bool, False, field="adetailer"),
    "adetailer_args": Row(str, "{}", field="adetailer_args"),
    "adetailer_args_hands": Row(str, "{}", field="adetailer_args_hands"),
}


def read_inputs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Every input with its value, checked whatever Cog let through.

    Raises:
        RequestError: names the input, the fault and what may be given.
    """
    for name in values:
        if name not in INPUTS:
            meant = closest(name, INPUTS)
            hint = f"did you mean {meant!r}?" if meant else f"there are: {', '.join(INPUTS)}"
            raise RequestError(f"{name:.80}: there is no such input; {hint}", field=name[:80])
    read = {name: _checked(name, row, values.get(name, row.default)) for name, row in INPUTS.items()}
    urls, scales = read["lora_urls"], read["lora_scales"]
    if scales != ALL_LORAS and len(scales) != len(urls):
        raise RequestError(
            f"lora_scales: {len(scales)} scales for {len(urls)} lora_urls; give one each, or leave it at [1] for all",
            field="lora_scales",
        )
    return read


def _checked(name: str, row: Row, value: Any) -> Any:
    what, convert = _KINDS[row.type]
    made = convert(value)
    if made is None:
        raise RequestError(f"{name}: give {what}, not {type(value).__name__}", field=name)
    if row.choices is not None and made not in row.choices:
        raise RequestError(f"{name}: {made!r:.80} is no choice; choose one of: {', '.join(row.choices)}", field=name)
    if row.bounds is not None and not row.bounds[0] <= made <= row.bounds[1]:
        raise RequestError(f"{name}: {made:g} is outside {row.bounds[0]:g} to {row.bounds[1]:g}", field=name)
    return made


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _truth(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    """Of JSON, where 1 and 1.0 are the same."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _list_of(convert: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...] | None]:
    def read(value: Any) -> tuple[Any, ...] | None:
        made = tuple(map(convert, value)) if isinstance(value, list | tuple) else (None,)
        return None if None in made else made

    return read


# Type -> what a message calls it, and the value as that type; None where it is no such value.
_KINDS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    str: ("a text", _text),
    bool: ("true or false", _truth),
    int: ("a whole number", _whole),
    float: ("a finite number", _number),
    list[str]: ("a list of texts", _list_of(_text)),
    list[float]: ("a list of finite numbers", _list_of(_number)),
}
