"""Products of float32 in pieces on tensor cores: whether their sums are as exact as those of float32."""

from __future__ import annotations

import pytest
import torch

from lightweight_engine.backend import in_pieces
from lightweight_engine.backend.linear import CastLinear

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def without_gradients() -> None:
    torch.set_grad_enabled(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(512, 4096, 10240), (300, 10240, 4096)], ids=str)
def test_it_is_nearly_as_exact_as_float32(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, width, made = shape
    x = torch.randn(rows, width, device="cuda") * torch.randn(rows, width, device="cuda").exp()
    linear = torch.nn.Linear(width, made, bias=True, device="cuda", dtype=dtype)
    weight, bias = linear.weight.double(), linear.bias.double()
    exact = x.double() @ weight.t() + bias
    theirs = torch.nn.functional.linear(x, linear.weight.float(), linear.bias.float())
    linear.__class__ = CastLinear
    assert in_pieces.serves(x, linear.weight)
    off, usual = ((each - exact).norm() / exact.norm() for each in (linear(x), theirs))
    assert off < 8 * usual, (off, usual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_numbers_of_one_sign_lose_no_more(dtype: torch.dtype) -> None:
    """Where what is cut off of each sum would add up."""
    x, weight = torch.rand(300, 4096, device="cuda") + 1, (torch.rand(4096, 4096, device="cuda") + 1).to(dtype)
    exact = x.double() @ weight.double().t()
    off = (in_pieces.product(x, weight) - exact).norm() / exact.norm()
    assert off < 2e-5, off
