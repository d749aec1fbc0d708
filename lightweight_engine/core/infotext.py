"""The text that a picture carries: what it was made with, word for word as Forge writes it.

    PROMPT
    Negative prompt: NEGATIVE PROMPT          (only where there is one)
    Steps: 20, Sampler: Euler, …, KEY: VALUE

``build_parameters`` is the table of keys in their order, ``format_infotext`` puts the text together, and
``infotext_parse`` reads it back. Numbers keep the type they were given in: 1 is written "1", 1.0 is written "1.0".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..request import GenerationRequest

Value = Any
"""A parameter: a plain value, a list of one per picture, a function of the picture's index, or None (left out)."""

SAME_CHOICES = "Use same choices"
LORA_HASHES = "Lora hashes"
MASKED_CONTENT = ("fill", "original", "latent noise", "latent nothing")


@dataclass(frozen=True, kw_only=True)
class HiresFacts:
    """How the hires pass ran. None or empty: as in the first pass, or not given."""

    denoising_strength: float
    scale: float = 2.0
    resize: tuple[int, int] = (0, 0)
    steps: int = 0
    upscaler: str | None = None
    cfg_scale: float = 1.0
    distilled_cfg_scale: float | None = 3.5
    checkpoint: str | None = None
    modules: tuple[str, ...] | None = None
    sampler: str | None = None
    scheduler: str | None = None
    prompt: str = ""
    negative_prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """How image-to-image ran. ``masked_content`` is an index into ``MASKED_CONTENT``; it counts only with a mask."""

    denoising_strength: float
    masked: bool = False
    mask_inverted: bool = False
    mask_blur: int = 0
    only_masked: bool = False
    masked_padding: int = 0
    masked_content: int = 1
    noise_multiplier: float = 1.0
    image_hash: str | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationFacts:
    """What is known of one picture's making.

    ``distilled_cfg_scale`` is None for models without guidance, ``ensd`` 0 for samplers that do not use it,
    ``emphasis`` "Original" where the prompt has no weights. ``extra`` are keys that come before the passes' own, as
    the detailer's; ``sampler_options`` is what ``sampler_parameters`` gives.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int
    sampler: str
    scheduler: str | None = None
    cfg_scale: float = 1.0
    distilled_cfg_scale: float | None = None
    seed: int
    width: int
    height: int
    model_name: str | None = None
    model_hash: str | None = None
    subseed: int = 0
    subseed_strength: float = 0.0
    seed_resize_from: tuple[int, int] = (0, 0)
    clip_skip: int = 1
    ensd: int = 0
    rng: str = "GPU"
    tiling: bool = False
    extra: Mapping[str, Value] = field(default_factory=dict)
    hires: HiresFacts | None = None
    image: ImageFacts | None = None
    loras: Mapping[str, str] = field(default_factory=dict)
    emphasis: str = "Original"
    sampler_options: Mapping[str, Value] = field(default_factory=dict)
    version: str | None = None
    user: str | None = None
    low_bits: str = "Automatic"
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class InfotextOptions:
    """Which facts may be told."""

    add_model_hash: bool = True
    add_model_name: bool = True
    add_version: bool = True
    add_user_name: bool = False
    add_modules: bool = True


def infotext(facts: GenerationFacts, options: InfotextOptions | None = None) -> str:
    """The whole text of one picture."""
    return format_infotext(facts.prompt, facts.negative_prompt, build_parameters(facts, options))


def format_infotext(prompt: str, negative_prompt: str, parameters: Mapping[str, Value], index: int = 0) -> str:
    """Prompt, negative prompt and ``parameters`` in their order, for the picture ``index`` of a batch."""
    items = []
    for key, value in parameters.items():
        value = _of_picture(value, index)
        if value is not None:
            items.append(key if value == key else f"{key}: {quote(value)}")
    negative = f"\nNegative prompt: {negative_prompt}" if negative_prompt else ""
    return f"{prompt}{negative}\n{', '.join(items)}".strip()


def _of_picture(value: Value, index: int) -> Value:
    if isinstance(value, (list, tuple)):
        return value[index] if index < len(value) else None
    return value(index) if callable(value) else value


def quote(value: Value) -> Value:
    """``value`` as a JSON string where its text would break the line apart, else as it is."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else value


