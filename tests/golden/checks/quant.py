"""Storage formats: the bytes of bitsandbytes, torch and gguf-py, and the numbers that they stand for."""

from __future__ import annotations

import json

import torch
from goldens import Case

from lightweight_engine.backend import fp8, nf4
from lightweight_engine.backend.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from lightweight_engine.backend.gguf import ENCODERS, quantize_blocks, read_packed
from lightweight_engine.backend.packed import Packed
from lightweight_engine.backend.stored import Stored

STATE = "quant_state.bitsandbytes__"
PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def check_4bit(case: Case) -> None:
    name = next(name for name in case["names"] if name.startswith(STATE))
    state = json.loads(bytes(case.tensor(name).tolist()))
    matrix = _read_4bit(case, state, name.removeprefix(STATE))
    expected = case.tensor("dequant")
    assert torch.equal(matrix.dequantize(expected.dtype), expected)
    assert isinstance(matrix.spec, nf4.FourBit)
    if case.has("absmax_f32"):
        assert torch.equal(matrix.spec.scales(matrix.parts), case.tensor("absmax_f32"))
    ours = nf4.quantize_4bit(case.tensor("source"), matrix.spec.kind, state["blocksize"])
    assert torch.equal(ours.parts["codes"], case.tensor("packed").view(-1))
    if not case.has("nested_absmax"):
        assert torch.equal(ours.parts["absmax"], case.tensor("absmax"))


def _read_4bit(case: Case, state: dict, kind: str) -> Packed:
    names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    satellites = {name: f"{case.id}.{name}" for name in names if case.has(name)}
    details = {"block_size": state["blocksize"]}
    if "nested_absmax" in satellites:
        details |= {"nested_block_size": state["nested_blocksize"], "nested_offset": state["nested_offset"]}
    checkpoint = open_checkpoint(case.folder / f"{case.family}.safetensors")
    return nf4.read_packed(Stored(checkpoint, f"{case.id}.packed", kind, tuple(state["shape"]), satellites, details))


def check_fp8(case: Case) -> None:
    for short, kind in (("e4m3fn", "fp8_e4m3"), ("e5m2", "fp8_e5m2")):
        codes = case.tensor("code").view(fp8.DTYPES[kind]).view(1, -1)
        table = Packed(fp8.Float8(kind, codes.shape), {"values": codes}).dequantize()
        torch.testing.assert_close(table[0], case.tensor(short), rtol=0, atol=0, equal_nan=True)
        ours = fp8.quantize_fp8(case.tensor("round_in").view(1, -1), kind).dequantize()
        largest = torch.finfo(fp8.DTYPES[kind]).max  # where the cast gives infinity, ours stays at the largest value
        assert torch.equal(ours[0], case.tensor(f"round_{short}").clamp(-largest, largest))


def check_gguf(case: Case) -> None:
    raw, expected = case.tensor("raw"), case.tensor("dequant_f32")
    if case.id in PLAIN:
        assert torch.equal(raw.view(PLAIN[case.id]).float(), expected)
        return
    opened = open_checkpoint(case.folder / f"{case.family}.safetensors")
    info = opened.tensors[f"{case.id}.raw"]
    shape, dtype = tuple(expected.shape), f"gguf:{case.id}"
    checkpoint = Checkpoint(opened.path, {"weight": TensorInfo(dtype, shape, info.start, info.end)})
    matrix = read_packed(Stored(checkpoint, "weight", dtype, shape))
    assert torch.equal(matrix.dequantize(), expected)
    if case.has("source") and case.id in ENCODERS:
        assert torch.equal(quantize_blocks(case.tensor("source"), case.id).parts["blocks"], raw)


CHECKS = {"bnb_4bit": check_4bit, "fp8_codes": check_fp8, "gguf_types": check_gguf}
