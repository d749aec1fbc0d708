"""T5's weights on a GPU: read together wherever they are, and texts stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fullsize import Sizes, scratch_folder, write_model
from benchmarks.observe import model_of, observed_engine
from lightweight_engine.backend.together import ReadsTogether, joint_weight
from lightweight_engine.core.models import ModelSet
from lightweight_engine.flux.params import CLIPParams, FluxParams, T5Params

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")

SIZES = Sizes(
    FluxParams(hidden_size=256, mlp_hidden=1024, num_heads=2, depth=1, depth_single_blocks=1, context_in_dim=1280),
    T5Params(vocab_size=8192, hidden_size=1280, num_layers=4, num_heads=20, mlp_hidden=3328),
    CLIPParams(vocab_size=8192, num_layers=2),
)


@pytest.fixture(scope="module")
def small() -> Iterator[ModelSet]:
    with scratch_folder() as folder:
        yield model_of(write_model(Path(folder), SIZES, CUDA), Path(folder))
        torch.cuda.empty_cache()


def watched(t5: Any) -> list[bool]:
    """Whether each module that reads together did so in one product, in one pass."""
    found: list[bool] = []
    readers = [module for module in t5.modules() if isinstance(module, ReadsTogether)]

    def look(module: ReadsTogether, *_: Any) -> None:
        found.append(joint_weight([module.get_submodule(name) for name in module.together]) is not None)

    hooks = [reader.register_forward_pre_hook(look) for reader in readers]
    text(t5)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(readers) > 0
    return found


@torch.inference_mode()
def text(t5: Any) -> Tensor:
    return t5(torch.arange(96, device=CUDA)[None])


@pytest.mark.parametrize("state", ["HIGH_VRAM", "LOW_VRAM"])
def test_one_product_wherever_they_are(small: ModelSet, tmp_path: Path, state: str) -> None:
    settings: dict[str, Any] = {"text_compute_dtype": "bf16", "vram_state": state}
    engine, networks = observed_engine(small, device="cuda", cache_dir=tmp_path, **settings)
    try:
        engine.networks.follow(engine.plan(engine.request(prompt="a quay", width=256, height=256, steps=1)))
        t5 = engine.networks.load("t5")
        assert all(watched(t5))
        together = text(t5).clone()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("lightweight_engine.backend.together.joint_weight", lambda linears: None)
            alone = text(t5).clone()
        error = (together - alone).float().abs().max() / alone.float().abs().max()
        assert error < 0.05, error
    finally:
        networks.finish()
        engine.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_text_is_the_same_streamed_and_resident(small: ModelSet, tmp_path: Path, dtype: str) -> None:
    texts = []
    for state in ("HIGH_VRAM", "LOW_VRAM", "NO_VRAM"):
        settings: dict[str, Any] = {"text_compute_dtype": dtype, "vram_state": state}
        engine, networks = observed_engine(small, device="cuda", cache_dir=tmp_path, **settings)
        engine.networks.follow(engine.plan(engine.request(prompt="a quay", width=256, height=256, steps=1)))
        texts.append(text(engine.networks.load("t5")).clone())
        networks.finish()
        engine.close()
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_what_comes_back_from_the_host_lies_together_too(small: ModelSet, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"text_compute_dtype": "bf16", "vram_state": "NO_VRAM"}
    engine, networks = observed_engine(small, device="cuda", cache_dir=tmp_path, **settings)
    try:
        t5 = engine.networks.load("t5")  # no plan yet: whole
        first = text(t5).clone()
        plan = engine.plan(engine.request(prompt="a quay", width=256, height=256, steps=1))
        engine.networks.follow(plan)
        engine.networks.load("t5")
        assert plan.placed("t5").streamed and torch.equal(text(t5), first)
        del engine.networks._placements["t5"]
        engine.networks.load("t5")
        assert all(watched(t5)) and torch.equal(text(t5), first)
    finally:
        networks.finish()
        engine.close()