def build_parameters(facts: GenerationFacts, options: InfotextOptions | None = None) -> dict[str, Value]:
    """Every key in the order of the reference; None is left out of the text.

    A key that a later part repeats keeps its first place and takes the later value. Keys that are None here without a
    condition belong to features that Flux has not: they hold the place for ``extra``.
    """
    told = options or InfotextOptions()
    varied = facts.subseed_strength != 0
    resized = min(facts.seed_resize_from) > 0
    return {
        "Steps": facts.steps,
        "Sampler": facts.sampler,
        "Schedule type": facts.scheduler,
        "CFG scale": facts.cfg_scale,
        "Distilled CFG Scale": facts.distilled_cfg_scale,
        "Image CFG scale": None,
        "Seed": facts.seed,
        "Face restoration": None,
        "Size": _by(facts.width, facts.height),
        "Model hash": facts.model_hash if told.add_model_hash else None,
        "Model": facts.model_name if told.add_model_name else None,
        "FP8 weight": None,
        "Cache FP16 weight for LoRA": None,
        "Variation seed": facts.subseed if varied else None,
        "Variation seed strength": facts.subseed_strength if varied else None,
        "Seed resize from": _by(*facts.seed_resize_from) if resized else None,
        "Denoising strength": None,
        "Conditional mask weight": None,
        "Clip skip": facts.clip_skip if facts.clip_skip > 1 else None,
        "ENSD": facts.ensd or None,
        "Token merging ratio": None,
        "Token merging ratio hr": None,
        "Init image hash": None,
        "RNG": facts.rng if facts.rng != "GPU" else None,
        "Tiling": True if facts.tiling else None,
        **facts.extra,
        **(hires_parameters(facts.hires, facts) if facts.hires else {}),
        **(image_parameters(facts.image) if facts.image else {}),
        **lora_parameters(facts.loras),
        **({"Emphasis": facts.emphasis} if facts.emphasis != "Original" else {}),
        **facts.sampler_options,
        "Version": facts.version if told.add_version else None,
        "User": facts.user if told.add_user_name else None,
        "Diffusion in Low Bits": facts.low_bits if facts.low_bits != "Automatic" else None,
        **(_numbered("Module", facts.modules) if told.add_modules else {}),
    }


def hires_parameters(hires: HiresFacts, first: GenerationFacts) -> dict[str, Value]:
    """The keys of the hires pass; those that repeat the ``first`` pass are None."""
    resized = any(hires.resize)
    modules = hires.modules if hires.modules is None or hires.modules else ("Built-in",)
    return {
        "Denoising strength": hires.denoising_strength,
        "Hires checkpoint": hires.checkpoint,
        **_numbered("Hires Module", modules or ()),
        "Hires sampler": _changed(hires.sampler, first.sampler),
        "Hires prompt": _changed(hires.prompt, first.prompt),
        "Hires negative prompt": _changed(hires.negative_prompt, first.negative_prompt),
        "Hires CFG Scale": hires.cfg_scale,
        "Hires Distilled CFG Scale": hires.distilled_cfg_scale,
        "Hires schedule type": _changed(hires.scheduler, first.scheduler),
        "Hires upscale": None if resized else hires.scale,
        "Hires resize": _by(*hires.resize) if resized else None,
        "Hires steps": hires.steps or None,
        "Hires upscaler": hires.upscaler,
    }


def image_parameters(image: ImageFacts) -> dict[str, Value]:
    """The keys of image-to-image and inpainting; ``recipe_text`` reads them back."""
    parameters: dict[str, Value] = {"Init image hash": image.image_hash, "Denoising strength": image.denoising_strength}
    if image.masked:
        content = MASKED_CONTENT[image.masked_content]
        parameters |= {
            "Mask mode": "Inpaint not masked" if image.mask_inverted else None,
            "Mask blur": image.mask_blur or None,
            "Inpaint area": "Only masked" if image.only_masked else None,
            "Masked area padding": image.masked_padding if image.only_masked else None,
            "Masked content": content if content != "original" else None,
        }
    parameters["Noise multiplier"] = image.noise_multiplier if image.noise_multiplier != 1 else None
    return parameters


def sampler_parameters(request: GenerationRequest, scheduler: str) -> dict[str, Value]:
    """The options of sampler and schedule that are not at their defaults; ``scheduler`` is the one that ran.

    The Beta schedule always names its two shapes.
    """
    beta = scheduler == "Beta"
    changed = {
        "Eta": (request.eta, None),
        "Sigma churn": (request.s_churn, 0),
        "Sigma tmin": (request.s_tmin, 0),
        "Sigma tmax": (request.s_tmax, 0),
        "Sigma noise": (request.s_noise, 1),
        "Schedule max sigma": (request.sigma_max, 0),
        "Schedule min sigma": (request.sigma_min, 0),
        "Schedule rho": (request.rho, 0),
        "Discard penultimate sigma": (request.discard_next_to_last, False),
        "NGMS": (request.s_min_uncond, 0),
        "NGMS all steps": (request.s_min_uncond_all, False),
        "Skip Early CFG": (request.skip_early_cond, 0),
    }
    shapes = {"Beta schedule alpha": request.beta_alpha, "Beta schedule beta": request.beta_beta} if beta else {}
    return {**shapes, **{key: value for key, (value, default) in changed.items() if value != default}}


def lora_parameters(loras: Mapping[str, str]) -> dict[str, Value]:
    """``Lora hashes``: name and short hash of each."""
    pairs = [f"{lora_key(name)}: {digest}" for name, digest in loras.items()]
    return {LORA_HASHES: ", ".join(pairs)} if pairs else {}


def lora_key(name: str) -> str:
    """The name of a LoRA as ``Lora hashes`` has it: without the marks that part names and hashes there."""
    return name.replace(":", "").replace(",", "")


def _by(width: int, height: int) -> str:
    return f"{width}x{height}"


def _changed(value: str | None, first: str | None) -> str | None:
    return value if value and value != first else None


def _numbered(key: str, names: tuple[str, ...]) -> dict[str, Value]:
    return {f"{key} {number}": PurePath(name).stem for number, name in enumerate(names, 1)}
