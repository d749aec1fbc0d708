"""Convolutions in half precision on a GPU, and ESRGAN's network by them: against plain torch and spandrel."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from convolution_cases import CASES, made
from safetensors.torch import save_file

pytest.importorskip("spandrel")

from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet
from test_dense import KINDS, PROJECT, by_tf32, levels_of, pictures, plain
from test_upscalers import noise

from lightweight_engine.backend import convolutions
from lightweight_engine.upscalers.dense import DenseNetwork, dense_network
from lightweight_engine.upscalers.networks import NetworkUpscaler, Tiling, network_bytes, open_network, tile_bytes

pytestmark = pytest.mark.gpu


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's convolutions without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("label", CASES)
@torch.inference_mode()
def test_the_program_says_what_its_twin_says(label: str) -> None:
    """Borders and other channels are as they were."""
    twins = made(label, convolutions.Convolution.forward)
    for ours, theirs in zip(made(label, convolutions.Convolution.forward, "cuda"), twins, strict=True):
        near = 2e-3 if ours.dtype == torch.float16 else 1e-4
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near)
        assert torch.equal(ours == 0, theirs == 0), "a border or another channel was written to"


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_network_is_as_near_to_float32_as_spandrels_in_tf32(kind: str) -> None:
    """TF32 by rounding what each convolution reads: cuDNN takes it for some sizes and not for others."""
    network, given = plain(kind).cuda(), pictures(48, 60).cuda()
    form = dense_network(network)
    assert form is not None and convolutions.kernels.available()
    exact, ours, theirs = network(given), form(given), by_tf32(network, given)
    assert 0 < (ours - exact).norm() < 1.25 * (theirs - exact).norm()
    off = (levels_of(ours) - levels_of(exact)).abs()
    assert off.max() <= 1 and off.float().mean() < 0.1
    assert torch.equal(ours, form(given)), "it is repeatable"


def opened(folder: Path, **fields: Any) -> Any:
    save_file(plain(**fields).state_dict(), folder / "x.safetensors")
    return open_network(folder / "x.safetensors")


@pytest.mark.parametrize("kind", ["4x", "2x, unshuffled"])
def test_pictures_are_those_of_the_cpu_and_the_network_goes_back(kind: str, tmp_path: Path) -> None:
    """But for what TF32 does to them, too: on a CPU it moves a tenth of these levels by one, and 1 in 1,000 by two."""
    levels = noise(70, 90)
    golden = NetworkUpscaler("x", opened(tmp_path, kind=kind), Tiling(tile=32)).upscale(levels, 2)
    ours = NetworkUpscaler("x", opened(tmp_path, kind=kind), Tiling(tile=32), "cuda", room=1 << 30)
    form = ours._dense
    assert isinstance(form, DenseNetwork)
    before = {name: tensor.data_ptr() for name, tensor in form.state_dict().items()}
    made = ours.upscale(levels, 2)
    off = (made.int() - golden.int()).abs()
    assert off.max() <= 2 and off.float().mean() < 0.1 and (off > 1).float().mean() < 2e-3
    assert {name: tensor.data_ptr() for name, tensor in form.state_dict().items()} == before
    assert all(tensor.device.type == "cpu" for tensor in form.state_dict().values())


def test_numbers_beyond_half_precision_are_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = opened(tmp_path, kind="2x")
    network.model.model[0].weight.data *= 1e6
    network.model.model[3].weight.data *= 1e-6
    levels = noise(40, 30)
    golden = NetworkUpscaler("x", network, Tiling(24, 8)).upscale(levels, 2)
    ours = NetworkUpscaler("x", network, Tiling(24, 8), "cuda", room=1 << 30)
    assert ours._dense is not None
    with caplog.at_level(logging.WARNING):
        made = ours.upscale(levels, 2)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert (made.int() - golden.int()).abs().max() <= 4, "convolutions in TF32 move few levels by one"


@pytest.mark.parametrize("fields", [{"scale": 4}, {"scale": 2}, {"scale": 1}], ids=str)
def test_tiles_take_no_more_than_is_counted(fields: dict[str, int], tmp_path: Path) -> None:
    save_file(RRDBNet(num_filters=64, num_blocks=2, **fields).state_dict(), tmp_path / "x.safetensors")
    tile, together = 192, 4
    room = together * tile_bytes(tile, fields["scale"])
    upscaler = NetworkUpscaler("x", open_network(tmp_path / "x.safetensors"), Tiling(tile, 8), "cuda", room=room)
    assert upscaler._dense is not None and upscaler._together(noise(tile, tile)) == together
    levels = noise(380, 700).cuda()
    upscaler.upscale(levels, fields["scale"])  # programs are built
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    upscaler.upscale(levels, fields["scale"])
    pictures = 3 * (1 + 3 * fields["scale"] ** 2) * levels[0].numel()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= room + network_bytes((tmp_path / "x.safetensors").stat().st_size) + pictures


def test_a_warm_up_compiles_all_that_a_network_needs(tmp_path: Path) -> None:
    """A process after it compiles nothing for a network of the published width."""
    if not convolutions.kernels.available():
        pytest.skip("Triton's programs cannot be run here")
    build = "import torch; from lightweight_engine.upscalers.dense import build_programs as b; b(torch.device('cuda'))"
    run = (
        "import sys, torch; sys.path.insert(0, 'tests/unit'); from test_dense import *\n"
        "with torch.inference_mode(): dense_network(plain('4x').cuda()).cuda()(pictures().cuda())"
    )
    found = []
    for code in (build, run):
        command = [sys.executable, "-c", code]
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT, check=False)
        assert done.returncode == 0, done.stderr
        found.append(len(list(tmp_path.rglob("*.cubin"))))
    assert found[0] == found[1] > 0
