"""Building blocks at real Flux sizes: embeddings, rotations, buckets, multistep coefficients, LoRA tags."""

from __future__ import annotations

import pytest
import torch
from goldens import Case

from lightweight_engine.backend.fused import rotate
from lightweight_engine.errors import RequestError
from lightweight_engine.flux.prompt import lora_weights
from lightweight_engine.flux.samplers_ode import deis_weights, lms_weights
from lightweight_engine.flux.t5 import relative_buckets
from lightweight_engine.flux.transformer import rotary_table, timestep_embedding

TOLERANCE = 1e-5
THETA = 10_000


def check(case: Case) -> None:
    checks = {
        "timestep_embedding": _timestep_embedding,
        "rope": _rope,
        "apply_rope": _apply_rope,
        "t5_bucket": _t5_bucket,
        "deis_coeffs": _deis,
        "lms_coeffs": _lms,
        "lora_tag": _lora_tag,
    }
    checks[case["op"]](case)


def _timestep_embedding(case: Case) -> None:
    golden = case.tensor("out")
    assert case["dim"] == golden.shape[1] == 256
    ours = timestep_embedding(case.tensor("t")).to(golden.dtype)
    torch.testing.assert_close(ours.float(), golden.float(), rtol=0, atol=TOLERANCE)


def _rope(case: Case) -> None:
    table = rotary_table(case.tensor("ids")[0], tuple(case["axes_dim"]), case.get("theta", THETA))
    rows = torch.stack((table.real, -table.imag, table.imag, table.real), dim=-1).unflatten(-1, (2, 2))
    torch.testing.assert_close(rows[None, None], case.tensor("out"), rtol=0, atol=TOLERANCE)


def _apply_rope(case: Case) -> None:
    table = rotary_table(case.tensor("ids")[0], tuple(case["axes_dim"]), case.get("theta", THETA))
    for name in "qk":
        ours = rotate(case.tensor(name), table)
        torch.testing.assert_close(ours, case.tensor(f"{name}_out"), rtol=0, atol=TOLERANCE)


def _t5_bucket(case: Case) -> None:
    buckets = relative_buckets(case["n"], 32, 128)
    assert torch.equal(buckets[0], case.tensor("row0"))
    assert torch.equal(buckets[-1], case.tensor("last"))


def _deis(case: Case) -> None:
    """A step whose next sigma is 0 is Euler's and has no row to compare; nor has the first."""
    sigmas = case["sigmas"]
    for i, row in enumerate(case["coeffs"]):
        if row and sigmas[i + 1] > 0:
            assert deis_weights(sigmas, i) == pytest.approx(row, rel=0, abs=TOLERANCE), f"step {i}"


def _lms(case: Case) -> None:
    for i, row in enumerate(case["coeffs"]):
        assert lms_weights(case["sigmas"], i) == pytest.approx(row, rel=0, abs=TOLERANCE)


def _lora_tag(case: Case) -> None:
    expected = case["result"]
    if "error" not in expected:
        assert lora_weights(case["prompt"]) == expected
        return
    with pytest.raises(RequestError) as caught:
        lora_weights(case["prompt"])
    cause = caught.value.__cause__
    assert f"{type(cause).__name__}: {cause}" == expected["error"]
