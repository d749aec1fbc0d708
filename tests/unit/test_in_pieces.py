"""Products of float32 in 16-bit pieces: as near to the exact one as float32 is, whatever the numbers are."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightweight_engine.backend import in_pieces

DTYPES = [torch.bfloat16, torch.float16]
PROJECT = Path(__file__).resolve().parents[2]
# Triton's interpreter has to be chosen before Triton is imported. It cuts where a GPU rounds to bf16: see tests/gpu.
RUN = """
import sys, torch
from lightweight_engine.backend.kernels import pieces
x, parts = torch.load(sys.argv[1])
made, scales = pieces.split(x, torch.float16, 3, 2048.0)
torch.save((made, scales, pieces.join(parts, scales, 2048.0)), sys.argv[2])
"""


def numbers(*shape: int, spread: float = 0.0) -> torch.Tensor:
    """Normal ones, each times a power of e of its own."""
    torch.manual_seed(1)
    return torch.randn(shape) * torch.exp(spread * torch.randn(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_it_is_as_near_as_a_product_of_float32(dtype: torch.dtype, spread: float) -> None:
    x, weight = numbers(2, 9, 384, spread=spread), (numbers(64, 384) / 20).to(dtype)
    exact = x.double() @ weight.double().t()
    ours, theirs = in_pieces.product(x, weight), x @ weight.float().t()
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert (ours - exact).norm() < 2 * (theirs - exact).norm()
    plain = (x.to(dtype).double() @ weight.double().t() - exact).norm()
    assert (ours - exact).norm() < 1e-2 * plain, "one piece is a hundred times further off"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_any_size_and_rows_of_zeros(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(4, 128), numbers(32, 128).to(dtype)
    x[0], x[1], x[3, 5] = numbers(128) * 1e6, numbers(128) * 1e-9, 70000.0
    exact = x.double() @ weight.double().t()
    made = in_pieces.product(x, weight)
    assert torch.equal(made[2], torch.zeros(32))
    assert ((made - exact).norm(dim=1)[[0, 1, 3]] < 1e-6 * exact.norm(dim=1)[[0, 1, 3]]).all()


def test_what_has_no_tensor_cores_is_not_served() -> None:
    weight = torch.zeros(2048, 2048, dtype=torch.bfloat16)
    assert weight.numel() >= in_pieces.LEAST and not in_pieces.serves(torch.zeros(1, 2048), weight)


def test_what_has_many_rows_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a picture's tokens would take more room than the plan knows of."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(in_pieces, "_has_bfloat16", lambda device: True)
    weight = torch.zeros(2048, 2048, dtype=torch.bfloat16)
    with torch.no_grad():
        served = [in_pieces.serves(torch.zeros(rows, 2048).as_subclass(OnGPU), weight) for rows in (77, 512, 513)]
    assert served == [True, True, False]
    assert not in_pieces.serves(torch.zeros(77, 2048).as_subclass(OnGPU), weight), "gradients go the plain way"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("rows", "width"), [(5, 384), (1, 200)])
def test_programs_have_the_bits_of_their_twins(rows: int, width: int, tmp_path: Path) -> None:
    x = numbers(rows, 2 * width, spread=3.0)[:, :width]  # of a larger matrix
    x[0] *= 1e30
    x[-1, 3:] = 0
    parts = numbers(3, rows, 1500)
    torch.save((x, parts), tmp_path / "given.pt")
    command = [sys.executable, "-c", RUN, str(tmp_path / "given.pt"), str(tmp_path / "made.pt")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stderr
    made, scales, joined = torch.load(tmp_path / "made.pt")
    pieces, expected = in_pieces.split(x, torch.float16, 2048.0)
    assert expected is not None and torch.equal(made, pieces) and torch.equal(scales, expected)
    assert torch.equal(joined, in_pieces.join(parts.clone(), expected, 2048.0))
