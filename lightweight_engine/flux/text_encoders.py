"""The two text encoders at work: a text to T5 states and a pooled CLIP vector, and prompts to conditioning.

Flux reads of CLIP only the pooled vector of the first chunk, so that emphasis acts on the T5 states alone. Encoding is
one chunk at a time: no prompt depends on which others are encoded with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RequestError
from .chunks import Chunk, clip_chunks, segments_of, t5_chunks
from .clip import CLIPText
from .conditioning import Composition, Conditioning, Scheduled
from .prompt import PromptPart, PromptPlan, Segment
from .t5 import T5Encoder
from .tokenizers import CLIPTokens, T5Tokens

if TYPE_CHECKING:
    from ..request import Compat, Emphasis

DEFAULT_GUIDANCE = 3.5
"""Distilled guidance where none is given (the reference's default)."""


# --- arithmetic in another type than the weights are stored in --------------------------------------------------


_SMALL = 1 << 20  # elements; what is smaller is stored in the type it is used in


class _CastingLinear(nn.Linear):
    """A linear layer that casts its weights to the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class _CastingEmbedding(nn.Embedding):
    """A table whose rows are cast when they are read."""

    compute_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.compute_dtype)


def compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Make an encoder compute in ``dtype`` with its large weights stored as they are, cast layer by layer.

    The reference does so in float32, whatever the file holds.
    """
    for child in module.modules():
        if type(child) is nn.Linear and child.weight.dtype != dtype:
            child.__class__ = _CastingLinear
        elif isinstance(child, nn.Embedding) and child.weight.numel() > _SMALL:
            child.__class__ = _CastingEmbedding
            child.compute_dtype = dtype
        elif not isinstance(child, nn.Linear):
            for name, parameter in child.named_parameters(recurse=False):
                setattr(child, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


# --- one text ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EncodedText:
    """One text on the CPU: the T5 states ``[T, D]`` of each chunk, all as long, and the pooled vector ``[V]``."""

    chunks: tuple[Tensor, ...]
    pooled: Tensor
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.chunks, self.pooled))


def emphasise(states: Tensor, multipliers: Sequence[float], emphasis: Emphasis) -> Tensor:
    """Scale the states ``[T, D]`` of one chunk token by token; ``Original`` then restores the mean of the whole."""
    if emphasis in ("Ignore", "None") or all(multiplier == 1.0 for multiplier in multipliers):
        return states
    scaled = states * torch.tensor(multipliers, dtype=states.dtype, device=states.device)[:, None]
    return scaled * (states.mean() / scaled.mean()) if emphasis == "Original" else scaled


class TextEncoders:
    """Both encoders with their tokenizers.

    Args:
        t5_length: T5 chunks are padded to at least so many tokens (256 in the reference, for dev and schnell).
        compute_dtype: of the arithmetic; the networks are changed to it in place, their storage is not.
    """

    def __init__(
        self,
        clip: CLIPText,
        clip_tokenizer: CLIPTokens,
        t5: T5Encoder,
        t5_tokenizer: T5Tokens,
        *,
        t5_length: int = 256,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        compute_in(clip, compute_dtype)
        compute_in(t5, compute_dtype)
        self.clip = clip
        self.clip_tokenizer = clip_tokenizer
        self.t5 = t5
        self.t5_tokenizer = t5_tokenizer
        self.t5_length = t5_length

    def encode(self, text: str, emphasis: Emphasis = "Original", compat: Compat = "fixed") -> EncodedText:
        """Encode one text of a prompt, which no tags, AND or schedules are left in.

        Raises:
            RequestError: the emphasis cannot be read (see ``parse_attention``).
        """
        warnings: list[str] = []
        segments = segments_of(text, emphasis, compat, warnings)
        chunks = t5_chunks(segments, self.t5_tokenizer, self.t5_length)
        if len(chunks) > 1:
            warnings.append(_break_warning(compat))
        states = tuple(self.t5_states(chunk, emphasis).cpu() for chunk in chunks)
        return EncodedText(states, self.pooled(segments).cpu(), tuple(warnings))

    @torch.no_grad()
    def t5_states(self, chunk: Chunk, emphasis: Emphasis) -> Tensor:
        """The states ``[T, D]`` of one chunk, in float32."""
        states = self.t5(_row(chunk.ids, self.t5))[0].float()
        return emphasise(states, chunk.multipliers, emphasis)

    @torch.no_grad()
    def pooled(self, segments: Sequence[Segment]) -> Tensor:
        """The pooled vector ``[V]`` of the first CLIP chunk, in float32."""
        first = clip_chunks(segments, self.clip_tokenizer, self.clip.params.max_positions)[0]
        return self.clip(_row(first.ids, self.clip), self.clip_tokenizer.end_id)[0].float()


@torch.no_grad()
def clip_states(clip: CLIPText, chunks: Sequence[Chunk], emphasis: Emphasis, skip: int = 1) -> Tensor:
    """The states ``[77 * chunks, D]`` of the ``skip``-th last layer, final-normed and scaled by emphasis.

    Flux does not read them; other models of the family do.
    """
    rows = []
    for chunk in chunks:
        _, states = clip.hidden_states(_row(chunk.ids, clip), skip)
        rows.append(emphasise(clip.text_model.final_layer_norm(states)[0].float(), chunk.multipliers, emphasis))
    return torch.cat(rows)


def _row(ids: list[int], module: nn.Module) -> Tensor:
    return torch.tensor([ids], device=next(module.parameters()).device)


def _break_warning(compat: Compat) -> str:
    if compat == "forge":
        return "the text after BREAK has no effect, as in Forge; use compat 'fixed' to have it read"
    return "BREAK makes a longer context: each part was encoded on its own and all are read"


# --- what was encoded before ------------------------------------------------------------------------------------


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


# --- prompts to conditioning ------------------------------------------------------------------------------------


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
    """

    encoders: Encoders
    model_key: Hashable
    cache: EmbeddingCache
    emphasis: Emphasis = "Original"
    compat: Compat = "fixed"

    def __call__(
        self, plans: Sequence[PromptPlan], guidance: float | None, warnings: list[str] | None = None
    ) -> list[Composition]:
        """The conditioning of each plan, on the CPU. A negative prompt is a plan of one part: take ``parts[0][1]``.

        Args:
            guidance: what ``resolve_guidance`` gives.
        """
        encoded = self.encode([text for plan in plans for part in plan for _, text in part.schedule])
        if warnings is not None:
            found = (warning for text in encoded.values() for warning in text.warnings)
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
                        encoded[text] = fresh = encoders.encode(text, self.emphasis, self.compat)
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
    joined = {text: torch.cat(encoded[text].chunks) for _, text in part.schedule}
    length = max(len(context) for context in joined.values())
    padded = {text: _lengthened(context, length) for text, context in joined.items()}
    return [padded[text] for _, text in part.schedule]


def _lengthened(context: Tensor, length: int) -> Tensor:
    missing = length - len(context)
    return torch.cat([context, context[-1:].expand(missing, -1)]) if missing else context


def _forge_contexts(part: PromptPart, encoded: dict[str, EncodedText]) -> list[Tensor]:
    """The reference takes chunks for batch rows and gives entry i the i-th chunk of all texts in a row."""
    rows = [chunk for _, text in part.schedule for chunk in encoded[text].chunks]
    if len({len(row) for row in rows}) > 1:
        raise RequestError(
            "the texts of a prompt schedule differ in length, which Forge cannot do; use compat 'fixed'", field="prompt"
        )
    return rows[: len(part.schedule)]
