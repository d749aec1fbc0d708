"""Prompts to conditioning: new texts are encoded, known ones remembered, schedules put together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import RequestError
from .conditioning import Composition, Conditioning, Scheduled, lengthened
from .prompt import PromptPart, PromptPlan
from .prompt_slips import slip_of_part
from .text_encoders import Check, EncodedText, TextEncoders

if TYPE_CHECKING:
    from ..request import Compat, Emphasis

DEFAULT_GUIDANCE = 3.5
"""Distilled guidance where none is given (the reference's default)."""


class EmbeddingCache:
    """Encoded texts by content, at most ``max_bytes`` of them, the least used dropped first. Safe between threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._kept: OrderedDict[Hashable, EncodedText] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> EncodedText | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, encoded: EncodedText) -> None:
        """Keep ``encoded``, unless it alone is larger than the cache."""
        with self._lock:
            if key in self._kept or encoded.nbytes > self.max_bytes:
                return
            self._kept[key] = encoded
            self.nbytes += encoded.nbytes
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self.nbytes = 0


def resolve_guidance(distilled: float | None, guidance_embed: bool, compat: Compat = "fixed") -> float | None:
    """The guidance that the transformer gets: None for schnell; absent is 3.5, and so is 0 in ``forge``."""
    if not guidance_embed:
        return None
    if distilled is None or (compat == "forge" and distilled == 0):
        return DEFAULT_GUIDANCE
    return distilled


Encoders = Callable[[], AbstractContextManager[TextEncoders]]


@dataclass(frozen=True)
class Conditioner:
    """Turns planned prompts into conditioning, with the encoders resident only while a new text is encoded.

    Args:
        encoders: makes the encoders resident for as long as the context lasts.
        model_key: tells these encoders, with all that was merged into them, from any others in ``cache``.
        check: see ``TextEncoders.encode``; what is in the cache has passed it.
    """

    encoders: Encoders
    model_key: Hashable
    cache: EmbeddingCache
    emphasis: Emphasis = "Original"
    compat: Compat = "fixed"
    check: Check = lambda *_: None

    def adapted(self, key: Hashable) -> Conditioner:
        """The same for encoders that are changed by LoRAs, as ``key`` tells."""
        return replace(self, model_key=(self.model_key, key))

    def __call__(
        self, plans: Sequence[PromptPlan], guidance: float | None, warnings: list[str] | None = None
    ) -> list[Composition]:
        """The conditioning of each plan, on the CPU. A negative prompt is a plan of one part: take ``parts[0][1]``.

        Args:
            guidance: what ``resolve_guidance`` gives.
        """
        encoded = self.encode([text for plan in plans for part in plan for _, text in part.schedule])
        if warnings is not None:
            shares = [part for plan in plans if len(plan) > 1 for part in plan]
            found = [warning for part in shares for _, text in part.schedule for warning in slip_of_part(text)]
            found += [warning for text in encoded.values() for warning in text.warnings]
            warnings.extend(warning for warning in dict.fromkeys(found) if warning not in warnings)
        made: dict[PromptPart, Scheduled] = {}
        for part in (part for plan in plans for part in plan):
            if part not in made:
                made[part] = self._scheduled(part, encoded, guidance)
        return [Composition(tuple((part.weight, made[part]) for part in plan)) for plan in plans]

    def encode(self, texts: Sequence[str]) -> dict[str, EncodedText]:
        """Each distinct text encoded, from the cache where it is there."""
        keys = {text: (self.model_key, self.emphasis, self.compat, text) for text in texts}
        encoded = {text: self.cache.get(key) for text, key in keys.items()}
        if any(found is None for found in encoded.values()):
            with self.encoders() as encoders:
                for text, found in encoded.items():
                    if found is None:
                        encoded[text] = fresh = encoders.encode(text, self.emphasis, self.compat, self.check)
                        self.cache.put(keys[text], fresh)
        return {text: found for text, found in encoded.items() if found is not None}

    def _scheduled(self, part: PromptPart, encoded: dict[str, EncodedText], guidance: float | None) -> Scheduled:
        contexts = (_forge_contexts if self.compat == "forge" else _fixed_contexts)(part, encoded)
        made: dict[tuple[int, str], Conditioning] = {}
        entries = []
        for (end, text), context in zip(part.schedule, contexts, strict=True):
            key = (id(context), text)  # an alternation repeats its texts: one object each
            if key not in made:
                made[key] = Conditioning(context, encoded[text].pooled, guidance)
            entries.append((end, made[key]))
        return Scheduled(tuple(entries))


def _fixed_contexts(part: PromptPart, encoded: dict[str, EncodedText]) -> list[Tensor]:
    """One context per entry: all its chunks in a row, as long as the longest by repeating the last row."""
    joined = {text: _joined(encoded[text].chunks) for _, text in part.schedule}
    length = max(len(context) for context in joined.values())
    padded = {text: lengthened(context, length) for text, context in joined.items()}
    return [padded[text] for _, text in part.schedule]


def _joined(chunks: tuple[Tensor, ...]) -> Tensor:
    """Chunks in a row; the one that most texts have is not copied."""
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _forge_contexts(part: PromptPart, encoded: dict[str, EncodedText]) -> list[Tensor]:
    """The reference takes chunks for batch rows and gives entry i the i-th chunk of all texts in a row."""
    rows = [chunk for _, text in part.schedule for chunk in encoded[text].chunks]
    if len({len(row) for row in rows}) > 1:
        raise RequestError(
            "the texts of a prompt schedule differ in length, which Forge cannot do; use compat 'fixed'", field="prompt"
        )
    return rows[: len(part.schedule)]
