"""The autoencoder: decode, encode, and both in tiles."""

from __future__ import annotations

import torch
from goldens import Case
from networks import network
from torch import Tensor

from lightweight_engine.core.images import to_uint8
from lightweight_engine.flux.tiling import decode_tiled, encode_tiled

TOLERANCE = 2e-5


def assert_pixels(ours: Tensor, golden: Tensor) -> None:
    """Bytes that differ do so by one level, and are under half a percent."""
    difference = (ours.int() - golden.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.005


@torch.inference_mode()
def check(case: Case) -> None:
    {"decode": _decode, "encode": _encode, "decode_tiled": _decode_tiled, "encode_tiled": _encode_tiled}[case["op"]](
        case
    )


def _decode(case: Case) -> None:
    pixels = network("ae").decode(case.tensor("latent"))
    torch.testing.assert_close(pixels * 2 - 1, case.tensor("engine"), rtol=0, atol=TOLERANCE)
    stored = ((case.tensor("raw") + 1) / 2).clamp(0, 1)
    assert torch.equal(torch.as_tensor(to_uint8(stored)), case.tensor("uint8"))
    assert_pixels(torch.as_tensor(to_uint8(pixels)), case.tensor("uint8"))


def _encode(case: Case) -> None:
    model = network("ae")
    torch.testing.assert_close(
        model.encoder(2 * case.tensor("image") - 1), case.tensor("moments"), rtol=0, atol=TOLERANCE
    )
    torch.testing.assert_close(
        model.encode(case.tensor("image"), case.tensor("eps")), case.tensor("latent"), rtol=0, atol=TOLERANCE
    )


def _decode_tiled(case: Case) -> None:
    model = network("ae")
    latent = (case.tensor("z") - model.params.shift) * model.params.scale
    pixels = decode_tiled(model, latent, (case["tile_y"], case["tile_x"]), case["overlap"])
    torch.testing.assert_close(pixels.permute(0, 2, 3, 1), case.tensor("out"), rtol=0, atol=TOLERANCE)


def _encode_tiled(case: Case) -> None:
    """The manifest holds the autoencoder's own latent here, before shift and scale."""
    model = network("ae")
    generator = torch.Generator().manual_seed(case["seed"])
    latent = encode_tiled(
        model,
        case.tensor("image").float().permute(0, 3, 1, 2),
        lambda shape: torch.randn(shape, generator=generator),
        (case["tile_y"], case["tile_x"]),
        case["overlap"],
    )
    torch.testing.assert_close(model.to_decoder(latent), case.tensor("latent"), rtol=0, atol=TOLERANCE)
