"""Upscaling networks on a GPU: the pictures of the CPU, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("spandrel")

from test_upscalers import esrgan_state, noise

from lightweight_engine.upscalers.files import Tiling
from lightweight_engine.upscalers.networks import NetworkUpscaler, open_network
from lightweight_engine.upscalers.resampling import lanczos

pytestmark = pytest.mark.gpu


def test_pictures_are_those_of_the_cpu_and_the_network_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(esrgan_state(), path)
    network = open_network(path)
    levels = noise(70, 90)
    golden = NetworkUpscaler("x", open_network(path), Tiling(tile=32)).upscale(levels, 3)
    ours = NetworkUpscaler("x", network, Tiling(tile=32), "cuda", room=1 << 30)
    before = {name: tensor.data_ptr() for name, tensor in network.model.state_dict().items()}
    made = ours.upscale(levels, 3)
    on_device = ours.upscale(levels.cuda(), 3)
    assert made.device.type == "cpu" and on_device.device.type == "cuda"
    assert torch.equal(made, on_device.cpu())
    off = (made.int() - golden.int()).abs()
    assert off.max() <= 4 and off.float().mean() < 0.25, "convolutions in TF32 move few levels by one"
    assert {name: tensor.data_ptr() for name, tensor in network.model.state_dict().items()} == before
    weights = [weight for weight in network.model.parameters() if weight.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize("size", [(998, 1747), (100, 3000)])
def test_lanczos_gives_the_bytes_of_the_cpu(size: tuple[int, int]) -> None:
    levels = noise(1344, 768)
    assert torch.equal(lanczos(levels.cuda(), size).cpu(), lanczos(levels, size))
