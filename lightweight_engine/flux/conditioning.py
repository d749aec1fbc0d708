"""What the text of a prompt becomes, as plain data between the text encoders and the sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def lengthened(context: Tensor, length: int) -> Tensor:
    """A context ``[T, D]`` at ``length`` tokens, by repeating its last row."""
    missing = length - len(context)
    return torch.cat((context, context[-1:].expand(missing, -1))) if missing else context


@dataclass(frozen=True, eq=False)
class Conditioning:
    """One text, encoded: T5 states ``[T, D]``, pooled CLIP vector ``[V]``, distilled guidance (None for schnell).

    Compared by identity, so that what is computed from one can be kept beside it.
    """

    context: Tensor
    pooled: Tensor
    guidance: float | None


@dataclass(frozen=True)
class Scheduled:
    """A text that changes while sampling: (last call index that uses it, conditioning), in order."""

    entries: tuple[tuple[int, Conditioning], ...]

    def at(self, call_index: int) -> Conditioning:
        """The entry for the ``call_index``-th guided call (from 0); past the last end it is the first entry again."""
        return next((cond for end, cond in self.entries if call_index <= end), self.entries[0][1])


@dataclass(frozen=True)
class Composition:
    """The prompt of one picture: parts joined by AND, each with its weight."""

    parts: tuple[tuple[float, Scheduled], ...]
