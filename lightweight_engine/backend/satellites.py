"""The tensors by which a safetensors file holds a parameter: the counterpart of what ``stored`` finds."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from .fp8 import Float8
from .nf4 import FourBit, code_book
from .packed import Packed

WRITABLE = ("nf4", "fp4", "fp8_e4m3", "fp8_e5m2")
"""Packed formats that a safetensors file can hold."""

JSON_MULTIPLE = 8  # its tensor ends where numbers of any dtype may begin


def tensors_of(name: str, value: Tensor | Packed, dtype: str = "float32") -> dict[str, Tensor]:
    """Keys and tensors of the parameter ``name``, the weight first.

    Args:
        value: may lie on the meta device, where only shapes matter.
        dtype: of the numbers before they were packed, which bitsandbytes gives back.

    Raises:
        ValueError: a format that safetensors files do not have.
    """
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value.spec, FourBit):
        return _four_bit(name, value, value.spec, dtype)
    if isinstance(value.spec, Float8):
        return _float8(name, value, value.spec)
    raise ValueError(f"{value.spec.name} belongs in a GGUF file")


def _four_bit(name: str, value: Packed, spec: FourBit, dtype: str) -> dict[str, Tensor]:
    """Source: the state that bitsandbytes saves (``QuantState.as_dict(packed=True)``)."""
    parts = value.parts
    state = {"quant_type": spec.kind, "blocksize": spec.block_size, "dtype": dtype, "shape": list(spec.shape)}
    tensors = {
        name: parts["codes"].reshape(-1, 1),
        f"{name}.absmax": parts["absmax"],
        f"{name}.quant_map": parts["code_book"] if spec.own_book else code_book(spec.kind),
    }
    if spec.nested_block_size:
        state |= {"nested_blocksize": spec.nested_block_size, "nested_dtype": "float32"}
        state["nested_offset"] = parts["nested_offset"].item()
        tensors[f"{name}.nested_absmax"] = parts["nested_absmax"]
        tensors[f"{name}.nested_quant_map"] = parts["nested_map"]
    text = json.dumps(state).encode()
    text += b" " * (-len(text) % JSON_MULTIPLE)
    tensors[f"{name}.quant_state.bitsandbytes__{spec.kind}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


def _float8(name: str, value: Packed, spec: Float8) -> dict[str, Tensor]:
    tensors = {name: value.parts["values"]}
    if spec.scales:
        shape = () if spec.scales == 1 else (spec.scales, 1)
        tensors[f"{name.removesuffix('.weight')}.scale_weight"] = value.parts["scale"].reshape(shape)
    return tensors
