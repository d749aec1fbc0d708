"""Products of float32 in pieces on tensor cores: whether their sums are as exact as those of float32."""

from __future__ import annotations

import pytest
import torch

from lightweight_engine.backend import in_pieces
from lightweight_engine.backend.kernels import pieces as programs
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [4096, 10240, 200])
def test_programs_have_the_bits_of_their_twins(dtype: torch.dtype, width: int) -> None:
    step = in_pieces._STEPS[dtype]
    x = torch.randn(77, 2 * width, device="cuda").exp()[:, :width] * torch.randn(77, 1, device="cuda").mul(9).exp()
    x[5], x[6, 2:] = 0, 0
    made, scales = programs.split(x, dtype, in_pieces.COUNT, step)
    pieces, expected = in_pieces.split(x, dtype, step)
    assert torch.equal(made, pieces)
    parts = torch.randn(in_pieces.COUNT, 77, 3000, device="cuda")
    if expected is not None:
        filled = x.abs().amax(-1) > 0  # what rows of zeros are divided by does not matter
        assert torch.equal(scales[filled], expected[filled])
        scales = expected
    assert torch.equal(programs.join(parts, scales, step), in_pieces.join(parts.clone(), expected, step))
