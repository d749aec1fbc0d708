"""The transformer as a function of a latent: packing, unpacking and cropping happen here.

``predict_velocity`` is the plain form. ``Velocity`` is the one that sampling uses: whatever does not depend on the
latent is computed once, so that a step is one pass over the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .conditioning import Conditioning
from .latents import pack, unpack
from .transformer import Flux, Modulations


def predict_velocity(
    model: Flux, latent: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor | None = None
) -> Tensor:
    """One evaluation with nothing precomputed: used in tests and training, and the twin of ``Velocity``.

    Args:
        latent: ``[B, 16, h, w]`` in the compute dtype, any h and w.
        timestep: ``[B]`` float32, sigma in 0..1.
        context: T5 output ``[B, T, C]`` in the compute dtype.
        pooled: CLIP vector ``[B, V]`` in the compute dtype.
        guidance: ``[B]`` in the compute dtype; dev only.

    Returns:
        The velocity ``[B, 16, h, w]``; the denoised latent is ``latent - sigma * velocity``.
    """
    height, width = latent.shape[-2:]
    modulations = model.modulations(model.condition(timestep, pooled, guidance))
    rotary = model.rotary((height + 1) // 2, (width + 1) // 2, context.shape[1])
    tokens = model(pack(latent), model.txt_in(context), modulations, rotary)
    return unpack(tokens, height, width)


class Velocity:
    """The velocity of a batch whose members share one sigma.

    Text projections, modulation vectors and rotations are kept for as long as the object lives: one job.

    Args:
        evaluate: what computes an evaluation in place of the model's own ``forward``.
    """

    def __init__(self, model: Flux, evaluate: Callable[..., Tensor] | None = None) -> None:
        self.model = model
        self._evaluate = evaluate or model
        self._texts: dict[Conditioning, Tensor] = {}
        self._rows: dict[tuple[float, Conditioning], tuple[Modulations, int]] = {}
        self._rotary: dict[tuple[int, int, int], Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        return self.model.img_in.bias.dtype

    def precompute(self, sigmas: Iterable[float], conditionings: Iterable[Conditioning]) -> None:
        """Compute all modulation vectors that sampling will need, in one product per layer.

        After this the modulation weights are not read again for these sigmas and conditionings.
        """
        sigmas = tuple(sigmas)
        self._add((sigma, cond) for cond in conditionings for sigma in sigmas)

    def _add(self, wanted: Iterable[tuple[float, Conditioning]]) -> None:
        """Compute the rows of those that have none yet."""
        pairs = [pair for pair in dict.fromkeys(wanted) if pair not in self._rows]
        if not pairs:
            return
        device = self.model.img_in.bias.device
        timestep = torch.tensor([sigma for sigma, _ in pairs], dtype=torch.float32, device=device)
        pooled = torch.stack([cond.pooled for _, cond in pairs]).to(device, self.dtype)
        guidance = None
        if self.model.params.guidance_embed:
            values = [0.0 if cond.guidance is None else cond.guidance for _, cond in pairs]
            guidance = torch.tensor(values, dtype=self.dtype, device=device)
        modulations = self.model.modulations(self.model.condition(timestep, pooled, guidance))
        # Taken apart step by step, beside the GPU's work: all at once the first step would wait for it.
        self._rows |= {pair: (modulations, row) for row, pair in enumerate(pairs)}

    def _modulations(self, sigma: float, conditionings: Sequence[Conditioning]) -> Modulations:
        pairs = [(sigma, cond) for cond in conditionings]
        self._add(pairs)
        if pairs.count(pairs[0]) == len(pairs):
            pairs = pairs[:1]
        rows = [table.rows(slice(row, row + 1)) for table, row in (self._rows[pair] for pair in pairs)]
        return rows[0] if len(rows) == 1 else Modulations.stack(rows)

    def _text(self, cond: Conditioning) -> Tensor:
        if cond not in self._texts:
            context = cond.context.to(self.model.img_in.bias.device, self.dtype)
            self._texts[cond] = self.model.txt_in(context[None])
        return self._texts[cond]

    def _rotations(self, rows: int, columns: int, text_tokens: int) -> Tensor:
        key = (rows, columns, text_tokens)
        if key not in self._rotary:
            self._rotary[key] = self.model.rotary(*key)
        return self._rotary[key]

    def __call__(self, latent: Tensor, sigma: float, conditionings: Sequence[Conditioning]) -> Tensor:
        """Velocity ``[B, 16, h, w]`` (float32) of a latent; one conditioning per member, equally long."""
        height, width = latent.shape[-2:]
        text = torch.cat([self._text(cond) for cond in conditionings])
        rotary = self._rotations((height + 1) // 2, (width + 1) // 2, text.shape[1])
        tokens = self._evaluate(pack(latent.to(self.dtype)), text, self._modulations(sigma, conditionings), rotary)
        return unpack(tokens, height, width).float()
