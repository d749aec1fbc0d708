"""What detailing adds to the text of a picture: the arguments of each pass that are worth telling; and read back.

Names, order and what is left out are the reference's. Source: pipelines.md §d.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import RequestError
from .detailer_args import MAX_PASSES, NONE, SAME_SCHEDULER, ADetailerArgs, Passes

VERSION = "25.3.0"  # of the extension whose arguments and results these are

Shown = Callable[[ADetailerArgs], bool]


def _always(args: ADetailerArgs) -> bool:
    return True


def _if(name: str, hidden: Any) -> Shown:
    """Shown unless the argument ``name`` has the value ``hidden``."""
    return lambda args: getattr(args, name) != hidden


def _group(switch: str, off: Any, *rows: tuple[str, str]) -> Iterable[tuple[str, str, Shown]]:
    return ((label, name, _if(switch, off)) for label, name in rows)


# Words in the infotext, the argument, and when it is shown. In the reference's order.
ENTRIES: tuple[tuple[str, str, Shown], ...] = (
    ("model", "ad_model", _always),
    ("model classes", "ad_model_classes", _if("ad_model_classes", "")),
    ("prompt", "ad_prompt", _if("ad_prompt", "")),
    ("negative prompt", "ad_negative_prompt", _if("ad_negative_prompt", "")),
    ("confidence", "ad_confidence", _always),
    *_group(
        "ad_mask_k",
        0,
        ("method to decide top k masks", "ad_mask_filter_method"),
        ("mask only top k", "ad_mask_k"),
    ),
    ("mask min ratio", "ad_mask_min_ratio", _if("ad_mask_min_ratio", 0.0)),
    ("mask max ratio", "ad_mask_max_ratio", _if("ad_mask_max_ratio", 1.0)),
    ("x offset", "ad_x_offset", _if("ad_x_offset", 0)),
    ("y offset", "ad_y_offset", _if("ad_y_offset", 0)),
    ("dilate erode", "ad_dilate_erode", _always),
    ("mask merge invert", "ad_mask_merge_invert", _if("ad_mask_merge_invert", NONE)),
    ("mask blur", "ad_mask_blur", _always),
    ("denoising strength", "ad_denoising_strength", _always),
    ("inpaint only masked", "ad_inpaint_only_masked", _always),
    ("inpaint padding", "ad_inpaint_only_masked_padding", _if("ad_inpaint_only_masked", False)),
    *_group(
        "ad_use_inpaint_width_height",
        False,
        ("use inpaint width height", "ad_use_inpaint_width_height"),
        ("inpaint width", "ad_inpaint_width"),
        ("inpaint height", "ad_inpaint_height"),
    ),
    *_group("ad_use_steps", False, ("use separate steps", "ad_use_steps"), ("steps", "ad_steps")),
    *_group("ad_use_cfg_scale", False, ("use separate CFG scale", "ad_use_cfg_scale"), ("CFG scale", "ad_cfg_scale")),
    *_group(
        "ad_use_checkpoint",
        False,
        ("use separate checkpoint", "ad_use_checkpoint"),
        ("checkpoint", "ad_checkpoint"),
    ),
    *_group("ad_use_vae", False, ("use separate VAE", "ad_use_vae"), ("VAE", "ad_vae")),
    *_group("ad_use_sampler", False, ("use separate sampler", "ad_use_sampler"), ("sampler", "ad_sampler")),
    ("scheduler", "ad_scheduler", lambda args: args.ad_use_sampler and args.ad_scheduler != SAME_SCHEDULER),
    *_group(
        "ad_use_noise_multiplier",
        False,
        ("use separate noise multiplier", "ad_use_noise_multiplier"),
        ("noise multiplier", "ad_noise_multiplier"),
    ),
    *_group("ad_use_clip_skip", False, ("use separate CLIP skip", "ad_use_clip_skip"), ("CLIP skip", "ad_clip_skip")),
    ("restore face", "ad_restore_face", _if("ad_restore_face", False)),
    ("ControlNet model", "ad_controlnet_model", _if("ad_controlnet_model", NONE)),
    *(
        (label, name, lambda args, name=name, off=off: args.ad_controlnet_model != NONE and getattr(args, name) != off)
        for label, name, off in (
            ("ControlNet module", "ad_controlnet_module", NONE),
            ("ControlNet weight", "ad_controlnet_weight", 1.0),
            ("ControlNet guidance start", "ad_controlnet_guidance_start", 0.0),
            ("ControlNet guidance end", "ad_controlnet_guidance_end", 1.0),
        )
    ),
)


def detailer_infotext(passes: Passes) -> dict[str, Any]:
    """What all passes add; nothing, if none runs."""
    if not passes.active:
        return {}
    entries: dict[str, Any] = {}
    for number, args in enumerate(passes.passes):
        entries |= infotext_of(args, number)
    return {**entries, "ADetailer version": VERSION}


def infotext_of(args: ADetailerArgs, number: int) -> dict[str, Any]:
    """What a pass adds to the text of a picture; ``number`` counts passes from 0."""
    if args.is_skipped:
        return {}
    suffix = f" {_ordinal(number + 1)}" if number else ""
    return {f"ADetailer {label}{suffix}": getattr(args, name) for label, name, shown in ENTRIES if shown(args)}


def _ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th …"""
    teens = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


PREFIX = "ADetailer "
_KEY = re.compile(rf"{PREFIX}(.+?)(?: (\d{{1,2}})(?:st|nd|rd|th))?")
_ARGUMENTS = {label: name for label, name, _ in ENTRIES}
# Of programs that this engine does not have, see ``detailer_args.UNSUPPORTED``; with the arguments that go with them.
_NOT_RUN = re.compile("ad_(restore_face|controlnet_.*|(use_)?(checkpoint|vae|clip_skip))")


def passes_in(keys: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The passes that the keys of a text tell, as a request has them, and the keys that this engine has nothing for.

    A pass that was skipped is one without a detector, so that those after it keep their numbers.

    Raises:
        RequestError: the value of an argument cannot be read.
    """
    found: dict[int, dict[str, Any]] = {}
    left = []
    for key, value in keys.items():
        if key == f"{PREFIX}version" or not (read := _KEY.fullmatch(key)):
            continue
        name, number = _ARGUMENTS.get(read[1], ""), int(read[2] or 1)
        if not name or _NOT_RUN.fullmatch(name) or not 1 <= number <= MAX_PASSES:
            left.append(key)
        else:
            found.setdefault(number, {})[name] = _value(key, name, value)
    return [{"ad_model": NONE} | found.get(number, {}) for number in range(1, max(found, default=0) + 1)], left


def _value(key: str, name: str, text: str) -> Any:
    """The value of an argument, of the kind that its default has."""
    kind = type(ADetailerArgs.model_fields[name].default)
    try:
        return text == "True" if kind is bool else kind(text)
    except ValueError:
        raise RequestError(f"{key} of the picture's text is {text!r:.80}, not a number", field=name) from None
