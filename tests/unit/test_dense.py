"""ESRGAN's network in the form for tensor cores: as near to float32 as TF32 is, recognised, watched and counted."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_convolutions import needs_triton
from test_upscalers import noise
from torch import Tensor, nn

from lightweight_engine.backend.convolutions import Convolution, Maps
from lightweight_engine.upscalers.dense import DenseNetwork, build_programs, dense_network
from lightweight_engine.upscalers.networks import (
    NetworkUpscaler,
    Tiling,
    convolves_in_tf32,
    network_bytes,
    open_network,
)
from lightweight_engine.upscalers.visits import Visitor

pytest.importorskip("spandrel")

from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

PROJECT = Path(__file__).resolve().parents[2]
KINDS: dict[str, dict[str, Any]] = {
    "4x": {"num_filters": 64, "num_blocks": 3, "scale": 4},
    "2x, unshuffled": {"num_filters": 64, "num_blocks": 2, "scale": 4, "in_nc": 12, "shuffle_factor": 2},
    "2x": {"num_filters": 32, "num_blocks": 2, "scale": 2},
    "1x": {"num_filters": 32, "num_blocks": 1, "scale": 1},
}


def plain(kind: str = "4x", **fields: Any) -> RRDBNet:
    """A network of random weights that makes colours between 0 and 1."""
    torch.manual_seed(3)
    network = RRDBNet(**KINDS[kind] | fields).eval()
    for parameter in network.parameters():
        parameter.data *= 1.5 if parameter.dim() > 1 else 1.0
    with torch.inference_mode():
        made = network(pictures())
        last = network.model[-1]
        last.weight.data *= 0.2 / made.std()
        last.bias.data = 0.5 + (last.bias - made.mean((0, 2, 3))) * 0.2 / made.std()
    return network


def pictures(height: int = 16, width: int = 20) -> Tensor:
    return noise(height, 2 * width).view(3, height, 2, width).permute(2, 0, 1, 3).float() / 255


def in_tf32(tensor: Tensor) -> Tensor:
    """Numbers rounded to 10 bits behind the first, to the nearest, ties to even."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


def by_tf32(network: nn.Module, given: Tensor) -> Tensor:
    """A network whose convolutions read what tensor cores read in TF32, summed in float32."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    hooks = [each.register_forward_pre_hook(lambda _, args: (in_tf32(args[0]),)) for each in convolutions]
    weights = [each.weight.data for each in convolutions]
    for each in convolutions:
        each.weight.data = in_tf32(each.weight.data)
    try:
        return network(given)
    finally:
        for each, weight, hook in zip(convolutions, weights, hooks, strict=True):
            each.weight.data = weight
            hook.remove()


def levels_of(made: Tensor) -> Tensor:
    return NetworkUpscaler._bytes(made).int()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_it_is_as_near_to_float32_as_tf32_is(kind: str) -> None:
    network, given = plain(kind), pictures()
    form = dense_network(network)
    assert form is not None
    exact, ours, theirs = network.double()(given.double()).float(), form(given), by_tf32(network.float(), given)
    assert ours.shape == exact.shape and ours.dtype == torch.float32
    assert exact.std() > 0.05, "the colours are spread"
    assert 0 < (ours - exact).norm() < 1.25 * (theirs - exact).norm()
    assert (ours - exact).abs().max() < 1.5 * (theirs - exact).abs().max()
    off = (levels_of(ours) - levels_of(network(given))).abs()
    assert off.max() <= 1 and off.float().mean() < 0.1


PROGRAMS = """
import sys, torch
sys.path.insert(0, "tests/unit")
from test_dense import pictures, plain
from lightweight_engine.backend import convolutions
from lightweight_engine.upscalers.dense import dense_network
with torch.inference_mode():
    for kind in ("2x", "1x"):
        form, given = dense_network(plain(kind, num_blocks=1)), pictures(5, 7)
        twin = form(given)
        convolutions.have_programs = lambda maps: True
        made = form(given)
        convolutions.have_programs = lambda maps: False
        assert made.shape == twin.shape and not torch.equal(made, twin), "sums are in another order"
        torch.testing.assert_close(made, twin, rtol=0, atol=1e-3)
