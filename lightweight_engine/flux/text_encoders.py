"""The two text encoders at work: a text to T5 states and a pooled CLIP vector.

Flux reads of CLIP only the pooled vector of the first chunk, so that emphasis acts on the T5 states alone. Encoding is
one chunk at a time: no prompt depends on which others are encoded with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .chunks import Chunk, clip_chunks, segments_of, t5_chunks
from .clip import CLIPText
from .prompt import Segment
from .t5 import T5Encoder
from .tokenizers import CLIPTokens, T5Tokens

if TYPE_CHECKING:
    from ..request import Compat, Emphasis

Check = Callable[[Literal["t5", "clip"], Sequence[Tensor]], None]
"""Told what a network computed for a text, on its device; may raise."""


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
    """

    def __init__(
        self,
        clip: CLIPText,
        clip_tokenizer: CLIPTokens,
        t5: T5Encoder,
        t5_tokenizer: T5Tokens,
        *,
        t5_length: int = 256,
    ) -> None:
        self.clip = clip
        self.clip_tokenizer = clip_tokenizer
        self.t5 = t5
        self.t5_tokenizer = t5_tokenizer
        self.t5_length = t5_length

    def encode(
        self, text: str, emphasis: Emphasis = "Original", compat: Compat = "fixed", check: Check = lambda *_: None
    ) -> EncodedText:
        """Encode one text of a prompt, which no tags, AND or schedules are left in.

        Args:
            check: looks at the numbers of each network, where it computed them.

        Raises:
            RequestError: the emphasis cannot be read (see ``parse_attention``).
        """
        warnings: list[str] = []
        segments = segments_of(text, emphasis, compat, warnings)
        chunks = t5_chunks(segments, self.t5_tokenizer, self.t5_length)
        if len(chunks) > 1:
            warnings.append(_break_warning(compat))
        states = [self.t5_states(chunk, emphasis) for chunk in chunks]
        check("t5", states)
        pooled = self.pooled(segments)
        check("clip", [pooled])
        return EncodedText(tuple(each.cpu() for each in states), pooled.cpu(), tuple(warnings))

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
