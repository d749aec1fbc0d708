"""What a file is that holds no part of Flux.1, which variant of Flux.1 a transformer is, and what widths say.

All of it is read from names and shapes. A file's own name and metadata give hints at most: variants that differ in
nothing else (Kontext, Krea) are told to people, and nothing depends on them. Loads no torch.

Source: the published files of each family (names and shapes only).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..backend.checkpoint import Checkpoint
from ..backend.model_folders import DETECTORS, LORAS, UPSCALERS, place_beside
from ..errors import UnsupportedCheckpointError
from .layouts import Role
from .params import Shapes

Rule = tuple[str, str]
"""A pattern, which is looked for at the beginning of each name and after any dot, and what has it."""


LORA = re.compile(
    r"(?m)^(lora_(unet|te\d?|transformer)_|lycoris_)|lora_(A|B|up|down|mid)\b|\.lora\.(up|down)\.|_lora\d?\.(up|down)\."
    r"|\.(hada_w1_a|lokr_w[12](_a)?|oft_blocks|dora_scale|lora_magnitude_vector|diff|diff_b|set_weight)$"
)

A_LORA, AN_UPSCALER, A_DETECTOR = "a LoRA", "an upscaler", "a detector"
HOMES = {A_LORA: LORAS, AN_UPSCALER: UPSCALERS, A_DETECTOR: DETECTORS}
"""What is of use here, though not as a model, and the folders that it is read from."""

# Other diffusion models and what belongs to them. Looked for first, as their files may share names with Flux.1.
OTHER_MODELS: tuple[Rule, ...] = (
    (r"double_stream_modulation|single_stream_modulation", "a Flux.2 checkpoint, which is another model"),
    (r"nerf_blocks\.", "a Chroma Radiance checkpoint, which is another model"),
    (r"distilled_guidance_layer\.", "a Chroma checkpoint, which is another model"),
    (r"individual_token_refiner|token_refiner\.|img_in\.proj\.", "a HunyuanVideo checkpoint, which is another model"),
    (r"redux_(up|down)\.weight$", "a Flux Redux adapter, not a checkpoint; it cannot be used"),
    (r"controlnet_|control_model\.|input_hint_block\.", "a ControlNet, not a checkpoint; it cannot be used"),
    (r"ip_adapter|ip_layers\.", "an IP-Adapter, not a checkpoint; it cannot be used"),
    (r"patchify_proj\.|adaln_single\.", "an LTX-Video or PixArt checkpoint, which is another model"),
    (r"joint_blocks\.|pos_embed\.proj\.", "a Stable Diffusion 3 checkpoint, which is another model"),
    (r"transformer_blocks\.\d+\.img_mlp\.", "a Qwen-Image checkpoint, which is another model"),
    (r"blocks\.\d+\.cross_attn\.", "a Wan checkpoint, which is another model"),
    (r"x_pad_token|cap_pad_token", "a Z-Image checkpoint, which is another model"),
    (r"context_refiner\.|noise_refiner\.", "a Lumina checkpoint, which is another model"),
    (r"double_stream_blocks\.|single_stream_blocks\.", "a HiDream checkpoint, which is another model"),
    (r"double_layers\.|joint_transformer_blocks\.", "an AuraFlow checkpoint, which is another model"),
    (r"label_emb\.|add_embedding\.linear", "a Stable Diffusion XL checkpoint, which is another model"),
    (r"input_blocks\.", "a Stable Diffusion 1 or 2 checkpoint, which is another model"),
)

# What else people keep beside checkpoints. Looked for where no part of Flux.1 is found.
OTHER_FILES: tuple[Rule, ...] = (
    (r"down_blocks\.0\.", "a Stable Diffusion checkpoint in the diffusers layout, which is another model"),
    (r"(conv_first|body\.0\.rdb1|model\.1\.sub\.0)\.", AN_UPSCALER),
    (r"dfl\.conv\.|model\.0\.conv\.weight", A_DETECTOR),
    (r"(model\.)?layers\.0\.self_attn\.q_proj|blk\.0\.attn_q\.", "a language model, which Flux.1 does not use"),
    (r"vision_model\.|visual\.", "a vision encoder, which Flux.1 does not use"),
    (r"(decoder|encoder)\.(layers\.0|1|0)\.weight$|\d+\.weight$", "a TAESD preview decoder, which is not needed"),
    (r"string_to_param|emb_params$|clip_[lg]$", "a textual inversion embedding, which is not used"),
    (r"(single_)?transformer_blocks\.", "the checkpoint of another model in the diffusers layout"),
    (r"(double|single)_blocks\.", "a piece of a Flux checkpoint; use the whole file"),
)

# Role -> key and axis of the size that tells foreign files of the kind, and their names by that size.
FOREIGN_SIZES: dict[Role, tuple[tuple[str, int, Mapping[int, str]], ...]] = {
    "clip": (
        (
            "text_model.encoder.layers.0.layer_norm1.bias",
            0,
            {
                1280: "CLIP-G, the second text encoder of Stable Diffusion XL and 3",
                1024: "CLIP-H, the text encoder of Stable Diffusion 2",
                1152: "the text encoder of SigLIP",
            },
        ),
    ),
    "t5": (
        ("shared.weight", 0, {256384: "umt5, the text encoder of Wan", 250112: "mT5, the text encoder of HunyuanDiT"}),
        ("shared.weight", 1, {2048: "T5-XL", 1024: "T5-large", 768: "T5-base", 512: "T5-small"}),
    ),
    "autoencoder": (
        (
            "decoder.conv_in.weight",
            1,
            {4: "the VAE of Stable Diffusion 1, 2 or XL (4 latent channels)", 32: "the VAE of Flux.2"},
        ),
    ),
}

INSTEAD: dict[Role, str] = {
    "clip": "use clip_l.safetensors",
    "t5": "use the encoder of T5-XXL (t5xxl_fp16.safetensors)",
    "autoencoder": "use ae.safetensors of Flux.1",
    "transformer": "use a Flux.1 checkpoint",
}

# Inputs of a transformer -> its variant; dev and schnell differ in their guidance.
VARIANTS = {128: "canny/depth", 384: "fill"}
LATENT_INPUTS = 64

# Words of a file's name or title -> what it may be; neither names nor shapes of tensors can tell.
HINTS = ("kontext", "krea", "dedistill", "de-distill", "undistill")

# Role -> the transformer's matrix whose inputs it fills, and where its own width stands.
FEEDS: dict[Role, tuple[str, str]] = {
    "t5": ("txt_in.weight", "shared.weight"),
    "clip": ("vector_in.in_layer.weight", "text_model.embeddings.token_embedding.weight"),
}


def refuse_other_models(checkpoint: Checkpoint) -> None:
    """
    Raises:
        UnsupportedCheckpointError: it is a LoRA, or belongs to another diffusion model.
    """
    names = "\n".join(checkpoint.tensors)
    if LORA.search(names):
        raise UnsupportedCheckpointError(_told(checkpoint, A_LORA))
    if what := _first(OTHER_MODELS, names):
        raise UnsupportedCheckpointError(f"{_told(checkpoint, what)}; {INSTEAD['transformer']}")


def unknown_file(checkpoint: Checkpoint) -> UnsupportedCheckpointError:
    """The error for a file without any part of Flux.1: what it is, where that is known."""
    names = "\n".join(checkpoint.tensors)
    if what := _first(OTHER_FILES, names):
        return UnsupportedCheckpointError(f"{_told(checkpoint, what)}; {INSTEAD['transformer']}")
    first = ", ".join(list(checkpoint.tensors)[:3]) or "none"
    return UnsupportedCheckpointError(
        f"{checkpoint.path.name} is no part of Flux.1 that this engine knows (first keys: {first}); use a Flux.1 file"
    )


def _told(checkpoint: Checkpoint, what: str) -> str:
    """What a file is, and where it belongs if there is a place for such files."""
    place = f"; it belongs in {place_beside(checkpoint.path, HOMES[what])}" if what in HOMES else ""
    return f"{checkpoint.path.name} is {what}{place}"


def _first(rules: Sequence[Rule], names: str) -> str | None:
    """What the first rule says that is met; all are looked for at once, as a search in a file's names takes long."""
    if not _anywhere(*(pattern for pattern, _ in rules)).search(names):
        return None
    return next(what for pattern, what in rules if _anywhere(pattern).search(names))


