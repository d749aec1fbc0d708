"""The group norm of feature maps: Triton's programs, in Triton's interpreter, against the textbook.

The interpreter has to be chosen before Triton is imported: one process of its own runs all cases. It cuts where a GPU
rounds to bf16, so that bf16 is compared in ``tests/gpu`` only.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from group_norm_cases import CASES, EPS, arguments, expected, tolerance
from torch import Tensor

from lightweight_engine.backend.feature_maps import group_norm

PROJECT = Path(__file__).resolve().parents[2]
RUN = """
import sys, torch
from lightweight_engine.backend.kernels.group_norm import group_norm
results = {}
for label, (x, weight, bias, groups, silu) in torch.load(sys.argv[1]).items():
    results[label] = group_norm(x, groups, weight, bias, float(sys.argv[3]), silu=silu)
torch.save(results, sys.argv[2])
"""
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def rounded(label: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int, bool]:
    x, weight, bias, groups, silu = arguments(label)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), groups, silu


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The results of all cases, by dtype and label."""
    folder = tmp_path_factory.mktemp("group_norm")
    calls = {f"{name} {label}": rounded(label, dtype) for name, dtype in DTYPES.items() for label in CASES}
    torch.save(calls, folder / "calls.pt")
    command = [sys.executable, "-c", RUN, str(folder / "calls.pt"), str(folder / "results.pt"), str(EPS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", CASES)
def test_programs_say_what_the_textbook_says(label: str, dtype: str, interpreted: dict[str, Tensor]) -> None:
    made, near = interpreted[f"{dtype} {label}"], tolerance(label, DTYPES[dtype])
    assert made.is_contiguous(memory_format=torch.channels_last) and made.dtype == DTYPES[dtype]
    torch.testing.assert_close(made.double(), expected(*rounded(label, DTYPES[dtype])), rtol=near, atol=near)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("label", ["odd sides", "without SiLU"])
def test_the_twin_keeps_the_order_and_the_gradient(label: str, order: torch.memory_format) -> None:
    x, weight, bias, groups, silu = arguments(label)
    x = x.contiguous(memory_format=order).requires_grad_()
    made = group_norm(x, groups, weight, bias, EPS, silu=silu)
    assert made.is_contiguous(memory_format=order)
    torch.testing.assert_close(made.double(), expected(x, weight, bias, groups, silu), rtol=1e-5, atol=1e-5)
    made.sum().backward()
    assert x.grad is not None
