"""Parameters put together from files of other layouts: the numbers are ours, whatever the names and the storage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import AE, CLIP, FLUX, T5, network, save
from safetensors.torch import save_file
from test_stored import open_saved
from torch import Tensor

from lightweight_engine.backend import fp8, nf4
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.backend.packed import Packed
from lightweight_engine.errors import UnsupportedCheckpointError
from lightweight_engine.flux.autoencoder import Autoencoder
from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.keymaps import Part, find_parts, unused_keys
from lightweight_engine.flux.sources import Source
from lightweight_engine.flux.t5 import T5Encoder
from lightweight_engine.flux.transformer import Flux

State = dict[str, Tensor]


def part_of(path: Path, state: State) -> Part:
    """The only part of a file, which uses or ignores every key of it."""
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    parts = find_parts(open_model(path))
    (part,) = parts.values()
    assert unused_keys(part.checkpoint, parts) == []
    return part


def check_numbers(part: Part, expected: State) -> None:
    assert set(part.sources) == set(expected)
    for name, tensor in expected.items():
        read = part.sources[name].read()
        assert isinstance(read, Tensor) and read.shape == part.sources[name].shape, name
        assert torch.equal(read, tensor), name


def diffusers_flux(state: State, hidden: int = FLUX.hidden_size) -> State:
    """Ours in the names of diffusers, written down independently of the tables."""
    out: State = {}
    stems = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
        "double_blocks.0.txt_attn.proj": "transformer_blocks.0.attn.to_add_out",
        "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.net.0.proj",
        "double_blocks.0.img_mlp.2": "transformer_blocks.0.ff.net.2",
        "double_blocks.0.txt_mlp.0": "transformer_blocks.0.ff_context.net.0.proj",
        "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.net.2",
        "double_blocks.0.img_mod.lin": "transformer_blocks.0.norm1.linear",
        "double_blocks.0.txt_mod.lin": "transformer_blocks.0.norm1_context.linear",
        "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
        "single_blocks.0.modulation.lin": "single_transformer_blocks.0.norm.linear",
    }
    norms = {
        "double_blocks.0.img_attn.norm.query_norm": "transformer_blocks.0.attn.norm_q",
        "double_blocks.0.img_attn.norm.key_norm": "transformer_blocks.0.attn.norm_k",
        "double_blocks.0.txt_attn.norm.query_norm": "transformer_blocks.0.attn.norm_added_q",
        "double_blocks.0.txt_attn.norm.key_norm": "transformer_blocks.0.attn.norm_added_k",
        "single_blocks.0.norm.query_norm": "single_transformer_blocks.0.attn.norm_q",
        "single_blocks.0.norm.key_norm": "single_transformer_blocks.0.attn.norm_k",
    }
    fused = {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
        "single_blocks.0.linear1": [
            *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
            "single_transformer_blocks.0.proj_mlp",
        ],
    }
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if stem in fused:
            sizes = [hidden] * 3 + [len(tensor) - 3 * hidden] * (len(fused[stem]) == 4)
            out |= {f"{theirs}.{leaf}": piece for theirs, piece in zip(fused[stem], tensor.split(sizes), strict=True)}
        elif stem in norms:
            out[f"{norms[stem]}.weight"] = tensor
        elif stem == "final_layer.adaLN_modulation.1":
            out[f"norm_out.linear.{leaf}"] = torch.cat(tensor.chunk(2)[::-1])
        else:
            out[f"{stems[stem]}.{leaf}"] = tensor
    return out


@pytest.fixture(scope="module")
def flux() -> State:
    return {name: tensor.clone() for name, tensor in network(Flux, FLUX).state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
def test_diffusers_transformer(tmp_path: Path, flux: State, prefix: str) -> None:
    theirs = {prefix + name: tensor for name, tensor in diffusers_flux(flux).items()}
    part = part_of(tmp_path / "x.safetensors", theirs)
    check_numbers(part, flux)
    assert (part.layout, part.prefix, part.variant) == ("diffusers", prefix, "dev")


def pack(state: State, kind: str) -> tuple[State, State]:
    """A file's tensors with its matrices packed, and the numbers that each then holds."""
    tensors: State = {}
    numbers: State = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim != 2:
            tensors[name] = numbers[name] = tensor
        elif kind == "nf4":
            packed = nf4.quantize_4bit(tensor, "nf4", 64)
            json = f'{{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":{list(tensor.shape)}}}'
            tensors |= {
                name: packed.parts["codes"].view(-1, 1),
                f"{name}.absmax": packed.parts["absmax"],
                f"{name}.quant_map": nf4.code_book("nf4").clone(),
                f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.encode()), dtype=torch.uint8),
            }
            numbers[name] = packed.dequantize()
        else:
            packed = fp8.quantize_fp8(tensor, "fp8_e4m3", scaled=kind == "fp8 scaled")
            tensors[name] = packed.parts["values"]
            if kind == "fp8 scaled":
                tensors[f"{layer}.weight_scale"] = packed.parts["scale"].view(())
            numbers[name] = packed.dequantize()
    return tensors, numbers


