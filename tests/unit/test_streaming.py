"""Units that pass through slots or mapped pages compute what resident ones do, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import FLUX, T5, network, save, save_flux
from torch import nn

from lightweight_engine.backend.checkpoint import open_checkpoint
from lightweight_engine.backend.streaming import ALIGNMENT, Place, Ring, Unit, aligned
from lightweight_engine.core.networks import units_of
from lightweight_engine.flux.footprint import inventory
from lightweight_engine.flux.keymaps import find_parts
from lightweight_engine.flux.load import Storage, load_part
from lightweight_engine.flux.t5 import T5Encoder
from lightweight_engine.flux.units import in_order, unit_of

CPU = torch.device("cpu")


class Stack(nn.Module):
    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, n), nn.Linear(n, 8)) for n in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def units(self, which: range) -> list[Unit]:
        return [
            Unit(str(i), self.layers[i], tuple(Place(m._parameters, n) for m in self.layers[i] for n in m._parameters))
            for i in which
        ]


@pytest.mark.parametrize("slots", [1, 2, 3, 9])
@pytest.mark.parametrize("every", [1, 2])
def test_a_ring_computes_what_resident_units_do(slots: int, every: int) -> None:
    model, x = Stack([3, 30, 7, 16, 5, 64]), torch.randn(4, 8)
    with torch.inference_mode():
        expected = model(x)
        ring = Ring(model.units(range(0, 6, every)), CPU, slots=slots, pinned=False)
        for slot in ring._slots:  # what is read before it was written would show
            slot.buffer.view(torch.uint8).fill_(255)
        assert all(torch.equal(model(x), expected) for _ in range(3))
        ring.close()
        assert torch.equal(model(x), expected)
        assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.layers)


def test_bytes_of_a_ring() -> None:
    model = Stack([3, 30])
    units = model.units(range(2))
    sizes = [4 * (8 * n + n + 8 * n + 8) for n in (3, 30)]
    assert [unit.nbytes for unit in units] == sizes
    ring = Ring(units, CPU, slots=2, pinned=False)
    assert ring.slot_bytes == 2 * units[1].slot_bytes and ring.nbytes == sum(unit.slot_bytes for unit in units)
    assert units[1].slot_bytes % ALIGNMENT == 0 and aligned(1) == ALIGNMENT and aligned(ALIGNMENT) == ALIGNMENT


def test_a_ring_whose_pass_was_broken_off_starts_anew() -> None:
    model, x = Stack([4, 4, 4]), torch.randn(2, 8)
    expected = model(x)
    ring = Ring(model.units(range(3)), CPU, slots=2, pinned=False)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("injected")

    hook = model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model(x)
    hook.remove()
    assert torch.equal(model(x), expected)
    ring.close()


@pytest.mark.parametrize("format", ["auto", "nf4", "fp8_e4m3", "gguf:Q8_0"])
def test_a_transformer_through_a_ring(tmp_path: Path, format: str) -> None:
    part = find_parts(open_checkpoint(save_flux(tmp_path / "x.safetensors")))["transformer"]
    model = load_part(part, Storage(format, torch.float32), device=CPU)
    units = units_of("transformer", model)
    names = set(units)
    torch.manual_seed(1)
    inputs = (
        torch.randn(1, 4, FLUX.in_channels),
        torch.randn(1, 3, FLUX.hidden_size),
    )
    vec = torch.randn(1, FLUX.hidden_size)
    rotary = model.rotary(2, 2, 3)
    with torch.inference_mode():
        modulations = model.modulations(vec)
        expected = model(*inputs, modulations, rotary)
        rings = [Ring([units[n] for n in in_order(names, kind)], CPU) for kind in ("block", "conditioning")]
        again = model.modulations(vec)
        assert torch.equal(again.final, modulations.final)
        assert torch.equal(model(*inputs, again, rotary), expected)
        for ring in rings:
            ring.close()


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_ring_that_is_closed_in_the_middle_of_a_pass_leaves_a_whole_network(stop: int) -> None:
    """As when memory runs out and units are placed anew: every tensor is on the host again, and no hook is left."""
    model, x = Stack([4, 9, 6]), torch.randn(2, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(x)
    ring = Ring(model.units(range(3)), CPU, slots=2)
    slots = [slot.buffer for slot in ring._slots]
    for layer in model.layers[: stop + 1]:
        layer(torch.randn(2, 8))
    ring.close()
    for buffer in slots:
        buffer.fill_(255)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), expected)
    again = Ring(model.units(range(3)), CPU, slots=1)
    assert torch.equal(model(x), expected)
    again.close()


def test_units_out_of_turn_and_units_twice() -> None:
    """Conditioning may be asked for again, or for one unit only."""
    model, inputs = Stack([4, 9, 6, 5]), torch.randn(12, 2, 8)
    order = [3, 3, 0, 2, 1, 1, 0, 3, 2, 2, 0, 1]
    expected = [model.layers[i](x) for i, x in zip(order, inputs, strict=True)]
    ring = Ring(model.units(range(4)), CPU, slots=2)
    made = [model.layers[i](x) for i, x in zip(order, inputs, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    ring.close()


def test_an_empty_ring() -> None:
    ring = Ring([], CPU)
    assert (ring.nbytes, ring.slot_bytes, ring.units) == (0, 0, [])
    ring.close()


@pytest.mark.parametrize("storage", ["file", "auto", "nf4", "gguf:Q8_0"])
def test_t5_through_a_ring(tmp_path: Path, storage: str) -> None:
    """Its table of positions belongs to the first block and is needed outside of it: it always stays."""
    part = find_parts(open_checkpoint(save(tmp_path / "x.safetensors", network(T5Encoder, T5))))["t5"]
    model = load_part(part, Storage(storage, torch.float32), device=CPU)
    units = units_of("t5", model)
    ids = torch.randint(0, T5.vocab_size, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids)
        ring = Ring([units[name] for name in in_order(set(units), "block")], CPU)
        assert len(ring.units) == T5.num_layers
        assert torch.equal(model(ids), expected)
        ring.close()


@pytest.mark.parametrize("storage", ["auto", "nf4", "fp8_e4m3", "gguf:Q8_0"])
def test_units_take_the_bytes_that_were_planned(tmp_path: Path, storage: str) -> None:
    """But for parts of packed weights, each of which starts at a multiple of the alignment."""
    part = find_parts(open_checkpoint(save_flux(tmp_path / "x.safetensors", depth=2)))["transformer"]
    kept = Storage(storage, torch.bfloat16)
    units = units_of("transformer", load_part(part, kept, device=CPU))
    known = inventory(part, kept)
    planned = dict((*known.blocks, *known.conditioning))
    assert set(planned) == set(units)
    for name, unit in units.items():
        assert 0 <= unit.slot_bytes - planned[name] <= (0 if storage == "auto" else ALIGNMENT * len(unit.places))


def test_units_are_in_the_order_in_which_they_run() -> None:
    names = ["double_blocks.10.img_attn.qkv.weight", "double_blocks.2.img_mlp.0.bias", "single_blocks.0.linear1.weight"]
    names += ["double_blocks.2.img_mod.lin.weight", "img_in.weight", "final_layer.adaLN_modulation.1.bias"]
    units = {unit_of("transformer", name) for name in names}
    blocks = ["double_blocks.2", "double_blocks.10", "single_blocks.0"]
    assert [name.path for name in in_order(units, "block")] == blocks
    assert {name.path for name in in_order(units, "conditioning")} == {
        "double_blocks.2.img_mod",
        "final_layer.adaLN_modulation",
    }
    assert unit_of("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight").kind == "fixed"
    assert unit_of("t5", "encoder.block.11.layer.0.SelfAttention.q.weight").path == "encoder.block.11"
