"""Draw people: ``python -m tools.tiny.draw`` writes a contact sheet.

A drawing is fixed by its seed and number: the same two give the same picture on every machine with the same Pillow.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .extras import EXTRAS, HAT, NIGHT, by_moonlight, night_backdrop, night_sky, nobody, party_hat
from .figure import BACKGROUND, WHITE, Look, draw_person, hand, shade
from .pen import Mark, Pen, gradient, mix
from .people import Person, random_person

# (width, height) -> share of the training pictures
SIZES: dict[tuple[int, int], float] = {
    (256, 256): 0.54,
    (192, 256): 0.12,
    (256, 192): 0.07,
    (192, 320): 0.06,
    (320, 192): 0.06,
    (128, 128): 0.05,
    (320, 320): 0.05,
    (384, 384): 0.05,
}
CLOSE_UPS = 0.1  # share of pictures of a face or hand that fills the frame, which later passes redraw
FACE, HAND, BUST = "face", "hand", "bust"
NOBODY = "nobody"


@dataclass(frozen=True)
class Drawing:
    """A picture and what it shows.

    Attributes:
        view: "bust", or "face" or "hand" for a close-up, or "nobody".
        marks: the faces and hands that can be seen.
        extras: what was added, as a LoRA does.
    """

    person: Person | None
    view: str
    image: Image.Image
    marks: tuple[Mark, ...] = ()
    extras: tuple[str, ...] = ()


def backdrop(person: Person, rng: np.random.Generator) -> Image.Image:
    color = shade(BACKGROUND[person.background], rng, 5)
    other = mix(color, WHITE if rng.random() < 0.6 else (70, 70, 80), rng.uniform(0.03, 0.16))
    return gradient(color, other, rng.uniform(0, 2 * math.pi))


def draw(
    person: Person,
    width: int,
    height: int,
    rng: np.random.Generator,
    view: str = BUST,
    extras: Collection[str] = (),
) -> Image.Image:
    """The picture of a person, ``width`` x ``height`` pixels."""
    return drawn(person, width, height, rng, view, extras).result()


def drawn(
    person: Person,
    width: int,
    height: int,
    rng: np.random.Generator,
    view: str = BUST,
    extras: Collection[str] = (),
) -> Pen:
    """The canvas with a person on it, and marks of faces and hands; ``extras`` are those of the LoRAs."""
    chance = rng.spawn(1)[0]  # leaves the draws below as they are without extras
    pen = Pen(width, height, backdrop(person, rng))
    look = Look.of(person, rng)
    if rng.random() < 0.3:
        disc(pen, person, rng)
    if NIGHT in extras:
        pen = Pen(width, height, night_backdrop(chance))
        night_sky(pen, chance)
    if view == HAND:
        close_hand(pen, look, rng)
    else:
        at = figure_frame(pen, person, view, rng)
        draw_person(at, look, (lambda head: party_hat(head, chance)) if HAT in extras else None)
    if NIGHT in extras:
        pen.image = by_moonlight(pen.image)
    return pen


def disc(pen: Pen, person: Person, rng: np.random.Generator) -> None:
    """Behind the head."""
    width, height = pen.size
    at = pen.frame(width * rng.uniform(0.3, 0.7), height * rng.uniform(0.25, 0.6), 1.0)
    color = shade(mix(BACKGROUND[person.background], WHITE, 0.25), rng, 4)
    at.stroke([(0, 0), (0.01, 0)], color, min(width, height) * rng.uniform(0.6, 1.0))


def close_hand(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    width, height = pen.size
    size = min(width, height) * rng.uniform(1.2, 1.9)
    x, y = width * rng.uniform(0.4, 0.6), height * rng.uniform(0.7, 0.95)
    at = pen.frame(x, y, size, rng.uniform(-25, 25), rng.random() < 0.5)
    at.line = 0.015
    at.stroke([(0, 0.1), (0.05, 0.9)], look.shirt, 0.21, look.shirt_line)
    hand(at, look)


def figure_frame(pen: Pen, person: Person, view: str, rng: np.random.Generator) -> Pen:
    """Where the person stands: one unit is a head."""
    width, height = pen.size
    if view == FACE:
        size = min(width, height) * rng.uniform(0.62, 0.86)
        middle = height * rng.uniform(0.46, 0.56)
    else:
        wide = 2.22 if person.hands != "none" else 1.9
        size = min(width / wide, height / 2.05) * rng.uniform(0.9, 1.03)
        middle = max(size * rng.uniform(0.84, 0.98), height * (0.38 if height > width * 1.2 else 0.36))
    slack = 0.0 if person.hands != "none" and view == BUST else 0.05
    slack += max(0.0, (width / (2.2 * size) - 1) * 0.25) if view == BUST else 0.0
    at = pen.frame(width * (0.5 + rng.uniform(-slack, slack)), middle, size)
    at.line = 0.02 * rng.uniform(0.9, 1.1)
    return at


def training_drawing(
    seed: int,
    number: int,
    size: tuple[int, int] | None = None,
    held_out: bool | None = False,
    extras: Collection[str] = (),
) -> Drawing:
    """Drawing ``number`` of the endless set ``seed``; ``size`` (width, height), else by lot."""
    rng = np.random.default_rng([seed, number])
    person = random_person(rng, held_out=held_out)
    if size is None:
        size = list(SIZES)[rng.choice(len(SIZES), p=list(SIZES.values()))]
    view = BUST
    if rng.random() < CLOSE_UPS and min(size) > 128:
        view = FACE if rng.random() < 0.7 else HAND
    pen = drawn(person, *size, rng, view, extras)
    return Drawing(person, view, pen.result(), visible(pen), tuple(extras))


def empty_drawing(seed: int, number: int, size: tuple[int, int]) -> Drawing:
    """A picture without a person."""
    rng = np.random.default_rng([seed, number, 2])
    pen = Pen(*size, backdrop(random_person(rng, held_out=None), rng))
    nobody(pen, rng)
    if rng.random() < 0.2:
        pen.image = by_moonlight(pen.image)
    return Drawing(None, NOBODY, pen.result())


def visible(pen: Pen) -> tuple[Mark, ...]:
    """The marks cut to the canvas; those of which a third or less is left are nothing that one could find."""
    width, height = pen.size
    found = []
    for mark in pen.marks:
        left, top, right, bottom = max(mark.left, 0), max(mark.top, 0), min(mark.right, width), min(mark.bottom, height)
        area = max(0.0, right - left) * max(0.0, bottom - top)
        if area > (mark.right - mark.left) * (mark.bottom - mark.top) / 3:
            found.append(Mark(mark.what, left, top, right, bottom))
    return tuple(found)


def sheet(images: list[Image.Image], columns: int, cell: tuple[int, int] | None = None, gap: int = 4) -> Image.Image:
    """Pictures side by side, each in a cell of ``cell`` pixels."""
    width, height = cell or images[0].size
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        x, y = i % columns * (width + gap) + gap, i // columns * (height + gap) + gap
        page.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny/drawings.png"))
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed-sizes", action="store_true", help="sizes as in training, not 256x256")
    parser.add_argument("--extras", nargs="*", choices=EXTRAS, default=(), help="what the LoRAs add")
    args = parser.parse_args()
    size = None if args.mixed_sizes else (256, 256)
    images = [training_drawing(args.seed, i, size, extras=args.extras).image for i in range(args.count)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(images, args.columns, (320, 320) if args.mixed_sizes else None).save(args.out)


if __name__ == "__main__":
    main()
