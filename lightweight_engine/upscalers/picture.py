"""A picture that the host and a GPU both work on, each in a form of its own, without going to and fro for nothing."""

from __future__ import annotations

from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from .resampling import in_mode, to_image, to_levels

Box = tuple[int, int, int, int]


class Picture:
    """A picture that was made as an image or as levels ``[3, H, W]`` on a device; the other is made when asked for.

    Nobody writes to either.
    """

    def __init__(self, made: Image.Image | Tensor) -> None:
        self.made = made
        self._there: Tensor | None = None

    @classmethod
    def of(cls, given: Image.Image | Tensor | Picture) -> Picture:
        """What is given as a picture; itself where it is one."""
        return given if isinstance(given, Picture) else cls(given)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        if isinstance(self.made, Tensor):
            return self.made.shape[2], self.made.shape[1]
        return self.made.size

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    @cached_property
    def image(self) -> Image.Image:
        return to_image(self.made) if isinstance(self.made, Tensor) else in_mode(self.made, "RGB")

    def levels(self, device: torch.device) -> Tensor:
        """The levels on a device; kept for the last one that was asked for."""
        if isinstance(self.made, Tensor) and self.made.device == device:
            return self.made
        if self._there is None or self._there.device != device:
            made = self.made
            self._there = made.to(device) if isinstance(made, Tensor) else to_levels(made, device)
        return self._there

    def crop(self, box: Box) -> Picture:
        """The part inside a box (left, top, right, bottom) that lies within the picture, where the picture is."""
        left, top, right, bottom = box
        levels = self.made if isinstance(self.made, Tensor) else self._there
        if levels is not None:
            return Picture(levels[:, top:bottom, left:right])
        assert isinstance(self.made, Image.Image)
        return Picture(self.made.crop(box))
