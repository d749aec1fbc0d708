"""Products in 8 bits by their twins on a CPU; the GPU's own are in ``tests/gpu/test_eight_bit.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from factories import FLUX, save_flux
from torch import Tensor, nn

from lightweight_engine.backend import eight_bit_attention
from lightweight_engine.backend.attention import attention
from lightweight_engine.backend.checkpoint import open_checkpoint
from lightweight_engine.backend.devices import Card
from lightweight_engine.backend.eight_bit import EightBitLinear, Rows, in_rows, multiply_as_stored, read_in_eight_bits
from lightweight_engine.backend.fp8 import as_rows, quantize_fp8, quantize_rows
from lightweight_engine.backend.fused import ResidualStream, gelu_beside, heads
from lightweight_engine.backend.linear import PackedLinear, is_product
from lightweight_engine.backend.lora import Change
from lightweight_engine.backend.lora_algorithms import LowRank
from lightweight_engine.backend.lora_layers import attach
from lightweight_engine.config import EngineConfig
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.core.precision import choose_precision
from lightweight_engine.flux.footprint import inventory
from lightweight_engine.flux.keymaps import Part, find_parts
from lightweight_engine.flux.load import Storage, load_part
from lightweight_engine.flux.transformer import Flux

CPU = torch.device("cpu")
STORAGE = Storage("fp8_rows", torch.float32)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def linear(out: int = 48, width: int = 32) -> Any:
    """A linear that multiplies as it is stored, and its weight before it was rounded."""
    model = nn.Sequential(PackedLinear(quantize_rows(torch.randn(out, width)), nn.Parameter(torch.randn(out))))
    multiply_as_stored(model)
    return model[0]


def part_of(path: Path, dtype: torch.dtype = torch.bfloat16) -> Part:
    return find_parts(open_checkpoint(save_flux(path / "x.safetensors", dtype=dtype)))["transformer"]


def evaluate(model: Flux, dtype: torch.dtype = torch.float32) -> Tensor:
    img, txt, vec = torch.randn(2, 6, 64), torch.randn(2, 3, 64), torch.randn(2, 64)
    with torch.inference_mode():
        return model(img, txt, model.modulations(vec), model.rotary(2, 3, 3))


def test_every_row_is_rounded_by_itself() -> None:
    x = torch.randn(2, 5, 64) * torch.logspace(-8, 8, 5)[:, None]
    x[1, 3] = 0
    rows = in_rows(x)
    assert rows.values.dtype == torch.float8_e4m3fn and rows.scale.shape == (2, 5, 1)
    # Half of the last of three bits; below 2^-6 of the type its numbers lie evenly.
    allowed = torch.maximum(x.abs() / 16, rows.scale * 2.0**-10)
    assert ((rows.numbers() - x).abs() <= allowed).all()
    assert torch.equal(rows.numbers()[1, 3], x[1, 3])


def test_what_is_not_a_number_stays_none() -> None:
    x = torch.randn(3, 16)
    x[1, 2] = float("nan")
    assert in_rows(x).numbers()[1].isnan().any() and in_rows(x).numbers()[[0, 2]].isfinite().all()


def test_a_linear_multiplies_rounded_rows() -> None:
    layer, x = linear(), torch.randn(2, 7, 32)
    expected = in_rows(x).numbers() @ layer.packed.dequantize().T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer(x), layer(in_rows(x)))


def test_scales_of_a_whole_matrix_become_those_of_its_rows_without_a_change() -> None:
    matrix = torch.randn(32, 48)
    for packed in (quantize_fp8(matrix, "fp8_e4m3"), quantize_fp8(matrix, "fp8_e4m3", scaled=True)):
        rows = as_rows(packed)
        assert rows is not None and rows.parts["scale"].shape == (32,)
        assert torch.equal(rows.dequantize(), packed.dequantize())
    assert as_rows(quantize_fp8(matrix, "fp8_e5m2")) is None


def test_rows_are_nearer_than_one_scale_for_all() -> None:
    matrix = torch.randn(64, 64) * torch.logspace(-4, 1, 64)[:, None]
    error = (quantize_rows(matrix).dequantize() - matrix).norm(dim=1) / matrix.norm(dim=1)
    assert error.max() < 0.035
    assert (quantize_fp8(matrix, "fp8_e4m3", scaled=True).dequantize() - matrix).norm(dim=1)[0] > 0.1 * matrix[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_linears_of_blocks_multiply_in_eight_bits_and_no_others(tmp_path: Path, dtype: torch.dtype) -> None:
    part = part_of(tmp_path, dtype)
    model: Any = load_part(part, STORAGE, device=CPU)
    found = {name for name, module in model.named_modules() if isinstance(module, EightBitLinear)}
    blocks = {
        f"double_blocks.0.{s}_{leaf}" for s in ("img", "txt") for leaf in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    }
    assert found == blocks | {"single_blocks.0.linear1", "single_blocks.0.linear2"}
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert inventory(part, STORAGE).nbytes == pytest.approx(held, abs=256 * len(part.sources))


def test_a_file_in_eight_bits_keeps_its_numbers(tmp_path: Path) -> None:
    part = part_of(tmp_path, torch.float8_e4m3fn)
    ours, plain = (load_part(part, Storage(format, torch.float32), device=CPU) for format in ("fp8_rows", "auto"))
    name = "single_blocks.0.linear1"
    assert torch.equal(ours.get_submodule(name).packed.dequantize(), plain.get_submodule(name).packed.dequantize())  # type: ignore[union-attr]


def test_a_network_is_about_as_far_off_as_its_rounding(tmp_path: Path) -> None:
    part = part_of(tmp_path)
    torch.manual_seed(1)
    exact = evaluate(load_part(part, Storage("fp32", torch.float32), device=CPU))  # type: ignore[arg-type]
    torch.manual_seed(1)
    ours = evaluate(load_part(part, STORAGE, device=CPU))  # type: ignore[arg-type]
    assert 0 < (ours - exact).norm() / exact.norm() < 0.06


def changes(out: int, width: int, rank: int = 2) -> Any:
    delta = LowRank(down=torch.randn(rank, width) / width**0.5, up=torch.randn(out, rank) / rank)
    return [(Change(delta), 0.5)]


def test_loras_act_beside_products_in_eight_bits_and_inside_them() -> None:
    network = nn.Sequential(linear())
    layer, x = network[0], torch.randn(7, 32)
    rows = changes(48, 32)
    added = rows[0][0].delta
    expected = layer.packed.dequantize() + 0.5 * added.up @ added.down
    before = layer(x)
    for at_hand in ((), ("0.weight",)):
        attached = attach(network, {"0.weight": rows}, device=CPU, dtype=torch.float32, at_hand=at_hand)
        assert read_in_eight_bits(layer) is bool(at_hand) and not is_product(layer)
        error = (network(x) - (x @ expected.T + layer.bias)).norm() / (x @ expected.T).norm()
        assert error < 0.06
        attached.close()
        assert torch.equal(layer(x), before) and read_in_eight_bits(layer)


def test_a_reader_of_rows_is_given_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_part(part_of(tmp_path), STORAGE, device=CPU)
    given: list[type] = []
    forward = EightBitLinear.forward
    monkeypatch.setattr(EightBitLinear, "forward", lambda self, x: (given.append(type(x)), forward(self, x))[1])
    evaluate(model)
    assert given.count(Rows) == 4 + 2 + 2 and given.count(Tensor) == 2  # attention's output goes to two projections


def single_block(path: Path) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A single block in 8 bits, tokens, a modulation, and rotations."""
    model: Any = load_part(part_of(path), STORAGE, device=CPU)
    return model.single_blocks[0], torch.randn(2, 9, 64), torch.randn(2, 1, 192), model.rotary(2, 3, 3)


