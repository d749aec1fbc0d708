"""What a block does between its products: Triton's programs against their twins, in Triton's interpreter.

The interpreter has to be chosen before Triton is imported: one process of its own runs all cases. It cuts where a GPU
rounds to bf16, and is wrong where a number rounds up to the next power of two in 8 bits: bf16 is compared in
``tests/gpu`` only, and scaled rows here before they are rounded.
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
from fused_cases import CASES, residual_norm, to, twin

from lightweight_engine.backend.kernels import fused as programs

PROJECT = Path(__file__).resolve().parents[2]
RUN = """
import sys, torch
sys.path.insert(0, "tests/unit")
from fused_cases import run
from lightweight_engine.backend.kernels import fused
cases = torch.load(sys.argv[1])
results = {label: run(fused, name, arguments, torch.float32) for label, (name, arguments) in cases.items()}
torch.save(results, sys.argv[2])
"""
DTYPES = {"float32": (torch.float32, 2e-5), "float16": (torch.float16, 3e-3)}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all cases, by dtype and label."""
    folder = tmp_path_factory.mktemp("fused")
    calls = {
        f"{dtype} {label}": (name, to(arguments, DTYPES[dtype][0]))
        for dtype in DTYPES
        for label, (name, arguments) in CASES.items()
    }
    torch.save(calls, folder / "calls.pt")
    command = [sys.executable, "-c", RUN, str(folder / "calls.pt"), str(folder / "results.pt")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", CASES)
def test_programs_say_what_their_twins_say(label: str, dtype: str, interpreted: dict[str, Any]) -> None:
    name, arguments = CASES[label]
    short, tolerance = DTYPES[dtype]
    expected = to(twin(name, to(to(arguments, short), torch.float64), rounded=False), torch.float64)
    actual = to(interpreted[f"{dtype} {label}"], torch.float64)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_vectors_of_different_modulations_are_refused() -> None:
    x, (gate, update), (shift, scale) = residual_norm(2, 3, 8)
    with pytest.raises(ValueError, match="one modulation"):
        programs.residual_norm(x, (gate, update), (shift.contiguous(), scale))
