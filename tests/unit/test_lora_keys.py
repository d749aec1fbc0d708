"""Names in LoRA files: every dialect's spelling finds its parameter, and the counts are those that Forge prints."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from lora_models import deep_shapes, small_shapes

from lightweight_engine.flux.layouts import DIFFUSERS_TRANSFORMER
from lightweight_engine.flux.lora_families import family_of
from lightweight_engine.flux.lora_keys import LoraNames, Place

QKV = "double_blocks.0.img_attn.qkv.weight"
LINEAR1 = "single_blocks.0.linear1.weight"

# Name of a tensor -> kind, parameter, rows (h = 64).
DIALECTS = {
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": ("down", QKV, None),
    "lora_unet_double_blocks_0_img_attn_qkv.alpha": ("alpha", QKV, None),
    "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight": ("up", "final_layer.adaLN_modulation.1.weight", None),
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": ("down", QKV, (0, 64)),
    "transformer.transformer_blocks.0.attn.to_k.lora_B.weight": ("up", QKV, (64, 128)),
    "transformer.transformer_blocks.0.attn.to_v.lora_A.default.weight": ("down", QKV, (128, 192)),
    "transformer.transformer_blocks.0.attn.to_v.lora_B.default_0.weight": ("up", QKV, (128, 192)),
    "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": ("down", LINEAR1, (192, 320)),
    "transformer.single_transformer_blocks.0.attn.to_v.lora.down.weight": ("down", LINEAR1, (128, 192)),
    "transformer.transformer_blocks.0.attn.to_q_lora.down.weight": ("down", QKV, (0, 64)),
    "transformer.x_embedder.lora_linear_layer.up.weight": ("up", "img_in.weight", None),
    "transformer.proj_out.lora_A": ("down", "final_layer.linear.weight", None),
    "transformer_blocks.0.attn.to_q.lora_A.weight": ("down", QKV, (0, 64)),
    "transformer.base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight": ("down", QKV, (0, 64)),
    "base_model.model.transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": ("magnitude", QKV, (0, 64)),
    "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector.default.weight": ("magnitude", QKV, (0, 64)),
    "transformer.transformer_blocks.0.attn.to_out.0.dora_scale": (
        "magnitude",
        "double_blocks.0.img_attn.proj.weight",
        None,
    ),
    "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight": ("down", QKV, (0, 64)),
    "lora_transformer.transformer_blocks.0.attn.to_q.lora_down.weight": ("down", QKV, (0, 64)),
    "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight": ("down", QKV, (0, 64)),
    "lora_unet_single_transformer_blocks_0_proj_out_.lora_up.weight": ("up", "single_blocks.0.linear2.weight", None),
    "lycoris_transformer_blocks_0_attn_add_k_proj.lokr_w1": (
        "lokr_w1",
        "double_blocks.0.txt_attn.qkv.weight",
        (64, 128),
    ),
    "lycoris_transformer_blocks_0_ff_net_2.lokr_w2_a": ("lokr_w2_a", "double_blocks.0.img_mlp.2.weight", None),
    "diffusion_model.double_blocks.0.img_attn.qkv.diff_b": ("diff_b", QKV, None),
    "model.diffusion_model.double_blocks.0.img_attn.qkv.diff": ("diff", QKV, None),
    "double_blocks.0.img_attn.qkv.lora_A.weight": ("down", QKV, None),
    "double_blocks.0.img_attn.qkv.lora_B.bias": ("diff_b", QKV, None),
    "double_blocks.0.img_attn.norm.key_norm.scale": (
        "set_weight",
        "double_blocks.0.img_attn.norm.key_norm.scale",
        None,
    ),
    "diffusion_model.double_blocks.0.txt_attn.norm.key_norm.scale.set_weight": (
        "set_weight",
        "double_blocks.0.txt_attn.norm.key_norm.scale",
        None,
    ),
    "transformer.transformer_blocks.0.attn.norm_added_k.weight": (
        "set_weight",
        "double_blocks.0.txt_attn.norm.key_norm.scale",
        None,
    ),
    "lora_unet_single_blocks_0_norm_query_norm.w_norm": ("diff", "single_blocks.0.norm.query_norm.scale", None),
    "base_model.model.final_layer.linear.lora_A.weight": ("down", "final_layer.linear.weight", None),
    "double_blocks.0.processor.qkv_lora1.down.weight": ("down", QKV, None),
    "double_blocks.0.processor.proj_lora2.up.weight": ("up", "double_blocks.0.txt_attn.proj.weight", None),
    "diffusion_model.double_blocks.0.processor.proj_lora1.up.weight": (
        "up",
        "double_blocks.0.img_attn.proj.weight",
        None,
    ),
    "single_blocks.0.processor.qkv_lora.down.weight": ("down", LINEAR1, (0, 192)),
    "single_blocks.0.processor.proj_lora.up.weight": ("up", "single_blocks.0.linear2.weight", None),
    "lora_unet_single_blocks_0_linear1.hada_w2_b": ("hada_w2_b", LINEAR1, None),
    "lora_unet_single_blocks_0_linear1.a1.weight": ("a1", LINEAR1, None),
    "lora_unet_single_blocks_0_linear1.oft_blocks": ("oft_blocks", LINEAR1, None),
    "lora_unet_single_blocks_0_linear1.lora_mid.weight": ("mid", LINEAR1, None),
}

CLIP_Q = "text_model.encoder.layers.1.self_attn.q_proj.weight"
T5_Q = "encoder.block.1.layer.0.SelfAttention.q.weight"

TEXT_ENCODERS = {
    "lora_te1_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight": ("clip", CLIP_Q),
    "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_A.weight": ("clip", CLIP_Q),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj.lora_A.weight": ("clip", CLIP_Q),
    "text_encoder.encoder.layers.1.self_attn.q_proj.lora_A.weight": ("clip", CLIP_Q),
    "lora_te2_encoder_block_1_layer_0_SelfAttention_q.lora_down.weight": ("t5", T5_Q),
    "lora_te3_encoder_block_1_layer_0_SelfAttention_q.lora_down.weight": ("t5", T5_Q),
    "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q.lora_A.weight": ("t5", T5_Q),
    "text_encoder_2.encoder.block.1.layer.0.SelfAttention.q.lora_A.weight": ("t5", T5_Q),
}

UNKNOWN = (
    "lora_te2_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight",  # CLIP-G of SDXL, not our CLIP
    "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight",
    "transformer.transformer_blocks.1.attn.to_q.lora_A.weight",  # the model has one block
    "lora_unet_input_blocks_4_1_proj_in.lora_down.weight",
    "diffusion_model.double_blocks_0.img_attn.qkv.lora_A.weight",  # neither dots nor underscores
    "",
    ".lora_A.weight",
)

# Names of tensors that no Flux module has -> a word of the refusal.
FOREIGN = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight": "SDXL",
    "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.lora_A.weight": "SDXL",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "SDXL",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": "SD 1.5",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "SD 1.5",
    "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": "SD3",
    "diffusion_model.double_stream_modulation_img.lin.lora_A.weight": "Flux.2",
    "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight": "Flux.2",
    "transformer.transformer_blocks.0.ff_context.linear_in.lora_A.weight": "Flux.2",
    "lora_unet_distilled_guidance_layer_layers_0_in_layer.lora_down.weight": "Chroma",
    "diffusion_model.blocks.0.cross_attn.k.lora_A.weight": "Wan",
    "lora_unet_blocks_3_self_attn_q.lora_down.weight": "Wan",
    "lora_unet_individual_token_refiner_blocks_0_mlp_fc1.lora_down.weight": "HunyuanVideo",
    "lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight": "HunyuanVideo",
    "transformer.single_transformer_blocks.39.attn.to_q.lora_A.weight": "HunyuanVideo",
    "diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": "HunyuanVideo",
    "lora_unet_double_blocks_19_img_attn_qkv.lora_down.weight": "HunyuanVideo",
    "transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight": "Qwen-Image",
    "transformer.transformer_blocks.59.attn.to_q.lora_A.weight": "Qwen-Image",
    "diffusion_model.layers.0.attention.to_q.lora_A.weight": "Z-Image",
    "diffusion_model.noise_refiner.0.attention.qkv.lora_A.weight": "Lumina",
    "diffusion_model.double_stream_blocks.0.block.attn1.lora_A.weight": "HiDream",
    "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": "LTX",
    "transformer_blocks.0.qkv_proj.lora_down": "nunchaku",
    "redux_down.weight": "Redux",
}


@pytest.fixture(scope="module")
def names() -> LoraNames:
    return LoraNames.of(small_shapes())


@pytest.mark.parametrize("key", DIALECTS)
def test_dialects(names: LoraNames, key: str) -> None:
    kind, parameter, rows = DIALECTS[key]
    found = names.read(key)
    assert found.kind == kind
    assert found.place is not None
    assert (found.place.role, found.place.parameter, found.place.rows) == ("transformer", parameter, rows)


@pytest.mark.parametrize("key", TEXT_ENCODERS)
def test_text_encoders(names: LoraNames, key: str) -> None:
    place = names.read(key).place
    assert place is not None
    assert (place.role, place.parameter) == TEXT_ENCODERS[key]


@pytest.mark.parametrize("key", UNKNOWN)
def test_unknown_modules(names: LoraNames, key: str) -> None:
    assert names.read(key).place is None


def test_unknown_kinds_hang_on_their_module(names: LoraNames) -> None:
    found = names.read("transformer.transformer_blocks.0.attn.to_q.oft_R.default.weight")
    assert found.kind is None
    assert found.place == Place("transformer", QKV, (0, 64))
    assert names.read("img_in.weight").kind is None


def test_the_last_layer_is_swapped_in_the_names_of_diffusers_alone(names: LoraNames) -> None:
    assert names.place("transformer.norm_out.linear") == Place(
        "transformer", "final_layer.adaLN_modulation.1.weight", swapped=True
    )
    ours = names.place("lora_unet_final_layer_adaLN_modulation_1")
    assert ours is not None and not ours.swapped


def test_forge_has_no_name_for_a_second_text_encoder_of_peft() -> None:
    key = "text_encoder_2.encoder.block.1.layer.0.SelfAttention.q.lora_A.weight"
    assert LoraNames.of(small_shapes(), "forge").read(key).place is None


def test_networks_that_are_not_there_have_no_names() -> None:
    names = LoraNames.of({"transformer": small_shapes()["transformer"]})
    assert names.read("lora_te1_text_model_encoder_layers_1_self_attn_q_proj.alpha").place is None


def test_no_spelling_stands_for_two_places() -> None:
    """Underscores may stand for dots as no two names meet that way."""
    ours = [name.removesuffix(".weight").replace(".", "_") for name in deep_shapes()["transformer"]]
    assert len(ours) == len(set(ours))
    theirs = {row.theirs.replace(".", "_") for row in DIFFUSERS_TRANSFORMER}
    assert len(theirs) == len(DIFFUSERS_TRANSFORMER)


def peft_modules() -> list[str]:
    rows = (row.theirs.removesuffix(".") for row in DIFFUSERS_TRANSFORMER if row.theirs.endswith("."))
    blocks = {"transformer_blocks.{n}.": 19, "single_transformer_blocks.{n}.": 38}
    return [
        "transformer." + row.replace("{n}", str(n))
        for row in rows
        for start, count in blocks.items()
        if row.startswith(start)
        for n in range(count)
    ]


def kohya_modules() -> list[str]:
    matrix = re.compile(r"(double|single)_blocks\..+\.weight$")
    found = (name for name in deep_shapes()["transformer"] if matrix.match(name))
    return ["lora_unet_" + name.removesuffix(".weight").replace(".", "_") for name in found]


@pytest.mark.parametrize(
    ("modules", "count"),
    [
        (peft_modules(), 494),
        ([name for name in peft_modules() if ".norm" not in name], 418),
        ([name for name in peft_modules() if ".attn." in name], 266),
        (kohya_modules(), 304),
        ([name for name in kohya_modules() if "mod" not in name], 228),
    ],
)
def test_counts_of_full_files(modules: list[str], count: int) -> None:
    names = LoraNames.of(deep_shapes())
    places = [names.place(module) for module in modules]
    assert None not in places
    assert len(places) == len({(place.parameter, place.rows) for place in places if place}) == count


@pytest.mark.parametrize("key", FOREIGN)
def test_foreign_families(names: LoraNames, key: str) -> None:
    assert names.read(key).place is None
    family = family_of([key], [], nothing_fits=True)
    assert family is not None and FOREIGN[key] in family


@pytest.mark.parametrize(("width", "family"), [(1536, "SD3"), (2432, "SD3"), (6144, "Flux.2"), (3840, "Z-Image")])
def test_families_by_width(width: int, family: str) -> None:
    found = family_of([], [width], nothing_fits=True)
    assert found is not None and family in found


def test_layers_and_refiners_are_told_by_their_width() -> None:
    names = ["diffusion_model.noise_refiner.0.attention.qkv.lora_A.weight"]
    assert family_of(names, [2304], nothing_fits=True) == "a Lumina LoRA"
    assert family_of(names, [3840], nothing_fits=True) == "a Z-Image LoRA"


def test_no_name_of_flux_is_foreign() -> None:
    """Not even of blocks that a smaller model lacks."""
    names = [*DIALECTS, *TEXT_ENCODERS, *(f"{module}.alpha" for module in (*kohya_modules(), *peft_modules()))]
    assert family_of(names, [64, 128, 384, 3072, 12288, 15360, 4096, 768], nothing_fits=True) is None


def test_foreign_text_encoders_beside_a_transformer_that_fits_are_no_reason_to_refuse() -> None:
    assert family_of(["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"], [], nothing_fits=False) is None


def test_names_load_no_torch() -> None:
    code = (
        "import sys; from lightweight_engine.flux import lora_keys, lora_families, lora_metadata; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
