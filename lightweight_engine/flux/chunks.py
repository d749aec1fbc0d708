"""Weighted segments to chunks of token ids with a multiplier each, for CLIP and T5.

Every segment is tokenised on its own, as the reference does, so that each begins a new word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .prompt import BREAK_WORD, Segment, is_break, parse_attention
from .prompt_slips import slips_of
from .tokenizers import CLIPTokens, T5Tokens

if TYPE_CHECKING:
    from ..request import Compat, Emphasis

COMMA_BACKTRACK = 20
"""A chunk of CLIP that is full is cut after a comma among its last so many tokens (constant in the reference)."""


class Chunk(NamedTuple):
    """Token ids, and the emphasis of each."""

    ids: list[int]
    multipliers: list[float]


def segments_of(
    text: str, emphasis: Emphasis = "Original", compat: Compat = "fixed", warnings: list[str] | None = None
) -> list[Segment]:
    """The segments of a text; the mode ``None`` takes it literally, BREAK included."""
    if emphasis == "None":
        return [Segment(text, 1.0)]
    if warnings is not None:
        warnings += slips_of(text)
    return parse_attention(text, compat=compat, warnings=warnings)


def clip_chunks(segments: Sequence[Segment], tokenizer: CLIPTokens, length: int = 77) -> list[Chunk]:
    """Chunks of exactly ``length`` ids: start, at most length - 2 tokens, ends. A break closes a chunk."""
    room = length - 2
    bodies: list[Chunk] = []
    body = Chunk([], [])
    last_comma: int | None = None

    def close(kept: int) -> None:
        nonlocal body, last_comma
        bodies.append(Chunk(body.ids[:kept], body.multipliers[:kept]))
        body, last_comma = Chunk(body.ids[kept:], body.multipliers[kept:]), None

    for segment in segments:
        if is_break(segment):
            close(len(body.ids))
            continue
        for token in tokenizer.encode(segment.text):
            full = len(body.ids) == room
            if full and token != tokenizer.comma_id and last_comma is not None and room - last_comma <= COMMA_BACKTRACK:
                close(last_comma + 1)
            elif full:
                close(room)
            if token == tokenizer.comma_id:
                last_comma = len(body.ids)
            body.ids.append(token)
            body.multipliers.append(segment.weight)
    if body.ids or not bodies:
        close(len(body.ids))
    return [_framed(chunk, tokenizer, length) for chunk in bodies]


def _framed(body: Chunk, tokenizer: CLIPTokens, length: int) -> Chunk:
    ends = length - 1 - len(body.ids)
    return Chunk([tokenizer.start_id, *body.ids, *[tokenizer.end_id] * ends], [1.0, *body.multipliers, *[1.0] * ends])


def t5_chunks(segments: Sequence[Segment], tokenizer: T5Tokens, min_length: int = 256) -> list[Chunk]:
    """Chunks of tokens, an end and padding, all as long as the longest and at least ``min_length``; never cut."""
    bodies = [Chunk([], [])]
    for segment in segments:
        if is_break(segment):
            bodies.append(Chunk([], []))
            continue
        ids = tokenizer.encode(segment.text)
        bodies[-1].ids.extend(ids)
        bodies[-1].multipliers.extend([segment.weight] * len(ids))
    if len(bodies) > 1 and not bodies[-1].ids:
        bodies.pop()
    length = max(min_length, *(len(body.ids) + 1 for body in bodies))
    padded = []
    for body in bodies:
        padding = length - len(body.ids) - 1
        ids = [*body.ids, tokenizer.end_id, *[tokenizer.pad_id] * padding]
        padded.append(Chunk(ids, [*body.multipliers, 1.0, *[1.0] * padding]))
    return padded


def t5_length(text: str, tokenizer: Callable[[], T5Tokens], min_length: int = 256) -> int:
    """Tokens that T5 is given for a text at most, with ends and padding: what encoding it will cost.

    Brackets are counted as the text that they may be, so that nothing is parsed for it, and the time is linear. A
    short text is padded anyway and is not tokenised; one of other letters is, as some of them become several.

    Args:
        tokenizer: gives the tokenizer, where a text needs it.
    """
    pieces = BREAK_WORD.split(text)
    counted = [piece for piece in pieces if len(piece) + 2 > min_length or not piece.isascii()]  # a first blank, an end
    longest = max((len(tokenizer().encode(piece)) + 1 for piece in counted), default=0)
    return len(pieces) * max(min_length, longest)
