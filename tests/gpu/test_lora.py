"""LoRAs on a GPU: beside every storage format, with streamed layers, merged, and gone without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from factories import save_drawable
from lora_models import lora_file, numbers, random_lora
from torch import Tensor, nn

from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.backend.ahead import Ahead
from lightweight_engine.backend.fused import linear_gelu
from lightweight_engine.backend.linear import AsNumbers, PackedLinear, is_product, passing_numbers
from lightweight_engine.backend.lora import Change, merged
from lightweight_engine.backend.lora_algorithms import LowRank
from lightweight_engine.backend.lora_layers import Changes, attach
from lightweight_engine.backend.nf4 import FourBit
from lightweight_engine.backend.quantize import quantize
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


# --- added to 4-bit weights as they become numbers ----------------------------------------------------------------

GPU = torch.device("cuda")
SHAPES = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)]
KINDS = ["nf4", "fp4"]


def layers(kind: str, shapes: list[tuple[int, int]], dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    made = []
    for seed, shape in enumerate(shapes):
        weight = numbers(*shape, seed=seed).to(GPU) / shape[1] ** 0.5
        made.append(PackedLinear(quantize(weight, kind), nn.Parameter(numbers(shape[0]).to(GPU, dtype))))
    return nn.Sequential(*made).requires_grad_(False)


def changes(network: nn.Sequential, rank: int, seed: int = 0, share: float = 0.2) -> dict[str, Changes]:
    """A LoRA on every layer, whose change is a share of the weight."""
    made: dict[str, Changes] = {}
    for name, layer in network.named_children():
        up, down = numbers(layer.out_features, rank, seed=seed), numbers(rank, layer.in_features, seed=seed + 9)  # type: ignore[arg-type]
        made[f"{name}.weight"] = [(Change(LowRank(down / rank**0.5, up / down.shape[1] ** 0.5)), share)]
    return made


def put(network: nn.Sequential, changed: dict[str, Changes], dtype: torch.dtype = torch.bfloat16) -> Any:
    return attach(network, changed, device=GPU, dtype=dtype)


def inputs(network: nn.Sequential, rows: int = 1000, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [numbers(rows, layer.in_features).to(GPU, dtype) for layer in network]  # type: ignore[arg-type]


def off(made: Tensor, expected: Tensor) -> float:
    return float((made.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 16, 40, 64, 200])
@torch.inference_mode()
def test_the_program_is_its_twin(rank: int, dtype: torch.dtype) -> None:
    """The order of the sum over the rank may decide between two neighbours, and so it seldom does."""
    network = layers("nf4", [(1000, 3072)], dtype)
    put(network, changes(network, rank), dtype)
    layer: Any = network[0]
    made = passing_numbers(layer, torch.empty(1, 3072, device=GPU, dtype=dtype))
    up, down = layer.added
    exact = layer.packed.dequantize(torch.float32) + up.float() @ down.float()
    torch.testing.assert_close(made.float(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 2**-10, atol=1e-6)
    assert float((made != exact.to(dtype)).float().mean()) < 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [16, 64])
@torch.inference_mode()
def test_inside_is_nearer_to_float32_than_beside(kind: str, rank: int) -> None:
    network = layers(kind, SHAPES)
    changed = changes(network, rank)
    put(network, changed)
    inside = [layer(x) for layer, x in zip(network, inputs(network), strict=True)]
    assert all(is_product(layer) for layer in network)
    network = layers(kind, SHAPES)
    with mock.patch.object(FourBit, "takes_added", lambda self, device: False):
        put(network, changed)
    assert not any(is_product(layer) for layer in network)
    for x, layer, made, rows in zip(inputs(network), network, inside, changed.values(), strict=True):
        moved = [(Change(LowRank(c.delta.down.to(GPU), c.delta.up.to(GPU))), s) for c, s in rows]  # type: ignore[attr-defined]
        weight = merged(layer.packed.dequantize(torch.float32), moved)  # type: ignore[operator,union-attr]
        exact = F.linear(x.float(), weight, layer.bias.float())  # type: ignore[operator,union-attr]
        ours, beside = off(made, exact), off(layer(x), exact)
        assert ours < beside < 0.004


@torch.inference_mode()
def test_nothing_that_was_unpacked_ahead_outlives_its_loras() -> None:
    network = layers("nf4", SHAPES)
    given = inputs(network)
    first, second = changes(network, 64), changes(network, 16, seed=1)
    expected = []
    for changed in ({}, first, second):
        attached = put(network, changed)
        expected.append([layer(x) for layer, x in zip(network, given, strict=True)])
        attached.close()
    ahead = Ahead(list(network), torch.bfloat16)  # type: ignore[arg-type]
    for which in (0, 1, 2, 1, 0, 0, 2):
        attached = put(network, ({}, first, second)[which])
        for _ in range(2):
            made = [layer(x) for layer, x in zip(network, given, strict=True)]
            assert all(map(torch.equal, made, expected[which]))
        attached.close()
    ahead.close()


@torch.inference_mode()
def test_gelu_is_applied_as_the_product_writes() -> None:
    network = layers("nf4", [(12288, 3072)])
    layer, (x,) = network[0], inputs(network)
    put(network, changes(network, 64))
    with mock.patch.object(AsNumbers, "gelu", autospec=True, side_effect=AsNumbers.gelu) as gelu:
        made = linear_gelu(layer, x)
    assert gelu.call_count == 1
    assert off(made, F.gelu(layer(x).float(), approximate="tanh")) < 0.005  # type: ignore[arg-type]


def test_no_linear_of_4_bits_has_a_branch(folder: Path) -> None:
    engine = engine_in(folder, storage_dtype="nf4")
    latent(engine, ("A",))
    transformer = engine.networks.load("transformer")
    linears = [module for module in transformer.modules() if isinstance(module, PackedLinear)]
    assert any(linear.added is not None for linear in linears)
    assert not any("forward" in vars(linear) for linear in linears)
    latent(engine, ())
    assert all(linear.added is None for linear in linears)
    engine.close()