def _anywhere(*patterns: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|\.)(?:{'|'.join(patterns)})", re.MULTILINE)


def foreign_size(role: Role, shapes: Shapes, asked_for: int | None = None) -> str | None:
    """What a part is whose size is that of another model's, or None; a width that the transformer asks for is none."""
    for key, axis, names in FOREIGN_SIZES.get(role, ()):
        shape = shapes.get(key, ())
        if axis < len(shape) and shape[axis] in names and shape[axis] != asked_for:
            return names[shape[axis]]
    return None


def width_fed(role: Role, transformer: Shapes) -> int | None:
    """The width that a transformer expects of a text encoder."""
    shape = transformer.get(FEEDS[role][0], ()) if role in FEEDS else ()
    return shape[1] if len(shape) > 1 else None


def width_of(role: Role, shapes: Shapes) -> int | None:
    """The width that a text encoder has."""
    shape = shapes.get(FEEDS[role][1], ()) if role in FEEDS else ()
    return shape[1] if len(shape) > 1 else None


def check_width(role: Role, name: str, shapes: Shapes, transformer: Shapes) -> None:
    """
    Raises:
        UnsupportedCheckpointError: the text encoder ``name`` has another width than the transformer expects.
    """
    expected, found = width_fed(role, transformer), width_of(role, shapes)
    if expected is not None and found is not None and expected != found:
        what = foreign_size(role, shapes)
        raise UnsupportedCheckpointError(
            f"{name}: {FEEDS[role][0]} of the transformer expects {expected:,} inputs, the text encoder has {found:,}"
            f"{f' (it is {what})' if what else ''}; choose one of that width"
        )


def variant_of(shapes: Shapes) -> str:
    """``dev``, ``schnell``, ``canny/depth`` or ``fill``.

    Raises:
        UnsupportedCheckpointError: the transformer takes another number of inputs, or its first matrix is missing.
    """
    if "img_in.weight" not in shapes:
        raise UnsupportedCheckpointError("the tensor 'img_in.weight' is missing; use the complete file")
    shape = shapes["img_in.weight"]
    inputs = shape[1] if len(shape) == 2 else 0
    if inputs == LATENT_INPUTS:
        return "dev" if "guidance_in.in_layer.weight" in shapes else "schnell"
    if inputs not in VARIANTS:
        known = ", ".join(f"{count} ({name})" for count, name in VARIANTS.items())
        raise UnsupportedCheckpointError(
            f"img_in takes {inputs} inputs, where Flux.1 takes {LATENT_INPUTS} (dev, schnell), {known}; "
            f"{INSTEAD['transformer']}"
        )
    return VARIANTS[inputs]


def hint_of(checkpoint: Checkpoint) -> str | None:
    """What a file's name or title says it is beyond its variant: ``kontext``, ``krea``, ``de-distilled``."""
    titles = [checkpoint.metadata.get(f"modelspec.{key}", "") for key in ("title", "architecture")]
    text = " ".join([checkpoint.path.stem, *titles]).lower()
    found = next((hint for hint in HINTS if hint in text), None)
    return "de-distilled" if found and "distill" in found else found
