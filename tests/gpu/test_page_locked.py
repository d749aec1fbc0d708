"""What a GPU fetches from page-locked files arrives as it was, and loads into the very same networks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.fullsize import SMALL, scratch_folder, write_model, write_packed
from benchmarks.observe import model_of
from lightweight_engine import Config
from lightweight_engine.backend import page_locked
from lightweight_engine.backend.checkpoint import Checkpoint, open_checkpoint
from lightweight_engine.backend.devices import card_of
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.backend.page_locked import CudaDriver, PageLocked
from lightweight_engine.backend.read_ahead import Span
from lightweight_engine.backend.staging import Staging
from lightweight_engine.core import networks as networks_module
from lightweight_engine.core.head_start import hold_context
from lightweight_engine.core.models import ModelSet
from lightweight_engine.core.networks import Networks
from lightweight_engine.core.precision import choose_precision, memory_manager
from lightweight_engine.errors import CorruptCheckpointError
from lightweight_engine.flux.keymaps import find_parts
from lightweight_engine.flux.load import Storage, load_part

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
EVERYTHING = 1 << 40


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where files lie in memory."""
    with scratch_folder() as made:
        yield Path(made)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> CudaDriver:
    monkeypatch.setattr(page_locked, "PIECE", 1 << 20)
    torch.zeros(1, device=CUDA)
    found = hold_context(0)
    assert found is not None and found.enter() and found.free() > 0
    return found


def whole(path: Path) -> Span:
    return Span(path, 0, path.stat().st_size)


def close(locked: PageLocked) -> None:
    torch.cuda.synchronize()
    if (thread := locked.close()) is not None:
        thread.join(30)
        assert not thread.is_alive()


def three(folder: Path) -> Checkpoint:
    """Tensors at odd places of the pieces; the last is over several."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(101), "b": torch.randn(3, 5).half(), "c": torch.randn(3001, 2051).bfloat16()}
    save_file(tensors, folder / "x.safetensors")
    return open_checkpoint(folder / "x.safetensors")


@pytest.mark.parametrize("limit", [EVERYTHING, 3 << 20, 0], ids=["all", "some", "none"])
def test_bytes_arrive(folder: Path, driver: CudaDriver, limit: int) -> None:
    checkpoint, locked = three(folder), PageLocked()
    try:
        locked.lock(driver, [whole(checkpoint.path)], limit)
        staging = Staging(CUDA, pinned=True, checkpoint=checkpoint, locked=locked)
        assert staging.fetches == (limit == EVERYTHING), "the driver locks files that it may only read"
        for name in "abc":
            tensor = checkpoint.tensor(name)
            made = staging.bring(tensor)
            assert (made.device, made.dtype, made.shape) == (CUDA, tensor.dtype, tensor.shape)
            assert torch.equal(made.cpu(), tensor)
        rows, into = checkpoint.tensor("c")[7:2900], torch.zeros(2893, 2051, dtype=torch.bfloat16, device=CUDA)
        assert staging.bring(rows, into) is into and torch.equal(into.cpu(), rows)
    finally:
        close(locked)
    assert torch.equal(staging.bring(checkpoint.tensor("c")).cpu(), checkpoint.tensor("c")), "and after that"


def test_threads_and_a_busy_device_change_nothing(folder: Path, driver: CudaDriver) -> None:
    """Memory that the device still writes to is given to a copy, which has to wait for it."""
    checkpoint, locked = three(folder), PageLocked()
    try:
        locked.lock(driver, [whole(checkpoint.path)], EVERYTHING)
        staging = Staging(CUDA, pinned=True, checkpoint=checkpoint, locked=locked)
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                torch.cuda._sleep(20_000_000)
                for name in "abc":
                    torch.empty_like(checkpoint.tensor(name), device=CUDA).fill_(7)
                names = [*"abccba"]
                made = list(pool.map(lambda name: staging.bring(checkpoint.tensor(name)), names))
                assert all(
                    torch.equal(found.cpu(), checkpoint.tensor(name)) for name, found in zip(names, made, strict=True)
                )
    finally:
        close(locked)


def networks_of(models: ModelSet) -> Networks:
    config, card = Config(device="cuda", offline=True), card_of(CUDA)
    return Networks(
        models, CUDA, choose_precision(config, models, card, []), memory_manager(config, card),
        tokenizers=lambda: pytest.fail("nobody asks for words"),
    )  # fmt: skip


def tensors_of(networks: Networks) -> dict[str, Tensor]:
    loaded = {role: networks.load(role) for role in networks.models.parts}
    state = {f"{role}.{key}": value for role, module in loaded.items() for key, value in module.state_dict().items()}
    return {key: value.cpu() for key, value in state.items()}


@pytest.mark.parametrize("refused", [False, True])
def test_the_networks_are_the_same(
    folder: Path, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """All parts, the transformer in nf4 as it is in the file, others converted."""
    paths = write_model(folder, SMALL, CUDA)
    (paths["transformer"],) = write_packed(paths["transformer"], ["nf4"], CUDA)
    expected = tensors_of(networks_of(model_of(paths, folder)))
    locked = PageLocked()
    monkeypatch.setattr(networks_module, "page_locked", lambda: locked)
    try:
        if refused:
            monkeypatch.setattr(driver, "lock", lambda address, nbytes: False)
        locked.lock(driver, [whole(path) for path in paths.values()], EVERYTHING)
        found = tensors_of(networks_of(model_of(paths, folder)))
    finally:
        close(locked)
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(*(each[key].contiguous().view(-1).view(torch.uint8) for each in (found, expected)))
        for key in expected
    )


@pytest.mark.parametrize("damage", ["absmax", "quant_map"])
def test_scales_that_are_not_finite_are_named_as_on_a_cpu(folder: Path, damage: str) -> None:
    paths = write_model(folder, SMALL, CUDA)
    (path,) = write_packed(paths["transformer"], ["nf4"], CUDA)
    tensors, metadata = load_file(path), dict(open_model(path).metadata)
    name = "single_blocks.3.linear2.weight"
    tensors[f"{name}.{damage}"][1] = torch.nan
    save_file(tensors, path, metadata)
    part, told = find_parts(open_model(path))["transformer"], []
    for device in (torch.device("cpu"), CUDA):
        with pytest.raises(CorruptCheckpointError, match=f"'{name}' cannot be read as nf4.*not finite") as error:
            load_part(part, Storage("auto", torch.bfloat16), device=device)
        told.append(str(error.value))
    assert told[0] == told[1]
