"""Prompts to the ids that the two encoders read, framed as the engine frames them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lightweight_engine.flux.chunks import clip_chunks, t5_chunks
from lightweight_engine.flux.prompt import Segment
from lightweight_engine.flux.tokenizers import CLIPTokenizer, T5Tokenizer

from .files import TINY

CLIP_LENGTH = 77
T5_LENGTH = 256


@dataclass(frozen=True)
class Tokens:
    """Both tokenizers."""

    clip: CLIPTokenizer
    t5: T5Tokenizer

    @classmethod
    @cache
    def shipped(cls, root: Path = TINY) -> Tokens:
        return cls(CLIPTokenizer.load(root / "tokenizers/clip_l"), T5Tokenizer.load(root / "tokenizers/t5xxl"))

    def clip_ids(self, text: str) -> list[int]:
        """77 ids: start, text, ends."""
        return clip_chunks([Segment(text, 1.0)], self.clip)[0].ids

    def t5_ids(self, text: str, length: int = T5_LENGTH) -> list[int]:
        """``length`` ids: text, end, padding; a longer text is an error."""
        ids = t5_chunks([Segment(text, 1.0)], self.t5, length)[0].ids
        if len(ids) > length:
            raise ValueError(f"{len(ids)} tokens do not fit in {length}: {text}")
        return ids