"""


@needs_triton
def test_programs_make_the_same_of_pictures() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAMS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stderr


def test_other_networks_stay_as_they_are() -> None:
    slope, large = plain("2x"), plain("2x")
    next(module for module in slope.modules() if isinstance(module, nn.LeakyReLU)).negative_slope = 0.1
    large.model[-1].weight.data[0, 0] = 1e5
    others = [
        RRDBNet(num_filters=64, num_blocks=1, plus=True),
        RRDBNet(num_filters=64, num_blocks=1, upsampler="pixel_shuffle"),
        RRDBNet(num_filters=64, num_blocks=1, scale=3),
        RRDBNet(num_filters=24, num_blocks=1),
        RRDBNet(num_filters=64, num_blocks=1, out_nc=1),
        RRDBNet(num_filters=64, num_blocks=1, norm="batch"),
        RRDBNet(num_filters=64, num_blocks=1, act="relu"),
        slope,
        large,
        nn.Conv2d(3, 3, 3),
    ]
    assert [dense_network(each) for each in others] == [None] * len(others)
    assert isinstance(dense_network(plain("2x")), DenseNetwork)


@pytest.fixture
def upscaler(tmp_path: Path) -> NetworkUpscaler:
    """One with its network in both forms, as it has them on a GPU."""
    save_file(plain("2x").state_dict(), tmp_path / "2x.safetensors")
    made = NetworkUpscaler("2x", open_network(tmp_path / "2x.safetensors"), Tiling(24, 8))
    made._dense = dense_network(made._network.model)
    return made


def test_tiles_are_made_by_this_form(upscaler: NetworkUpscaler, caplog: pytest.LogCaptureFixture) -> None:
    levels = noise(40, 30)
    made = upscaler.once(levels)
    form, upscaler._dense = upscaler._dense, None
    plain = upscaler.once(levels)
    assert form is not None and made.shape == plain.shape == (3, 80, 60)
    off = (made.int() - plain.int()).abs()
    assert off.max() == 1 and not caplog.records, "it rounds otherwise, by a level"


@pytest.mark.parametrize(
    ("device", "build", "allowed", "capability", "expected"),
    [
        ("cuda", "12.9", True, (9, 0), True),
        ("cuda", "12.9", True, (8, 0), True),
        ("cuda", "12.9", True, (7, 5), False),
        ("cuda", "12.9", False, (9, 0), False),
        ("cuda", None, True, (9, 4), False),
        ("cpu", "12.9", True, (9, 0), False),
    ],
)
def test_half_precision_is_for_where_the_reference_rounds_as_well(
    device: str,
    build: str | None,
    allowed: bool,
    capability: tuple[int, int],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert convolves_in_tf32(torch.device(device)) is expected


def test_both_forms_are_counted_and_one_travels(upscaler: NetworkUpscaler) -> None:
    form, network = upscaler._dense, upscaler._network.model
    assert form is not None and not list(form.parameters())
    weights, packed = (sum(t.nbytes for t in each.state_dict().values()) for each in (network, form))
    assert upscaler.nbytes == weights + packed
    file = weights // 2  # of 16 bits
    assert weights + packed <= network_bytes(file)
    visitor = Visitor(form, torch.device("meta"))
    before = {name: tensor.data_ptr() for name, tensor in form.state_dict().items()}
    with visitor.there():
        assert all(tensor.is_meta for tensor in form.state_dict().values())
    assert {name: tensor.data_ptr() for name, tensor in form.state_dict().items()} == before


def test_numbers_beyond_half_precision_are_computed_again(
    upscaler: NetworkUpscaler, caplog: pytest.LogCaptureFixture
) -> None:
    """Maps of a million behind the first convolution, which a later one takes back."""
    model = upscaler._network.model.model
    model[0].weight.data *= 1e6
    model[3].weight.data *= 1e-6
    upscaler._dense = dense_network(upscaler._network.model)
    levels = noise(40, 30)
    with caplog.at_level(logging.WARNING):
        made = upscaler.once(levels)
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "once for all tiles"
    assert "half precision" in caplog.text
    upscaler._dense = None
    plain = upscaler.once(levels)
    assert torch.equal(made, plain) and plain.float().std() > 1


@torch.inference_mode()
def test_programs_are_built_as_a_published_network_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a convolution, what a program is compiled for: channels, and what is done with the result."""
    needed: list[set[tuple[Any, ...]]] = []

    def noted(self: Convolution, x: Maps, out: Tensor, **how: Any) -> None:
        sums = how.get("sums")
        kind = sums and (sums.factor, sums.origin is None, sums.keep is None)
        strides = x.whole.stride(2), out.stride(2), out.dtype
        needed[-1].add((x.whole.shape[3], self.made, *strides, how.get("slope"), how.get("doubled"), kind))

    monkeypatch.setattr(Convolution, "forward", noted)
    needed.append(set())
    build_programs(torch.device("cpu"))
    for kind in ("4x", "2x, unshuffled"):
        form = dense_network(plain(kind))
        assert form is not None
        needed.append(set())
        form(pictures())
    assert needed[0] == needed[1] == needed[2] and len(needed[0]) == 10
