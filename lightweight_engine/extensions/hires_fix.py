"""The hires pass: a finished latent or its picture is enlarged, and becomes the start of an image-to-image pass.

The engine's own passes come in as functions (``Passes``), so that nothing here knows networks, devices or plans.
Sizes are (width, height) in pixels, as people give them; latents are ``[B, 16, h, w]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..request import GenerationRequest
from ..upscalers.upscaler import Upscaler, enlarged

HIRES_STRENGTH = 0.7
"""Where a request names none; the reference fails there."""


class LatentMode(NamedTuple):
    """How a latent is resized."""

    mode: str
    antialias: bool = False


LATENT_MODES = {
    "Latent": LatentMode("bilinear"),
    "Latent (antialiased)": LatentMode("bilinear", antialias=True),
    "Latent (bicubic)": LatentMode("bicubic"),
    "Latent (bicubic antialiased)": LatentMode("bicubic", antialias=True),
    "Latent (nearest)": LatentMode("nearest"),
    "Latent (nearest-exact)": LatentMode("nearest-exact"),
}


@dataclass(frozen=True)
class Target:
    """What a picture is enlarged to, and how much of its latent is then cut away, in cells, left and right together."""

    width: int
    height: int
    cut_width: int = 0
    cut_height: int = 0

    def grows(self, size: tuple[int, int]) -> bool:
        """Whether a picture of ``size`` (height, width) is enlarged, which alone takes an upscaler."""
        return self.height > size[0] or self.width > size[1]

    def cells(self, factor: int) -> tuple[int, int]:
        """(h, w) of the latent that the second pass works on."""
        return self.height // factor - self.cut_height, self.width // factor - self.cut_width

    def cut(self, latent: Tensor) -> Tensor:
        """The middle of an enlarged latent."""
        top, left = self.cut_height // 2, self.cut_width // 2
        bottom, right = self.cut_height - top, self.cut_width - left
        return latent[:, :, top : latent.shape[2] - bottom, left : latent.shape[3] - right]

    def cut_pixels(self, pixels: Tensor, factor: int) -> Tensor:
        """What the cut latent covers of an enlarged picture."""
        top, left = self.cut_height // 2 * factor, self.cut_width // 2 * factor
        height, width = (side * factor for side in self.cells(factor))
        return pixels[:, :, top : top + height, left : left + width]


def target_size(width: int, height: int, scale: float, resize_x: int, resize_y: int, factor: int) -> Target:
    """The size of the second pass: ``scale`` times the first, or, where a side is given, at the first one's aspect.

    With both sides given, the picture covers them and the rest is cut away. No side is rounded.

    Args:
        resize_x, resize_y: 0 where it is not given.
        factor: pixels of a latent cell.
    """
    if not resize_x and not resize_y:
        return Target(int(width * scale), int(height * scale))
    by_width = resize_x, resize_x * height // width
    by_height = resize_y * width // height, resize_y
    if not resize_y:
        return Target(*by_width)
    if not resize_x:
        return Target(*by_height)
    wide, high = by_width if width / height < resize_x / resize_y else by_height
    return Target(wide, high, (wide - resize_x) // factor, (high - resize_y) // factor)


def second_pass(request: GenerationRequest) -> GenerationRequest:
    """The request of the hires pass: image-to-image that runs exactly its steps, with what the request has for it."""
    strength = HIRES_STRENGTH if request.denoising_strength is None else request.denoising_strength
    own = {
        "prompt": request.hr_prompt or request.prompt,
        "negative_prompt": request.hr_negative_prompt or request.negative_prompt,
        "steps": request.hr_steps or request.steps,
        "sampler": request.hr_sampler or request.sampler,
        "scheduler": request.hr_scheduler or request.scheduler,
        "cfg_scale": request.cfg_scale if request.hr_cfg is None else request.hr_cfg,
        "distilled_cfg_scale": (
            request.distilled_cfg_scale if request.hr_distilled_cfg is None else request.hr_distilled_cfg
        ),
        "denoising_strength": strength,
        "initial_noise_multiplier": 1.0,
        "img2img_fix_steps": True,
        "enable_hr": False,
    }
    return request.model_copy(update=own)


@dataclass(frozen=True)
class Passes:
    """What the hires pass needs of the engine.

    Attributes:
        decode: latents to pixels ``[B, 3, H, W]`` in 0..1.
        enlarge: does the work of enlarging, whose picture it may keep.
        encode: pixels to latents, drawn from the posterior of each picture.
    """

    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    enlarge: Callable[[Callable[[], Tensor]], Tensor] = lambda work: work()


def enlarge_latent(latent: Tensor, target: Target, mode: LatentMode, factor: int) -> Tensor:
    """A latent at the target's size, before it is cut."""
    size = (target.height // factor, target.width // factor)
    return F.interpolate(latent, size=size, mode=mode.mode, antialias=mode.antialias)


def enlarge_pixels(pixels: Tensor, target: Target, upscaler: Upscaler | None) -> Tensor:
    """Pixels ``[B, 3, H, W]`` in 0..1 at the target's size, on the same device.

    They are cut to bytes on the way, as pictures that are saved are; an upscaler runs only where they grow.
    """
    levels = (pixels.float().nan_to_num(nan=0.0).clamp(0, 1) * 255).byte()
    size = (target.width, target.height)
    return torch.stack([enlarged(picture, size, upscaler) for picture in levels]).float() / 255


def start(latent: Tensor, target: Target, method: LatentMode | Upscaler | None, passes: Passes, factor: int) -> Tensor:
    """The start latent of the second pass, ``[B, 16, h, w]``, from the finished one of the first.

    Args:
        factor: pixels of a latent cell.
    """
    if isinstance(method, LatentMode):
        larger = enlarge_latent(latent, target, method, factor)
    else:
        pixels = passes.decode(latent)
        larger = passes.encode(passes.enlarge(lambda: enlarge_pixels(pixels, target, method)))
    return target.cut(larger)
