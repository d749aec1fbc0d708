"""LoRAs of other models, told by names and widths: what the refusal calls them.

Looked for among the tensors that no module of the model has, so that nothing that fits is ever taken for foreign.
Names have dots or underscores, as the trainer had it. Loads no torch.

Source: the published LoRAs of each family (names and shapes only).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Rule = tuple[re.Pattern[str], str]


def _rules(*rows: tuple[str, str]) -> tuple[Rule, ...]:
    r"""A dot stands for a dot or an underscore, \x2e for a dot alone; matches begin a name or follow either."""
    return tuple((re.compile(r"(?:^|[._])(?:" + pattern.replace(".", "[._]") + ")"), what) for pattern, what in rows)


# The first that fits holds: what is a beginning of another name stands behind it.
_FAMILIES = _rules(
    (r"(double|single)_stream_modulation|attn.to_qkv_mlp_proj|ff(_context)?.linear_(in|out).", "a Flux.2 LoRA"),
    (r"nerf_blocks.", "a Chroma Radiance LoRA"),
    (r"distilled_guidance_layer", "a Chroma LoRA"),
    (r"(individual_)?token_refiner|(img|txt)_mlp.fc[12]", "a HunyuanVideo LoRA"),
    (r"double_blocks\x2e\d+\x2e(img|txt)_attn_(qkv|proj)", "a HunyuanVideo LoRA"),  # Flux.1 has a dot: img_attn.qkv
    (r"double_blocks.19.|single_(transformer_)?blocks.(38|39).", "a HunyuanVideo LoRA"),  # Flux.1 has 19 and 38
    (r"joint_blocks.\d", "an SD3 LoRA"),
    (r"(img|txt)_mlp.net.\d|(img|txt)_mod.1", "a Qwen-Image LoRA"),
    (r"blocks.\d+.(cross_attn.|self_attn.|ffn.\d)", "a Wan LoRA (Wan 2.1 or 2.2)"),
    (r"double_stream_blocks|single_stream_blocks", "a HiDream LoRA"),
    (r"joint_transformer_blocks|double_layers.\d", "an AuraFlow LoRA"),
    (r"transformer_blocks.\d+.(qkv_proj|mlp_fc[12]|mlp_context_fc[12])", "an SVDQuant/nunchaku LoRA (W4A4 kernels)"),
    (r"redux_(up|down).", "a Flux Redux adapter"),
    (r"controlnet|control_model.|input_hint_block.", "a ControlNet"),
    (r"ip_adapter|ip_layers.", "an IP-Adapter"),
    (r"cap_embedder|noise_refiner|context_refiner|layers.\d+.(attention|adaLN_modulation)", "a Z-Image or Lumina LoRA"),
    (r"(input|output)_blocks.\d|middle_block.\d", "an SDXL LoRA"),
    (r"(down|up)_blocks.\d+.attentions.\d+.transformer_blocks.[1-9]", "an SDXL LoRA"),
    (r"(down|up)_blocks.\d|mid_block.", "an SD 1.5 or SD 2 LoRA"),
    (r"transformer_blocks.\d+.attn[12].", "an LTX-Video, CogVideoX or PixArt LoRA"),
)  # fmt: skip

# Text encoders alone tell a family only where nothing else of the file fits: trainers of Flux may add some of theirs.
_TEXT_ENCODERS = _rules(
    (r"lora_te2_text_model", "an SDXL LoRA"),
    (r"lora_te_text_model", "an SD 1.5 or SD 2 LoRA"),
)

# Inputs of a module that has others here -> the family that has this width.
_WIDTHS = {
    1536: "an SD3 LoRA (SD3 Medium)",
    2432: "an SD3.5 LoRA (SD3 Large)",
    6144: "a Flux.2 LoRA",
    2304: "a Lumina LoRA",
    3840: "a Z-Image LoRA",
}

# Last, as SD3 has such names too: more double blocks than Flux.1 and HunyuanVideo have.
_DEPTHS = _rules((r"(?<!single_)transformer_blocks.([2-9]\d).", "a Qwen-Image LoRA"))

# Families whose names are the same and whose widths are not.
_BY_WIDTH = {"a Z-Image or Lumina LoRA": (2304, 3840)}


def family_of(unknown: Iterable[str], widths: Iterable[int], nothing_fits: bool) -> str | None:
    """What a file is, in words, or None where nothing speaks for another model.

    Args:
        unknown: names of tensors that no module of the model has.
        widths: inputs of factors, where they are not those of their module.
        nothing_fits: whether no other tensor of the file belongs to the transformer.
    """
    names, seen = list(unknown), set(widths)
    rules = (*_FAMILIES, *_TEXT_ENCODERS) if nothing_fits else _FAMILIES
    named = _first(rules, names)
    if named is not None and named not in _BY_WIDTH:
        return named
    known = _BY_WIDTH.get(named or "", tuple(_WIDTHS))
    by_width = next((_WIDTHS[width] for width in known if width in seen), named)
    return by_width or _first(_DEPTHS, names)


def _first(rules: Iterable[Rule], names: list[str]) -> str | None:
    return next((what for pattern, what in rules if any(pattern.search(name) for name in names)), None)
