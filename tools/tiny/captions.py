"""Prompts for drawn people: several wordings and frames, words dropped by lot.

``UNSEEN_FRAMES`` are kept from training, so that evaluation asks in sentences that were never read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .people import NONE, Person

# Which attributes a close-up still shows.
VISIBLE: dict[str, tuple[str, ...]] = {
    "bust": ("hair", "skin", "shirt", "expression", "glasses", "hands", "background"),
    "face": ("hair", "skin", "expression", "glasses", "background"),
    "hand": ("skin", "background"),
}

SUBJECTS = {True: ("woman", "girl", "lady", "person"), False: ("man", "boy", "guy", "person")}

HAIR_COLOR = {"blonde": ("blonde", "blond", "yellow"), "red": ("red", "ginger"), "grey": ("grey", "gray", "silver")}
STYLED = {
    "short": ("short {c} hair", "{c} short hair", "short cropped {c} hair"),
    "long": ("long {c} hair", "{c} long hair", "long straight {c} hair"),
    "curly": ("curly {c} hair", "{c} curly hair", "{c} curls"),
    "bun": ("{c} hair in a bun", "a {c} bun", "{c} hair bun"),
    "ponytail": ("a {c} ponytail", "{c} hair in a ponytail", "{c} ponytail"),
    "spiky": ("spiky {c} hair", "{c} spiky hair", "{c} spikes of hair"),
}
STYLE_ONLY = {
    "short": ("short hair",),
    "long": ("long hair",),
    "curly": ("curly hair", "curls"),
    "bun": ("hair in a bun", "a bun", "a hair bun"),
    "ponytail": ("a ponytail", "hair in a ponytail"),
    "spiky": ("spiky hair",),
    "bald": ("a bald head", "no hair"),
}
SKIN = {
    "light": ("light skin", "pale skin", "fair skin"),
    "tan": ("tan skin", "tanned skin", "olive skin"),
    "brown": ("brown skin",),
    "dark": ("dark skin",),
}
EXPRESSION = {
    "smiling": ("smiling", "a smile", "happy", "with a happy face", "cheerful"),
    "neutral": ("neutral expression", "a neutral face", "calm", "serious"),
    "sad": ("sad", "a sad face", "unhappy", "looking sad"),
    "surprised": ("surprised", "a surprised face", "looking surprised", "astonished"),
    "angry": ("angry", "an angry face", "looking angry", "furious"),
}
GLASSES = {
    NONE: ("no glasses", "without glasses"),
    "round": ("round glasses", "wearing round glasses", "glasses with round frames"),
    "square": ("square glasses", "wearing square glasses", "rectangular glasses"),
    "sunglasses": ("sunglasses", "wearing sunglasses", "dark sunglasses"),
}
HANDS = {
    NONE: ("hands down", "no hands"),
    "one": ("one hand raised", "raising one hand", "waving", "waving a hand", "one raised hand"),
    "two": ("both hands raised", "two hands up", "raising both hands", "hands up", "two raised hands"),
}
SHIRT = ("{c} shirt", "a {c} shirt", "wearing a {c} shirt", "{c} sweater", "in a {c} shirt", "{c} clothes")
BACKGROUND = ("{c} background", "a {c} background", "on a {c} background", "{c} wall behind", "{c} backdrop")

OPENINGS = (
    "",
    "",
    "",
    "portrait of ",
    "drawing of ",
    "a drawing of ",
    "cartoon of ",
    "picture of ",
    "a portrait of ",
    "illustration of ",
    "photo of ",
)
ENDINGS = (
    "",
    "",
    "",
    "",
    ".",
    ", high quality",
    ", flat colors",
    ", masterpiece, best quality",
    ", detailed",
    ", cartoon style",
)

# {s} subject, {0} the first phrase, {1} the others
FRAMES = (
    "{o}a {s} with {0}, {1}",
    "{o}a {s}, {0}, {1}",
    "{s}, {0}, {1}",
    "{0}, {1}",
    "{0}, {1}, {s}",
    "{o}a {s} with {0} and {1}",
    "{o}one {s}: {0}, {1}",
    "a {s} who has {0}, {1}",
)
ADJECTIVES = {
    "smiling": ("smiling", "happy", "cheerful"),
    "neutral": ("calm", "serious"),
    "sad": ("sad", "unhappy"),
    "surprised": ("surprised", "astonished"),
    "angry": ("angry", "furious"),
}
JOINTS = (", ", ", ", ", ", ", ", " and ", " ")

UNSEEN_FRAMES = (
    "{1}, {s} with {0}",
    "{o}{s} with {0}, also {1}",
    "there is a {s}, {0}, and {1}",
    "{0} and {1}, {o}a {s}",
)

_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


@dataclass(frozen=True)
class Caption:
    """A prompt, and the attributes that it names."""

    text: str
    named: dict[str, str]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[rng.integers(len(options))]


def _hair(person: Person, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    style, color = person.hair_style, person.hair_color
    chance = rng.random()
    if style == "bald":
        return _pick(rng, STYLE_ONLY[style]), {"hair_style": style, "hair_color": color}
    if chance < 0.12:
        return _pick(rng, STYLE_ONLY[style]), {"hair_style": style}
    word = _pick(rng, HAIR_COLOR.get(color, (color,)))
    if chance < 0.27:
        return f"{word} hair", {"hair_color": color}
    return _pick(rng, STYLED[style]).format(c=word), {"hair_style": style, "hair_color": color}


def _phrase(group: str, person: Person, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    if group == "hair":
        return _hair(person, rng)
    value = person.attributes[group]
    if group in ("shirt", "background"):
        word = _pick(rng, ("grey", "gray")) if value == "grey" else value
        return _pick(rng, SHIRT if group == "shirt" else BACKGROUND).format(c=word), {group: value}
    words = {"skin": SKIN, "expression": EXPRESSION, "glasses": GLASSES, "hands": HANDS}[group]
    return _pick(rng, words[value]), {group: value}


def _groups(person: Person, view: str, rng: np.random.Generator, least: int) -> list[str]:
    """Which groups a prompt names, in random order; absent glasses and hands are seldom worth a word."""
    groups = [g for g in VISIBLE[view] if not (person.attributes.get(g) == NONE and rng.random() < 0.7)]
    count = len(groups) if rng.random() < 0.5 else int(rng.integers(min(least, len(groups)), len(groups) + 1))
    return [groups[i] for i in rng.permutation(len(groups))[:count]]


def caption(
    person: Person, rng: np.random.Generator, view: str = "bust", *, frames: Sequence[str] = FRAMES, least: int = 1
) -> Caption:
    """A prompt for a person, naming at least ``least`` groups of attributes."""
    groups = _groups(person, view, rng, least)
    subject, named = _pick(rng, SUBJECTS[person.lashes]), {}
    if "expression" in groups and len(groups) > 1 and rng.random() < 0.3:
        groups.remove("expression")
        subject = f"{_pick(rng, ADJECTIVES[person.expression])} {subject}"
        named["expression"] = person.expression
    parts = [_phrase(group, person, rng) for group in groups]
    named |= {name: value for _, found in parts for name, value in found.items()}
    phrases, opening = [phrase for phrase, _ in parts], _pick(rng, OPENINGS)
    if view != "bust":
        opening = _pick(rng, (f"close-up of a {view}, ", f"{view} close-up, ", f"close up, {view}, "))
        text = opening + ", ".join(phrases)
    elif len(phrases) == 1:
        text = _short(rng, opening, subject, phrases[0])
    else:
        text = _pick(rng, frames).format(phrases[0], _pick(rng, JOINTS).join(phrases[1:]), o=opening, s=subject)
    text = _ARTICLE.sub(r"\1n ", text) + _pick(rng, ENDINGS)
    return Caption(text[:1].upper() + text[1:] if rng.random() < 0.3 else text, named)


def _short(rng: np.random.Generator, opening: str, subject: str, phrase: str) -> str:
    frame = _pick(rng, ("{o}a {s} with {p}", "{p}", "{s}, {p}", "{o}a {s}, {p}"))
    return frame.format(o=opening, s=subject, p=phrase)
