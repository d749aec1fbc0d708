"""Convolutions in half precision: Triton's program, in Triton's interpreter, against plain torch.

The interpreter has to be chosen before Triton is imported: one process of its own runs all cases.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from convolution_cases import CASES, given, made
from torch import Tensor

from lightweight_engine.backend.convolutions import Convolution, Maps

PROJECT = Path(__file__).resolve().parents[2]
RUN = """
import sys, torch
sys.path.insert(0, "tests/unit")
from convolution_cases import CASES, made
from lightweight_engine.backend import convolutions
convolutions.have_programs = lambda maps: True
torch.save({label: made(label, convolutions.Convolution.forward) for label in CASES}, sys.argv[1])
"""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    path = tmp_path_factory.mktemp("convolutions") / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", RUN, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@needs_triton
@pytest.mark.parametrize("label", CASES)
def test_the_program_says_what_its_twin_says(label: str, interpreted: dict[str, list[Tensor]]) -> None:
    """To the last bit but one of half precision where that is written; borders and other channels are as they were."""
    twins = made(label, Convolution.forward)
    for ours, theirs in zip(interpreted[label], twins, strict=True):
        near = 2e-3 if ours.dtype == torch.float16 else 2e-5
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near)
        assert torch.equal(ours == 0, theirs == 0), "a border or another channel was written to"


@pytest.mark.parametrize("label", ["first of a block", "doubled", "colours", "last of a chain"])
def test_the_twin_says_what_the_textbook_says(label: str) -> None:
    """In float64, of the numbers that half precision holds."""
    case, each = CASES[label], given(label)
    maps = each.maps.channels(0, case.read).inside.permute(0, 3, 1, 2).double()
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(case.made, case.read, 3, 3, generator=random) * (9 * case.read) ** -0.5
    maps = maps.repeat_interleave(2, 2).repeat_interleave(2, 3) if case.doubled else maps
    expected = F.conv2d(maps, weight.half().double(), each.convolution.bias.double(), padding=1)
    expected = torch.where(expected < 0, expected * case.slope, expected).permute(0, 2, 3, 1)
    if each.sums is not None and each.sums.origin is not None:
        expected = each.sums.origin + 0.2 * (each.sums.trunk + 0.2 * expected)
    each.convolution(
        each.maps.channels(0, case.read), each.out.inside, slope=case.slope, doubled=case.doubled, sums=each.sums
    )
    near = 2e-3 if case.beside else 1e-5
    torch.testing.assert_close(each.out.inside.double(), expected, rtol=near, atol=near)


def test_maps_have_a_border_of_zeros() -> None:
    maps = Maps.empty((2, 3, 5), 32)
    maps.inside.fill_(1)
    assert maps.whole.shape[1] == 5 and maps.whole.shape[2] >= 7
    assert maps.whole.sum() == maps.inside.numel() == 2 * 3 * 5 * 32
    assert maps.channels(8, 24).inside.shape == (2, 3, 5, 16)