@pytest.mark.parametrize("kind", ["nf4", "fp8", "fp8 scaled"])
def test_diffusers_transformer_packed(tmp_path: Path, flux: State, kind: str) -> None:
    """Rows are stacked and halves swapped in the packed form, without a change of any number."""
    theirs, numbers = pack(diffusers_flux(flux), kind)
    part = part_of(tmp_path / "x.safetensors", theirs)
    matrices = 0
    for name, source in part.sources.items():
        read = source.read()
        found = read.dequantize() if isinstance(read, Packed) else read
        matrices += isinstance(read, Packed)
        assert found.shape == flux[name].shape and torch.equal(_in_diffusers(name, found, numbers), found), name
    assert matrices == sum(tensor.ndim == 2 for tensor in flux.values())


def _in_diffusers(name: str, found: Tensor, numbers: State) -> Tensor:
    """What the packed pieces hold for one of our parameters: the names are found by renaming a marker."""
    pieces = diffusers_flux({name: torch.zeros_like(found)})
    joined = torch.cat([numbers[piece] for piece in pieces])
    return torch.cat(joined.chunk(2)[::-1]) if name.startswith("final_layer.adaLN") else joined


def test_mixed_pieces_are_joined_in_numbers(tmp_path: Path, flux: State) -> None:
    """One of three projections is plain, or has another dtype."""
    theirs = diffusers_flux(flux)
    query, key = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
    packed, numbers = pack({f"{query}.weight": theirs[f"{query}.weight"]}, "nf4")
    mixed = {**theirs, **packed, f"{key}.bias": theirs[f"{key}.bias"].half()}
    part = part_of(tmp_path / "x.safetensors", mixed)
    weight, bias = (part.sources[f"double_blocks.0.img_attn.qkv.{leaf}"] for leaf in ("weight", "bias"))
    joined = weight.read()
    assert isinstance(joined, Tensor) and weight.format == "mixed"
    assert torch.equal(joined[:64], numbers[f"{query}.weight"])
    assert torch.equal(joined[64:], flux["double_blocks.0.img_attn.qkv.weight"][64:])
    assert bias.read().dtype == torch.float32  # type: ignore[union-attr]


