"""Files told apart: variants of Flux.1, other models by name, parts of a foreign size, and what goes where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from factories import save_flux
from sparse_files import Hole, write_gguf, write_safetensors

from lightweight_engine.backend.model_files import open_model
from lightweight_engine.core.inspect import describe_file
from lightweight_engine.errors import UnsupportedCheckpointError
from lightweight_engine.flux.keymaps import find_parts
from lightweight_engine.flux.recognise import check_width

XL = "model.diffusion_model."


def write(path: Path, keys: dict[str, tuple[int, ...]] | list[str], **metadata: str) -> Path:
    shapes = keys if isinstance(keys, dict) else dict.fromkeys(keys, (2, 2))
    return write_safetensors(path, {key: Hole("BF16", shape) for key, shape in shapes.items()}, metadata)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"], "a LoRA; it belongs in models/Lora"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA"),
        (["double_blocks.0.processor.qkv_lora1.down.weight"], "a LoRA"),
        (["lycoris_transformer_blocks_0_attn_to_q.lokr_w1"], "a LoRA"),
        (["diffusion_model.img_in.diff"], "a LoRA"),
        (["double_stream_modulation_img.lin.weight", "img_in.weight"], "a Flux.2 checkpoint"),
        (["transformer.single_stream_modulation.lin.weight"], "a Flux.2 checkpoint"),
        (["distilled_guidance_layer.norms.0.scale", "double_blocks.0.img_attn.norm.key_norm.scale"], "a Chroma check"),
        (["nerf_blocks.0.x", "distilled_guidance_layer.norms.0.scale"], "a Chroma Radiance"),
        ([f"{XL}txt_in.individual_token_refiner.blocks.0.x"], "a HunyuanVideo checkpoint"),
        (["redux_up.weight", "redux_down.weight"], "a Flux Redux adapter"),
        (["controlnet_blocks.0.weight", "double_blocks.0.img_attn.norm.key_norm.scale"], "a ControlNet"),
        (["input_hint_block.0.weight"], "a ControlNet"),
        (["ip_adapter_proj_model.proj.weight"], "an IP-Adapter"),
        (["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], "an IP-Adapter"),
        ([f"{XL}joint_blocks.0.x_block.attn.qkv.weight"], "a Stable Diffusion 3 checkpoint"),
        ([f"{XL}input_blocks.0.0.weight", f"{XL}label_emb.0.0.weight"], "a Stable Diffusion XL checkpoint"),
        ([f"{XL}input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"], "a Stable Diffusion 1 or 2"),
        (["down_blocks.0.attentions.0.norm.weight"], "a Stable Diffusion checkpoint in the diffusers layout"),
        (["transformer_blocks.0.img_mlp.net.0.proj.weight"], "a Qwen-Image checkpoint"),
        (["blocks.0.cross_attn.k.weight"], "a Wan checkpoint"),
        (["cap_pad_token", "noise_refiner.0.x"], "a Z-Image checkpoint"),
        (["noise_refiner.0.x", "context_refiner.0.x"], "a Lumina checkpoint"),
        (["conv_first.weight", "body.0.rdb1.conv1.weight"], "an upscaler; it belongs in models/ESRGAN"),
        (["model.22.dfl.conv.weight"], "a detector; it belongs in models/adetailer"),
        (["model.layers.0.self_attn.q_proj.weight"], "a language model"),
        (["vision_model.embeddings.patch_embedding.weight"], "a vision encoder"),
        (["0.weight", "2.weight"], "a TAESD preview"),
        (["double_blocks.3.img_attn.qkv.weight"], "a piece of a Flux checkpoint"),
        (["something.else"], "no part of Flux.1 .*first keys: something.else"),
    ],
    ids=str,
)
def test_other_files_are_named(tmp_path: Path, keys: list[str], words: str) -> None:
    path = write(tmp_path / "some.safetensors", keys)
    with pytest.raises(UnsupportedCheckpointError, match=f"some.safetensors is {words}"):
        find_parts(open_model(path))
    assert describe_file(path).problem


@pytest.mark.parametrize(
    ("key", "forge", "comfy"),
    [
        ("lora_unet_x.lora_up.weight", "models/Lora", "models/loras"),
        ("conv_first.weight", "models/ESRGAN", "models/upscale_models"),
        ("model.22.dfl.conv.weight", "models/adetailer", None),
    ],
)
def test_where_a_file_belongs_is_a_folder_that_is_there(
    tmp_path: Path, key: str, forge: str, comfy: str | None
) -> None:
    """Of the install that it lies in; where none is there, the usual one."""
    for folder, below in ((forge, "Stable-diffusion/some"), (comfy, "unet")):
        root = tmp_path / below.replace("/", "-")
        path = root / "models" / below / "x.safetensors"
        path.parent.mkdir(parents=True)
        if folder:
            (root / folder).mkdir(parents=True)
        with pytest.raises(UnsupportedCheckpointError) as raised:
            find_parts(open_model(write(path, [key])))
        told = str(raised.value).partition("belongs in ")[2].partition(";")[0]
        assert told == (str(root / folder) if folder else forge)


CLIP = "text_model.encoder.layers.0.layer_norm1.bias"
CLIP_TABLE = "text_model.embeddings.token_embedding.weight"
T5 = "encoder.block.0.layer.0.SelfAttention.k.weight"


def clip(width: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + CLIP: (width,), prefix + CLIP_TABLE: (49408, width)}


def t5(width: int, vocabulary: int = 32128, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + T5: (width, width), f"{prefix}shared.weight": (vocabulary, width)}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (clip(1280), "CLIP-G.*use clip_l.safetensors"),
        (clip(1024), "CLIP-H"),
        (
            {"transformer.resblocks.0.ln_1.bias": (1280,), "token_embedding.weight": (49408, 1280)},
            "CLIP-G.*use clip_l.safetensors",
        ),
        (t5(2048), "T5-XL, not of Flux.1; use the encoder of T5-XXL"),
        (t5(4096, 256384), "umt5"),
        ({"decoder.conv_in.weight": (512, 4, 3, 3), "decoder.up.0.block.0.norm1.weight": (128,)}, "4 latent channels"),
        (
            {"decoder.conv_in.weight": (512, 4, 3, 3), "decoder.up_blocks.0.resnets.0.norm1.weight": (128,)},
            "4 latent channels.*use ae.safetensors",
        ),
        ({"decoder.conv_in.weight": (512, 32, 3, 3), "decoder.up.0.block.0.norm1.weight": (128,)}, "the VAE of Flux.2"),
    ],
    ids=str,
)
def test_foreign_sizes_are_named(tmp_path: Path, keys: dict, words: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=words):
        find_parts(open_model(write(tmp_path / "x.safetensors", keys)))


def test_of_two_clips_ours_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {**clip(1280, "clip_g.transformer."), **clip(768, "clip_l.transformer.")})
    assert find_parts(open_model(path))["clip"].prefix == "clip_l.transformer."


def test_widths_must_agree(tmp_path: Path) -> None:
    """Any width that the transformer asks for will do; one that it does not ask for is named."""
    transformer = {"txt_in.weight": (64, 2048), "vector_in.in_layer.weight": (64, 32)}
    check_width("t5", "t5xl", t5(2048), transformer)
    check_width("clip", "small", clip(32), transformer)
    with pytest.raises(UnsupportedCheckpointError, match=r"t5xxl: txt_in.weight .*expects 2,048 inputs.*has 4,096"):
        check_width("t5", "t5xxl", t5(4096), transformer)
    with pytest.raises(UnsupportedCheckpointError, match=r"it is CLIP-G"):
        check_width("clip", "g", clip(1280), transformer)


def test_umt5_has_the_width_of_t5_xxl_and_is_refused_all_the_same(tmp_path: Path) -> None:
    keys = {
        "model.double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        "model.img_in.weight": (64, 64),
        "model.txt_in.weight": (64, 4096),
        **t5(4096, 256384, prefix="t5."),
    }
    with pytest.raises(UnsupportedCheckpointError, match="is umt5"):
        find_parts(open_model(write(tmp_path / "x.safetensors", keys)))


def test_a_foreign_width_that_the_file_itself_asks_for(tmp_path: Path) -> None:
    keys = {
        "model.double_blocks.0.img_attn.norm.key_norm.scale": (32,),
        "model.img_in.weight": (64, 64),
        "model.txt_in.weight": (64, 512),
        **t5(512, prefix="t5."),
    }
    assert set(find_parts(open_model(write(tmp_path / "x.safetensors", keys)))) == {"transformer", "t5"}


@pytest.mark.parametrize(
    ("changes", "variant"),
    [
        ({}, "dev"),
        ({"guidance_embed": False}, "schnell"),
        ({"in_channels": 128}, "canny/depth"),
        ({"in_channels": 384}, "fill"),
    ],
)
def test_variants(tmp_path: Path, changes: dict, variant: str) -> None:
    path = save_flux(tmp_path / "x.safetensors", **changes)
    assert find_parts(open_model(path))["transformer"].variant == variant
    (described,) = describe_file(path).parts
    assert (described.variant, described.sizes["depth"]) == (variant, 1)


def test_unknown_inputs(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=r"x.safetensors: img_in takes 96 inputs.*64.*128.*384"):
        find_parts(open_model(save_flux(tmp_path / "x.safetensors", in_channels=96)))


def test_hints(tmp_path: Path) -> None:
    for name, hint in (
        ("flux1-kontext-dev", "kontext"),
        ("Krea_v1", "krea"),
        ("dev-dedistilled", "de-distilled"),
        ("a", None),
    ):
        part = find_parts(open_model(save_flux(tmp_path / f"{name}.safetensors")))["transformer"]
        assert part.hint == hint
        titled = replace(part.checkpoint, path=Path("x"), metadata={"modelspec.title": f"My {name}"})
        assert replace(part, checkpoint=titled).hint == hint


def test_language_models_in_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", {"blk.0.attn_q.weight": ("Q8_0", (32, 32))}, architecture="llama")
    with pytest.raises(UnsupportedCheckpointError, match="a language model"):
        find_parts(open_model(path))


def test_descriptions(tmp_path: Path) -> None:
    path = save_flux(tmp_path / "x.safetensors", prefix="model.diffusion_model.")
    described = describe_file(path)
    (part,) = described.parts
    assert (described.container, described.bytes, described.problem) == ("safetensors", path.stat().st_size, None)
    assert (part.role, part.layout, part.prefix) == ("transformer", "bfl", "model.diffusion_model.")
    assert part.formats == {"BF16": part.bytes} and part.parameters * 2 == part.bytes
    assert described.as_dict()["parts"][0]["sizes"]["hidden_size"] == 64
    assert "does not exist" in (describe_file(tmp_path / "none").problem or "")
