"""What goes to the GPU by way of page-locked memory arrives as it was, from several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightweight_engine.backend.staging import HALF, SMALL, Staging

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
SIZES = (0, 1, SMALL - 1, SMALL, HALF, HALF + 1, 2 * HALF, 3 * HALF + 5, 7 * HALF)


def numbers(count: int) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_arrive(size: int, pinned: bool) -> None:
    found = Staging(CUDA, pinned=pinned).bring(numbers(size))
    assert found.device == CUDA
    assert torch.equal(found.cpu(), numbers(size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8])
def test_shape_and_dtype_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "file"
    given = torch.randn(3001, 2048).mul(50).to(dtype)
    path.write_bytes(given.view(-1).view(torch.uint8).numpy().tobytes())
    mapped = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).view(dtype).view(3001, 2048)
    found = Staging(CUDA, pinned=True).bring(mapped)
    assert (found.dtype, found.shape) == (dtype, given.shape)
    assert torch.equal(found.cpu(), given)
    turned = Staging(CUDA, pinned=True).bring(mapped.t())
    assert torch.equal(turned.cpu(), given.t())


def test_threads_and_a_busy_device_change_nothing() -> None:
    """Memory that the device still writes to is given to a copy, which has to wait for it."""
    staging = Staging(CUDA, pinned=True)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            torch.cuda._sleep(20_000_000)
            for size in SIZES[3:]:
                torch.empty(size, dtype=torch.uint8, device=CUDA).fill_(7)  # freed with its work still waiting
            made = list(pool.map(staging.bring, map(numbers, SIZES)))
            for size, found in zip(SIZES, made, strict=True):
                assert torch.equal(found.cpu(), numbers(size)), size
