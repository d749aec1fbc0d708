"""Pages of mapped files go back to the system when they are asked to, alone, and no number is lost."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import called_fresh, resident
from safetensors.torch import save_file
from torch import Tensor, nn

from lightweight_engine.backend.checkpoint import Checkpoint, open_checkpoint
from lightweight_engine.backend.pages import PageStream, release_pages
from lightweight_engine.backend.streaming import Place, Unit

MIB = 1 << 20
HUGE_PAGE = 2 * MIB

pytestmark = [
    pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system has no madvise"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell what is resident"),
]


def numbers(seed: int, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def resident_pages(tensor: Tensor) -> int:
    """Bytes of a tensor's range that this process has mapped in, as the kernel counts them page by page."""
    start, end = tensor.data_ptr() // mmap.PAGESIZE, -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE)
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(8 * start)
        entries = memoryview(file.read(8 * (end - start))).cast("Q")
    return sum(entry >> 63 for entry in entries) * mmap.PAGESIZE


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Three tensors of 8 MiB, one after another, none at the start of a page."""
    save_file({name: numbers(i, 2 * MIB) for i, name in enumerate("abc")}, tmp_path / "x.safetensors")
    return open_checkpoint(tmp_path / "x.safetensors")


def test_pages_go_back_and_others_stay(checkpoint: Checkpoint) -> None:
    a, b, c = (checkpoint.tensor(name) for name in "abc")
    for tensor in (a, b, c):
        tensor.sum()
        assert resident_pages(tensor) >= tensor.nbytes
    release_pages(checkpoint, b)
    assert resident_pages(b) <= 2 * mmap.PAGESIZE, "those that it shares with its neighbours stay"
    # Where the kernel has mapped a whole huge page at a seam, it cuts it up, and reads the rest again when it is used.
    assert all(resident_pages(tensor) >= tensor.nbytes - HUGE_PAGE for tensor in (a, c))


def test_no_number_is_lost(checkpoint: Checkpoint) -> None:
    for _ in range(3):
        for i, name in enumerate("abc"):
            tensor = checkpoint.tensor(name)
            assert torch.equal(tensor, numbers(i, 2 * MIB))
            release_pages(checkpoint, tensor)
            assert torch.equal(tensor, numbers(i, 2 * MIB)), "a view can be read on"
            release_pages(checkpoint, tensor[1000:2000])
    assert all(torch.equal(checkpoint.tensor(name), numbers(i, 2 * MIB)) for i, name in enumerate("abc"))


@pytest.mark.parametrize("size", [1, 1000, 1023])
def test_what_fills_no_page_gives_none_back(checkpoint: Checkpoint, size: int) -> None:
    """All pages of a small tensor are its neighbours' too."""
    whole = checkpoint.tensor("b")
    whole.sum()
    before = resident_pages(whole)
    for start in (0, 1, 1020, 300_000, len(whole) - size):
        release_pages(checkpoint, whole[start : start + size])
    assert resident_pages(whole) == before >= whole.nbytes


def test_memory_of_ones_own_is_left_alone(checkpoint: Checkpoint) -> None:
    own = checkpoint.tensor("a").clone()
    changed = own.mul_(2)
    release_pages(checkpoint, changed)
    release_pages(checkpoint, torch.empty(0))
    assert torch.equal(changed, numbers(0, 2 * MIB) * 2)


def test_a_file_of_another_checkpoint_is_left_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_file({"a": numbers(9, MIB)}, tmp_path / "other.safetensors")
    other = open_checkpoint(tmp_path / "other.safetensors")
    tensor = other.tensor("a")
    tensor.sum()
    release_pages(checkpoint, tensor)
    assert resident_pages(tensor) >= tensor.nbytes


# --- a network that is larger than what it may take -------------------------------------------------------------------

WIDTH, LAYERS = 1024, 25  # 100 MiB


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def deep(checkpoint: Checkpoint) -> Deep:
    """The network with the weights of a file, which it does not copy."""
    with torch.device("meta"):
        model = Deep()
    state = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def units(model: Deep) -> list[Unit]:
    return [
        Unit(str(i), layer, (Place(layer._parameters, "weight"),))  # type: ignore[arg-type]
        for i, layer in enumerate(model.layers)
    ]


def outputs_and_memory(path: str, stream: bool) -> dict[str, Any]:
    """Three passes: what comes out, what was resident at most and in the end, in bytes above the start."""
    torch.set_num_threads(1)
    x = numbers(0, 2 * WIDTH).view(2, WIDTH)
    torch.tanh(x @ torch.eye(WIDTH))  # what torch loads at first use
    checkpoint = open_checkpoint(path)
    model = deep(checkpoint)
    gc.collect()
    before, most = resident(), 0

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, resident() - before)

    pages = PageStream(units(model), checkpoint) if stream else None
    for layer in model.layers:
        layer.register_forward_pre_hook(look)
    with torch.inference_mode():
        made = [model(x).tolist() for _ in range(3)]
    if pages is not None:
        pages.close()
    hooks = sum(len(layer._forward_hooks) for layer in model.layers)
    return {"made": made, "most": most, "end": resident() - before, "hooks": hooks}


def test_a_stream_of_pages_computes_the_same_in_a_fraction_of_the_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(Deep().state_dict(), tmp_path / "deep.safetensors")
    size = (tmp_path / "deep.safetensors").stat().st_size
    resident_run, streamed = (called_fresh(outputs_and_memory, str(tmp_path / "deep.safetensors"), s) for s in (0, 1))
    assert streamed["made"] == resident_run["made"]
    assert streamed["made"][0] == streamed["made"][1] == streamed["made"][2]
    assert resident_run["most"] > 0.9 * size and resident_run["end"] > 0.9 * size
    assert streamed["most"] < 0.15 * size, "a layer of 4 MiB, and what the kernel reads ahead"
    assert streamed["end"] < 0.05 * size and streamed["hooks"] == 0


def test_closing_in_the_middle_of_a_pass_gives_all_back(checkpoint: Checkpoint) -> None:
    model = nn.Linear(1024, 2048, bias=False)
    model.weight = nn.Parameter(checkpoint.tensor("a").view(2048, 1024), requires_grad=False)
    stream = PageStream([Unit("x", model, (Place(model._parameters, "weight"),))], checkpoint)  # type: ignore[arg-type]
    model.weight.sum()
    stream.close()
    assert resident_pages(model.weight) <= 2 * mmap.PAGESIZE and not model._forward_hooks
