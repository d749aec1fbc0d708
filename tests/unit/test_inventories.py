"""The published models at full size in every layout: each parameter has its source, no key is left, the bytes fit.

The files are headers with holes behind them. Expected counts and bytes are those of the published files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from sparse_files import Hole, text, write_gguf, write_safetensors

from lightweight_engine.backend.model_files import open_model
from lightweight_engine.core.inspect import describe_file
from lightweight_engine.flux.keymaps import Part, find_parts, unused_keys
from lightweight_engine.flux.load import NETWORKS, _Uninitialised, read_params
from lightweight_engine.flux.params import AutoencoderParams, CLIPParams, FluxParams, T5Params

Shapes = dict[str, tuple[int, ...]]

PARAMS = {
    "dev": ("transformer", FluxParams()),
    "schnell": ("transformer", FluxParams(guidance_embed=False)),
    "t5": ("t5", T5Params()),
    "clip": ("clip", CLIPParams()),
    "autoencoder": ("autoencoder", AutoencoderParams()),
}
PREFIX = "model.diffusion_model."
GUIDANCE = 10_229_760  # parameters that dev has and schnell has not


@cache
def shapes_of(model: str) -> Shapes:
    """Names and shapes of a network of the published size."""
    role, params = PARAMS[model]
    with _Uninitialised():
        network = NETWORKS[role][1](params)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@cache
def diffusers_shapes(model: str) -> Shapes:
    """Names and shapes in the diffusers layout, from diffusers itself."""
    diffusers = pytest.importorskip("diffusers")
    with _Uninitialised():
        if model == "autoencoder":
            network = diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
        else:
            network = diffusers.FluxTransformer2DModel(guidance_embeds=model == "dev")
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def plain(shapes: Shapes, prefix: str = "", dtype: str = "BF16") -> dict[str, Hole]:
    return {prefix + name: Hole(dtype, shape) for name, shape in shapes.items()}


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and not name.endswith(("shared.weight", "relative_attention_bias.weight"))


def with_linears(
    shapes: Shapes, prefix: str, pack: Callable[[str, tuple[int, ...]], dict[str, Hole]]
) -> dict[str, Hole]:
    tensors: dict[str, Hole] = {}
    for name, shape in shapes.items():
        tensors |= pack(prefix + name, shape) if is_linear(name, shape) else {prefix + name: Hole("BF16", shape)}
    return tensors


def nf4(name: str, shape: tuple[int, ...], *, nested: bool = False) -> dict[str, Hole]:
    count = shape[0] * shape[1]
    blocks = count // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape}
    tensors = {name: Hole("U8", (count // 2, 1)), f"{name}.quant_map": Hole("F32", (16,))}
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.04}
        tensors |= {
            f"{name}.absmax": Hole("U8", (blocks,)),
            f"{name}.nested_absmax": Hole("F32", (-(-blocks // 256),)),
            f"{name}.nested_quant_map": Hole("F32", (256,)),
        }
    else:
        tensors[f"{name}.absmax"] = Hole("F32", (blocks,))
    return {**tensors, f"{name}.quant_state.bitsandbytes__nf4": text(state)}


def nf4_double(name: str, shape: tuple[int, ...]) -> dict[str, Hole]:
    return nf4(name, shape, nested=True)


def fp8(name: str, shape: tuple[int, ...]) -> dict[str, Hole]:
    return {name: Hole("F8_E4M3", shape)}


def fp8_scaled(name: str, shape: tuple[int, ...]) -> dict[str, Hole]:
    layer = name.removesuffix(".weight")
    return {
        name: Hole("F8_E4M3", shape),
        f"{layer}.scale_weight": Hole("F32", ()),
        f"{layer}.scale_input": Hole("F32", ()),
    }


def fp8_declared(name: str, shape: tuple[int, ...]) -> dict[str, Hole]:
    layer = name.removesuffix(".weight")
    declaration = text({"format": "float8_e4m3fn"})
    return {
        name: Hole("F8_E4M3", shape),
        f"{layer}.weight_scale": Hole("F32", ()),
        f"{layer}.comfy_quant": declaration,
    }


def fp8_in_metadata(name: str, shape: tuple[int, ...]) -> dict[str, Hole]:
    return {name: Hole("F8_E4M3", shape), f"{name.removesuffix('.weight')}.weight_scale": Hole("F32", (1,))}


def numbers(part: Part) -> int:
    """Bytes of codes, values and block scales: without code books, JSON, and the scale of a whole matrix."""
    counted = ("absmax", "nested_absmax")
    tensors = part.checkpoint.tensors
    return sum(
        tensors[stored.name].nbytes
        + sum(tensors[key].nbytes for role, key in stored.satellites.items() if role in counted)
        for source in part.sources.values()
        for stored, _ in source.pieces
    )


def check(path: Path, model: str, keys: int | None = None, nbytes: int | None = None) -> Part:
    """Every parameter of the network has a source of its shape, and no key of the file is left over."""
    checkpoint = open_model(path)
    parts = find_parts(checkpoint)
    role, params = PARAMS[model]
    part = parts[role]
    assert part.shapes == shapes_of(model)
    assert unused_keys(checkpoint, parts) == []
    assert read_params(part) == params
    assert keys is None or len([key for key in checkpoint.tensors if key.startswith(part.prefix)]) == keys
    assert nbytes is None or numbers(part) == nbytes
    return part


BYTES = {
    "bf16": 23_802_816_640,
    "fp8": 11_904_493_696,
    "nf4": 6_698_977_408,
    "nf4 double": 6_144_148_384,
}
PACKED = [
    # layout, pack, tensors of dev, of schnell, bytes of dev
    ("nf4", nf4, 1722, 1712, BYTES["nf4"]),
    ("nf4 double", nf4_double, 2350, 2336, BYTES["nf4 double"]),
    ("fp8", fp8, 780, 776, BYTES["fp8"]),
    ("fp8 scaled", fp8_scaled, 780 + 2 * 314, 776 + 2 * 312, BYTES["fp8"]),
    ("fp8 declared", fp8_declared, 780 + 2 * 314, 776 + 2 * 312, BYTES["fp8"]),
]


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(("model", "keys"), [("dev", 780), ("schnell", 776)])
def test_single_file(tmp_path: Path, model: str, keys: int, prefix: str) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", plain(shapes_of(model), prefix))
    nbytes = BYTES["bf16"] - (model == "schnell") * 2 * GUIDANCE
    part = check(path, model, keys, nbytes)
    assert (part.variant, part.layout, part.prefix) == (model, "bfl", prefix)
    assert path.stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("model", ["dev", "schnell"])
@pytest.mark.parametrize(
    ("name", "pack", "dev_keys", "schnell_keys", "nbytes"),
    PACKED,
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_packed(tmp_path: Path, name, pack, dev_keys: int, schnell_keys: int, nbytes: int, model: str) -> None:
    tensors = with_linears(shapes_of(model), PREFIX, pack)
    dev = model == "dev"
    path = write_safetensors(tmp_path / "x.safetensors", tensors)
    part = check(path, model, dev_keys if dev else schnell_keys, nbytes if dev else None)
    linears = [source for key, source in part.sources.items() if is_linear(key, source.shape)]
    assert len(linears) == (314 if dev else 312) and {source.format for source in linears} == {
        name.split()[0].replace("fp8", "fp8_e4m3")
    }


@pytest.mark.parametrize("named_with_prefix", [True, False])
def test_fp8_declared_in_the_metadata(tmp_path: Path, named_with_prefix: bool) -> None:
    shapes = shapes_of("dev")
    prefix = PREFIX if named_with_prefix else ""
    layers = {
        prefix + name.removesuffix(".weight"): {"format": "float8_e4m3fn"}
        for name, shape in shapes.items()
        if is_linear(name, shape)
    }
    path = write_safetensors(
        tmp_path / "x.safetensors",
        with_linears(shapes, PREFIX, fp8_in_metadata),
        {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})},
    )
    check(path, "dev", 780 + 314, BYTES["fp8"])


GGUF_BYTES = {
    "Q8_0": 12_654_309_632,
    "Q6_K": 9_772_916_480,
    "Q5_1": 8_936_083_712,
    "Q5_0": 8_192_438_528,
    "Q5_K": 8_192_696_576,
    "Q4_1": 7_448_793_344,
    "Q4_0": 6_705_148_160,
    "Q4_K": 6_705_430_784,
    "Q3_K": 5_125_210_880,
    "Q2_K": 3_916_807_424,
}


@pytest.mark.parametrize("kind", GGUF_BYTES)
def test_gguf(tmp_path: Path, kind: str) -> None:
    """Uniform types; a row of 64 numbers is no block of 256, so ``img_in`` stays in F16 there."""
    tensors = {
        name: ("F32" if len(shape) < 2 else "F16" if kind.endswith("_K") and shape[1] % 256 else kind, shape)
        for name, shape in shapes_of("dev").items()
    }
    part = check(write_gguf(tmp_path / "x.gguf", tensors), "dev", 780, GGUF_BYTES[kind])
    assert part.storage == f"gguf:{kind}"


def sharded(folder: Path, tensors: dict[str, Hole], shards: int = 3, stem: str = "diffusion_pytorch_model") -> Path:
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = {name: tensors[name] for name in names[number::shards]}
        write_safetensors(folder / file, mine)
        weight_map |= dict.fromkeys(mine, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_diffusers_folder_index_and_file(tmp_path: Path, model: str) -> None:
    tensors = plain(diffusers_shapes(model))
    folder = tmp_path / "transformer"
    index = sharded(folder, tensors)
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "FluxTransformer2DModel", "axes_dims_rope": [16, 56, 56]})
    )
    one = write_safetensors(tmp_path / "one.safetensors", tensors)
    for path in (folder, index, one):
        part = check(path, model, nbytes=BYTES["bf16"] - (model == "schnell") * 2 * GUIDANCE)
        assert (part.layout, part.variant) == ("diffusers", model)
    assert part.sources["final_layer.adaLN_modulation.1.weight"].swapped
    assert len(part.sources["single_blocks.37.linear1.weight"].pieces) == 4


@pytest.mark.parametrize("pack", [nf4, nf4_double, fp8_scaled])
def test_diffusers_packed(tmp_path: Path, pack) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", with_linears(diffusers_shapes("dev"), "", pack))
    check(path, "dev")


@pytest.mark.parametrize("transformer", ["bf16", "nf4"])
def test_all_in_one(tmp_path: Path, transformer: str) -> None:
    flux = with_linears(shapes_of("dev"), PREFIX, nf4) if transformer == "nf4" else plain(shapes_of("dev"), PREFIX)
    clip, t5 = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."
    tensors = {
        **flux,
        **plain(shapes_of("clip"), clip),
        f"{clip}text_projection.weight": Hole("BF16", (768, 768)),
        "text_encoders.clip_l.logit_scale": Hole("F32", ()),
        **with_linears(shapes_of("t5"), t5, fp8),
        f"{t5}scaled_fp8": Hole("F8_E4M3", (0,)),
        **plain(shapes_of("autoencoder"), "vae."),
    }
    path = write_safetensors(tmp_path / "x.safetensors", tensors)
    for model in ("dev", "clip", "t5", "autoencoder"):
        check(path, model)
    described = describe_file(path)
    assert [part.role for part in described.parts] == ["transformer", "t5", "clip", "autoencoder"]
    assert described.problem is None and described.unused == []


def test_pipeline_folder(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    sharded(tmp_path / "transformer", plain(diffusers_shapes("schnell")))
    sharded(tmp_path / "text_encoder_2", plain(shapes_of("t5")), 2, "model")
    write_safetensors(tmp_path / "text_encoder" / "model.safetensors", plain(shapes_of("clip")))
    write_safetensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", plain(diffusers_shapes("autoencoder")))
    config = {"_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "shift_factor": 0.1159}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    for model in ("schnell", "clip", "t5", "autoencoder"):
        check(tmp_path, model)


T5_NAMES = (
    ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
    *((f"layer.0.SelfAttention.{x}", f"attn_{x}") for x in "qkvo"),
    ("layer.0.layer_norm", "attn_norm"),
    ("layer.1.DenseReluDense.wi_0", "ffn_gate"),
    ("layer.1.DenseReluDense.wi_1", "ffn_up"),
    ("layer.1.DenseReluDense.wo", "ffn_down"),
    ("layer.1.layer_norm", "ffn_norm"),
    ("encoder.final_layer_norm", "enc.output_norm"),
    ("encoder.block.", "enc.blk."),
    ("shared", "token_embd"),
)


def test_t5(tmp_path: Path) -> None:
    shapes = shapes_of("t5")
    check(write_safetensors(tmp_path / "a.safetensors", plain(shapes)), "t5", 219, 9_524_621_312)
    packed = with_linears(shapes, "", fp8)
    check(write_safetensors(tmp_path / "b.safetensors", packed), "t5", 219, 4_894_109_696)
    scaled = {**with_linears(shapes, "", fp8_scaled), "scaled_fp8": Hole("F8_E4M3", (2,))}
    check(write_safetensors(tmp_path / "c.safetensors", scaled), "t5", nbytes=4_894_109_696)
    renamed = {}
    for name, shape in shapes.items():
        for ours, theirs in T5_NAMES:
            name = name.replace(ours, theirs)
        renamed[name] = ("Q8_0" if len(shape) == 2 and "rel_b" not in name else "F32", shape)
    decoder = {"dec.blk.0.attn_q.weight": ("Q8_0", (4096, 4096))}
    part = check(write_gguf(tmp_path / "d.gguf", renamed | decoder, architecture="t5"), "t5")
    assert part.ignored == tuple(decoder) and part.sources["shared.weight"].format == "gguf:Q8_0"
    both = {**plain(shapes), "encoder.embed_tokens.weight": Hole("BF16", shapes["shared.weight"])}
    assert check(write_safetensors(tmp_path / "e.safetensors", both), "t5").ignored == ("encoder.embed_tokens.weight",)


def test_clip_and_autoencoder(tmp_path: Path) -> None:
    check(write_safetensors(tmp_path / "a.safetensors", plain(shapes_of("clip"))), "clip", 196, 246_120_960)
    check(
        write_safetensors(tmp_path / "b.safetensors", plain(shapes_of("autoencoder"))), "autoencoder", 244, 167_639_366
    )
    theirs = plain(diffusers_shapes("autoencoder"))
    check(write_safetensors(tmp_path / "c.safetensors", theirs), "autoencoder", 244, 167_639_366)
