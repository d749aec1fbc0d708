"""The whole way from a request to latents and pixels, with ``compat="forge"``."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from goldens import Case, model_config, model_path
from PIL import Image
from recorded_tokenizers import golden_tokenizers

from checks.vae import assert_pixels
from lightweight_engine.backend.checkpoint import open_checkpoint
from lightweight_engine.backend.devices import card_of
from lightweight_engine.backend.memory_manager import MemoryManager
from lightweight_engine.config import EngineConfig
from lightweight_engine.core.engine import LightweightEngine
from lightweight_engine.core.images import to_uint8
from lightweight_engine.core.infotext_parse import parse_infotext
from lightweight_engine.core.models import ModelSet
from lightweight_engine.core.networks import Networks
from lightweight_engine.core.precision import Precision
from lightweight_engine.flux.keymaps import find_parts
from lightweight_engine.request import GenerationRequest

SAME_NAME = (
    "prompt", "negative_prompt", "emphasis", "steps", "scheduler", "cfg_scale", "distilled_cfg_scale", "width",
    "height", "seed", "subseed", "subseed_strength", "batch_size", "denoising_strength", "eta", "s_churn", "s_tmin",
    "s_tmax", "s_noise",
    "seed_resize_from_w", "seed_resize_from_h", "s_min_uncond", "skip_early_cond", "initial_noise_multiplier",
)  # fmt: skip
OTHER_NAME = {"sampler_name": "sampler", "randn_source": "noise_source"}
NOT_FIELDS = {"id", "model", "n_iter", "infotext", "all_seeds", "tensors", "global_seed", "error", "note", "quirk"}


@cache
def engine(model: str) -> LightweightEngine:
    """An engine on the golden model of that name."""
    files = {"transformer": f"flux_{model}", "t5": "t5xxl", "clip": "clip_l", "autoencoder": "ae"}
    parts: Any = OrderedDict()
    for role, name in files.items():
        if not model_path(name).exists():
            pytest.skip(f"{name} is not in this copy of the goldens")
        parts[role] = replace(find_parts(open_checkpoint(model_path(name)))[role], given=model_config(name))
    models = ModelSet(files["transformer"], parts, model_path("ae").parent)
    device = torch.device("cpu")
    precision = Precision.plain(torch.float32, torch.float32)
    manager = MemoryManager(card_of(device))
    networks = Networks(models, device, precision, manager, tokenizers=golden_tokenizers)
    made = LightweightEngine(EngineConfig())
    made.use(networks)
    return made


def request_fields(case: Case) -> dict[str, Any]:
    fields = {name: case[name] for name in SAME_NAME if name in case.data}
    fields |= {ours: case[theirs] for theirs, ours in OTHER_NAME.items() if theirs in case.data}
    unknown = set(case.data) - set(SAME_NAME) - set(OTHER_NAME) - NOT_FIELDS
    assert not unknown, f"the manifest has fields that this check does not know: {sorted(unknown)}"
    return {**fields, "compat": "forge", "num_outputs": case.get("batch_size", 1) * case.get("n_iter", 1)}


def assert_infotext(ours: LightweightEngine, request: GenerationRequest, case: Case) -> None:
    """The last picture's text says the same, but for the names of model and program."""
    names = {"Model", "Model hash", "Version"}
    mine, golden = (
        {key: value for key, value in parse_infotext(text, defaults=False).items() if key not in names}
        for text in (ours.run(request).infotexts[-1], case["infotext"])
    )
    assert mine == golden


def check(case: Case) -> None:
    ours = engine(case["model"])
    fields = request_fields(case)
    prompts: list[str] = []
    if isinstance(fields["prompt"], list):  # the pictures of a batch have prompts of their own
        prompts = fields.pop("prompt")
    if case.has("init_image"):
        fields["image"] = Image.fromarray(case.tensor("init_image").numpy())
    request = ours.request(**fields)
    if case.get("error"):
        with pytest.raises(Exception):  # noqa: B017 - the reference fails here; so may we, in any typed way
            ours.draw(request, prompts)
        return
    if "global_seed" in case.data:
        torch.manual_seed(case["global_seed"])
    drawn = ours.draw(request, prompts)
    if not prompts:
        assert_infotext(ours, request, case)
    golden = case.tensor("latent")
    tolerance = 1e-4 * max(1.0, float(golden.abs().max()))
    torch.testing.assert_close(drawn.latent, golden.float(), rtol=0, atol=tolerance)
    assert_pixels(
        torch.as_tensor(to_uint8(drawn.pixels)), case.tensor("image").view(drawn.pixels.permute(0, 2, 3, 1).shape)
    )
