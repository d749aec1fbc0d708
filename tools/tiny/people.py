"""What a drawn person can look like: the attributes, their values, and how one is drawn by lot."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields

import numpy as np

NONE = "none"

# Attribute -> its values and how often each comes. These are what prompts name and the classifier finds.
ATTRIBUTES: dict[str, dict[str, float]] = {
    "hair_style": {"short": 3, "long": 3, "curly": 3, "bun": 2, "ponytail": 2, "spiky": 2, "bald": 1},
    "hair_color": dict.fromkeys(("black", "brown", "blonde", "red", "grey", "blue", "pink", "green"), 1),
    "skin": dict.fromkeys(("light", "tan", "brown", "dark"), 1),
    "shirt": dict.fromkeys(("red", "orange", "yellow", "green", "blue", "purple", "white", "black"), 1),
    "expression": {"smiling": 3, "neutral": 2, "sad": 2, "surprised": 2, "angry": 2},
    "glasses": {NONE: 4, "round": 2, "square": 2, "sunglasses": 2},
    "hands": {NONE: 2, "one": 1.5, "two": 1.5},
    "background": dict.fromkeys(("white", "grey", "blue", "green", "yellow", "pink", "orange", "purple"), 1),
}

VIEWS = ("bust", "face", "hand")
HELD_OUT = 8  # one combination of attributes in so many is never drawn for training


@dataclass(frozen=True)
class Person:
    """One person; ``hair_color`` is "none" for a bald one. ``lashes`` goes with the words woman and girl."""

    hair_style: str
    hair_color: str
    skin: str
    shirt: str
    expression: str
    glasses: str
    hands: str
    background: str
    lashes: bool = False

    @property
    def attributes(self) -> dict[str, str]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name in ATTRIBUTES}

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept from training, so that prompts can ask for what was never drawn."""
        return zlib.crc32("/".join(self.attributes.values()).encode()) % HELD_OUT == 0


def values(attribute: str) -> tuple[str, ...]:
    """All values of an attribute, "none" included where a bald person has it."""
    found = tuple(ATTRIBUTES[attribute])
    return (NONE, *found) if attribute == "hair_color" else found


def random_person(rng: np.random.Generator, *, held_out: bool | None = False) -> Person:
    """A person by lot.

    Args:
        held_out: only combinations kept from training (True), only those used in training (False), or any (None).
    """
    while True:
        chosen = {}
        for name, weights in ATTRIBUTES.items():
            share = np.fromiter(weights.values(), float)
            chosen[name] = list(weights)[rng.choice(len(share), p=share / share.sum())]
        if chosen["hair_style"] == "bald":
            chosen["hair_color"] = NONE
        person = Person(**chosen, lashes=bool(rng.random() < 0.5))
        if held_out is None or person.held_out == held_out:
            return person
