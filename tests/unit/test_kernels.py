"""Triton programs give the bits of their twins in plain torch, here in Triton's interpreter on the CPU.

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
from kernel_cases import make_cases
from torch import Tensor

from lightweight_engine.backend import kernels
from lightweight_engine.backend.block_types import BLOCK_TYPES
from lightweight_engine.backend.kernels import dequantize, launch
from lightweight_engine.backend.nf4 import code_book

PROJECT = Path(__file__).resolve().parents[2]
RUN = """
import sys, torch
from lightweight_engine.backend import kernels
from lightweight_engine.backend.kernels import dequantize, quantize
assert kernels.available()
homes, cases = {"dequantize": dequantize, "quantize": quantize}, torch.load(sys.argv[1])
def run(home, name, arguments, options):
    if "tile" in options:
        options = {"tile": dequantize.Tile(**options["tile"])}
    return getattr(homes[home], name)(*arguments, **options)
torch.save({name: run(*case) for name, case in cases.items()}, sys.argv[2])
"""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CASES = make_cases(torch.float16)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all cases."""
    folder = tmp_path_factory.mktemp("kernels")
    torch.save(CASES.calls, folder / "calls.pt")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder / "calls.pt"), str(folder / "results.pt")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=PROJECT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


@needs_triton
@pytest.mark.parametrize("label", CASES.calls)
def test_same_bits_as_the_twin(label: str, interpreted: dict[str, Any]) -> None:
    torch.testing.assert_close(interpreted[label], CASES.expected[label], rtol=0, atol=0, equal_nan=True)


def test_every_block_type_has_a_program() -> None:
    assert set(BLOCK_TYPES) == dequantize.SUPPORTED


@pytest.mark.parametrize(
    ("codes", "absmax", "message"),
    [
        (torch.zeros(31, dtype=torch.uint8), torch.zeros(1), "31 values where"),
        (torch.zeros(32, dtype=torch.uint8), torch.zeros(2), "2 values where"),
        (torch.zeros(64, dtype=torch.uint8)[::2], torch.zeros(1), "contiguous"),
        (torch.zeros(32, dtype=torch.uint8), torch.zeros(1, device="meta"), "lies on meta"),
    ],
)
@needs_triton
def test_parts_that_do_not_fit_are_refused(codes: Tensor, absmax: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize.four_bit(codes, absmax, code_book("nf4"), 64, torch.empty(1, 64))


@needs_triton
@pytest.mark.parametrize(
    ("width", "up", "message"),
    [(64, torch.zeros(2, 3), "6 values where"), (64, torch.zeros(1, 2), "lies on"), (12, torch.zeros(1, 2), "8 codes")],
)
def test_changes_that_do_not_fit_are_refused(width: int, up: Tensor, message: str) -> None:
    codes, absmax, down = torch.zeros(width // 2, dtype=torch.uint8), torch.zeros(1), torch.zeros(2, width)
    up = up.to("meta") if "lies" in message else up
    with pytest.raises(ValueError, match=message):
        dequantize.four_bit_changed(codes, absmax, code_book("nf4"), 64, up, down, torch.empty(1, width))


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_are_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(launch.logger, "warning", lambda text, *_: said.append(text))  # whatever logging is set to
    assert not kernels.available()
    assert not launch._driver_works()
    assert len(said) == 1 and "read by plain torch" in said[0]
