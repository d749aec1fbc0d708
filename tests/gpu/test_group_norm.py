"""Norms and sums of feature maps on a GPU: programs against the textbook, and what the autoencoder makes of them."""

from __future__ import annotations

import pytest
import torch
from factories import AE, network
from group_norm_cases import CASES, EPS, SUMS, arguments, expected, summands, tolerance

from lightweight_engine.backend import feature_maps
from lightweight_engine.backend.feature_maps import add, group_norm
from lightweight_engine.backend.kernels import group_norm as programs
from lightweight_engine.flux.autoencoder import Autoencoder

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label", CASES)
def test_programs_say_what_the_textbook_says(label: str, dtype: torch.dtype) -> None:
    given = arguments(label, dtype, "cuda")
    x, weight, bias, groups, silu, shift = given
    with torch.inference_mode():
        made = group_norm(x, groups, weight, bias, EPS, silu=silu, shift=shift)
    assert made.is_contiguous(memory_format=torch.channels_last) and made.dtype == dtype
    near = tolerance(label, dtype)
    torch.testing.assert_close(made.double(), expected(*given), rtol=near, atol=near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label", SUMS)
@torch.inference_mode()
def test_sums_are_rounded_once(label: str, dtype: torch.dtype) -> None:
    x, update, shift = summands(label, dtype, "cuda")
    expected = (x.float() + update.float() + shift.float()[:, None, None]).to(dtype)
    made = add(x, update, shift)
    assert made.data_ptr() == update.data_ptr()
    torch.testing.assert_close(made, expected)


@torch.inference_mode()
def test_the_finest_level_of_a_picture_is_right_and_repeatable() -> None:
    """A million pixels, of which float32 holds no plain sum of squares to this."""
    random = torch.Generator("cuda").manual_seed(0)
    x = 50 + torch.randn(1, 128, 1344, 768, device="cuda", generator=random)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(128, device="cuda"), torch.zeros(128, device="cuda")
    made = programs.group_norm(x, 32, weight, bias, EPS)
    torch.testing.assert_close(made.double(), expected(x, weight, bias, 32, False, None), rtol=3e-5, atol=3e-5)
    assert torch.equal(made, programs.group_norm(x, 32, weight, bias, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_the_autoencoder_says_the_same_in_either_order(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps keep their channels last from the first convolution to the last, so that every norm is a program's."""
    plain = network(Autoencoder, AE).to("cuda", dtype)
    last = network(Autoencoder, AE).to("cuda", dtype)
    last.load_state_dict(plain.state_dict())
    last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latent = torch.randn(2, AE.z_channels, 6, 10, device="cuda")
    pixels, noise = plain.decode(latent), torch.randn_like(latent, dtype=dtype)
    refused = []
    monkeypatch.setattr(feature_maps.F, "group_norm", lambda *args: refused.append(args))
    made = last.decode(latent)
    latents = last.encode(pixels.to(dtype), noise)
    assert not refused
    monkeypatch.undo()
    allowed = 3e-2 if dtype == torch.bfloat16 else 3e-3  # convolutions in TF32
    for ours, theirs in ((made, pixels), (latents, plain.encode(pixels.to(dtype), noise))):
        assert (ours - theirs).float().norm() <= allowed * theirs.float().norm()
