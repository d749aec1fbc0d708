"""The transformer as a function of a latent: packing, unpacking and cropping happen here."""

from __future__ import annotations

from torch import Tensor

from .latents import pack, unpack
from .transformer import Flux


def predict_velocity(
    model: Flux, latent: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor | None = None
) -> Tensor:
    """One evaluation with nothing precomputed: the plain form, used in tests, training and as the twin of the fast path.

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
