"""Steps recorded as CUDA graphs: the bits of those that are not, whatever changes between them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightweight_engine.backend import eight_bit
from lightweight_engine.backend.ahead import Ahead
from lightweight_engine.backend.eight_bit import multiply_as_stored
from lightweight_engine.backend.linear import PackedLinear, store
from lightweight_engine.backend.lora import Change
from lightweight_engine.backend.lora_algorithms import LowRank
from lightweight_engine.backend.lora_layers import attach
from lightweight_engine.backend.quantize import quantize
from lightweight_engine.flux.load import linear_weights
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.recorded import Recorded
from lightweight_engine.flux.transformer import Flux
from lightweight_engine.flux.units import unit_of

pytestmark = pytest.mark.gpu

PARAMS = FluxParams(hidden_size=512, mlp_hidden=2048, num_heads=4, depth=2, depth_single_blocks=3)
GPU = torch.device("cuda")


def model_of(storage: str) -> Flux:
    torch.manual_seed(0)
    with GPU:
        model: Any = Flux(PARAMS).bfloat16().eval().requires_grad_(False)
    if storage == "bf16":
        return model
    for name in sorted(linear_weights(model)):
        if unit_of("transformer", name).kind == "block":
            store(model, name, quantize(model.get_parameter(name), storage))
    multiply_as_stored(model)
    linears = [m for m in model.modules() if isinstance(m, PackedLinear) and not m.multiplies_as_stored]
    if linears:
        Ahead(linears, torch.bfloat16)
    return model


def inputs(model: Flux, seed: int, rows: int = 12, text: int = 20, batch: int = 1) -> tuple[Any, ...]:
    random = torch.Generator(GPU).manual_seed(seed)
    img, txt, vec = (
        torch.randn(shape, device=GPU, generator=random).bfloat16()
        for shape in ((batch, rows * 8, 64), (batch, text, PARAMS.hidden_size), (batch, PARAMS.hidden_size))
    )
    return img, txt, model.modulations(vec)


@pytest.mark.parametrize("storage", ["bf16", "nf4", "fp8_rows"])
@torch.inference_mode()
def test_replayed_steps_are_bit_equal(storage: str) -> None:
    if storage == "fp8_rows" and not eight_bit.available(GPU):
        pytest.skip("the GPU has no products in 8 bits")
    model = model_of(storage)
    rotary = {rows: model.rotary(rows, 8, 20) for rows in (12, 6)}
    steps = Recorded(model, lambda: "here", trial=1)
    pairs = []
    for seed, rows in enumerate([12, 12, 6, 12, 6, 6, 12]):  # two shapes, each run, recorded and replayed
        given = inputs(model, seed, rows)
        pairs.append((steps(*given, rotary[rows]), model(*given, rotary[rows])))
    assert all(torch.equal(made, expected) for made, expected in pairs)  # also those that others came after
    assert len(steps._graphs) == 2
    steps.close()


@torch.inference_mode()
def test_a_later_pass_replays_with_rotations_of_its_own() -> None:
    model = model_of("bf16")
    steps = Recorded(model, lambda: "here", trial=1)
    recordings = []
    for rows, columns in ((12, 8), (8, 12), (6, 8)):  # the second is the first turned
        steps.begin(rows * columns)
        rotary = model.rotary(rows, columns, 20)
        for seed in range(3):
            given = inputs(model, seed, rows * columns // 8)
            assert torch.equal(steps(*given, rotary), model(*given, rotary))
        recordings.append(list(steps._graphs.values()))
        assert len(recordings[-1]) == 1 and steps.nbytes > 0
    assert recordings[0] == recordings[1] != recordings[2]
    recordings.clear()
    held = torch.cuda.memory_reserved()
    steps.close()
    assert steps.nbytes == 0 and torch.cuda.memory_reserved() < held


@torch.inference_mode()
def test_another_placement_is_recorded_anew() -> None:
    model = model_of("bf16")
    rotary, standing = model.rotary(12, 8, 20), ["one"]
    steps = Recorded(model, lambda: standing[0], trial=1)
    for _ in range(3):
        steps(*inputs(model, 1), rotary)
    weight: Tensor = model.double_blocks[0].img_attn.qkv.weight
    model.double_blocks[0].img_attn.qkv.weight = torch.nn.Parameter(weight * 2, requires_grad=False)
    standing[0] = "two"
    for _ in range(3):
        given = inputs(model, 2)
        assert torch.equal(steps(*given, rotary), model(*given, rotary))


@torch.inference_mode()
def test_changes_that_are_added_to_4_bits_are_replayed_with_them() -> None:
    model = model_of("nf4")
    rotary = model.rotary(12, 8, 20)
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    standing: list[Any] = [None]
    steps = Recorded(model, lambda: standing[0], trial=1)
    seen = []
    for strength in (0.0, 0.5, 1.0):
        changes = {}
        for name in names if strength else ():
            linear = model.get_submodule(name.removesuffix(".weight"))
            down, up = torch.randn(16, linear.in_features), torch.randn(linear.out_features, 16) / 100  # type: ignore[arg-type]
            changes[name] = [(Change(LowRank(down, up)), strength)]
        steps.close()
        attached = attach(model, changes, device=GPU, dtype=torch.bfloat16)
        standing[0] = strength
        for seed in (1, 2, 3, 0):
            given = inputs(model, seed)
            assert torch.equal(steps(*given, rotary), model(*given, rotary))
        assert len(steps._graphs) == 1
        seen.append(steps(*given, rotary))  # type: ignore[reportPossiblyUnbound]
        steps.close()
        attached.close()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@torch.inference_mode()
def test_where_units_pass_through_nothing_is_recorded() -> None:
    model = model_of("bf16")
    steps = Recorded(model, lambda: None, trial=1)
    for _ in range(3):
        steps(*inputs(model, 1), model.rotary(12, 8, 20))
    assert not steps._graphs


@torch.inference_mode()
def test_a_step_that_cannot_be_recorded_is_computed_all_the_same() -> None:
    model = model_of("nf4")
    rotary, given = model.rotary(12, 8, 20), inputs(model, 1)
    expected = model(*given, rotary).clone()
    steps = Recorded(model, lambda: "here", trial=1)
    run_out = torch.cuda.OutOfMemoryError("out of memory")

    # In the middle of recording: the stream that unpacks ahead must be free again.
    def forward(*args: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            raise run_out
        return type(block).forward(block, *args)

    block = model.single_blocks[1]
    with mock.patch.object(block, "forward", forward):
        for _ in range(3):
            assert torch.equal(steps(*given, rotary), expected)
    assert not steps._graphs and steps._refused
    assert torch.equal(model(*given, rotary), expected)
    torch.randn(1, device=GPU)  # the GPU's own generator is no part of a recording any more
