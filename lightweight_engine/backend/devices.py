"""Which device, which dtypes, how much memory, how fast."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .early_fetch import early_fetch
from .host_memory import host_available, host_total
from .processes import resident_bytes


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, else the CPU; otherwise the named device.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device: {name} is asked for, but torch sees no CUDA device; use device=cpu")
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"device: {name} is asked for, but there are {torch.cuda.device_count()} CUDA devices")
    elif device.type != "cpu":
        raise ConfigError(f"device: {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def compute_dtype(setting: str, card: Card) -> torch.dtype:
    """The dtype to compute in: as set; else bfloat16 where the GPU has it, float16 where not, float32 on a CPU."""
    if setting != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[setting]
    if card.kind != "cuda":
        return torch.float32
    old = card.device is not None and torch.cuda.get_device_capability(card.device) < (8, 0)
    return torch.float16 if old else torch.bfloat16


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated: free on the GPU, or on the host with cgroup limits honoured."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_available()


# Name of a card -> (dense bf16 TFLOP/s, GB/s from pinned host memory). Vendors' figures for the cards of desktops,
# measured ones for H100 and H200.
RATES: dict[str, tuple[float, float]] = {
    "H200": (790, 55),
    "H100": (790, 55),
    "A100": (312, 24),
    "L40": (181, 24),
    "RTX 5090": (210, 50),
    "RTX 4090": (165, 24),
    "RTX 4080": (97, 24),
    "RTX 4070": (58, 24),
    "RTX 3090": (71, 24),
    "RTX 3080": (60, 24),
    "RTX 3060": (26, 24),
    "A10": (125, 24),
    "T4": (65, 12),
}

WITHOUT_EIGHT_BITS = ("A100", "RTX 3090", "RTX 3080", "RTX 3060", "A10", "T4")
"""Those of these cards that have no products of 8-bit floats, which came with Ada and Hopper."""


def known_card(name: str) -> str | None:
    """Which of ``RATES`` a device's name means: "H200" for "NVIDIA H200 NVL", and none for "H2000"."""
    return next((known for known in RATES if re.search(rf"\b{known}(?!\d)", name, re.IGNORECASE)), None)


@dataclass(frozen=True)
class Card:
    """The memory of a device in bytes, and its name; ``device`` is None for one that is only planned for."""

    name: str
    kind: str
    total: int
    free: int
    device: torch.device | None = None

    @property
    def flops(self) -> float | None:
        """Floating-point operations a second in bf16."""
        known = known_card(self.name)
        return RATES[known][0] * 1e12 if known else None

    @property
    def is_known_without_eight_bits(self) -> bool:
        """Whether its name says that it has no products of 8-bit floats; one that is here is asked itself."""
        return self.device is None and known_card(self.name) in WITHOUT_EIGHT_BITS

    @property
    def link(self) -> float | None:
        """Bytes a second from the host; a usual PCIe 4 slot where the card is not known. None for the host itself."""
        if self.kind == "cpu":
            return None
        known = known_card(self.name)
        return RATES[known][1] * 1e9 if known else 24e9


_NONE = {"all": {"current": 0}}  # before torch's first work on a device


def card_of(device: torch.device) -> Card:
    """What a device has now. Memory that torch holds and does not use counts as free, as what a start took does."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        # Asked for one by one, each of the two would make a sorted table of all 150 figures; a plan asks at every pass.
        figures = torch.cuda.memory_stats_as_nested_dict(device)
        held, used = (figures.get(kind, _NONE)["all"]["current"] for kind in ("reserved_bytes", "allocated_bytes"))
        cached = held - used
        with early_fetch().held(device.index or 0) as early:
            free = available_memory(device) + early
        return Card(properties.name, "cuda", properties.total_memory, free + cached, device)
    return Card("CPU", "cpu", host_total(), available_memory(device), device)


def memory_figures(device: torch.device) -> dict[str, dict[str, Any]]:
    """Bytes of the host and of this process there; on a GPU, of it and of torch's allocator, with its peaks.

    Names are those of ``/memory`` of Stable Diffusion WebUI. A job resets the peaks.
    """
    host = card_of(torch.device("cpu"))
    figures: dict[str, dict[str, Any]] = {"ram": {"free": host.free, "used": resident_bytes(), "total": host.total}}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        stats = torch.cuda.memory_stats(device)
        kinds = {"active": "active", "allocated": "allocated", "reserved": "reserved", "inactive": "inactive_split"}
        figures["cuda"] = {
            "system": {"free": free, "used": total - free, "total": total},
            **{
                name: {when: stats.get(f"{kind}_bytes.all.{when}", 0) for when in ("current", "peak")}
                for name, kind in kinds.items()
            },
            "events": {"retries": stats.get("num_alloc_retries", 0), "oom": stats.get("num_ooms", 0)},
        }
    return figures


# What is said where memory runs out beside torch's own allocator on a GPU, all as RuntimeError or a kind of it.
_RAN_OUT = (
    # by torch's allocator on a host, and by oneDNN without room for a convolution's program or its workspace
    *("can't allocate memory", "could not create a primitive", "could not execute a primitive"),
    # by CUDA, of a GPU's memory and of a host's where it is page-locked; by the driver; as Triton loads a kernel
    *("CUDA error: out of memory", "CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory"),
    "ran out of memory outside PyTorch's allocator",
    # by cuBLAS and by cuDNN, whose version 9 has other names for it
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    *("CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _RAN_OUT)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or said


def what_ran_out(error: BaseException) -> str:
    """The first line of an error, or its name where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class PeakMemory:
    """The most memory a stretch of work had in use, in bytes: allocated on the GPU, resident on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        except ImportError:
            return 0


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device. Whoever sends it waits for nothing that a GPU computes.

    Copies from pages that may be swapped begin when all that was started before is done, and the host waits for them.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def release_cached(device: torch.device) -> None:
    """Give unused blocks back to the device, those too that only circles of references hold."""
    gc.collect()
    give_back_cached(device)


def give_back_cached(device: torch.device) -> None:
    """Give unused blocks back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim_heap()


def trim_heap() -> None:
    """Give back what MKL keeps of the buffers of its matrix products, and the C library (glibc) of what was freed."""
    for library, name, arguments in ((_mkl(), "mkl_serv_free_buffers", ()), (c_library(), "malloc_trim", (0,))):
        give_back = getattr(library, name, None)
        if give_back is not None:
            give_back(*arguments)


@cache
def _mkl() -> Any:
    """The library that has MKL in it, which is torch's own; None where torch was built without."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return ctypes.CDLL(str(path)) if torch.backends.mkl.is_available() and path.exists() else None


# Of glibc's mallopt.
M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -8, -3, -1
KEPT = 128 << 20
"""Bytes that stay at the end of a heap when they are freed."""


def return_freed_memory() -> None:
    """Let what is freed go back to the system at once (glibc): large blocks one by one, small ones from one heap.

    By itself glibc raises the size from which blocks go back up to 32 MiB, which is most tensors of a pass, and gives
    every thread a heap whose end is never trimmed: what a job takes would depend on the jobs before it.
    """
    mallopt = getattr(c_library(), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


def keep_freed_memory() -> None:
    """Keep what is freed for what comes next (glibc): beside a GPU that is a few pictures, made over and over in a job.

    Pages that the system hands out anew are filled with zeros first, which takes longer than copying a picture.
    """
    mallopt = getattr(c_library(), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(M_TRIM_THRESHOLD, KEPT)


@cache
def c_library() -> Any:
    """The C library; where none is found by its name, what this program has of it."""
    return ctypes.CDLL(ctypes.util.find_library("c"))
