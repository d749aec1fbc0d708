"""What a detector finds on a picture, and the one way from pixels to that which all YOLO networks share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ..backend.devices import is_out_of_memory
from ..errors import RequestError
from ..upscalers.picture import Picture
from ..upscalers.resampling import HOST, resample
from .boxes import Found, Letterbox, masks_of, select

# Pixels [1, 3, H, W] in 0..1 to boxes, scores and coefficients [4 + K + M, N], and the prototypes [M, H/4, W/4].
Network = Callable[[Tensor], tuple[Tensor, Tensor | None]]

log = logging.getLogger(__name__)


@contextmanager
def on_host(size: tuple[int, int]) -> Iterator[torch.device]:
    """A network that never leaves the host."""
    yield HOST


Visit = Callable[[tuple[int, int]], AbstractContextManager[torch.device]]
"""Brings a network to where it looks at a rectangle of (width, height), for as long as it does; tells where that is."""


@dataclass(frozen=True, eq=False)
class Detection:
    """
    Attributes:
        box: x1, y1, x2, y2 in pixels of the picture.
        score: 0 to 1.
        label: name of the class.
        mask: levels of the picture's size, from a segmentation network; None where there is only the box.
    """

    box: tuple[float, float, float, float]
    score: float
    label: str
    mask: Image.Image | None = field(default=None, repr=False)


class Detector(Protocol):
    """Finds things on pictures; ``nbytes`` is what its network takes."""

    name: str
    classes: tuple[str, ...]
    nbytes: int

    def detect(self, picture: Picture, confidence: float, classes: Sequence[str] = ()) -> list[Detection]:
        """What is seen with more than ``confidence``, surest first; only ``classes``, if any are named.

        Raises:
            RequestError: see ``check_classes``.
        """
        ...

    def check_classes(self, classes: Sequence[str]) -> None:
        """
        Raises:
            RequestError: it does not know one of them; names those that it knows.
        """
        ...


class YOLODetector:
    """A YOLO network, ours or another's, with what stands in its file.

    Args:
        classes: names of the K classes.
        image_size: the longer side of what the network sees, in pixels.
        visit: where it looks.
        open_vocabulary: whether the classes are texts that others could stand for.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        classes: tuple[str, ...],
        image_size: int,
        visit: Visit = on_host,
        *,
        nbytes: int = 0,
        open_vocabulary: bool = False,
    ) -> None:
        self.name = name
        self.network = network
        self.classes = classes
        self.image_size = image_size
        self.visit = visit
        self.nbytes = nbytes
        self.open_vocabulary = open_vocabulary

    @torch.inference_mode()
    def detect(self, picture: Picture | Image.Image, confidence: float, classes: Sequence[str] = ()) -> list[Detection]:
        picture = Picture.of(picture)
        wanted = self._numbers(classes) if classes else None
        letterbox = Letterbox.of(*picture.size, self.image_size)
        decoded, prototypes = self._seen(picture, letterbox)
        # The host picks: hundreds of short steps, each depending on the last.
        found = select(decoded, len(self.classes), confidence, wanted)
        masks: Sequence[Image.Image | None] = [None] * len(found.boxes)
        if prototypes is not None:
            found, levels = _with_masks(found, masks_of(found, prototypes, letterbox.size))
            masks = [to_picture(mask, picture.size) for mask in levels]
        boxes = letterbox.restore(found.boxes)
        rows = zip(boxes.tolist(), found.scores.tolist(), found.classes.tolist(), masks, strict=True)
        return [Detection(tuple(box), score, self.classes[kind], mask) for box, score, kind, mask in rows]

    def _seen(self, picture: Picture, letterbox: Letterbox) -> tuple[Tensor, Tensor | None]:
        """What the network makes of a picture, on the host; it looks there too where memory runs out elsewhere."""
        try:
            return self._seen_by(self.visit, picture, letterbox)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("%s looks at the picture on the CPU, as the GPU has no room for it", self.name)
        return self._seen_by(on_host, picture, letterbox)

    def _seen_by(self, visit: Visit, picture: Picture, letterbox: Letterbox) -> tuple[Tensor, Tensor | None]:
        with visit(letterbox.size) as device:
            pixels = letterbox.apply(picture.levels(device).permute(1, 2, 0))
            decoded, prototypes = self.network(pixels.permute(2, 0, 1)[None].float() / 255)
            return decoded.cpu(), None if prototypes is None else prototypes.cpu()

    def check_classes(self, classes: Sequence[str]) -> None:
        """
        Raises:
            RequestError: it does not know one of them; names those that it knows.
        """
        self._numbers(classes)

    def _numbers(self, classes: Sequence[str]) -> list[int]:
        known = {name.lower(): number for number, name in enumerate(self.classes)}
        unknown = next((name for name in classes if name.lower() not in known), None)
        if unknown is not None:
            why = "; other texts need a CLIP network, which is not read" if self.open_vocabulary else ""
            raise RequestError(
                f"ad_model_classes: {self.name} does not know {unknown!r:.80}{why}; it knows: "
                + ", ".join(self.classes[:100]),
                field="ad_model_classes",
            )
        return [known[name.lower()] for name in classes]


def _with_masks(found: Found, masks: Tensor) -> tuple[Found, Tensor]:
    """What has a mask at all."""
    keep = masks.flatten(1).any(dim=1)
    return Found(*(part[keep] for part in found)), masks[keep]


def to_picture(mask: Tensor, size: tuple[int, int]) -> Image.Image:
    """A mask [H, W] of bool as levels of ``size``.

    The mask is of the rectangle that the network sees and stays so, borders and all, as in the reference.
    """
    return resample(Image.fromarray(mask.byte().mul(255).cpu().numpy()), size, Image.Resampling.BICUBIC)
