"""From the finished latent of the first pass to the start and the noise of the second."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_vae import fake_encode
from goldens import Case, golden_dir
from torch import Tensor

from lightweight_engine.extensions.hires_fix import LATENT_MODES, LatentMode, Passes, second_pass, start, target_size
from lightweight_engine.flux.noise import ImageNoise
from lightweight_engine.request import GenerationRequest
from lightweight_engine.upscalers.networks import NetworkUpscaler, open_network
from lightweight_engine.upscalers.upscaler import PLAIN, Upscaler

WITHOUT_NETWORK = {plain.name: plain for plain in PLAIN[1:]}


def method(name: str | None) -> LatentMode | Upscaler | None:
    """As the reference chooses: no name is the first latent mode."""
    if name is None or name in LATENT_MODES:
        return LATENT_MODES[name or "Latent"]
    if name == "None" or name in WITHOUT_NETWORK:
        return WITHOUT_NETWORK.get(name)
    pytest.importorskip("spandrel")
    return NetworkUpscaler(name, open_network(golden_dir() / "pipelines" / "models" / f"{name}.pth"))


def check(case: Case) -> None:
    encoded: list[Tensor] = []

    def decode(latent: Tensor) -> Tensor:
        return (torch.from_numpy(case.array(f"decoded_{case.id}")) + 1).div(2).clamp(0, 1)

    def encode(pixels: Tensor) -> Tensor:
        encoded.append(pixels)
        return fake_encode(pixels)

    target = target_size(case["w"], case["h"], case.get("hr_scale", 2.0), case.get("rx", 0), case.get("ry", 0), 8)
    latent = torch.from_numpy(case.array(f"latent_{case.id}"))
    first = start(latent, target, method(case["up"]), Passes(decode, encode), 8)
    assert list(first.shape) == case["x_shape"] == [1, 16, *target.cells(8)]
    torch.testing.assert_close(first, torch.from_numpy(case.array(f"x_{case.id}")), rtol=0, atol=1e-4)
    if encoded:
        bytes_in = (encoded[0][0] * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(bytes_in - case.array(f"vae_in_u8_{case.id}")).max() <= 1
    noise = ImageNoise((16, *target.cells(8)), [case["seed"]], source="CPU")
    assert torch.equal(noise.first(), torch.from_numpy(case.array(f"noise_{case.id}")))
    own = {"hr_steps": case.get("n", 0), "hr_sampler": case.get("sampler")}
    second = second_pass(GenerationRequest(steps=20, sampler="Euler", **own))
    assert (second.steps, second.sampler, second.img2img_fix_steps) == (case["steps_arg"], case["sampler_used"], True)
