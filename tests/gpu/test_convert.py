"""Files that are converted on a GPU are those that a CPU writes, and stand in for quantising on load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.backend.satellites import WRITABLE
from lightweight_engine.core.describe import pixels_sha256
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.flux.convert import convert_part

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("format", WRITABLE)
def test_a_gpu_writes_the_bytes_of_a_cpu(tmp_path: Path, format: str) -> None:
    part = ModelLibrary([TINY]).choose().parts["transformer"]
    for kind in ("cpu", "cuda"):
        convert_part(part, format, tmp_path / kind, device=torch.device(kind))
    assert (tmp_path / "cuda").read_bytes() == (tmp_path / "cpu").read_bytes()


def test_pictures_are_those_of_quantising_on_load(tmp_path: Path) -> None:
    pictures = set()
    for cached in (False, True, True):
        settings = {"models_dir": tmp_path, "cache_dir": tmp_path, "device": "cuda", "offline": True}
        engine = LightweightEngine(Config(**settings, storage_dtype="nf4", quantized_cache=cached))
        request = GenerationRequest(prompt="a man", width=128, height=128, steps=3, seed=5)
        pictures.add(pixels_sha256(engine.run(request).images[0]))
        engine.close()
    assert len(pictures) == 1
    assert len(list((tmp_path / "quantized").iterdir())) == 1