@torch.inference_mode()
def test_a_block_has_the_bits_of_its_formula(tmp_path: Path) -> None:
    block, tokens, mod, rotary = single_block(tmp_path)
    shift, scale, gate = mod.chunk(3, dim=-1)
    fused = block.linear1(ResidualStream(tokens).normed(shift, scale, block.linear1))
    attended = attention(*heads([(fused[..., :192], *block.norm())], rotary))
    expected = torch.addcmul(tokens, gate, block.linear2(gelu_beside(attended, fused, block.linear2)))
    stream = ResidualStream(tokens)
    block(stream, mod, rotary)
    assert torch.equal(stream.tokens, expected)


@pytest.mark.parametrize("beside", [False, True])
@torch.inference_mode()
def test_a_block_lets_go_of_what_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool) -> None:
    """The plan reckons with it; where LoRAs act beside, linears read numbers and round them themselves."""
    block, tokens, mod, rotary = single_block(tmp_path)
    made: dict[str, ref[Tensor]] = {}
    alive: dict[str, set[str]] = {}

    def note(at: str, name: str, tensor: Tensor | Rows) -> None:
        made[name] = ref(tensor.values if isinstance(tensor, Rows) else tensor)
        alive[at] = {name for name, tensor in made.items() if tensor() is not None}

    def attend(*args: Any) -> Tensor:
        out = eight_bit_attention.attend(*args)
        note("attention", "attended", out)
        return out

    monkeypatch.setattr("lightweight_engine.flux.transformer.attend", attend)
    block.linear1.register_forward_pre_hook(lambda _, inputs: note("linear1", "normed", inputs[0]))
    block.linear1.register_forward_hook(lambda _, inputs, out: note("linear1's end", "fused", out))
    block.linear2.register_forward_pre_hook(lambda _, inputs: note("linear2", "joined", inputs[0]))
    if beside:
        loras = {"linear1.weight": changes(320, 64), "linear2.weight": changes(64, 192)}
        attach(block, loras, device=CPU, dtype=torch.float32)
    block(ResidualStream(tokens), mod, rotary)
    assert alive == {
        "linear1": {"normed"},
        "linear1's end": {"normed", "fused"},
        "attention": {"fused", "attended"},
        "linear2": {"joined"},
    }
    assert not any(tensor() is not None for tensor in made.values())


