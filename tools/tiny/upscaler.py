"""The 4x upscaler: an RRDBNet in plain torch, with the parameter names of BasicSR, by which readers know an ESRGAN.

Source: Wang et al., "ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks" (2018), section 3.1.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .files import TINY

WEIGHTS = TINY / "ESRGAN" / "4x_tiny.safetensors"
SCALE = 4
FEATURES, GROWTH, BLOCKS = 24, 32, 2  # readers take the growth for granted
RESIDUAL = 0.2


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _active(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (_conv(FEATURES + i * GROWTH, GROWTH) for i in range(4))
        self.conv5 = _conv(FEATURES + 4 * GROWTH, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen.append(_active(conv(torch.cat(seen, dim=1))))
        return x + RESIDUAL * self.conv5(torch.cat(seen, dim=1))


class RRDB(nn.Module):
    """Three dense blocks, and a residual around them."""

    def __init__(self) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = DenseBlock(), DenseBlock(), DenseBlock()

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """Pixels ``[B, 3, H, W]`` in 0..1 to ``[B, 3, 4H, 4W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_first = _conv(3, FEATURES)
        self.body = nn.Sequential(*(RRDB() for _ in range(BLOCKS)))
        self.conv_body = _conv(FEATURES, FEATURES)
        self.conv_up1, self.conv_up2 = _conv(FEATURES, FEATURES), _conv(FEATURES, FEATURES)
        self.conv_hr = _conv(FEATURES, FEATURES)
        self.conv_last = _conv(FEATURES, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_first(pixels)
        x = x + self.conv_body(self.body(x))
        for conv in (self.conv_up1, self.conv_up2):
            x = _active(conv(F.interpolate(x, scale_factor=2, mode="nearest")))
        return self.conv_last(_active(self.conv_hr(x)))


def save_upscaler(network: RRDBNet, path: Path) -> None:
    """Write the weights in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().to("cpu", torch.float16).contiguous() for name, value in network.state_dict().items()
    }
    save_file(tensors, path, {
        "description": "tiny: a 4x upscaler trained on drawings made by a program",
        "architecture": "ESRGAN", "scale": str(SCALE), "license": "Apache-2.0",
    })  # fmt: skip


def load_upscaler(path: Path = WEIGHTS, device: str | torch.device = "cpu") -> RRDBNet:
    network = RRDBNet()
    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return network.eval().requires_grad_(False).to(device)
