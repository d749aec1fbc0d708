"""Weights that are unpacked ahead, on a GPU: the numbers are those of unpacking at each use, in any order."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lightweight_engine.backend.ahead import Ahead
from lightweight_engine.backend.linear import PackedLinear
from lightweight_engine.backend.quantize import quantize

pytestmark = pytest.mark.gpu

SHAPES = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (64, 3072)]


def linears(format: str) -> list[PackedLinear]:
    torch.manual_seed(0)
    made = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in SHAPES]
    return [PackedLinear(quantize(each, format), None) for each in made]  # type: ignore[arg-type]


def inputs(modules: list[PackedLinear]) -> list[Tensor]:
    return [torch.randn(2000, each.in_features, device="cuda", dtype=torch.bfloat16) for each in modules]


@pytest.mark.parametrize("format", ["nf4", "fp8_e4m3", "gguf:Q8_0"])
@torch.inference_mode()
def test_any_order_gives_the_numbers_of_unpacking_at_each_use(format: str) -> None:
    modules = linears(format)
    given = inputs(modules)
    expected = [module(x) for module, x in zip(modules, given, strict=True)]
    ahead = Ahead(modules, torch.bfloat16)
    draws = random.Random(0)
    order = [*range(5)] * 6 + draws.choices(range(5), k=40) + [*range(5)] * 2
    seen = [(index, modules[index](given[index])) for index in order]
    for index, result in seen:
        assert torch.equal(result, expected[index])
    ahead.close()
    assert all(module.ahead is None for module in modules)
    assert torch.equal(modules[0](given[0]), expected[0])


@torch.inference_mode()
def test_other_dtypes_are_unpacked_by_themselves() -> None:
    modules = linears("nf4")
    ahead = Ahead(modules, torch.bfloat16)
    x = torch.randn(10, modules[0].in_features, device="cuda")
    assert torch.equal(modules[0](x), x @ modules[0].packed.dequantize(torch.float32).T)
    ahead.close()
