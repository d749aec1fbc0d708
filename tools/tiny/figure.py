"""A person drawn with the pen. Lengths are in heads: a head is 1 high, its middle at (0, 0), y grows downwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .pen import Color, Pen, box, ellipse, mix, smooth
from .people import Person

INK: Color = (38, 28, 34)
WHITE: Color = (255, 255, 255)

HAIR: dict[str, Color] = {
    "black": (40, 36, 44),
    "brown": (116, 72, 40),
    "blonde": (242, 206, 98),
    "red": (202, 66, 30),
    "grey": (178, 182, 190),
    "blue": (56, 108, 220),
    "pink": (246, 122, 182),
    "green": (58, 158, 84),
    "none": (92, 62, 44),  # brows of a bald person
}
SKIN: dict[str, Color] = {
    "light": (255, 226, 204),
    "tan": (232, 180, 132),
    "brown": (170, 112, 72),
    "dark": (102, 64, 46),
}
SHIRT: dict[str, Color] = {
    "red": (206, 44, 48),
    "orange": (240, 134, 34),
    "yellow": (246, 212, 52),
    "green": (48, 146, 74),
    "blue": (46, 92, 200),
    "purple": (126, 66, 176),
    "white": (240, 240, 242),
    "black": (48, 48, 56),
}
BACKGROUND: dict[str, Color] = {
    "white": (246, 246, 244),
    "grey": (160, 164, 168),
    "blue": (146, 196, 244),
    "green": (158, 216, 158),
    "yellow": (252, 232, 138),
    "pink": (252, 188, 206),
    "orange": (250, 176, 112),
    "purple": (194, 166, 228),
}
EYES: tuple[Color, ...] = ((88, 56, 34), (60, 112, 176), (70, 134, 84), (50, 44, 48))


@dataclass(frozen=True)
class Look:
    """Colours and small differences of one drawing, by lot."""

    person: Person
    rng: np.random.Generator
    skin: Color
    hair: Color
    shirt: Color
    eyes: Color

    @classmethod
    def of(cls, person: Person, rng: np.random.Generator) -> Look:
        return cls(
            person,
            rng,
            shade(SKIN[person.skin], rng, 4),
            shade(HAIR[person.hair_color], rng, 6),
            shade(SHIRT[person.shirt], rng, 6),
            EYES[rng.integers(len(EYES))],
        )

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    @property
    def skin_line(self) -> Color:
        return mix(self.skin, INK, 0.62)

    @property
    def hair_line(self) -> Color:
        return mix(self.hair, INK, 0.6)

    @property
    def shirt_line(self) -> Color:
        return mix(self.shirt, INK, 0.6)


def shade(color: Color, rng: np.random.Generator, amount: float) -> Color:
    """The colour a little lighter or darker and a little off in hue."""
    light = rng.normal(0, amount)
    return tuple(int(np.clip(round(c + light + rng.normal(0, amount / 3)), 0, 255)) for c in color)  # type: ignore[return-value]


def draw_person(pen: Pen, look: Look, headgear: Callable[[Pen], None] | None = None) -> None:
    """The whole person, from back to front; ``headgear`` draws on the head."""
    tilt = look.between(-7, 7)
    head = pen.frame(look.between(-0.03, 0.03), 0.5, 1.0, tilt).frame(0, -0.5, 1.0)
    hair_behind(head, look)
    body(pen, look)
    face(head, look)
    hair_before(head, look)
    glasses(head, look)
    if headgear is not None:
        headgear(head)
    raised_arms(pen, look)


# --- body and hands ---------------------------------------------------------------------------------------------


def body(pen: Pen, look: Look) -> None:
    wide = look.between(0.62, 0.74)
    pen.shape(
        [(-0.15, 0.3), (0.15, 0.3), (0.17, 0.84), (-0.17, 0.84)], mix(look.skin, look.skin_line, 0.22), look.skin_line
    )
    torso = [(-0.17, 0.62), (-wide + 0.14, 0.74), (-wide, 0.92), (-wide - 0.08, 1.5), (-wide - 0.1, 4.0)]
    torso = [*torso, *[(-x, y) for x, y in reversed(torso)]]
    pen.shape(smooth(torso, steps=6), look.shirt, look.shirt_line)
    collar = look.rng.integers(3)
    if collar == 0:  # round neck
        pen.shape(ellipse(0, 0.62, 0.2, 0.14), look.skin, look.shirt_line)
    elif collar == 1:  # v-neck
        pen.shape([(-0.2, 0.6), (0.2, 0.6), (0, 0.98)], look.skin, look.shirt_line)
    else:  # shirt collar with buttons
        pen.shape([(-0.16, 0.6), (0.16, 0.6), (0, 0.84)], look.skin, look.shirt_line)
        light = mix(look.shirt, WHITE, 0.35)
        for side in (-1, 1):
            pen.shape([(side * 0.18, 0.56), (0, 0.84), (side * 0.17, 1.0), (side * 0.3, 0.74)], light, look.shirt_line)
        for y in (1.12, 1.36, 1.6, 1.84):
            pen.shape(ellipse(0, y, 0.028, 0.028, count=14), light, look.shirt_line, 0.6)
    pen.shape(
        [(-0.14, 0.36), (0.14, 0.36), (0.15, 0.62), (0, 0.68), (-0.15, 0.62)], mix(look.skin, look.skin_line, 0.22)
    )
    for side in (-1, 1):  # where the arms hang
        pen.stroke([(side * (wide - 0.17), 1.15), (side * (wide - 0.16), 4.0)], look.shirt_line, pen.line)


def raised_arms(pen: Pen, look: Look) -> None:
    if look.person.hands == "none":
        return
    sides = (-1, 1) if look.person.hands == "two" else (int(look.rng.choice((-1, 1))),)
    for side in sides:
        raised_arm(pen.frame(0, 0, 1.0, mirror=side < 0), look)


def raised_arm(pen: Pen, look: Look) -> None:
    """The arm on the right of the picture, with its open hand."""
    wrist = (look.between(0.77, 0.86), look.between(0.44, 0.6))
    elbow = (look.between(0.93, 1.0), 1.34)
    arm = [(0.6, 1.02), (0.72, 1.34), (0.86, 1.4), elbow, wrist]
    forearm = smooth([elbow, ((elbow[0] + wrist[0]) / 2 + 0.02, (elbow[1] + wrist[1]) / 2), wrist], closed=False)
    pen.stroke(smooth(arm[:4], closed=False), look.shirt, 0.24, look.shirt_line)
    pen.stroke(forearm, look.shirt, 0.23, look.shirt_line)
    pen.stroke(smooth(arm[:4], closed=False), look.shirt, 0.235)
    pen.stroke(forearm[:-4], look.shirt, 0.225)
    hand(pen.frame(*wrist, look.between(1.1, 1.22), look.between(-14, 16)), look)


def hand(pen: Pen, look: Look) -> None:
    """An open hand with five fingers; the wrist is at (0, 0), the fingers point up, the thumb inwards (left)."""
    spread = look.between(0.8, 1.25)
    fingers = [
        ((x, -0.2), (x + spread * lean, -0.2 - length))
        for x, lean, length in (
            (-0.085, -0.045, 0.18),
            (-0.03, -0.012, 0.225),
            (0.03, 0.022, 0.21),
            (0.085, 0.055, 0.16),
        )
    ]
    thumb = [(-0.07, -0.07), (-0.145, -0.14), (-0.185 - 0.02 * spread, -0.215)]
    pen.mark("hand", [*(tip for _, tip in fingers), *thumb, (0.112, -0.22), (0.0, 0.03)], margin=0.03)
    for finger in fingers:
        pen.stroke(finger, look.skin, 0.052, look.skin_line, 0.85)
    pen.stroke(thumb, look.skin, 0.058, look.skin_line, 0.85)
    palm = smooth(
        [(-0.075, 0.03), (-0.115, -0.1), (-0.11, -0.22), (0, -0.25), (0.112, -0.22), (0.1, -0.08), (0.075, 0.03)]
    )
    pen.shape(palm, look.skin, look.skin_line, 0.85)
    for finger in fingers:
        pen.stroke(finger, look.skin, 0.052)
    pen.stroke(thumb, look.skin, 0.058)
    crease = mix(look.skin, look.skin_line, 0.4)
    pen.stroke([(-0.06, -0.14), (0.0, -0.155), (0.06, -0.135)], crease, pen.line * 0.6)
    cuff = mix(look.shirt, WHITE, 0.22)
    pen.shape(box(0, 0.06, 0.12, 0.05, 0.03), cuff, look.shirt_line)


# --- face -------------------------------------------------------------------------------------------------------


def face(pen: Pen, look: Look) -> None:
    wide, jaw = look.between(0.385, 0.42), look.between(0.25, 0.31)
    for side in (-1, 1):
        pen.shape(ellipse(side * (wide + 0.01), 0.06, 0.075, 0.1), look.skin, look.skin_line)
        pen.shape(ellipse(side * (wide + 0.015), 0.06, 0.035, 0.055), mix(look.skin, look.skin_line, 0.3))
    outline = [(0, -0.5), (wide * 0.75, -0.4), (wide, -0.1), (wide * 0.97, 0.14), (jaw, 0.38), (0, 0.5)]
    outline = [*outline, *[(-x, y) for x, y in outline[-2:0:-1]]]
    pen.shape(smooth(outline), look.skin, look.skin_line)
    pen.mark("face", smooth(outline))
    blush = mix(look.skin, (232, 70, 80), 0.22)
    for side in (-1, 1):
        pen.shape(ellipse(side * 0.25, 0.19, 0.075, 0.05), blush)
    gaze = look.between(-0.02, 0.02)
    for side in (-1, 1):
        eye(pen.frame(side * 0.17, 0.02, 1.0, mirror=side < 0), look, gaze * side)
    nose = look.between(0.02, 0.045)
    pen.stroke(
        smooth([(-0.01, 0.1), (nose, 0.17), (-0.02, 0.185)], closed=False), mix(look.skin, look.skin_line, 0.75), 0.02
    )
    mouth(pen, look)


def eye(pen: Pen, look: Look, gaze: float) -> None:
    """The eye on the right of the picture, with its brow."""
    mood = look.person.expression
    height = {"surprised": 0.12, "angry": 0.072, "sad": 0.085}.get(mood, 0.095)
    pen.shape(ellipse(0, 0, 0.092, height), WHITE, INK, 0.8)
    iris = 0.05 if mood == "surprised" else 0.062
    pen.shape(ellipse(gaze, 0.008, iris, min(iris, height * 0.92)), look.eyes)
    pen.shape(ellipse(gaze, 0.008, iris * 0.55, iris * 0.55), INK)
    pen.shape(ellipse(gaze - 0.02, -0.018, 0.018, 0.018, count=14), WHITE)
    pen.stroke(ellipse(0, 0, 0.094, height, 195, 345, 16), INK, 0.026)
    if look.person.lashes:
        for x, y in ((0.12, -0.055), (0.135, -0.02)):
            pen.stroke([(0.078, -height * 0.55), (x, y - height * 0.5)], INK, 0.016)
    brow = {
        "smiling": [(-0.095, -0.155), (0.0, -0.19), (0.1, -0.155)],
        "neutral": [(-0.095, -0.155), (0.0, -0.165), (0.1, -0.155)],
        "sad": [(-0.1, -0.225), (0.0, -0.175), (0.105, -0.12)],
        "surprised": [(-0.095, -0.235), (0.0, -0.275), (0.1, -0.235)],
        "angry": [(-0.105, -0.09), (0.0, -0.15), (0.1, -0.205)],
    }[mood]
    thick = 0.028 if look.person.lashes else 0.04
    pen.stroke(smooth(brow, closed=False), mix(look.hair, INK, 0.45), thick)


def mouth(pen: Pen, look: Look) -> None:
    mood, rng = look.person.expression, look.rng
    lips = (196, 62, 74) if look.person.lashes else mix(look.skin, (150, 30, 38), 0.72)
    dark, y = (112, 26, 34), 0.315
    wide = look.between(0.13, 0.165)
    if mood == "smiling" and rng.random() < 0.6:  # open, with teeth
        lower = ellipse(0, y - 0.035, wide, look.between(0.11, 0.14), 0, 180, 20)
        pen.shape(lower, dark, INK, 0.8)
        pen.shape(
            [(-wide * 0.9, y - 0.03), (wide * 0.9, y - 0.03), (wide * 0.78, y + 0.012), (-wide * 0.78, y + 0.012)],
            WHITE,
        )
        pen.stroke([(-wide, y - 0.035), (wide, y - 0.035)], lips, 0.022)
    elif mood == "smiling":
        pen.stroke(ellipse(0, y - 0.08, wide * 1.1, 0.12, 15, 165, 16), lips, 0.034)
    elif mood == "neutral":
        pen.stroke([(-wide * 0.8, y), (wide * 0.8, y)], lips, 0.034)
    elif mood == "sad":
        pen.stroke(ellipse(0, y + 0.085, wide * 0.95, 0.11, 200, 340, 16), lips, 0.034)
        if rng.random() < 0.5:
            side = rng.choice((-1, 1))
            tear = smooth([(side * 0.21, 0.1), (side * 0.25, 0.2), (side * 0.21, 0.24), (side * 0.17, 0.2)])
            pen.shape(tear, (120, 196, 250), (56, 120, 200), 0.6)
    elif mood == "surprised":
        pen.shape(ellipse(0, y + 0.01, look.between(0.06, 0.08), look.between(0.085, 0.11)), dark, lips, 1.3)
    else:  # angry: clenched teeth
        pen.shape(box(0, y, wide * 0.95, 0.055, 0.035), WHITE, INK, 0.9)
        pen.stroke([(-wide * 0.9, y), (wide * 0.9, y)], INK, 0.012)
        for x in np.linspace(-wide * 0.6, wide * 0.6, 4):
            pen.stroke([(x, y - 0.045), (x, y + 0.045)], INK, 0.012)


def glasses(pen: Pen, look: Look) -> None:
    kind = look.person.glasses
    if kind == "none":
        return
    frame = ((36, 36, 42), (36, 36, 42), (130, 40, 40), (40, 56, 110))[look.rng.integers(4)]
    y = 0.025
    for side in (-1, 1):
        pen.stroke([(side * 0.31, y - 0.02), (side * 0.41, y - 0.04)], frame, 0.03)
    pen.stroke(smooth([(-0.06, y - 0.01), (0, y - 0.035), (0.06, y - 0.01)], closed=False), frame, 0.03)
    for side in (-1, 1):
        x = side * 0.178
        if kind == "round":
            pen.shape(ellipse(x, y, 0.138, 0.138), None, frame, 1.7)
        elif kind == "square":
            pen.shape(box(x, y, 0.14, 0.108, 0.014), None, frame, 1.7)
        else:
            pen.shape(
                smooth(
                    [
                        (x - 0.135, y - 0.09),
                        (x + 0.135, y - 0.09),
                        (x + 0.12, y + 0.07),
                        (x, y + 0.12),
                        (x - 0.12, y + 0.07),
                    ]
                ),
                (30, 30, 38),
                (18, 18, 22),
                1.2,
            )
            pen.stroke([(x - 0.07, y + 0.02), (x - 0.02, y - 0.05)], (150, 158, 180), 0.022)


# --- hair -------------------------------------------------------------------------------------------------------


def hair_behind(pen: Pen, look: Look) -> None:
    """What lies behind the head."""
    style, fill, line = look.person.hair_style, look.hair, look.hair_line
    deep = mix(fill, INK, 0.22)
    if style == "long":
        low, flare = look.between(0.82, 1.12), look.between(0.5, 0.6)
        half = [
            (0, -0.64),
            (0.36, -0.52),
            (0.5, -0.2),
            (0.5, 0.2),
            (flare, low - 0.15),
            (flare - 0.1, low),
            (0.2, low - 0.02),
        ]
        pen.shape(smooth([*half, *[(-x, y) for x, y in half[:0:-1]]]), deep, line)
    elif style == "curly":
        for angle in np.linspace(150, 390, 13):
            at = ellipse(0, -0.02, 0.45, 0.5, angle, angle + 1, 2)[0]
            pen.shape(ellipse(*at, 0.17, 0.17), deep, line)
        for side in (-1, 1):
            pen.shape(ellipse(side * 0.47, 0.28, 0.16, 0.16), deep, line)
    elif style == "bun":
        x, size = look.between(-0.1, 0.1), look.between(0.19, 0.23)
        pen.shape(ellipse(x, -0.68, size, size * 0.92), fill, line)
        pen.stroke(ellipse(x, -0.68, size * 0.55, size * 0.5, 180, 330, 12), line, pen.line * 0.7)
    elif style == "ponytail":
        side = float(look.rng.choice((-1, 1)))
        low = look.between(0.62, 0.86)
        tail = [
            (0.22, -0.5),
            (0.5, -0.5),
            (0.76, -0.2),
            (0.78, 0.25),
            (0.66, low),
            (0.58, 0.3),
            (0.5, -0.1),
            (0.34, -0.3),
        ]
        pen.shape(smooth([(side * x, y) for x, y in tail]), fill, line)
        pen.stroke(
            [(side * 0.4, -0.48), (side * 0.5, -0.3)],
            (220, 60, 90) if look.person.hair_color != "red" else (60, 90, 200),
            0.07,
            line,
        )


def hair_before(pen: Pen, look: Look) -> None:
    """What lies on the forehead."""
    style, fill, line = look.person.hair_style, look.hair, look.hair_line
    if style == "bald":
        pen.stroke(
            smooth([(-0.2, -0.36), (-0.12, -0.42), (-0.02, -0.44)], closed=False), mix(look.skin, WHITE, 0.55), 0.035
        )
        return
    if style == "curly":
        for angle in np.linspace(188, 352, 8):
            at = ellipse(0, 0.0, 0.37, 0.44, angle, angle + 1, 2)[0]
            pen.shape(ellipse(*at, 0.125, 0.115), fill, line, 0.8)
        pen.shape(smooth([(-0.33, -0.2), (-0.34, -0.42), (0, -0.54), (0.34, -0.42), (0.33, -0.2), (0, -0.36)]), fill)
        for x, y in ((-0.2, -0.4), (0.02, -0.46), (0.22, -0.38)):
            pen.stroke(ellipse(x, y, 0.06, 0.05, 170, 380, 12), line, pen.line * 0.7)
        return
    if style == "spiky":
        count, points = 7, []
        for i, angle in enumerate(np.linspace(186, 354, 2 * count + 1)):
            reach = look.between(1.26, 1.46) if i % 2 else 1.0
            points.append(ellipse(0, -0.04, 0.44 * reach, 0.5 * reach, angle, angle + 1, 2)[0])
        fringe = [
            (0.36, -0.12),
            (0.26, -0.3),
            (0.16, -0.2),
            (0.05, -0.32),
            (-0.07, -0.2),
            (-0.17, -0.32),
            (-0.28, -0.2),
            (-0.36, -0.12),
        ]
        pen.shape([*points, *fringe], fill, line)
        return
    low = {"short": look.between(-0.02, 0.06), "long": 0.22, "bun": -0.04, "ponytail": -0.02}[style]
    crown = [
        (-0.445, low),
        (-0.46, -0.2),
        (-0.36, -0.48),
        (0, -0.62),
        (0.36, -0.48),
        (0.46, -0.2),
        (0.445, low),
        (0.37, low - 0.06),
    ]
    pen.shape(smooth([*crown, *fringe_of(look, low), (-0.37, low - 0.06)]), fill, line)
    shine = mix(fill, WHITE, 0.3)
    pen.stroke(ellipse(-0.02, -0.1, 0.33, 0.41, 215, 262, 10), shine, 0.035)


def fringe_of(look: Look, low: float) -> list[tuple[float, float]]:
    """The lower edge of the hair on the forehead, from right to left."""
    kind = look.rng.integers(3)
    if kind == 0:  # straight
        return [(0.33, -0.16), (0.3, -0.19), (0.1, -0.2), (-0.1, -0.2), (-0.3, -0.19), (-0.33, -0.16)]
    if kind == 1:  # swept to one side
        swept = [(0.34, -0.18), (0.27, -0.3), (0.1, -0.3), (-0.12, -0.22), (-0.3, -0.13), (-0.34, -0.1)]
        return swept if look.rng.random() < 0.5 else [(-x, y) for x, y in reversed(swept)]
    return [
        (0.34, -0.16),
        (0.24, -0.28),
        (0.08, -0.38),
        (0, -0.42),
        (-0.08, -0.38),
        (-0.24, -0.28),
        (-0.34, -0.16),
    ]  # parted
