"""Guidance: from a velocity network and conditionings to ``denoise(x, sigma)``.

Classifier-free guidance with negative prompts, compositions of weighted parts, and the rules that leave the negative
prompt out of some calls. A call of the network takes several rows at once: the parts of every picture, then the
negative prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import RequestError
from ..labels import Compat
from .conditioning import Composition, Conditioning, Scheduled, lengthened
from .sampler_parts import Denoise

Predict = Callable[[Tensor, float, Sequence[Conditioning]], Tensor]
"""``(x [R, C, h, w], sigma, R conditionings of one length) -> velocity [R, C, h, w]``."""

_MAX_TILING = 4  # contexts are repeated up to this often to share a call


@dataclass(frozen=True)
class SkipRules:
    """When a call leaves the negative prompt out.

    Args:
        s_min_uncond: below this sigma, at every other call; 0 is off.
        s_min_uncond_all: at every such call.
        skip_early_cond: in this fraction of the calls from the first on; 0 is off.
        total_calls: how many calls ``skip_early_cond`` counts with (``labels.schedule_steps``).
    """

    s_min_uncond: float = 0.0
    s_min_uncond_all: bool = False
    skip_early_cond: float = 0.0
    total_calls: int = 1

    def skips(self, call: int, sigma: float) -> bool:
        if self.skip_early_cond > 0 and call / self.total_calls <= self.skip_early_cond:
            return True
        return 0 < self.s_min_uncond > sigma and (self.s_min_uncond_all or call % 2 == 1)


class Guided:
    """``denoise(x, sigma)`` for a batch, counting its calls from 0 (prompt schedules and skip rules go by the count).

    Args:
        predict: the network.
        positives: one composition for each picture.
        negatives: one for each picture, or None to never evaluate any.
        cfg_scale: 1 leaves the negatives out.
        compat: with ``forge``, parts at a scale of 1 multiply the picture by the sum of their weights.

    Raises:
        RequestError: (``fixed`` only) the weights of a composition add up to 0.
    """

    def __init__(
        self,
        predict: Predict,
        positives: Sequence[Composition],
        negatives: Sequence[Scheduled] | None = None,
        cfg_scale: float = 1.0,
        *,
        rules: SkipRules | None = None,
        compat: Compat = "fixed",
    ) -> None:
        self._predict = predict
        self._positives = positives
        self._negatives = negatives if not math.isclose(cfg_scale, 1.0) else None
        self._cfg_scale = cfg_scale
        self._rules = rules or SkipRules()
        self._compat = compat
        self._owners = [owner for owner, picture in enumerate(positives) for _ in picture.parts]
        self._weights = [[weight for weight, _ in picture.parts] for picture in positives]
        if compat == "fixed" and any(math.isclose(sum(weights), 0.0, abs_tol=1e-6) for weights in self._weights):
            raise RequestError("prompt: the weights of the parts joined by AND add up to 0; change one", field="prompt")
        self._fitted: dict[tuple[Conditioning, int, bool], Conditioning] = {}
        self.calls = 0
        self.unconditional: Tensor | None = None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The denoised latent ``[B, C, h, w]`` in float32; ``unconditional`` is then that of the negatives, if any."""
        call, self.calls = self.calls, self.calls + 1
        guided = self._negatives is not None and not self._rules.skips(call, sigma)
        parts = [part.at(call) for picture in self._positives for _, part in picture.parts]
        negatives = [negative.at(call) for negative in self._negatives] if guided and self._negatives else []
        rows, self.unconditional = self._denoise(x, sigma, self._extend(parts), self._extend(negatives))
        denoised = self._compose(rows)
        if self.unconditional is None:
            return denoised * self._edit(denoised) if self._compat == "forge" and self._edited else denoised
        scale = self._edit(denoised) * self._cfg_scale if self._edited else self._cfg_scale
        return self.unconditional + (denoised - self.unconditional) * scale

    def _denoise(
        self, x: Tensor, sigma: float, parts: list[Conditioning], negatives: list[Conditioning]
    ) -> tuple[Tensor, Tensor | None]:
        """The denoised latents of all parts, and of the negatives; in one call of the network where lengths allow."""
        owned = x if self._owners == list(range(len(x))) else torch.stack([x[owner] for owner in self._owners])
        if not negatives:
            return self._one_call(owned, sigma, parts), None
        length = shared_length(len(parts[0].context), len(negatives[0].context))
        if length is None:
            return self._one_call(owned, sigma, parts), self._one_call(x, sigma, negatives)
        tiled = [self._fit(cond, length, tile=True) for cond in (*parts, *negatives)]
        rows = self._one_call(torch.cat((owned, x)), sigma, tiled)
        return rows[: len(owned)], rows[len(owned) :]

    def _one_call(self, x: Tensor, sigma: float, conditionings: list[Conditioning]) -> Tensor:
        return x - self._predict(x, sigma, conditionings).float() * sigma

    def _compose(self, rows: Tensor) -> Tensor:
        """The weighted mean of each picture's parts."""
        if len(rows) == len(self._weights):
            return rows
        pictures, first = [], 0
        for weights in self._weights:
            total = sum(rows[first + k] * weight for k, weight in enumerate(weights))
            pictures.append(total / sum(weights))
            first += len(weights)
        return torch.stack(pictures)

    @property
    def _edited(self) -> bool:
        return any(sum(weights) != 1 for weights in self._weights)

    def _edit(self, like: Tensor) -> Tensor | float:
        """The sum of each picture's weights, one number where they agree."""
        sums = [sum(weights) for weights in self._weights]
        return sums[0] if len(set(sums)) == 1 else like.new_tensor(sums).view(-1, 1, 1, 1)

    def _extend(self, conditionings: list[Conditioning]) -> list[Conditioning]:
        """All at the length of the longest, by repeating the last row."""
        length = max((len(cond.context) for cond in conditionings), default=0)
        return [self._fit(cond, length, tile=False) for cond in conditionings]

    def _fit(self, cond: Conditioning, length: int, *, tile: bool) -> Conditioning:
        """The conditioning at another context length; the same object each time, so that others can go by identity."""
        have = len(cond.context)
        if have == length:
            return cond
        key = (cond, length, tile)
        if key not in self._fitted:
            context = cond.context.repeat(length // have, 1) if tile else lengthened(cond.context, length)
            self._fitted[key] = replace(cond, context=context)
        return self._fitted[key]


def shared_length(first: int, second: int) -> int | None:
    """The context length at which two groups can share a call, by repeating whole contexts; None where too long."""
    length = math.lcm(first, second)
    return length if length // min(first, second) <= _MAX_TILING else None


class Inpainting:
    """A ``denoise`` that keeps part of a latent: noised before the network, put back after it.

    Args:
        init: the latent to keep, ``[B, C, h, w]``.
        mask: 1 where ``init`` is kept, 0 where it is painted; broadcasts to ``init``.
        mask_noise: noise like a tensor (``ImageNoise.side``).
    """

    def __init__(self, denoise: Denoise, init: Tensor, mask: Tensor, mask_noise: Callable[[Tensor], Tensor]) -> None:
        self._denoise, self._init, self._mask, self._noise = denoise, init, mask, mask_noise

    @property
    def unconditional(self) -> Tensor | None:
        return getattr(self._denoise, "unconditional", None)

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        noised = self._noise(self._init) * sigma + self._init * (1 - sigma)
        return self.blend(self._denoise(x * (1 - self._mask) + noised * self._mask, sigma))

    def blend(self, x: Tensor) -> Tensor:
        """``x`` with the kept part put back; also the last thing done to a finished latent."""
        return x * (1 - self._mask) + self._init * self._mask
