"""The prompt language: network tags, AND, schedules and emphasis. Pure Python, no tensors.

A prompt is read in this order: ``parse_networks`` takes ``<lora:name:weight>`` tags out, ``split_and`` cuts at AND,
``schedule`` (in ``prompt_schedule``) resolves ``[from:to:when]`` and ``[a|b]`` into texts over steps, and
``parse_attention`` turns each text into weighted segments. ``plan_prompt`` does the second and third at once.

Where the reference (Forge) drops or crashes, ``compat="fixed"`` does what was meant and appends a sentence to
``warnings``. All work is near linear in the length of the text, also on hostile input.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..errors import RequestError
from .prompt_schedule import schedule

if TYPE_CHECKING:
    from ..request import Compat


class Segment(NamedTuple):
    """A piece of text with one emphasis weight."""

    text: str
    weight: float


BREAK = Segment("BREAK", -1.0)
"""Ends a chunk of tokens. The reference marks it by the weight -1, which ``forge`` multiplies like any other."""


# --- network tags -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkTag:
    """``<kind:item:item…>``: an item ``key=value`` is named, any other positional."""

    kind: str
    items: tuple[str, ...]

    @property
    def positional(self) -> tuple[str, ...]:
        return tuple(item for item in self.items if item.count("=") != 1)

    @property
    def named(self) -> dict[str, str]:
        return dict(item.split("=") for item in self.items if item.count("=") == 1)

    def __str__(self) -> str:
        return f"<{':'.join((self.kind, *self.items))}>"


@dataclass(frozen=True)
class LoraTag:
    """The LoRA that a tag asks for: strengths on the text encoders and the transformer, and a rank limit (unused)."""

    name: str
    te: float
    unet: float
    dyn: int | None


_TAG_START = re.compile(r"<(\w+):")


def parse_networks(text: str) -> tuple[str, list[NetworkTag]]:
    """Take the network tags out of ``text``; the blanks around them stay."""
    kept, tags, done, start = [], [], 0, 0
    while (found := _TAG_START.search(text, start)) is not None:
        end = text.find(">", found.end())
        if end < 0:
            break
        if end == found.end():  # "<lora:>" names nothing and stays text
            start = end
            continue
        kept.append(text[done : found.start()])
        tags.append(NetworkTag(found[1], tuple(text[found.end() : end].split(":"))))
        done = start = end + 1
    return "".join(kept) + text[done:], tags


def read_lora_tag(tag: NetworkTag) -> LoraTag:
    """Read ``<lora:name:te:unet:dyn>``, or the same by name (``te=``, ``unet=``, ``dyn=``).

    Raises:
        RequestError: no name, or a strength that is not a finite number; the message names the tag.
    """
    place, named = tag.positional, tag.named
    try:
        name = place[0]
        te = float(place[1]) if len(place) > 1 else 1.0
        te = float(named.get("te", te))
        unet = float(place[2]) if len(place) > 2 else te
        unet = float(named.get("unet", unet))
        dyn = int(place[3]) if len(place) > 3 else None
        dyn = int(named["dyn"]) if "dyn" in named else dyn
        if not (math.isfinite(te) and math.isfinite(unet)):
            raise ValueError("a strength must be finite")
    except (IndexError, ValueError) as error:
        hint = "; a colon ends the name: give a LoRA that has one by loras (--lora)" if len(place) > 1 else ""
        why = "it has no name" if isinstance(error, IndexError) else "a strength in it is no number"
        raise RequestError(
            f"prompt: the tag {str(tag)[:200]} cannot be read ({why}); write <lora:name:0.8>{hint}", field="prompt"
        ) from error
    return LoraTag(name, te, unet, dyn)


def lora_weights(text: str) -> dict[str, list]:
    """The LoRA tags of ``text`` as columns ``names``, ``te``, ``unet`` and ``dyn``.

    Raises:
        RequestError: as ``read_lora_tag``; its cause is the error of the unreadable value.
    """
    tags = [read_lora_tag(tag) for tag in parse_networks(text)[1] if tag.kind == "lora"]
    return {
        "names": [tag.name for tag in tags],
        "te": [tag.te for tag in tags],
        "unet": [tag.unet for tag in tags],
        "dyn": [tag.dyn for tag in tags],
    }


# --- AND --------------------------------------------------------------------------------------------------------

_AND = re.compile(r"\bAND\b")
_PART_WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")


def _cut_weight(part: str) -> tuple[float, str]:
    """Cut ``: number`` from the end of a part; blanks at the end go in any case."""
    part = part.rstrip()
    head, colon, tail = part.rpartition(":")
    if colon and _PART_WEIGHT.fullmatch(tail.strip()) and math.isfinite(float(tail)):
        return float(tail), head.rstrip()
    return 1.0, part


def split_and(text: str, compat: Compat = "fixed") -> list[tuple[float, str]]:
    """Cut ``text`` at the word AND into (weight, text); ``fixed`` reads weights only where there is an AND."""
    parts = _AND.split(text)
    if len(parts) == 1 and compat == "fixed":
        return [(1.0, text)]
    return [_cut_weight(part) for part in parts]


# --- the plan of a prompt ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptPart:
    """One part of a prompt: its weight under AND, and its texts with the last step that uses each."""

    weight: float
    schedule: tuple[tuple[int, str], ...]


PromptPlan = tuple[PromptPart, ...]


def plan_prompt(text: str, steps: int, *, base_steps: int | None = None, compat: Compat = "fixed") -> PromptPlan:
    """Which texts a prompt without tags needs, and when.

    Args:
        steps: of this pass, doubled for samplers that call the model twice a step.
        base_steps: of the first pass, doubled likewise, when this is the hires pass.
    """
    parts = split_and(text, compat)
    return tuple(PromptPart(weight, tuple(schedule(part, steps, base_steps))) for weight, part in parts)


def plan_negative(text: str, steps: int, *, base_steps: int | None = None) -> PromptPlan:
    """As ``plan_prompt``, for a negative prompt: AND and a weight at the end mean nothing there."""
    return (PromptPart(1.0, tuple(schedule(text, steps, base_steps))),)


# --- emphasis ---------------------------------------------------------------------------------------------------

TOKEN = re.compile(r"\\[()\[\]\\]?|:\s*([-+]?[.\d]+)\s*\)|[()\[\]:]|[^\\()\[\]:]+")
BREAK_WORD = re.compile(r"\bBREAK\b")
_FACTOR = {"(": 1.1, "[": 1 / 1.1}


class _Weights:
    """Segments under construction, with the places of the brackets that are still open."""

    def __init__(self, scale_breaks: bool) -> None:
        self.texts: list[str] = []
        self.weights: list[float] = []
        self.breaks: set[int] = set()
        self.open: dict[str, list[int]] = {"(": [], "[": []}
        self.scale_breaks = scale_breaks

    def add(self, text: str) -> None:
        """Append text; the word BREAK, with the blanks around it, becomes a break."""
        pieces = BREAK_WORD.split(text)
        for i, piece in enumerate(pieces):
            if i > 0:
                self.breaks.add(len(self.texts))
                self._append(*BREAK)
                piece = piece.lstrip()
            self._append(piece if i == len(pieces) - 1 else piece.rstrip(), 1.0)

    def _append(self, text: str, weight: float) -> None:
        self.texts.append(text)
        self.weights.append(weight)

    def close(self, bracket: str, factor: float) -> None:
        """Close the last open bracket of that kind; one factor at a time, as equal weights are merged later."""
        start = self.open[bracket].pop()
        self.weights[start:] = [weight * factor for weight in self.weights[start:]]
        if not self.scale_breaks:
            for i in [i for i in self.breaks if i >= start]:
                self.weights[i] = BREAK.weight

    def close_all(self) -> None:
        """Brackets that were never closed reach to the end; the outermost counts first."""
        for bracket, places in self.open.items():
            places.reverse()
            while places:
                self.close(bracket, _FACTOR[bracket])

    def merged(self) -> list[Segment]:
        """The segments, neighbours of equal weight joined; a break that still is one stands alone."""
        segments: list[Segment] = []
        run: list[str] = []
        for i, (text, weight) in enumerate(zip(self.texts, self.weights, strict=True)):
            alone = not self.scale_breaks and (i in self.breaks or i - 1 in self.breaks)
            if run and (alone or weight != self.weights[i - 1]):
                segments.append(Segment("".join(run), self.weights[i - 1]))
                run = []
            run.append(text)
        return [*segments, Segment("".join(run), self.weights[-1])] if run else [Segment("", 1.0)]


def parse_attention(text: str, *, compat: Compat = "fixed", warnings: list[str] | None = None) -> list[Segment]:
    """Read ``(more)``, ``[less]``, ``(weighted:1.3)``, backslash escapes and BREAK.

    A weight that is no number (``1.2.3``) is literal text with a warning, in ``forge`` an error.

    Raises:
        RequestError: such a weight in ``forge``; or the weights multiply beyond what a float holds.
    """
    found = _Weights(scale_breaks=compat == "forge")
    for token in TOKEN.finditer(text):
        piece, number = token[0], token[1]
        if piece[0] == "\\":
            found.add(piece[1:])
        elif piece in _FACTOR:
            found.open[piece].append(len(found.texts))
        elif number is not None and found.open["("]:
            _close_weighted(found, piece, number, compat, warnings)
        elif piece == ")" and found.open["("]:
            found.close("(", _FACTOR["("])
        elif piece == "]" and found.open["["]:
            found.close("[", _FACTOR["["])
        else:
            found.add(piece)
    found.close_all()
    segments = found.merged()
    if not all(math.isfinite(weight) for _, weight in segments):
        raise RequestError(
            "the emphasis of the prompt is beyond all numbers; use fewer nested brackets", field="prompt"
        )
    return segments


def _close_weighted(found: _Weights, piece: str, number: str, compat: Compat, warnings: list[str] | None) -> None:
    """Apply ``:number)``; see ``parse_attention`` for a number that is none."""
    try:
        weight = float(number)
        if math.isinf(weight):
            raise ValueError(f"{number[:20]}... is too large")
    except ValueError as error:
        if compat == "forge":
            raise RequestError(f"the emphasis weight {number[:50]!r} is not a number", field="prompt") from error
        if warnings is not None:
            warnings.append(f"the emphasis weight {number[:50]!r} is not a number; it was read as text")
        found.add(piece[:-1])
        weight = _FACTOR["("]
    found.close("(", weight)


def is_break(segment: Segment) -> bool:
    """Whether the segment ends a chunk of tokens."""
    return segment == BREAK
