"""Pictures on a GPU: upscaled, resized, prepared and looked at as on the CPU, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("spandrel")

from test_upscalers import esrgan_state, noise

from lightweight_engine.extensions.boxes import Letterbox
from lightweight_engine.extensions.inpainting import Masking, latent_mask, paste_back, prepare
from lightweight_engine.upscalers.files import Tiling
from lightweight_engine.upscalers.networks import NetworkUpscaler, open_network
from lightweight_engine.upscalers.resampling import HOST, lanczos, to_image, to_levels, to_numbers

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


@pytest.mark.parametrize("round", [True, False])
def test_a_latent_mask_has_the_numbers_of_the_cpu(round: bool) -> None:
    mask = to_image(noise(1344, 768)[:1])
    made = latent_mask(mask, (168, 96), round=round, device=torch.device("cuda"))
    assert made.is_cuda and torch.equal(made.cpu(), latent_mask(mask, (168, 96), round=round))


def test_numbers_are_those_of_the_cpu() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(to_numbers(levels.cuda()).cpu(), to_numbers(levels))


@pytest.mark.parametrize("only_masked", [True, False])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_pictures_are_prepared_and_put_back_with_the_bytes_of_the_cpu(only_masked: bool, mode: int) -> None:
    picture, mask = to_image(noise(150, 90)), to_image(torch.zeros(1, 150, 90, dtype=torch.uint8))
    mask.paste(255, (30, 40, 60, 90))
    masking = Masking((4, 4), only_masked=only_masked, padding=8)
    outcomes = []
    for device in (HOST, torch.device("cuda")):
        made = prepare(picture, mask, (128, 96), mode, masking, device=device)
        result = noise(96, 128, 1)
        backs = [paste_back(each, made, device=device).image for each in (to_image(result), result.to(device))]
        outcomes.append([to_levels(each) for each in (made.picture, made.mask, made.overlay_mask, *backs) if each])
    assert len(outcomes[0]) == 5
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outcomes, strict=True))


@pytest.mark.parametrize("longest", [64, 128, 640])
def test_a_detector_sees_the_bytes_of_the_cpu(longest: int) -> None:
    pixels = noise(256, 128).permute(1, 2, 0).contiguous()
    letterbox = Letterbox.of(128, 256, longest)
    assert torch.equal(letterbox.apply(pixels.cuda()).cpu(), letterbox.apply(pixels))