def test_a_plain_parameter_is_a_view(tmp_path: Path, flux: State) -> None:
    part = part_of(tmp_path / "x.safetensors", diffusers_flux(flux))
    mapped = part.checkpoint.tensor("x_embedder.weight").untyped_storage().data_ptr()
    read = part.sources["img_in.weight"].read()
    assert isinstance(read, Tensor) and read.untyped_storage().data_ptr() == mapped


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float8_e4m3fn, torch.float8_e4m3fn), torch.float8_e4m3fn),
        ((torch.float8_e4m3fn, torch.bfloat16), torch.float32),
    ],
)
def test_the_widest_dtype(tmp_path: Path, dtypes: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    """Vectors, as 8-bit matrices are packed."""
    tensors = {f"t{i}": torch.full((3,), float(i + 1)).to(dtype) for i, dtype in enumerate(dtypes)}
    stored = open_saved(tmp_path / "x.safetensors", tensors)
    read = Source(tuple((stored[name], None) for name in tensors), (6,)).read()
    assert isinstance(read, Tensor) and read.dtype == expected
    assert read.float().tolist() == [1.0] * 3 + [2.0] * 3


def test_a_missing_piece_is_named(tmp_path: Path, flux: State) -> None:
    theirs = diffusers_flux(flux)
    del theirs["single_transformer_blocks.0.attn.to_v.weight"]
    with pytest.raises(UnsupportedCheckpointError, match=r"linear1.weight is made of 4 tensors.*complete file"):
        part_of(tmp_path / "x.safetensors", theirs)


@pytest.mark.parametrize("shape", [(), (4,), (64, 32)], ids=str)
def test_projections_that_cannot_be_parted_or_joined(tmp_path: Path, flux: State, shape: tuple[int, ...]) -> None:
    theirs = {**diffusers_flux(flux), "transformer_blocks.0.attn.to_k.weight": torch.zeros(shape)}
    with pytest.raises(UnsupportedCheckpointError, match=r"img_attn.qkv.weight is made of 3 tensors of one width"):
        part_of(tmp_path / "x.safetensors", theirs)
    clip = {"transformer.resblocks.0.ln_1.bias": torch.zeros(32), "token_embedding.weight": torch.zeros(64, 32)}
    clip["transformer.resblocks.0.attn.in_proj_weight"] = torch.zeros(shape)
    with pytest.raises(UnsupportedCheckpointError, match=r"q_proj.weight is made of 1 tensors"):
        part_of(tmp_path / "y.safetensors", clip)


def test_two_tables_of_different_shapes(tmp_path: Path) -> None:
    state = network(T5Encoder, T5).state_dict()
    state["encoder.embed_tokens.weight"] = torch.zeros(3, 48)
    with pytest.raises(UnsupportedCheckpointError, match="stand for one parameter"):
        part_of(tmp_path / "x.safetensors", state)


def test_unknown_keys_stay_and_are_reported(tmp_path: Path, flux: State) -> None:
    """Under the prefix the loader names them; elsewhere they belong to no part."""
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in flux.items()}
    extra = {"model.diffusion_model.surprise": torch.zeros(2), "other.thing": torch.zeros(2)}
    save_file(prefixed | extra, tmp_path / "x.safetensors")
    checkpoint = open_model(tmp_path / "x.safetensors")
    parts = find_parts(checkpoint)
    assert "surprise" in parts["transformer"].sources
    assert unused_keys(checkpoint, parts) == ["other.thing"]


