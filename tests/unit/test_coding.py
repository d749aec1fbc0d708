"""Pictures to latents: what the host does beside a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightweight_engine.core.coding import encode_pixels
from lightweight_engine.flux import noise
from lightweight_engine.flux.autoencoder import Autoencoder
from lightweight_engine.flux.params import AutoencoderParams

FACTOR = 8


def job_of(autoencoder: Autoencoder) -> Any:
    networks = SimpleNamespace(load=lambda role: autoencoder, autoencoder_factor=FACTOR)
    plan = SimpleNamespace(stage=lambda name: SimpleNamespace(tiled=False))
    return SimpleNamespace(
        networks=networks, request=SimpleNamespace(compat="fixed"), attempt=SimpleNamespace(plan=plan)
    )


@torch.inference_mode()
def test_noise_is_drawn_while_a_gpu_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderParams(widths=(32, 32, 32, 32))).eval()
    events: list[str] = []
    encoder, randn = autoencoder.encoder.forward, noise.TorchStream.randn

    def encoding(pixels: Tensor) -> Tensor:
        events.append("encode")
        return encoder(pixels)

    def drawing(stream: noise.TorchStream, shape: tuple[int, ...]) -> Tensor:
        events.append("draw")
        return randn(stream, shape)

    monkeypatch.setattr(autoencoder.encoder, "forward", encoding)
    monkeypatch.setattr(noise.TorchStream, "randn", drawing)
    pixels = torch.rand(2, 3, 32, 40)
    made = encode_pixels(job_of(autoencoder), pixels, [5, 6])
    assert events == ["encode", "draw"] * 2
    for picture, seed, latent in zip(pixels.split(1), (5, 6), made.split(1), strict=True):
        drawn = noise.TorchStream(noise.side_seed(seed), "cpu").randn((1, 16, 4, 5))
        assert torch.equal(autoencoder.encode(picture, drawn), latent)
