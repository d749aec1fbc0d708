"""Programs in CUDA C++ up to machine code, which needs no GPU; they run in ``tests/gpu``."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lightweight_engine.backend import kernels
from lightweight_engine.backend.kernels import attention, cuda
from lightweight_engine.backend.kernels.cuda import CudaError
from lightweight_engine.backend.kernels.hopper import LEAST_TILES, plan, usable

SOURCES = sorted(Path(kernels.__file__).parent.glob("*.cu"))
NAMES = {
    "attention.cu": [b"attend", b"merge"],
    "eight_bit_attention.cu": [b"find_peaks", b"prepare", b"attend", b"merge"],
}

needs_compiler = pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA's compiler")


@needs_compiler
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_programs_are_compiled_without_a_gpu(source: Path) -> None:
    code = cuda.compiled(source.read_bytes(), source.name, "sm_90a")
    assert code.startswith(b"\x7fELF")
    assert all(name in code for name in NAMES[source.name])


@needs_compiler
def test_a_program_that_cannot_be_compiled_says_why() -> None:
    with pytest.raises(cuda.CudaError, match=r"odd\.cu cannot be compiled for sm_90a: odd\.cu\(1\): error.*nothing"):
        cuda.compiled(b"__global__ void odd() { nothing(); }", "odd.cu", "sm_90a")


@needs_compiler
def test_machine_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    made = cuda._machine_code("attention.cu", 0)
    (kept,) = (tmp_path / "kernels").iterdir()
    assert kept.read_bytes() == made
    kept.write_bytes(b"kept")
    assert cuda._machine_code("attention.cu", 0) == b"kept", "it is not compiled again"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 9))
    with pytest.raises(cuda.CudaError, match="sm_99a"):
        cuda._machine_code("attention.cu", 0)


@needs_compiler
def test_machine_code_belongs_to_the_headers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    cuda._machine_code("attention.cu", 0)
    monkeypatch.setattr(cuda, "_headers", lambda: {b"hopper.cuh": b"#error changed"})
    with pytest.raises(CudaError, match="changed"):
        cuda._machine_code("attention.cu", 0)


def test_a_folder_that_cannot_be_written_to_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda is None:
        pytest.skip("torch was built without CUDA's compiler")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert cuda._machine_code("attention.cu", 0).startswith(b"\x7fELF")


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda._compiler.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(cuda.CudaError, match="without CUDA"):
        cuda.compiled(b"", "empty.cu", "sm_90a")
    monkeypatch.setattr(torch.version, "cuda", "99.7")
    with pytest.raises(cuda.CudaError, match=r"libnvrtc-builtins\.so\.99\.7 is missing"):
        cuda.compiled(b"", "empty.cu", "sm_90a")
    cuda._compiler.cache_clear()


def test_what_another_gpu_has_not_is_no_matter(caplog: pytest.LogCaptureFixture) -> None:
    assert not usable(attention.programs, torch.device("cpu"), "slower")
    assert not caplog.messages


def test_a_gpu_that_should_have_programs_says_why_it_has_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(device: torch.device) -> None:
        raise CudaError("no room")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with caplog.at_level(logging.WARNING):
        assert not usable(fails, torch.device("cuda", 0), "attention is torch's")
        assert usable(lambda device: None, torch.device("cuda", 0), "attention is torch's")
    assert caplog.messages == ["attention is torch's: no room"]
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD counts its GPUs otherwise
    assert not usable(lambda device: None, torch.device("cuda", 0), "")


def lying(*, tokens: int = 40, heads: int = 2, apart: int = 0, first: int = 0) -> torch.Tensor:
    """Queries, keys or values ``[1, N, S, 128]`` in rows that are apart, from some number of memory on."""
    width = heads * attention.DIM + apart
    memory = torch.zeros(tokens * width + first, dtype=torch.bfloat16)[first:]
    rows = memory.view(1, tokens, width)[..., : heads * attention.DIM]
    return rows.unflatten(-1, (heads, attention.DIM)).transpose(1, 2)


def test_what_lies_otherwise_than_attention_reads_is_told() -> None:
    x = lying()
    assert attention.take(x, x, x) and attention.take(x, lying(apart=64), x, 0.5)
    assert attention.take(*(x.expand(1, 2, 40, 128) for _ in range(3)))
    assert not attention.take(x, x, lying(apart=4)), "rows that start between 16 bytes"
    assert not attention.take(x, lying(first=1), x), "memory that does"
    assert not attention.take(x, x[:, :, :8], x[:, :, :8]), "keys that are not as many as queries"
    assert not attention.take(x.float(), x.float(), x.float())
    assert not attention.take(x.half(), x.half(), x.half())
    assert not attention.take(*(each[..., :64] for each in (x, x, x))), "heads of another width"
    assert not attention.take(*(x[:, :1].expand(1, 3, 40, 128) for _ in range(3))), "one head for all"
    assert not attention.take(x, x, x, -1.0)
    assert not attention.take(x[:0], x[:0], x[:0])


@pytest.mark.parametrize(
    ("batch", "heads", "tokens"), [(1, 24, 4544), (4, 24, 1536), (1, 1, 300), (2, 24, 77), (1, 24, 16640)]
)
def test_jobs_that_are_left_are_cut_into_equal_shares(batch: int, heads: int, tokens: int) -> None:
    blocks = 132
    made = plan(batch, heads, tokens, 176, blocks)
    assert made.jobs == batch * heads * made.places and 128 * (made.places - 1) < tokens <= 128 * made.places
    assert 176 * (made.tiles - 1) < tokens <= 176 * made.tiles
    cut = made.jobs - made.whole
    assert cut < blocks
    if cut:
        assert made.whole % blocks == 0, "the others are shared out evenly"
        assert LEAST_TILES <= made.share < made.tiles, "a block has parts of two jobs at most"
        assert made.share * blocks >= cut * made.tiles, "all tiles are somebody's"


def test_what_would_be_left_for_nearly_all_blocks_is_not_cut() -> None:
    assert plan(1, 1, 128 * 131, 176, 132).whole == 131
    assert plan(1, 1, 128 * 132, 176, 132).whole == 132
    assert plan(1, 1, 128 * 133, 176, 132).whole == 132
    assert plan(1, 2, 128, 176, 132).whole == 2
