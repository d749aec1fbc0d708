"""A picture and its mask on the way to the autoencoder, and the result on its way back."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from fake_vae import fake_encode
from goldens import Case
from PIL import Image

from checks.fill import mask_of
from lightweight_engine.core.infotext import ImageFacts, image_parameters
from lightweight_engine.core.pictures import flattened
from lightweight_engine.extensions.inpainting import (
    NOISE,
    Masking,
    Prepared,
    latent_mask,
    paste_back,
    prepare,
    start_content,
)
from lightweight_engine.upscalers.resampling import to_levels
from lightweight_engine.upscalers.resizing import LATENT


def check(case: Case) -> None:
    size = case["width"], case["height"]
    masking = Masking(
        (case["mask_blur"],) * 2,
        bool(case["invert"]),
        case["mask_round"],
        case["inpainting_fill"],
        case["inpaint_full_res"],
        case["padding"],
    )
    source = flattened(picture(*case["src"], case["src_seed"], case["src_mode"]))
    mask = mask_of(source.size, case["mask_rects"]) if case["mask_rects"] else None
    made = prepare(source, mask, size, case["resize_mode"], masking)
    check_pictures(case, made)
    check_latents(case, made, masking)
    check_text(case, made, masking)


def check_pictures(case: Case, made: Prepared) -> None:
    near(made.picture, case.array(f"vae_in_u8_{case.id}"))
    assert list(made.picture.size) == case["vae_input_wh"]
    place = made.paste_to and [
        *made.paste_to[:2],
        made.paste_to[2] - made.paste_to[0],
        made.paste_to[3] - made.paste_to[1],
    ]
    assert place == case["paste_to"]
    if f"overlay_{case.id}" in case.arrays():
        near(made.overlay_mask, case.array(f"mask_for_overlay_{case.id}"))
        near(made.overlay, case.array(f"overlay_{case.id}"))
    decoded = picture(case["width"] // 8 * 8, case["height"] // 8 * 8, case["decoded_seed"], "RGB")
    final = paste_back(decoded, made).image
    assert list(final.size) == case["final_wh"]
    near(final, case.array(f"final_{case.id}"))


def check_latents(case: Case, made: Prepared, masking: Masking) -> None:
    latent = fake_encode(to_levels(made.picture)[None].float() / 255)
    cells = case["height"] // 8, case["width"] // 8
    if case["resize_mode"] == LATENT:
        latent = F.interpolate(latent, size=cells, mode="bilinear")
    if made.mask is not None:
        mask = latent_mask(made.mask, cells, round=masking.round)
        np.testing.assert_allclose(mask.numpy(), case.array(f"nmask_{case.id}"), rtol=0, atol=1e-5)
        if masking.content == NOISE:  # the case does not tell which
            return
        latent = start_content(latent, mask, torch.zeros_like(latent), masking.content)
    torch.testing.assert_close(latent[0], torch.from_numpy(case.array(f"init_latent_{case.id}")), rtol=0, atol=1e-5)


def check_text(case: Case, made: Prepared, masking: Masking) -> None:
    facts = ImageFacts(
        denoising_strength=0.4,
        masked=made.mask is not None,
        mask_inverted=masking.invert,
        mask_blur=masking.blur[0],
        only_masked=made.paste_to is not None,
        masked_padding=masking.padding,
        masked_content=masking.content,
    )
    assert (made.paste_to is not None) == case["inpaint_full_res_after"]
    told = {key: value for key, value in image_parameters(facts).items() if value is not None}
    assert told == case["extra"]


def near(ours: Image.Image, golden: np.ndarray) -> None:
    assert np.abs(np.array(ours).astype(int) - golden).max() <= 1


def picture(width: int, height: int, seed: int, mode: str) -> Image.Image:
    """The test picture of the manifest: noisy squares."""
    random = np.random.RandomState(seed)
    channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
    base = random.randint(0, 256, (height // 8 + 2, width // 8 + 2, channels)).astype(np.uint8)
    big = np.kron(base, np.ones((8, 8, 1), np.uint8))[:height, :width]
    big = np.clip(big.astype(int) + random.randint(-20, 21, big.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(big[..., 0] if channels == 1 else big)
