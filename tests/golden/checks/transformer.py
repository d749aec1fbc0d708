"""Forward pass and denoised latent of the transformer, in float32 and bfloat16."""

from __future__ import annotations

import torch
from goldens import Case
from networks import network

from lightweight_engine.flux.velocity import predict_velocity

DTYPES = {"fp32": (torch.float32, 2e-5), "bf16": (torch.bfloat16, 0.06)}


@torch.inference_mode()
def check(case: Case) -> None:
    dtype, tolerance = DTYPES[case["compute"]]
    x, sigma = case.tensor("x"), case.tensor("timestep")
    guidance = case.tensor("guidance").to(dtype) if case.has("guidance") else None
    out = predict_velocity(
        network(f"flux_{case['model']}", dtype),
        x.to(dtype),
        sigma,
        case.tensor("context").to(dtype),
        case.tensor("y").to(dtype),
        guidance,
    ).float()
    torch.testing.assert_close(out, case.tensor("out"), rtol=0, atol=tolerance)
    if case.has("denoised"):
        denoised = x - sigma.view(-1, 1, 1, 1) * out
        torch.testing.assert_close(denoised, case.tensor("denoised"), rtol=0, atol=tolerance)
