"""Norms and sums of feature maps: Triton's programs, in Triton's interpreter, against the textbook.

The interpreter has to be chosen before Triton is imported: one process of its own runs all cases. It cuts where a GPU
rounds to bf16, so that bf16 is compared in ``tests/gpu`` only.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from group_norm_cases import CASES, EPS, SUMS, arguments, expected, summands, tolerance
from torch import Tensor

from lightweight_engine.backend.feature_maps import group_norm

PROJECT = Path(__file__).resolve().parents[2]
RUN = """
import sys, torch
from lightweight_engine.backend.kernels.group_norm import add, group_norm
norms, sums, eps = torch.load(sys.argv[1])
made = {}
for label, (x, weight, bias, groups, silu, shift) in norms.items():
    made[label] = group_norm(x, groups, weight, bias, eps, silu=silu, shift=shift)
torch.save((made, {label: add(*each) for label, each in sums.items()}), sys.argv[2])
"""
DTYPES = {"float32": torch.float32, "float16": torch.float16}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The norms and the sums of all cases, by dtype and label."""
    folder = tmp_path_factory.mktemp("group_norm")
    norms = {f"{name} {label}": arguments(label, dtype) for name, dtype in DTYPES.items() for label in CASES}
    sums = {f"{name} {label}": summands(label, dtype) for name, dtype in DTYPES.items() for label in SUMS}
    torch.save((norms, sums, EPS), folder / "calls.pt")
    command = [sys.executable, "-c", RUN, str(folder / "calls.pt"), str(folder / "results.pt")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", CASES)
def test_norms_are_those_of_the_textbook(label: str, dtype: str, interpreted: Any) -> None:
    made, near = interpreted[0][f"{dtype} {label}"], tolerance(label, DTYPES[dtype])
    assert made.is_contiguous(memory_format=torch.channels_last) and made.dtype == DTYPES[dtype]
    torch.testing.assert_close(made.double(), expected(*arguments(label, DTYPES[dtype])), rtol=near, atol=near)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", SUMS)
def test_sums_are_rounded_once(label: str, dtype: str, interpreted: Any) -> None:
    x, update, shift = summands(label, DTYPES[dtype])
    expected = (x.float() + update.float() + shift.float()[:, None, None]).to(DTYPES[dtype])
    torch.testing.assert_close(interpreted[1][f"{dtype} {label}"], expected)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("label", ["odd sides", "without SiLU", "shifted"])
def test_the_twin_keeps_the_order_and_the_gradient(label: str, order: torch.memory_format) -> None:
    x, weight, bias, groups, silu, shift = arguments(label, torch.float32)
    x = x.contiguous(memory_format=order).requires_grad_()
    made = group_norm(x, groups, weight, bias, EPS, silu=silu, shift=shift)
    assert made.is_contiguous(memory_format=order)
    textbook = expected(x, weight, bias, groups, silu, shift)
    torch.testing.assert_close(made.double(), textbook, rtol=1e-5, atol=1e-5)
    made.sum().backward()
    assert x.grad is not None


AUTOENCODER = """
import sys, torch
from lightweight_engine.backend import feature_maps
from lightweight_engine.flux import autoencoder
from lightweight_engine.flux.params import AutoencoderParams
torch.manual_seed(0)
model = autoencoder.Autoencoder(AutoencoderParams(widths=(32, 32, 64, 64), num_res_blocks=1))
for parameter in model.parameters():
    parameter.data += 0.2 * torch.randn(parameter.shape) * (parameter.dim() == 1)
model.to(memory_format=torch.channels_last)
latent, pixels, noise = torch.randn(2, 16, 3, 5), torch.rand(1, 3, 16, 24), torch.randn(1, 16, 2, 3)
with torch.inference_mode():
    plain = model.decode(latent), model.encode(pixels, noise)
    for module in (feature_maps, autoencoder):
        module.have_programs = lambda x: x.is_contiguous(memory_format=torch.channels_last)
    made = model.decode(latent), model.encode(pixels, noise)
for ours, theirs in zip(made, plain):
    assert not torch.equal(ours, theirs), "other programs round otherwise"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
"""


@needs_triton
def test_the_autoencoder_makes_the_same_of_programs() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", AUTOENCODER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stderr
