"""Weights and their satellites: what belongs together, what does not fit, and formats that are not read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sparse_files import Hole, text, write_gguf, write_safetensors
from torch import Tensor

from lightweight_engine.backend import fp8, nf4
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.backend.packed import Packed
from lightweight_engine.backend.stored import Stored, find_stored
from lightweight_engine.errors import CorruptCheckpointError, UnsupportedCheckpointError

MATRIX = torch.linspace(-1, 1, 64 * 128).view(64, 128)


def four_bit(name: str, kind: nf4.Kind = "nf4", **changes: object) -> dict[str, Tensor]:
    """A matrix as bitsandbytes saves it, in single quantisation."""
    parts = nf4.quantize_4bit(MATRIX, kind, 64).parts
    state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128], **changes}
    encoded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        name: parts["codes"].view(-1, 1),
        f"{name}.absmax": parts["absmax"],
        f"{name}.quant_map": nf4.code_book(kind).clone(),
        f"{name}.quant_state.bitsandbytes__{kind}": encoded,
    }


def nested(name: str) -> dict[str, Tensor]:
    """The same with its scales in 8 bits: a table of 256 values, a scale for each 256 of them, and their mean."""
    tensors = four_bit(name, nested_blocksize=256, nested_dtype="float32", nested_offset=0.5)
    tensors[f"{name}.nested_quant_map"] = torch.linspace(-1, 1, 256)
    tensors[f"{name}.nested_absmax"] = torch.full((1,), 0.5)
    codes = (tensors[f"{name}.absmax"] - 0.5) / 0.5
    tensors[f"{name}.absmax"] = ((codes + 1) * 127.5).round().to(torch.uint8)
    return tensors


def open_saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, Stored]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return find_stored(open_model(path))


def test_every_key_belongs_to_one_parameter(tmp_path: Path) -> None:
    tensors = {
        **four_bit("a.weight"),
        **nested("b.weight"),
        "c.weight": MATRIX.to(torch.float8_e5m2),
        "c.bias": torch.zeros(64),
        "norm.scale": torch.ones(3).to(torch.float8_e4m3fn),
    }
    stored = open_saved(tmp_path / "x.safetensors", tensors)
    assert {name: each.format for name, each in stored.items()} == {
        "a.weight": "nf4",
        "b.weight": "nf4",
        "c.weight": "fp8_e5m2",
        "c.bias": "plain",
        "norm.scale": "plain",
    }
    assert sorted(key for each in stored.values() for key in each.keys) == sorted(tensors)
    assert sum(each.nbytes for each in stored.values()) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(tmp_path: Path, kind: nf4.Kind) -> None:
    (each,) = open_saved(tmp_path / "x.safetensors", four_bit("p.weight", kind)).values()
    value = each.read()
    assert isinstance(value, Packed) and each.shape == (64, 128)
    assert torch.equal(value.dequantize(), nf4.quantize_4bit(MATRIX, kind, 64).dequantize())


def test_nested_scales(tmp_path: Path) -> None:
    (each,) = open_saved(tmp_path / "x.safetensors", nested("p.weight")).values()
    value = each.read()
    assert isinstance(value, Packed)
    assert (value.dequantize() - MATRIX).abs().max() < 0.16  # half a step of the code book, and of the scales
    assert each.details["nested_offset"] == 0.5


SCALED = fp8.quantize_fp8(MATRIX, "fp8_e4m3", scaled=True)
SPELLINGS = {
    "old": ({"p.scale_weight": "scale", "p.scale_input": "one", "scaled_fp8": "marker"}, {}),
    "beside": ({"p.weight_scale": "scale", "p.comfy_quant": "declaration"}, {}),
    "metadata": ({"p.weight_scale": "scale"}, {"layers": {"p": {"format": "float8_e4m3fn"}}}),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scaled_fp8_in_three_spellings(tmp_path: Path, spelling: str, prefix: str) -> None:
    keys, metadata = SPELLINGS[spelling]
    values = {
        "scale": SCALED.parts["scale"].view(()),
        "one": torch.ones(()),
        "marker": torch.zeros(2).to(torch.float8_e4m3fn),
        "declaration": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8),
    }
    tensors = {prefix + key: values[what] for key, what in keys.items()}
    tensors[f"{prefix}p.weight"] = SCALED.parts["values"]
    declared = {"_quantization_metadata": json.dumps(metadata)} if metadata else None
    stored = open_saved(tmp_path / "x.safetensors", tensors, declared)
    value = stored[f"{prefix}p.weight"].read()
    assert isinstance(value, Packed) and torch.equal(value.dequantize(), SCALED.dequantize())
    assert set(stored) - {f"{prefix}p.weight"} <= {f"{prefix}scaled_fp8"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"blocks.0.qkv_proj.qweight": "I8"}, "layer 'blocks.0' as SVDQuant/nunchaku"),
        ({"p.wscales": "BF16"}, "layer 'p' as SVDQuant/nunchaku"),
        ({"p.qweight": "I32", "p.qzeros": "I32"}, "layer 'p' as AWQ or GPTQ"),
        ({"p.float8_data": "F8_E4M3", "p.scale": "F32"}, "layer 'p' as fp8 of flux-fp8-api"),
        ({"p.weight._data": "I8", "p.weight._scale": "F32"}, "layer 'p.weight' as quanto"),
        ({"p.weight:qdata": "I8"}, "layer 'p' as TorchAO"),
        ({"p.weight": "I8", "p.zero_point": "F32"}, "layer 'p' as SDNQ"),
        ({"p.weight": "I8", "p.SCB": "F32"}, "layer 'p' as LLM.int8"),
        ({"p.weight": "U8", "p.weight_scale": "F8_E4M3", "p.weight_scale_2": "F32"}, "layer 'p' as nvfp4"),
        ({"p.weight": "F8_E4M3", "p.weight_scale": "F8_E8M0"}, "layer 'p' as mxfp8"),
        ({"p.weight": "I8", "p.weight_scale": "F32"}, "layer 'p' as int8"),
    ],
    ids=str,
)
def test_formats_that_are_not_read_are_named(tmp_path: Path, keys: dict[str, str], words: str) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", {key: Hole(dtype, (4, 4)) for key, dtype in keys.items()})
    with pytest.raises(UnsupportedCheckpointError, match=f"x.safetensors: .*{words}.*; not supported: use the bf16"):
        find_stored(open_model(path))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8", "int8_blockwise", "convrot_w4a4"])
def test_declared_formats_that_are_not_read(tmp_path: Path, format: str) -> None:
    beside = {"m.p.weight": Hole("U8", (4, 4)), "m.p.comfy_quant": text({"format": format})}
    path = write_safetensors(tmp_path / "a.safetensors", beside)
    with pytest.raises(UnsupportedCheckpointError, match=f"layer 'm.p' as {format}; not supported"):
        find_stored(open_model(path))
    metadata = {"_quantization_metadata": json.dumps({"layers": {"p": {"format": format}}})}
    path = write_safetensors(tmp_path / "b.safetensors", {"m.p.weight": Hole("U8", (4, 4))}, metadata)
    with pytest.raises(UnsupportedCheckpointError, match=f"layer 'm.p' as {format}; not supported"):
        find_stored(open_model(path))


def test_nunchaku_metadata(tmp_path: Path) -> None:
    metadata = {"model_class": "NunchakuFluxTransformer2dModel"}
    path = write_safetensors(tmp_path / "x.safetensors", {"a": Hole("F32", (1,))}, metadata)
    with pytest.raises(UnsupportedCheckpointError, match="SVDQuant/nunchaku checkpoint .*bf16, fp8, nf4 or GGUF"):
        find_stored(open_model(path))


STATE = "p.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"p.weight.absmax": None}, "p.weight.absmax' is missing"),
        ({"p.weight": torch.zeros(5, 1, dtype=torch.uint8)}, "5 packed bytes, 4,096 expected"),
        ({"p.weight.absmax": torch.zeros(3)}, "3 absmax, 128 expected"),
        ({"p.weight.quant_map": torch.zeros(15)}, "15 quant_map, 16 expected"),
        ({STATE: torch.zeros(5000, dtype=torch.uint8)}, "5,000 bytes where at most 4,096"),
        ({STATE: torch.tensor(list(b"{"), dtype=torch.uint8)}, "is damaged"),
        ({STATE: None}, "belongs to no quantised weight"),
    ],
    ids=str,
)
def test_satellites_that_do_not_fit(tmp_path: Path, change: dict, words: str) -> None:
    tensors = {key: tensor for key, tensor in {**four_bit("p.weight"), **change}.items() if tensor is not None}
    with pytest.raises(CorruptCheckpointError, match=words):
        open_saved(tmp_path / "x.safetensors", tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocksize": 48}, "block_size 48"),
        ({"blocksize": 8192}, "block_size 8192"),
        ({"blocksize": "64"}, "block_size '64'"),
        ({"shape": [64, 129]}, "packed bytes"),
        ({"shape": [8192]}, "no shape of two"),
        ({"shape": [64, -128]}, "no shape of two"),
        ({"quant_type": "fp4"}, "quant_type 'fp4'"),
        ({"nested_blocksize": 256, "nested_offset": 0.5}, "nested_absmax' is missing"),
    ],
    ids=str,
)
def test_quant_states_that_do_not_fit(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=words):
        open_saved(tmp_path / "x.safetensors", four_bit("p.weight", **change))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"p.weight": ("BF16", (4, 4)), "p.scale_weight": ("F32", ())}, "a scaled fp8 matrix is expected"),
        ({"p.weight": ("F8_E4M3", (4, 4)), "p.scale_weight": ("F32", (3,))}, "1 or 4 scales"),
        ({"p.weight": ("F8_E4M3", (4, 4)), "p.scale_weight": ("I32", ())}, "1 or 4 scales"),
        ({"q.scale_weight": ("F32", ())}, "belongs to no quantised weight"),
        (
            {"p.weight": ("F8_E4M3", (4, 4)), "p.scale_weight": ("F32", ()), "p.weight_scale": ("F32", ())},
            "two spellings",
        ),
    ],
    ids=str,
)
def test_scales_that_do_not_fit(tmp_path: Path, keys: dict, words: str) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", {key: Hole(*value) for key, value in keys.items()})
    with pytest.raises(CorruptCheckpointError, match=words):
        find_stored(open_model(path))


@pytest.mark.parametrize("damaged", ["absmax", "scale_weight"])
def test_scales_that_are_not_finite_are_found_when_read(tmp_path: Path, damaged: str) -> None:
    if damaged == "absmax":
        tensors = four_bit("p.weight")
        tensors["p.weight.absmax"][7] = torch.nan
    else:
        tensors = {"p.weight": SCALED.parts["values"], "p.scale_weight": torch.tensor(torch.inf)}
    (each,) = open_saved(tmp_path / "x.safetensors", tensors).values()
    with pytest.raises(CorruptCheckpointError, match=r"x.safetensors: 'p.weight'.*not finite.*again"):
        each.read()


def test_blocks_are_matrices(tmp_path: Path) -> None:
    (each,) = find_stored(open_model(write_gguf(tmp_path / "a.gguf", {"w": ("Q4_K", (3, 256))}))).values()
    assert (each.format, each.shape, each.nbytes) == ("gguf:Q4_K", (3, 256), 3 * 144)
    with pytest.raises(CorruptCheckpointError, match="is no matrix"):
        find_stored(open_model(write_gguf(tmp_path / "b.gguf", {"w": ("Q8_0", (64,))})))
