"""LoRAs on a GPU: beside every storage format, with streamed layers, merged, and gone without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from factories import save_drawable
from lora_models import lora_file, random_lora
from torch import Tensor

from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.core.models import TINY, ModelLibrary

pytestmark = pytest.mark.gpu  # the device's own products and streams

STORAGES = ["bf16", "nf4", "fp8_e4m3", "gguf:Q8_0", "gguf:Q4_0"]
SMALL = {"prompt": "a cat", "width": 128, "height": 128, "steps": 2, "seed": 3}
SEQUENCE = [(), ("A",), ("B:0.5",), ("A", "B"), ()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_drawable(tmp_path_factory.mktemp("loras") / "models", depth=2, depth_single_blocks=3)
    shapes = {role: part.shapes for role, part in ModelLibrary([root]).choose().parts.items()}
    (root / "Lora").mkdir()
    for seed, name in enumerate("AB"):
        lora_file(root / "Lora", random_lora(shapes, seed=seed, text=name == "B"), name=f"{name}.safetensors")
    return root


def engine_in(folder: Path, device: str = "cuda", **settings: object) -> LightweightEngine:
    places = {"models_dir": folder, "cache_dir": folder.parent / "cache", "tokenizer_dirs": (TINY,)}
    return LightweightEngine(Config(**{**places, "device": device, "offline": True, **settings}))


def latent(engine: LightweightEngine, loras: tuple[str, ...]) -> Tensor:
    return engine.draw(GenerationRequest(**{**SMALL, "loras": loras})).latent.cpu()


@pytest.fixture(scope="module", params=STORAGES)
def resident(request: pytest.FixtureRequest, folder: Path) -> Iterator[LightweightEngine]:
    made = engine_in(folder, storage_dtype=request.param)
    yield made
    made.close()


def test_none_one_other_both_none(resident: LightweightEngine) -> None:
    seen = [latent(resident, loras) for loras in SEQUENCE]
    assert torch.equal(seen[0], seen[-1])
    assert len({tuple(each.flatten().tolist()) for each in seen}) == len(SEQUENCE) - 1


def test_streamed_layers_give_the_same_bits(resident: LightweightEngine, folder: Path) -> None:
    streaming = engine_in(folder, storage_dtype=resident.config.storage_dtype, vram_state="NO_VRAM")
    for loras in SEQUENCE:
        assert torch.equal(latent(streaming, loras), latent(resident, loras))
    streaming.close()


@pytest.mark.parametrize("storage", ["bf16", "fp32"])
@pytest.mark.parametrize("state", ["HIGH_VRAM", "NO_VRAM"])
def test_merged_and_out_again(folder: Path, storage: str, state: str) -> None:
    merging = engine_in(folder, storage_dtype=storage, lora_merge=True, vram_state=state)
    beside = engine_in(folder, storage_dtype=storage)
    bare = latent(merging, ())
    for loras in SEQUENCE:
        ours, theirs = latent(merging, loras), latent(beside, loras)
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05  # rounded to bf16 in one, and computed in bf16
    assert torch.equal(latent(merging, ()), bare)


def test_memory_is_given_back(resident: LightweightEngine) -> None:
    latent(resident, ())
    before = torch.cuda.memory_allocated()
    for loras in SEQUENCE * 2:
        latent(resident, loras)
    assert torch.cuda.memory_allocated() == before
