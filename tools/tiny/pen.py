"""A pen on a supersampled canvas: filled shapes and strokes with outlines, in coordinates of a movable frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 3

Color: TypeAlias = tuple[int, int, int]
Points: TypeAlias = Sequence[tuple[float, float]] | np.ndarray


class Mark(NamedTuple):
    """Where a thing was drawn: its name and its box in pixels, which may reach beyond the canvas."""

    what: str
    left: float
    top: float
    right: float
    bottom: float


def mix(a: Color, b: Color, share: float) -> Color:
    """``a`` moved by ``share`` towards ``b``."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def smooth(points: Points, closed: bool = True, steps: int = 8) -> np.ndarray:
    """A Catmull-Rom curve through ``points`` ``[N, 2]``."""
    p = np.asarray(points, float)
    ends = (p[-1], p[0], p[1]) if closed else (p[0], p[-1], p[-1])
    p = np.vstack([ends[0], p, ends[1:]]) if closed else np.vstack([ends[0], p, ends[1]])
    a, b, c, d = p[:-3, None], p[1:-2, None], p[2:-1, None], p[3:, None]
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    curve = curve.reshape(-1, 2)
    return curve if closed else np.vstack([curve, p[-2]])


def ellipse(
    x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360, count: int = 36
) -> np.ndarray:
    """Points of an ellipse, angles in degrees, clockwise from the right."""
    angle = np.radians(np.linspace(start, end, count, endpoint=end - start < 360))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def box(x: float, y: float, rx: float, ry: float, corner: float) -> np.ndarray:
    """A rectangle of half sides ``rx``, ``ry`` with round corners."""
    quarters = [(rx, ry, 0), (-rx, ry, 90), (-rx, -ry, 180), (rx, -ry, 270)]
    return np.vstack(
        [
            ellipse(
                x + cx - math.copysign(corner, cx), y + cy - math.copysign(corner, cy), corner, corner, a, a + 90, 6
            )
            for cx, cy, a in quarters
        ]
    )


class Pen:
    """Draws in a frame: a turn, a mirror, a scale and a place on a canvas of ``width`` x ``height`` pixels."""

    def __init__(self, width: int, height: int, backdrop: Image.Image | None = None) -> None:
        self.size = (width, height)
        large = (width * SUPERSAMPLING, height * SUPERSAMPLING)
        self.image = Image.new("RGB", large) if backdrop is None else backdrop.resize(large)
        self._draw = ImageDraw.Draw(self.image)
        self._turn = np.eye(2)
        self._place = np.zeros(2)
        self._scale = 1.0
        self.line = 0.02
        """Width of an outline, in units of the frame."""
        self.marks: list[Mark] = []
        """Of all frames of the canvas, in the order of drawing."""

    def frame(self, x: float, y: float, scale: float, angle: float = 0.0, mirror: bool = False) -> Pen:
        """A pen on the same canvas whose (0, 0) lies at ``x``, ``y`` of this one; ``angle`` in degrees, clockwise."""
        pen = object.__new__(Pen)
        pen.__dict__.update(self.__dict__)
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        turn = np.array([[cos, -sin], [sin, cos]]) * [[-1 if mirror else 1, 1]]
        pen._place = self._place + self._scale * self._turn @ np.array([x, y])
        pen._turn = self._turn @ turn
        pen._scale = self._scale * scale
        pen.line = self.line / scale
        return pen

    @property
    def scale(self) -> float:
        """Pixels of a unit of the frame."""
        return self._scale

    def mark(self, what: str, points: Points, margin: float = 0.0) -> None:
        """Note the box around ``points`` and ``margin`` about them, both in units of the frame."""
        at = np.asarray(points, float) @ self._turn.T * self._scale + self._place
        low, high = at.min(0) - margin * self._scale, at.max(0) + margin * self._scale
        self.marks.append(Mark(what, *low.tolist(), *high.tolist()))

    def _pixels(self, points: Points) -> list[tuple[float, float]]:
        at = (np.asarray(points, float) @ self._turn.T * self._scale + self._place) * SUPERSAMPLING
        return [tuple(p) for p in at.tolist()]

    def shape(self, points: Points, fill: Color | None, line: Color | None = None, width: float = 1.0) -> None:
        """A filled polygon; ``width`` is that of its outline in units of ``line``."""
        at = self._pixels(points)
        if fill is not None:
            self._draw.polygon(at, fill=fill)
        if line is not None:
            self._line([*at, at[0], at[1]], line, self.line * width)

    def stroke(self, points: Points, color: Color, width: float, line: Color | None = None, wide: float = 1.0) -> None:
        """A line with round ends, ``width`` in units of the frame, with an outline of its own if ``line`` is given."""
        if line is not None:
            self.stroke(points, line, width + 2 * self.line * wide)
        at = self._pixels(points)
        self._line(at, color, width)
        radius = width * self._scale * SUPERSAMPLING / 2
        for x, y in at:  # round ends, and joints without the gaps that thick short segments leave
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

    def _line(self, at: list[tuple[float, float]], color: Color, width: float) -> None:
        self._draw.line(at, fill=color, width=max(1, round(width * self._scale * SUPERSAMPLING)), joint="curve")

    def result(self) -> Image.Image:
        return self.image.reduce(SUPERSAMPLING)


def gradient(top: Color, bottom: Color, angle: float) -> Image.Image:
    """A small picture that runs from ``top`` to ``bottom``; enlarge it smoothly."""
    y, x = np.mgrid[-1:1:9j, -1:1:9j]
    share = ((y * math.cos(angle) + x * math.sin(angle)) / 2.8 + 0.5).clip(0, 1)[..., None]
    return Image.fromarray((np.array(top) * (1 - share) + np.array(bottom) * share).round().astype(np.uint8))
