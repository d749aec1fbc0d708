"""One transformer in every layout of users' files: shape, norm, samples and, where exact, bytes of each parameter."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import torch
from goldens import Case
from torch import nn

from lightweight_engine.backend.linear import PackedLinear
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.flux.keymaps import Part, Source, find_parts, unused_keys
from lightweight_engine.flux.load import Storage, load_part

ROUNDED = 4e-3  # the reference rounded double-quantised weights to bf16
FLOAT32 = 2e-6


def check(case: Case) -> None:
    checkpoint = open_model(case.folder.parent / case["file"])
    parts = find_parts(checkpoint)
    part = parts["transformer"]
    expected = json.loads((case.folder.parent / case["expected"]).read_text(encoding="utf-8"))
    assert sorted(part.sources) == sorted(expected)
    assert unused_keys(checkpoint, parts) == []
    network = _load(part)
    for name, row in expected.items():
        source = part.sources[name]
        nested = any("nested_absmax" in stored.satellites for stored, _ in source.pieces)
        rounded = nested or case.get("dequant_dtype", "float32") != "float32"
        _compare(name, _numbers(network, name), source, row, rounded=rounded)


def _numbers(network: nn.Module, name: str) -> torch.Tensor:
    """A parameter as the loaded network computes with it, float32."""
    module = network.get_submodule(name.rpartition(".")[0])
    packed = isinstance(module, PackedLinear) and name.endswith(".weight")
    return (module.packed.dequantize() if packed else network.get_parameter(name)).float().contiguous()


def _compare(name: str, numbers: torch.Tensor, source: Source, row: dict, *, rounded: bool) -> None:
    assert list(numbers.shape) == list(source.shape) == row["shape"], name
    tolerance = ROUNDED if rounded else FLOAT32
    samples = torch.tensor(row["val"], dtype=torch.float64)
    found = numbers.flatten()[torch.tensor(row["idx"])].double()
    torch.testing.assert_close(
        found, samples, rtol=tolerance, atol=tolerance * 1e-2, msg=lambda text: f"{name}: {text}"
    )
    assert abs(numbers.double().norm().item() - row["fro"]) <= tolerance * max(row["fro"], 1e-6), name
    if source.format in ("plain", "fp8_e4m3", "fp8_e5m2") and not rounded:
        assert hashlib.sha256(numbers.numpy().tobytes()).hexdigest().startswith(row["sha256_f32"]), name


def _load(part: Part) -> nn.Module:
    """The file in a network of its own sizes; the rotary axes, which it does not tell, only have to add up."""
    head = part.shapes["double_blocks.0.img_attn.norm.key_norm.scale"][0]
    axes = (head // 8 * 2, head // 8 * 3, head // 8 * 3)
    part = replace(part, given={"axes_dim": axes})
    return load_part(part, Storage("auto", torch.float32), device=torch.device("cpu"))
