"""Products in 8 bits on a GPU that has them: against their twins, alone and in a network, with and without LoRAs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightweight_engine.backend import eight_bit, fused
from lightweight_engine.backend.eight_bit import EightBitLinear, Rows, in_rows, multiply_as_stored
from lightweight_engine.backend.fp8 import quantize_rows
from lightweight_engine.backend.linear import PackedLinear
from lightweight_engine.flux.load import linear_weights
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.transformer import Flux
from lightweight_engine.flux.units import unit_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not eight_bit.available(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        reason="the GPU has no products in 8 bits",
    ),
]

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("tokens", "out", "width"), [(1, 16, 16), (77, 3072, 3072), (512, 9216, 3072), (300, 64, 15360)]
)
def test_a_product_says_what_its_twin_says(tokens: int, out: int, width: int) -> None:
    """Within the sums of tensor cores (22 bits) and one rounding to bfloat16; the last two are done in 16 bits."""
    torch.manual_seed(0)
    x = torch.randn(2, tokens, width).bfloat16()
    weight, bias = quantize_rows(torch.randn(out, width)), torch.randn(out).bfloat16()
    rows = in_rows(x)
    expected = rows.times(weight, bias).float()
    on_gpu = Rows(rows.values.to(GPU), rows.scale.to(GPU), rows.dtype)
    actual = on_gpu.times(weight.to(GPU), bias.to(GPU)).float().cpu()
    assert (actual - expected).norm() < 0.01 * expected.norm()


def in_eight_bits(model: Flux) -> Flux:
    model = copy.deepcopy(model)
    for name in linear_weights(model):
        if unit_of("transformer", name).kind == "block":
            path = name.removesuffix(".weight")
            parent, _, leaf = path.rpartition(".")
            layer = model.get_submodule(path)
            made = PackedLinear(quantize_rows(layer.weight), layer.bias)  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), leaf, made)
    multiply_as_stored(model)
    return model


def evaluate(model: Any, dtype: torch.dtype, batch: int) -> Tensor:
    random = torch.Generator("cuda").manual_seed(1)
    img, txt, vec = (
        torch.randn(shape, device="cuda", generator=random).to(dtype)
        for shape in ((batch, 24 * 16, 64), (batch, 100, 3072), (batch, 3072))
    )
    with torch.inference_mode():
        return model(img, txt, model.modulations(vec), model.rotary(24, 16, 100)).double()


@contextmanager
def plain_torch() -> Iterator[None]:
    """Blocks by their twins; products as the GPU has them."""
    with mock.patch.object(fused, "_in_one_pass", lambda x: False):
        yield


@pytest.mark.parametrize("batch", [1, 2])
def test_a_network_is_no_further_from_float32_than_its_twin(batch: int) -> None:
    """Programs that round once before 8 bits are at least as near as operations that round to bfloat16 each."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Flux(FluxParams(depth=1, depth_single_blocks=1)).eval().requires_grad_(False)
    exact = evaluate(model.float(), torch.float32, batch)
    eight = in_eight_bits(model.bfloat16())
    assert sum(isinstance(module, EightBitLinear) for module in eight.modules()) == 10
    with plain_torch():
        twin = evaluate(eight, torch.bfloat16, batch)
    error, allowed = ((made - exact).norm() / exact.norm() for made in (evaluate(eight, torch.bfloat16, batch), twin))
    assert 0 < error <= 1.1 * allowed < 0.06
