"""Reads a picture's text back: prompt, negative prompt and ``key: value`` pairs, as Forge reads it.

With ``defaults`` a key that is absent gets the value that the reference fills in; without, only what the text says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import RequestError
from ..flux.prompt import is_break, parse_attention
from .infotext import SAME_CHOICES

# A key has at least two characters and runs up to the colon. The look-behind lets a match begin only where a run of key
# characters begins, which finds the same pairs and keeps the search linear on text without colons.
_PAIR = re.compile(r'(?<![\w \-/])[ \-/]*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d+)x(\d+)")
_NEGATIVE = "Negative prompt:"
_MIN_PAIRS = 3
"""Fewer pairs than this in the last line, and the line is prompt."""

DEFAULTS: dict[str, Any] = {
    "Clip skip": "1",
    "Hires resize-1": 0,
    "Hires resize-2": 0,
    "Hires sampler": "Use same sampler",
    "Hires schedule type": "Use same scheduler",
    "Hires checkpoint": "Use same checkpoint",
    "Hires prompt": "",
    "Hires negative prompt": "",
    "Mask mode": "Inpaint masked",
    "Masked content": "original",
    "Inpaint area": "Whole picture",
    "Masked area padding": 32,
    "RNG": "GPU",
    "Schedule type": "Automatic",
    "Schedule max sigma": 0,
    "Schedule min sigma": 0,
    "Schedule rho": 0,
    "VAE Encoder": "Full",
    "VAE Decoder": "Full",
    "FP8 weight": "Disable",
    "Refiner switch by sampling steps": False,
}
"""What the reference assumes where a key is absent."""


def parse_infotext(text: str, *, defaults: bool = True) -> dict[str, Any]:
    """The keys of ``text``, with ``Prompt`` and ``Negative prompt``; sizes as ``KEY-1`` (width) and ``KEY-2``.

    With ``defaults`` what is absent is filled in, as where no model or module is known.
    """
    lines = text.strip().split("\n")
    last = _mend_civitai(lines[-1])
    pairs = _PAIR.findall(last)
    if len(pairs) < _MIN_PAIRS:
        pairs = []
    else:
        lines.pop()
    prompt, negative = _split_prompts(lines)
    parsed: dict[str, Any] = {"Prompt": prompt, "Negative prompt": negative}
    for key, quoted in pairs:
        parsed.update(_sized(key, unquote(quoted)))
    return _fill(parsed) if defaults else parsed


def unquote(text: str) -> str:
    """The string inside a JSON quotation; any other text as it is."""
    if len(text) < 2 or not (text[0] == text[-1] == '"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _split_prompts(lines: list[str]) -> tuple[str, str]:
    parts: tuple[list[str], list[str]] = ([], [])
    side = 0
    for line in (line.strip() for line in lines):
        if line.startswith(_NEGATIVE):
            side, line = 1, line.removeprefix(_NEGATIVE).strip()
        if parts[side] or line:
            parts[side].append(line)
    return "\n".join(parts[0]), "\n".join(parts[1])


def _sized(key: str, value: str) -> Iterator[tuple[str, str]]:
    """The pair, or two for WIDTHxHEIGHT; none for an empty value, which says no more than an absent key."""
    if size := _SIZE.fullmatch(value):
        yield f"{key}-1", size[1]
        yield f"{key}-2", size[2]
    elif value:
        yield key, value


def _mend_civitai(line: str) -> str:
    """Civitai's own generator names no sampler for Flux and writes the distilled guidance as CFG scale."""
    if "Civitai" not in line or "FLUX" not in line:
        return line
    line = re.sub(r"Clip skip: [0-8]\b(, )?", "", line)
    line = line.replace("Sampler: Undefined", "Sampler: Euler, Schedule type: Simple")
    return re.sub(r"(?<![\w ])( ?)CFG scale: ", r"\1CFG scale: 1, Distilled CFG Scale: ", line)


def _fill(parsed: dict[str, Any]) -> dict[str, Any]:
    filled = {**DEFAULTS, **parsed}
    if filled["FP8 weight"] != "Disable":
        filled.setdefault("Cache FP16 weight for LoRA", False)
    if has_weights(filled["Prompt"]) or has_weights(filled["Negative prompt"]):
        filled.setdefault("Emphasis", "Original")
    hires = _numbered(parsed, "Hires Module")
    filled["Hires VAE/TE"] = [SAME_CHOICES] if not hires or SAME_CHOICES in hires else []
    return filled


def has_weights(prompt: str) -> bool:
    """Whether a prompt uses emphasis."""
    return any(segment.weight != 1 and not is_break(segment) for segment in parse_attention(prompt))


def _numbered(parsed: dict[str, Any], key: str) -> list[str]:
    names = []
    while (name := parsed.get(f"{key} {len(names) + 1}")) is not None:
        names.append(name)
    return names


