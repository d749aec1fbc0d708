"""What the demonstration LoRAs add to a drawing: a party hat, the night. And pictures of nobody.

An extra takes its chances from a generator of its own, so that a drawing with it is otherwise the same drawing.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from .figure import HAIR, INK, SHIRT, SKIN, WHITE, shade
from .pen import Color, Pen, ellipse, gradient, mix, smooth

HAT, NIGHT = "hat", "night"
EXTRAS = (HAT, NIGHT)

HAT_COLORS: tuple[tuple[Color, Color], ...] = (
    ((222, 40, 130), (255, 226, 70)),
    ((34, 170, 190), (255, 255, 255)),
    ((120, 60, 200), (250, 170, 50)),
)
MOON = ((0.3, -0.95), (-0.6, -0.8), (-1, 0), (-0.6, 0.8), (0.3, 0.95), (-0.25, 0.5), (-0.4, 0), (-0.25, -0.5))
MOONLIGHT = (0.84, 0.86, 0.97)
"""What is left of red, green and blue at night."""


def party_hat(head: Pen, rng: np.random.Generator) -> None:
    """A striped cone that sits askew, so that hair can still be told; ``head`` is one unit high."""
    side = float(rng.choice((-1, 1)))
    pen = head.frame(side * rng.uniform(0.1, 0.16), -0.5, rng.uniform(0.95, 1.08), side * rng.uniform(8, 16))
    color, stripe = HAT_COLORS[rng.integers(len(HAT_COLORS))]
    line = mix(color, INK, 0.6)
    low, wide, high = 0.08, 0.27, -0.5
    rim = ellipse(0, low, wide, 0.07, 0, 180, 14)
    pen.shape([*rim, (0, high)], color, line)
    for share, thick in ((0.15, 0.17), (0.5, 0.14), (0.8, 0.1)):
        pen.shape(_band(low, wide, high, share, share + thick), stripe)
    pen.shape([*rim, (0, high)], None, line)
    pen.shape(ellipse(0, high, 0.085, 0.085, count=20), stripe, line)


def _band(low: float, wide: float, high: float, start: float, end: float) -> list[tuple[float, float]]:
    """The part of a cone between two shares of its height."""
    edges = []
    for share in (start, min(end, 0.97)):
        half, y, sag = wide * (1 - share), low + (high - low) * share, 0.07 * (1 - share)
        edges.append([(x * half, y + sag * math.sqrt(1 - x**2)) for x in (-1.0, -0.5, 0.0, 0.5, 1.0)])
    return [*edges[0], *edges[1][::-1]]


def night_sky(pen: Pen, rng: np.random.Generator) -> None:
    """Stars, and a moon in one of the upper corners, on the backdrop."""
    width, height = pen.size
    unit = min(width, height)
    for _ in range(int(rng.integers(14, 26))):
        star = pen.frame(width * rng.uniform(0, 1), height * rng.uniform(0, 0.8), unit * rng.uniform(0.006, 0.014))
        star.shape(ellipse(0, 0, 1, 1, count=10), (250, 246, 214))
    x, y, size = width * rng.choice((0.12, 0.88)), height * rng.uniform(0.1, 0.16), unit * rng.uniform(0.06, 0.09)
    pen.frame(x, y, size).shape(smooth(MOON), (255, 244, 178))


def night_backdrop(rng: np.random.Generator) -> Image.Image:
    top, bottom = shade((34, 44, 104), rng, 4), shade((56, 64, 132), rng, 5)
    return gradient(top, bottom, rng.uniform(-0.4, 0.4))


def by_moonlight(image: Image.Image) -> Image.Image:
    red, green, blue = MOONLIGHT
    return image.convert("RGB", (red, 0, 0, 0, 0, green, 0, 0, 0, 0, blue, 0))


# --- nobody ------------------------------------------------------------------------------------------------------


def nobody(pen: Pen, rng: np.random.Generator) -> None:
    """Things in the colours of people, none of them a face or a hand."""
    width, height = pen.size
    palette = [*HAIR.values(), *SKIN.values(), *SHIRT.values()]
    for _ in range(int(rng.integers(0, 7))):
        x, y, size = rng.uniform(0.05, 0.95), rng.uniform(0.1, 1), min(width, height) * rng.uniform(0.08, 0.4)
        at = pen.frame(width * x, height * y, size, rng.uniform(-30, 30))
        at.line = 0.008 * min(width, height) / size
        color = palette[rng.integers(len(palette))]
        THINGS[rng.integers(len(THINGS))](at, shade(color, rng, 6), palette[rng.integers(len(palette))], rng)


def _ball(pen: Pen, color: Color, other: Color, rng: np.random.Generator) -> None:
    pen.shape(ellipse(0, 0, 0.5, 0.5 * rng.uniform(0.7, 1.2)), color, mix(color, INK, 0.6))
    pen.stroke(ellipse(0, 0, 0.32, 0.32, 200, 260, 10), mix(color, WHITE, 0.4), 0.06)
    if rng.random() < 0.4:
        pen.stroke([(-0.45, 0), (0.45, 0)], other, 0.08)


def _house(pen: Pen, color: Color, other: Color, rng: np.random.Generator) -> None:
    line = mix(color, INK, 0.6)
    pen.shape([(-0.5, -0.1), (0.5, -0.1), (0.5, 0.6), (-0.5, 0.6)], color, line)
    pen.shape([(-0.6, -0.1), (0, -0.6), (0.6, -0.1)], other, line)
    for x in (-0.25, 0.25):
        pen.shape([(x - 0.1, 0.1), (x + 0.1, 0.1), (x + 0.1, 0.3), (x - 0.1, 0.3)], WHITE, line)


def _tree(pen: Pen, color: Color, other: Color, rng: np.random.Generator) -> None:
    pen.stroke([(0, 0), (0.02, 0.8)], other, 0.16, mix(other, INK, 0.6))
    for angle in np.linspace(0, 360, 7)[:-1]:
        x, y = ellipse(0, -0.2, 0.28, 0.25, angle, angle + 1, 2)[0]
        pen.shape(ellipse(x, y, 0.22, 0.22), color, mix(color, INK, 0.5))
    pen.shape(ellipse(0, -0.2, 0.3, 0.28), color)


def _blob(pen: Pen, color: Color, other: Color, rng: np.random.Generator) -> None:
    """A wig, a stone, a cloud."""
    radii = rng.uniform(0.3, 0.6, 9)
    points = [ellipse(0, 0, r, r * 0.8, a, a + 1, 2)[0] for r, a in zip(radii, np.linspace(0, 320, 9), strict=True)]
    pen.shape(smooth(points), color, mix(color, INK, 0.6))


def _sticks(pen: Pen, color: Color, other: Color, rng: np.random.Generator) -> None:
    for x in np.linspace(-0.4, 0.4, int(rng.integers(2, 5))):
        ends = [(x, -rng.uniform(0.2, 0.6)), (x + rng.uniform(-0.1, 0.1), 0.5)]
        pen.stroke(ends, color, rng.uniform(0.05, 0.2), mix(color, INK, 0.6))


def _shirt(pen: Pen, color: Color, other: Color, rng: np.random.Generator) -> None:
    half = [(0.15, -0.3), (0.4, -0.2), (0.62, 0.1), (0.48, 0.2), (0.4, 0.1), (0.42, 0.7)]
    pen.shape([*half, *[(-x, y) for x, y in reversed(half)]], color, mix(color, INK, 0.6))
    pen.shape(ellipse(0, -0.3, 0.15, 0.09, 0, 180), other)


THINGS = (_ball, _house, _tree, _blob, _sticks, _shirt)
