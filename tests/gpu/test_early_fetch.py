"""What the GPU fetches before torch is there arrives as it was, is waited for, and is forgotten when all is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.fullsize import SMALL, scratch_folder, write_model, write_packed
from lightweight_engine.backend import devices, page_locked
from lightweight_engine.backend.checkpoint import Checkpoint, open_checkpoint
from lightweight_engine.backend.devices import card_of
from lightweight_engine.backend.early_fetch import EarlyFetch
from lightweight_engine.backend.gpu_driver import CudaDriver, hold_context
from lightweight_engine.backend.page_locked import PageLocked
from lightweight_engine.backend.read_ahead import Span
from lightweight_engine.backend.staging import Staging

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
EVERYTHING = 1 << 40
PIECE = 1 << 20
TOKENIZERS = Path(__file__).resolve().parents[2] / "lightweight_engine" / "tiny"

START = """
import hashlib, json, sys
from lightweight_engine.config import EngineConfig
config = EngineConfig(**json.loads(sys.argv[1]))
from lightweight_engine.core import head_start
from lightweight_engine.backend.early_fetch import early_fetch
begun = head_start.begin(config) if sys.argv[2] == "early" else []
assert "torch" not in sys.modules
for thread in begun:
    thread.join(60)
held = early_fetch().nbytes
from lightweight_engine.core.engine import LightweightEngine
engine = LightweightEngine(config)
engine.setup()
import torch
digest = hashlib.sha256()
for role in sorted(engine.models.parts):
    for key, value in sorted(engine.networks.load(role).state_dict().items()):
        digest.update(key.encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).cpu().numpy())
print(json.dumps([digest.hexdigest(), held, early_fetch().fetched, early_fetch().nbytes]))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where files lie in memory."""
    with scratch_folder() as made:
        yield Path(made)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> CudaDriver:
    monkeypatch.setattr(page_locked, "PIECE", PIECE)
    torch.zeros(1, device=CUDA)
    found = hold_context(0)
    assert found is not None and found.enter()
    return found


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    """Tensors at odd places of the pieces; the last is over several."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(101), "b": torch.randn(3, 5).half(), "c": torch.randn(3001, 2051).bfloat16()}
    save_file(tensors, folder / "x.safetensors")
    return open_checkpoint(folder / "x.safetensors")


def whole(checkpoint: Checkpoint) -> Span:
    return Span(checkpoint.path, 0, checkpoint.path.stat().st_size)


def close(locked: PageLocked, early: EarlyFetch) -> None:
    early.close()
    if (thread := locked.close()) is not None:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("refuses", ["", "reserve", "stream", "fetch"])
def test_bytes_arrive(
    checkpoint: Checkpoint, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    if refuses:
        monkeypatch.setattr(driver, refuses, lambda *_: 0)
    locked, early = PageLocked(), EarlyFetch()
    try:
        locked.lock(driver, [whole(checkpoint)], EVERYTHING, early)
        way = Staging(CUDA, pinned=True, checkpoint=checkpoint, locked=locked, early=early)
        found = way._fetched(checkpoint.tensor("c"))
        assert found and {piece.device.type for _, piece in found} == {"cpu" if refuses else "cuda"}
        for name in "abc":
            tensor = checkpoint.tensor(name)
            made = way.bring(tensor)
            assert (made.device, made.dtype, made.shape) == (CUDA, tensor.dtype, tensor.shape)
            assert torch.equal(made.cpu(), tensor)
        rows, into = checkpoint.tensor("c")[7:2900], torch.zeros(2893, 2051, dtype=torch.bfloat16, device=CUDA)
        assert way.bring(rows, into) is into and torch.equal(into.cpu(), rows)
    finally:
        close(locked, early)
    assert torch.equal(way.bring(checkpoint.tensor("b")).cpu(), checkpoint.tensor("b")), "and after that"


def test_what_is_on_its_way_is_waited_for(checkpoint: Checkpoint, driver: CudaDriver) -> None:
    """With a GPU that fetches late."""
    locked, early = PageLocked(), EarlyFetch()
    try:
        early.open(driver, whole(checkpoint).end + PIECE)
        with torch.cuda.stream(torch.cuda.ExternalStream(early.stream, CUDA)):
            torch.cuda._sleep(1_000_000_000)
        locked.lock(driver, [whole(checkpoint)], EVERYTHING, early)
        way = Staging(CUDA, pinned=True, checkpoint=checkpoint, locked=locked, early=early)
        made = [way.bring(checkpoint.tensor(name)) for name in "abc"]
        assert all(torch.equal(each.cpu(), checkpoint.tensor(name)) for each, name in zip(made, "abc", strict=True))
    finally:
        close(locked, early)


def test_what_is_copied_from_it_is_there_before_it_goes(checkpoint: Checkpoint, driver: CudaDriver) -> None:
    """With a GPU that copies late."""
    locked, early = PageLocked(), EarlyFetch()
    locked.lock(driver, [whole(checkpoint)], EVERYTHING, early)
    way = Staging(CUDA, pinned=True, checkpoint=checkpoint, locked=locked, early=early)
    torch.cuda._sleep(1_000_000_000)
    made = way.bring(checkpoint.tensor("c"))
    close(locked, early)
    assert torch.equal(made.cpu(), checkpoint.tensor("c"))


def test_it_counts_as_free_and_is_given_back(driver: CudaDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    early = EarlyFetch()
    monkeypatch.setattr(devices, "early_fetch", lambda: early)
    before, free = card_of(CUDA).free, driver.free()
    early.open(driver, 1 << 30)
    assert early.nbytes == 1 << 30 and abs(free - driver.free() - early.nbytes) < 64 << 20
    assert abs(card_of(CUDA).free - before) < 64 << 20
    early.close()
    assert abs(driver.free() - free) < 64 << 20 and abs(card_of(CUDA).free - before) < 64 << 20


def test_a_start_loads_the_same(folder: Path) -> None:
    """In processes of their own, where torch is not there as the files are fetched; the transformer in nf4."""
    paths = write_model(folder, SMALL, CUDA)
    write_packed(paths["transformer"], ["nf4"], CUDA)
    paths["transformer"].unlink()
    settings = {
        "models_dir": str(folder), "cache_dir": str(folder / "cache"), "offline": True, "device": "cuda",
        "tokenizer_dirs": [str(TOKENIZERS)],
    }  # fmt: skip
    told = []
    for way in ("early", "plainly"):
        command = [sys.executable, "-c", START, json.dumps(settings), way]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1]))
    (early, held, fetched, left), (plainly, *none) = told
    assert early == plainly and none == [0, 0, 0]
    assert held >= fetched > 0 == left, "all of it is given back"
