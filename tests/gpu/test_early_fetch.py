"""What a GPU fetches before torch is there arrives as it was, loads into the very same networks, and is given back."""

from __future__ import annotations

import json
import subprocess
import sys
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
from lightweight_engine.backend import devices, early_fetch, reader
from lightweight_engine.backend.checkpoint import Checkpoint, open_checkpoint
from lightweight_engine.backend.devices import card_of
from lightweight_engine.backend.early_fetch import EarlyFetch, Pace
from lightweight_engine.backend.gpu_driver import CudaDriver, hold_context
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.backend.read_ahead import Span
from lightweight_engine.backend.staging import Staging
from lightweight_engine.core import networks as networks_module
from lightweight_engine.core.folders import kernels_folder
from lightweight_engine.core.models import ModelSet
from lightweight_engine.core.networks import Networks
from lightweight_engine.core.precision import choose_precision, memory_manager
from lightweight_engine.errors import CorruptCheckpointError
from lightweight_engine.flux.keymaps import find_parts
from lightweight_engine.flux.load import Storage, load_part

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
begun = head_start.begin(config) if sys.argv[2] != "plainly" else []
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
    monkeypatch.setattr(early_fetch, "IN_PYTHON", Pace(2, PIECE))
    monkeypatch.setattr(early_fetch, "IN_C", Pace(3, PIECE))
    torch.zeros(1, device=CUDA)
    found = hold_context(0)
    assert found is not None and found.enter() and found.free() > 0
    return found


@pytest.fixture(params=["in Python", "in C"])
def early(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EarlyFetch]:
    made = EarlyFetch()
    if request.param == "in C":
        assert reader.build(tmp_path) is not None, "a machine with a GPU has the compiler that Triton asks for"
        loop, fetch = reader.read_pieces(tmp_path), made.fetch
        assert loop is not None
        made.fetch = lambda driver, spans, room, _=None: fetch(driver, spans, room, loop)  # type: ignore[method-assign]
    yield made
    made.close()


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    """Tensors at odd places of the pieces, one of them over several."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(101), "b": torch.randn(3, 5).half(), "c": torch.randn(3001, 2051).bfloat16()}
    save_file(tensors, folder / "x.safetensors")
    return open_checkpoint(folder / "x.safetensors")


def whole(path: Path) -> Span:
    return Span(path, 0, path.stat().st_size)


@pytest.mark.parametrize("room", [EVERYTHING, 3 << 20, 0], ids=["all", "some", "none"])
def test_bytes_arrive(checkpoint: Checkpoint, driver: CudaDriver, early: EarlyFetch, room: int) -> None:
    early.fetch(driver, [whole(checkpoint.path)], room)
    assert early.fetched == early.nbytes == min(room, whole(checkpoint.path).end)
    way = Staging(CUDA, pinned=True, checkpoint=checkpoint, early=early)
    assert way.fetches == (room == EVERYTHING)
    for name in "abc":
        tensor = checkpoint.tensor(name)
        made = way.bring(tensor)
        assert (made.device, made.dtype, made.shape) == (CUDA, tensor.dtype, tensor.shape)
        assert torch.equal(made.cpu(), tensor)
    rows, into = checkpoint.tensor("c")[7:2900], torch.zeros(2893, 2051, dtype=torch.bfloat16, device=CUDA)
    assert way.bring(rows, into) is into and torch.equal(into.cpu(), rows)
    early.close()
    assert torch.equal(way.bring(checkpoint.tensor("c")).cpu(), checkpoint.tensor("c")), "and after that"


def test_threads_and_a_busy_device_change_nothing(
    checkpoint: Checkpoint, driver: CudaDriver, early: EarlyFetch
) -> None:
    """Memory that the device still writes to is given to a copy, which has to wait for it."""
    early.fetch(driver, [whole(checkpoint.path)], EVERYTHING)
    way = Staging(CUDA, pinned=True, checkpoint=checkpoint, early=early)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            torch.cuda._sleep(20_000_000)
            for name in "abc":
                torch.empty_like(checkpoint.tensor(name), device=CUDA).fill_(7)
            names = [*"abccba"]
            made = list(pool.map(lambda name: way.bring(checkpoint.tensor(name)), names))
            assert all(
                torch.equal(found.cpu(), checkpoint.tensor(name)) for name, found in zip(names, made, strict=True)
            )


def test_what_is_copied_from_it_is_there_before_it_goes(
    checkpoint: Checkpoint, driver: CudaDriver, early: EarlyFetch
) -> None:
    """With a GPU that copies late."""
    early.fetch(driver, [whole(checkpoint.path)], EVERYTHING)
    way = Staging(CUDA, pinned=True, checkpoint=checkpoint, early=early)
    torch.cuda._sleep(1_000_000_000)
    made = way.bring(checkpoint.tensor("c"))
    early.close()
    assert torch.equal(made.cpu(), checkpoint.tensor("c"))


def test_it_counts_as_free_and_is_given_back(
    folder: Path, driver: CudaDriver, early: EarlyFetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "early_fetch", lambda: early)
    before, free = card_of(CUDA).free, driver.free()
    with (folder / "x").open("wb") as file:
        file.truncate(1 << 30)
    early.fetch(driver, [whole(folder / "x")], EVERYTHING)
    assert early.nbytes == 1 << 30 and abs(free - driver.free() - early.nbytes) < 64 << 20
    assert abs(card_of(CUDA).free - before) < 64 << 20
    early.close()
    assert abs(driver.free() - free) < 64 << 20 and abs(card_of(CUDA).free - before) < 64 << 20


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


@pytest.mark.parametrize("room", [EVERYTHING, 3 << 20], ids=["all", "some"])
def test_the_networks_are_the_same(
    folder: Path, driver: CudaDriver, early: EarlyFetch, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """All parts, the transformer in nf4 as it is in the file, others converted."""
    paths = write_model(folder, SMALL, CUDA)
    (paths["transformer"],) = write_packed(paths["transformer"], ["nf4"], CUDA)
    expected = tensors_of(networks_of(model_of(paths, folder)))
    monkeypatch.setattr(networks_module, "early_fetch", lambda: early)
    early.fetch(driver, [whole(path) for path in paths.values()], room)
    assert early.fetched > 0
    found = tensors_of(networks_of(model_of(paths, folder)))
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(*(each[key].contiguous().view(-1).view(torch.uint8) for each in (found, expected)))
        for key in expected
    )


def test_a_start_loads_the_same(folder: Path) -> None:
    """In processes of their own, where torch is not there as the files are fetched; transformer and T5 in nf4."""
    paths = write_model(folder, SMALL, CUDA)
    for role in ("transformer", "t5"):
        write_packed(paths[role], ["nf4"], CUDA)
        paths[role].unlink()
    settings = {
        "models_dir": str(folder), "cache_dir": str(folder / "cache"), "offline": True, "device": "cuda",
        "tokenizer_dirs": [str(TOKENIZERS)],
    }  # fmt: skip
    told, kernels = [], kernels_folder(folder / "cache")
    for way in ("early", "in C", "plainly"):
        if way == "in C":
            assert list(kernels.glob("reader/*.so")), "the start before has built it"
        command = [sys.executable, "-c", START, json.dumps(settings), way]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1]))
    *starts, (plainly, *none) = told
    assert none == [0, 0, 0]
    for early, held, fetched, left in starts:
        assert early == plainly and held >= fetched > 0 == left, "all of it is given back"


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
