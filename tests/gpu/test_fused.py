"""What a block does between its products, on a GPU: programs against their twins, alone and in a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from fused_cases import CASES, beside, randn, residual_norm, run, streams, to, tolerances, twin
from torch import Tensor

from lightweight_engine.backend import fused
from lightweight_engine.backend.kernels import fused as programs
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.transformer import Flux

pytestmark = pytest.mark.gpu

DTYPES = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
LARGE = {
    "norm of a picture": ("residual_norm", residual_norm(2, 4544, 3072)),
    "heads of a picture": ("heads", streams(1, (512, 4032), 24, 128)),
    "heads in place": ("heads", streams(2, (1000,), 24, 128)),
    "norm of a picture in 8 bits": ("residual_norm_rows", residual_norm(1, 4544, 3072)),
    "activation of a picture in 8 bits": ("in_rows", (randn(1, 4544, 3072), randn(1, 4544, 12288))),
    "activation of a picture": ("gelu_beside", beside(1, 4544, 3072, 12288)),
}
ALL = {**CASES, **LARGE}
TWO_BLOCKS = FluxParams(depth=1, depth_single_blocks=1)


@contextmanager
def plain_torch() -> Iterator[None]:
    with mock.patch.object(fused, "_in_one_pass", lambda x: False):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label", ALL)
def test_programs_say_what_their_twins_say(label: str, dtype: torch.dtype) -> None:
    name, arguments = ALL[label]
    rounded = to(arguments, dtype)
    expected = twin(name, to(rounded, torch.float64))
    actual = run(programs, name, to(rounded, dtype, "cuda"))
    relative, absolute = tolerances(name, DTYPES[dtype], expected)
    torch.testing.assert_close(to(actual, torch.float64), to(expected, torch.float64), rtol=relative, atol=absolute)


def evaluate(model: Flux, dtype: torch.dtype, batch: int) -> Tensor:
    """One evaluation in a dtype, of the same numbers in any."""
    model = model.to(dtype)
    random = torch.Generator("cuda").manual_seed(1)
    img, txt, vec = (
        torch.randn(shape, device="cuda", generator=random).bfloat16().to(dtype)
        for shape in ((batch, 24 * 16, 64), (batch, 100, 3072), (batch, 3072))
    )
    with torch.inference_mode():
        return model(img, txt, model.modulations(vec), model.rotary(24, 16, 100)).double()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_network_is_no_further_from_float32_than_plain_torch(batch: int) -> None:
    """At most 1.1 times the error that rounding to bfloat16 at each operation makes."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Flux(TWO_BLOCKS).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    with plain_torch():
        exact = evaluate(model, torch.float32, batch)
        plain = evaluate(model, torch.bfloat16, batch)
    error = (evaluate(model, torch.bfloat16, batch) - exact).norm()
    assert error <= 1.1 * (plain - exact).norm()


def test_with_gradients_the_twins_run() -> None:
    x = torch.randn(1, 3, 64, device="cuda", requires_grad=True)
    vector = torch.randn(1, 1, 64, device="cuda")
    fused.norm_modulate(x, vector, vector).sum().backward()
    assert x.grad is not None
