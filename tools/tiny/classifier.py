"""Finds the attributes of a drawn person in a picture: the measure by which prompts are judged.

Train it with ``python -m tools.tiny.train_classifier``; its weights lie beside this file. A second one, trained with
``--extras``, knows people in hats and at night too, and judges LoRAs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .extras import EXTRAS
from .people import ATTRIBUTES, values

WEIGHTS = Path(__file__).with_name("classifier.safetensors")
EXTRAS_WEIGHTS = Path(__file__).with_name("classifier_extras.safetensors")

Heads = Mapping[str, tuple[str, ...]]
"""What is told, and its values, in the order of labels."""

PEOPLE: Heads = {name: values(name) for name in ATTRIBUTES}
WITH_EXTRAS: Heads = {**PEOPLE, **dict.fromkeys(EXTRAS, ("no", "yes"))}

SIDE = 160  # pictures of any size are resized to this square
WIDTHS = (24, 48, 80, 112, 128)


class Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(x)))
        return x + F.relu(self.norm2(self.second(x)))


class Classifier(nn.Module):
    """Pixels ``[B, 3, 160, 160]`` in 0..1 to one row of scores per attribute."""

    def __init__(self, told: Heads = PEOPLE) -> None:
        super().__init__()
        self.told = told
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip((3, *WIDTHS), WIDTHS, strict=False)))
        places = (SIDE // 2 ** len(WIDTHS)) ** 2
        self.reduce = nn.Conv2d(WIDTHS[-1], 32, 1)
        self.mix = nn.Linear(32 * places, 192)
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(found)) for name, found in told.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = F.relu(self.reduce(self.blocks(2 * pixels - 1))).flatten(1)
        features = F.relu(self.mix(F.dropout(features, 0.1, self.training)))
        return {name: head(features) for name, head in self.heads.items()}


def resized(pixels: Tensor) -> Tensor:
    return F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def save_classifier(network: Classifier, path: Path = WEIGHTS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            k: v.detach().cpu().to(torch.bfloat16 if v.ndim > 1 else v.dtype).contiguous()
            for k, v in network.state_dict().items()
        },
        path,
    )


def load_classifier(path: Path = WEIGHTS, device: str | torch.device = "cpu") -> Classifier:
    weights = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    network = Classifier({name: found for name, found in WITH_EXTRAS.items() if f"heads.{name}.weight" in weights})
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False).to(device)


@torch.no_grad()
def probabilities(
    network: Classifier, images: Sequence[Image.Image], batch: int = 64
) -> list[dict[str, dict[str, float]]]:
    """For every picture and attribute, the probability of each value."""
    device = next(network.parameters()).device
    found: list[dict[str, dict[str, float]]] = []
    for first in range(0, len(images), batch):
        pixels = torch.cat([_pixels(image, device) for image in images[first : first + batch]])
        scores = {name: score.float().softmax(-1).tolist() for name, score in network(pixels).items()}
        for row in range(len(pixels)):
            found.append({name: dict(zip(told, scores[name][row], strict=True)) for name, told in network.told.items()})
    return found


def attributes_in(network: Classifier, images: Sequence[Image.Image]) -> list[dict[str, str]]:
    """The most probable value of every attribute in every picture."""
    return [
        {name: max(row, key=lambda value: row[value]) for name, row in picture.items()}
        for picture in probabilities(network, images)
    ]


def _pixels(image: Image.Image, device: torch.device) -> Tensor:
    array = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).to(device)
    return resized(array.permute(2, 0, 1)[None].float() / 255)