def _flag(text: str) -> bool:
    return text == "True"


Rows = Mapping[str, tuple[str, Callable[[str], Any]]]
"""Which request field a key fills, and how its text is read."""

REQUEST_FIELDS: Rows = {
    "Prompt": ("prompt", str),
    "Negative prompt": ("negative_prompt", str),
    "Steps": ("steps", int),
    "Sampler": ("sampler", str),
    "Schedule type": ("scheduler", str),
    "CFG scale": ("cfg_scale", float),
    "Distilled CFG Scale": ("distilled_cfg_scale", float),
    "Seed": ("seed", int),
    "Size-1": ("width", int),
    "Size-2": ("height", int),
    "Variation seed": ("subseed", int),
    "Variation seed strength": ("subseed_strength", float),
    "Seed resize from-1": ("seed_resize_from_w", int),
    "Seed resize from-2": ("seed_resize_from_h", int),
    "Denoising strength": ("denoising_strength", float),
    "ENSD": ("eta_noise_seed_delta", int),
    "RNG": ("noise_source", str),
    "Emphasis": ("emphasis", str),
    "Noise multiplier": ("initial_noise_multiplier", float),
    "Hires upscale": ("hr_scale", float),
    "Hires resize-1": ("hr_resize_x", int),
    "Hires resize-2": ("hr_resize_y", int),
    "Hires CFG Scale": ("hr_cfg", float),
    "Hires Distilled CFG Scale": ("hr_distilled_cfg", float),
    "Hires sampler": ("hr_sampler", str),
    "Hires schedule type": ("hr_scheduler", str),
    "Hires prompt": ("hr_prompt", str),
    "Hires negative prompt": ("hr_negative_prompt", str),
    "Hires steps": ("hr_steps", int),
    "Hires upscaler": ("hr_upscaler", str),
    "Beta schedule alpha": ("beta_alpha", float),
    "Beta schedule beta": ("beta_beta", float),
    "Eta": ("eta", float),
    "Sigma churn": ("s_churn", float),
    "Sigma tmin": ("s_tmin", float),
    "Sigma tmax": ("s_tmax", float),
    "Sigma noise": ("s_noise", float),
    "Schedule max sigma": ("sigma_max", float),
    "Schedule min sigma": ("sigma_min", float),
    "Schedule rho": ("rho", float),
    "Discard penultimate sigma": ("discard_next_to_last", _flag),
    "NGMS": ("s_min_uncond", float),
    "NGMS all steps": ("s_min_uncond_all", _flag),
    "Skip Early CFG": ("skip_early_cond", float),
}


# Keys that pictures of Forge and of this engine carry, and that tell what a request does not repeat.
_RECORDED = frozenset(
    (
        *("Model", "Model hash", "VAE", "VAE hash", "Hires checkpoint", "Version", "User", "Clip skip", "Tiling"),
        *("Face restoration", "Image CFG scale", "FP8 weight", "Cache FP16 weight for LoRA", "Diffusion in Low Bits"),
        *("Init image hash", "Mask mode", "Mask blur", "Inpaint area", "Masked area padding", "Masked content"),
        *("Conditional mask weight", "Token merging ratio", "Token merging ratio hr", "Lora hashes", "TI hashes"),
        *("VAE Encoder", "VAE Decoder", "Batch size", "Batch pos", "Refiner", "Refiner switch at", "Guidance policy"),
    )
)
_RECORDED_FAMILIES = ("Module ", "Hires Module ", "ADetailer ")


def unknown_keys(text: str) -> list[str]:
    """The keys of ``text`` that no picture carries: slips, which fill nothing."""
    keys = (key for key in parse_infotext(text, defaults=False) if key not in REQUEST_FIELDS)
    return [key for key in keys if key not in _RECORDED and not key.startswith(_RECORDED_FAMILIES)]


def request_fields(text: str) -> dict[str, Any]:
    """The request fields that ``text`` names, to make its picture again; the rest is not in the text."""
    fields = fields_in(parse_infotext(text, defaults=False), REQUEST_FIELDS)
    if "hr_upscaler" in fields:  # a hires pass of scale 1, or of as many steps as the first, does not name either
        fields = {"enable_hr": True, "hr_steps": 0, **fields}
    return fields


def fields_in(keys: Mapping[str, str], rows: Rows) -> dict[str, Any]:
    """The request fields that keys fill by a table.

    Raises:
        RequestError: the text of one cannot be read; names the field.
    """
    fields: dict[str, Any] = {}
    for key, value in keys.items():
        if key not in rows:
            continue
        name, read = rows[key]
        try:
            fields[name] = read(value)
        except ValueError:
            raise RequestError(
                f"{key} of the picture's text is {value!r:.80}, not a number; give {name} yourself", field=name
            ) from None
    return fields