@pytest.mark.parametrize("extra", ["visual.transformer.resblocks.0.ln_1.bias", "text_projection", "logit_scale"])
def test_openai_clip(tmp_path: Path, extra: str) -> None:
    state = network(CLIPText, CLIP).state_dict()
    renames = {
        "text_model.encoder.layers.": "transformer.resblocks.",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_ln_.": "ln_final.",
        "text_model.final_layer_norm": "ln_final",
    }
    theirs: State = {extra: torch.zeros(2)}
    for name, tensor in state.items():
        if "q_proj" in name:
            qkv = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            name, tensor = name.replace("q_proj.", "in_proj_"), torch.cat(qkv)
        elif "k_proj" in name or "v_proj" in name:
            continue
        name = name.replace("text_model.final_layer_norm", "ln_final")
        for ours, other in renames.items():
            name = name.replace(ours, other)
        theirs[name] = tensor
    part = part_of(tmp_path / "x.safetensors", theirs)
    check_numbers(part, state)
    assert (part.layout, part.ignored) == ("openai", (extra,))
    assert part.nbytes == sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "transformer.",
        "clip_l.transformer.",
        "text_encoders.clip_l.transformer.",
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
    ],
)
@pytest.mark.parametrize("wrapped", [True, False], ids=["text_model", "bare"])
def test_clip_under_any_prefix(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    state = network(CLIPText, CLIP).state_dict()
    theirs = {
        prefix + (name if wrapped else name.removeprefix("text_model.")): tensor for name, tensor in state.items()
    }
    theirs[f"{prefix}{'text_model.' if wrapped else ''}embeddings.position_ids"] = torch.arange(77)
    if wrapped:
        theirs[f"{prefix}vision_model.encoder.layers.0.layer_norm1.bias"] = torch.zeros(4)
    part = part_of(tmp_path / "x.safetensors", theirs)
    check_numbers(part, state)
    assert part.prefix == prefix


def test_longer_clip(tmp_path: Path) -> None:
    """LongCLIP has 248 positions."""
    state = network(CLIPText, type(CLIP)(**{**CLIP.__dict__, "max_positions": 248})).state_dict()
    part = part_of(tmp_path / "x.safetensors", dict(state))
    assert part.shapes["text_model.embeddings.position_embedding.weight"][0] == 248


@pytest.mark.parametrize("prefix", ["", "t5xxl.transformer.", "text_encoders.t5xxl.transformer.", "transformer."])
def test_t5_under_any_prefix(tmp_path: Path, prefix: str) -> None:
    state = network(T5Encoder, T5).state_dict()
    theirs = {prefix + name: tensor for name, tensor in state.items()}
    theirs[f"{prefix}decoder.block.0.layer.0.SelfAttention.k.weight"] = torch.zeros(4, 4)
    part = part_of(tmp_path / "x.safetensors", theirs)
    check_numbers(part, state)


OLD, NEW = ("query", "key", "value", "proj_attn"), ("to_q", "to_k", "to_v", "to_out.0")


@pytest.mark.parametrize("names", [OLD, NEW], ids=["old", "new"])
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_diffusers_autoencoder(tmp_path: Path, prefix: str, names: tuple[str, ...]) -> None:
    """Levels of the decoder are numbered the other way, and attention is linear there and convolutional here."""
    params = type(AE)(**{**AE.__dict__, "widths": (32, 64, 96, 128)})
    state = network(Autoencoder, params).state_dict()
    attention = dict(zip(("attn_1.q.", "attn_1.k.", "attn_1.v.", "attn_1.proj_out."), names, strict=True))
    theirs: State = {}
    for name, tensor in state.items():
        for ours, other in attention.items():
            if ours in name:
                name = name.replace(ours, f"attn_1.{other}.")
                tensor = tensor.reshape(tensor.shape[:2]) if tensor.ndim == 4 else tensor
        for level in range(4):
            name = name.replace(f"decoder.up.{level}.", f"decoder.up_blocks.{3 - level}.")
            name = name.replace(f"encoder.down.{level}.", f"encoder.down_blocks.{level}.")
        for ours, other in (
            (".block.", ".resnets."),
            ("nin_shortcut", "conv_shortcut"),
            ("downsample.", "downsamplers.0."),
            ("upsample.", "upsamplers.0."),
            ("mid.block_1", "mid_block.resnets.0"),
            ("mid.block_2", "mid_block.resnets.1"),
            ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
            ("mid.attn_1", "mid_block.attentions.0"),
            ("coder.norm_out", "coder.conv_norm_out"),
        ):
            name = name.replace(ours, other)
        theirs[prefix + name] = tensor
    part = part_of(tmp_path / "x.safetensors", theirs)
    check_numbers(part, dict(state))
    assert part.layout == "diffusers"


def test_pickled_models(tmp_path: Path, flux: State) -> None:
    torch.save({"state_dict": flux, "epoch": 3}, tmp_path / "x.ckpt")
    check_numbers(find_parts(open_model(tmp_path / "x.ckpt"))["transformer"], flux)


def test_hints_of_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "text_encoder" / "model.safetensors", network(CLIPText, CLIP))
    config = '{"architectures": ["CLIPTextModel"], "num_attention_heads": 2, "hidden_size": 32}'
    (tmp_path / "text_encoder" / "config.json").write_text(config)
    (part,) = find_parts(open_model(tmp_path / "text_encoder")).values()
    assert part.hints == {"num_attention_heads": 2}
