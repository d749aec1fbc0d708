"""A network that computes NaN ends the job with the name of its file, instead of a black picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import save_drawable
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.core.models import TINY
from lightweight_engine.errors import ModelError

# Role -> its file, and a weight that everything it computes passes through.
WEIGHTS = {
    "transformer": ("Stable-diffusion/small.safetensors", "img_in.weight"),
    "t5": ("text_encoder/t5.safetensors", "encoder.final_layer_norm.weight"),
    "clip": ("text_encoder/clip.safetensors", "text_model.final_layer_norm.weight"),
    "autoencoder": ("VAE/ae.safetensors", "decoder.conv_out.weight"),
}


def spoil(path: Path, key: str) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    state[key] = torch.full_like(state[key], float("nan"))
    save_file(state, path, metadata=metadata)


@pytest.mark.parametrize("role", WEIGHTS)
def test_what_is_not_finite_names_its_file(tmp_path: Path, role: str) -> None:
    name, key = WEIGHTS[role]
    spoil(save_drawable(tmp_path) / name, key)
    config = Config(models_dir=tmp_path, cache_dir=tmp_path, tokenizer_dirs=(TINY,), device="cpu", offline=True)
    engine = LightweightEngine(config)
    with pytest.raises(ModelError, match=rf"{Path(name).name}: the {role} computed .*models verify"):
        engine.generate(prompt="a person", width=64, height=64, steps=1)