@pytest.mark.parametrize(
    ("card", "settings", "words"),
    [
        (Card("CPU", "cpu", 1 << 34, 1 << 34), {}, "it needs a GPU"),
        (Card("H200", "cuda", 1 << 37, 1 << 37), {"compute_dtype": "fp16"}, "compute_dtype is float16"),
        (Card("NVIDIA A100-SXM4", "cuda", 1 << 37, 1 << 37), {}, "A100-SXM4 has no products in 8 bits"),
        (Card("RTX 3090", "cuda", 1 << 35, 1 << 35), {}, "RTX 3090 has no products in 8 bits"),
    ],
)
def test_where_it_cannot_be_it_says_so(card: Card, settings: dict, words: str) -> None:
    notes: list[str] = []
    models = ModelLibrary([TINY]).choose()
    precision = choose_precision(EngineConfig(speed="fp8", **settings), models, card, notes)
    assert precision.transformer.format != "fp8_rows"
    assert any(words in note and "speed = fp8" in note for note in notes)


def test_where_it_can_be_it_replaces_what_weights_are_kept_as() -> None:
    notes: list[str] = []
    card = Card("H200", "cuda", 1 << 37, 1 << 37)
    precision = choose_precision(EngineConfig(speed="fp8"), ModelLibrary([TINY]).choose(), card, notes)
    assert precision.transformer == Storage("fp8_rows", torch.bfloat16) and not notes
    assert FLUX.hidden_size % 16 == 0
