"""Programs in CUDA C++, compiled at their first use from source beside this file and kept where Triton keeps its own.

For what Triton does not reach: tensor cores that are fed from registers in an order of one's own. NVIDIA's run-time
compiler comes with torch; the driver loads what it makes.

Source: the manuals of NVRTC and of the CUDA driver.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from contextlib import suppress
from ctypes import Structure, byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...errors import EngineError
from .. import gpu_driver
from .launch import kept_in

PLAIN_SHARED = 48 << 10
"""Bytes of shared memory that a program may have without being allowed more."""
_MOST_SHARED = 8  # the attribute that allows more
_BFLOAT16 = 9  # of the types of a tensor map


class CudaError(EngineError):
    """A program cannot be compiled, loaded or started."""


class CudaProgram:
    """A function of a source file, on one GPU.

    Args:
        file: name of the source in this folder.
        name: of the function, which is declared ``extern "C"`` and takes one structure.
        device: the GPU.
        shared: bytes of shared memory that a start may ask for.

    Raises:
        CudaError: there is no compiler, or the source is not for this GPU.
    """

    def __init__(self, file: str, name: str, device: torch.device, shared: int = 0) -> None:
        self._name, self._device = name, device
        self._function = c_void_p()
        self._context = _context(device)
        with torch.cuda.device(device):
            module = _loaded(file, torch.cuda.current_device())
            _check(_driver().cuModuleGetFunction(byref(self._function), module, name.encode()), name)
            if shared > PLAIN_SHARED:
                _check(_driver().cuFuncSetAttribute(self._function, _MOST_SHARED, c_int(shared)), name)

    def __call__(self, grid: tuple[int, int, int], threads: int, work: Structure, *, shared: int = 0) -> None:
        """Queue it on the current stream of its GPU."""
        _enter(self._context)
        arguments = (c_void_p * 1)(ctypes.addressof(work))  # copied before the driver returns
        stream = c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        done = _driver().cuLaunchKernel(self._function, *grid, threads, 1, 1, shared, stream, arguments, None)
        _check(done, self._name)


class TensorMap(Structure):
    """Where numbers of 16 bits lie, as Hopper's GPUs fetch boxes of them. It is part of what a program is given."""

    _fields_ = (("opaque", c_uint64 * 16),)


def tensor_map(
    device: torch.device, address: int, sizes: tuple[int, ...], steps: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:
    """Of bfloat16, in boxes whose rows of 128 bytes come out swizzled; zeros where there is nothing.

    Args:
        device: the GPU that has the numbers.
        address: of the first number; a multiple of 16.
        sizes: of all dimensions, the innermost first.
        steps: bytes from one to the next in each but the innermost; multiples of 16.
        box: numbers of each dimension that are fetched at a time, 64 of the innermost.

    Raises:
        CudaError: these do not fit together.
    """
    made, count = TensorMap(), len(sizes)
    shape = (c_uint64 * count)(*sizes), (c_uint64 * (count - 1))(*steps), (c_uint32 * count)(*box)
    every = (c_uint32 * count)(*(1 for _ in sizes))
    plain, swizzled, kept, zeros = 0, 3, 3, 0  # no interleaving; 128 bytes; 256 bytes of the second-level cache
    _enter(_context(device))
    encode = _driver().cuTensorMapEncodeTiled
    failed = encode(
        byref(made), _BFLOAT16, count, c_void_p(address), *shape, every, *map(c_int, (plain, swizzled, kept, zeros))
    )
    _check(failed, "tensor map")
    return made


def _check(code: int, what: str) -> None:
    if code:
        text = c_char_p()
        _driver().cuGetErrorString(code, byref(text))
        raise CudaError(f"a CUDA program ({what}) failed: {(text.value or b'').decode() or code}")


@cache
def _driver() -> Any:
    return ctypes.CDLL(gpu_driver.NAME)


@cache
def _context(device: torch.device) -> c_void_p:
    """That of a GPU, which is torch's."""
    torch.cuda.init()
    context = c_void_p()
    index = torch.cuda.current_device() if device.index is None else device.index
    _check(_driver().cuDevicePrimaryCtxRetain(byref(context), c_int(index)), f"GPU {index}")
    return context


def _enter(context: c_void_p) -> None:
    """Before any other call of the driver: a thread that has done nothing yet has no context."""
    _check(_driver().cuCtxSetCurrent(context), "context")


@cache
def _loaded(file: str, index: int) -> c_void_p:
    """A file's functions in the context of a GPU."""
    module = c_void_p()
    _enter(_context(torch.device("cuda", index)))
    _check(_driver().cuModuleLoadData(byref(module), _machine_code(file, index)), file)
    return module


def _machine_code(file: str, index: int) -> bytes:
    """That of a file for a GPU; from the cache where that has it."""
    source = (Path(__file__).parent / file).read_bytes()
    target = "sm_{}{}a".format(*torch.cuda.get_device_capability(index))
    parts = f"{target} {torch.version.cuda}\n".encode(), source, *_headers().values()
    version = hashlib.sha256(b"".join(parts)).hexdigest()[:32]
    kept = kept_in() / f"{Path(file).stem}-{version}.cubin"
    with suppress(OSError):
        return kept.read_bytes()
    code = compiled(source, file, target)
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")  # another process may be at it
        part.write_bytes(code)
        part.replace(kept)
    return code


def compiled(source: bytes, name: str, target: str) -> bytes:
    """Machine code; needs no GPU. The source may include what is in this folder's headers.

    Args:
        name: of the source, in errors.
        target: as ``sm_90a``.

    Raises:
        CudaError: there is no compiler, or it refuses the source.
    """
    compiler, program = _compiler(), c_void_p()
    options = [f"--gpu-architecture={target}".encode(), b"-std=c++17"]
    headers = _headers()
    texts, names = ((c_char_p * len(headers))(*each) for each in (headers.values(), headers))
    failed = compiler.nvrtcCreateProgram(byref(program), source, name.encode(), len(headers), texts, names)
    try:
        failed = failed or compiler.nvrtcCompileProgram(program, len(options), (c_char_p * len(options))(*options))
        if failed:
            log = _told(compiler, program, "ProgramLog").decode()
            raise CudaError(f"{name} cannot be compiled for {target}: {log}")
        return _told(compiler, program, "CUBIN")
    finally:
        compiler.nvrtcDestroyProgram(byref(program))


@cache
def _headers() -> dict[bytes, bytes]:
    """Texts by their names."""
    return {path.name.encode(): path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.cuh"))}


def _told(compiler: Any, program: c_void_p, what: str) -> bytes:
    size = c_size_t()
    getattr(compiler, f"nvrtcGet{what}Size")(program, byref(size))
    text = ctypes.create_string_buffer(max(1, size.value))
    getattr(compiler, f"nvrtcGet{what}")(program, text)
    return text.raw if what == "CUBIN" else text.value


@cache
def _compiler() -> Any:
    """NVRTC. Its built-in functions come first, as it looks for them by their name alone."""
    version = torch.version.cuda
    if version is None:
        raise CudaError("torch was built without CUDA")
    major = version.partition(".")[0]
    if sys.platform == "win32":
        return _library(f"nvrtc64_{major}0_0.dll")
    _library(f"libnvrtc-builtins.so.{version}")
    return _library(f"libnvrtc.so.{major}")


def _library(name: str) -> Any:
    """A library that the system finds, or that came with torch."""
    with suppress(OSError):
        return ctypes.CDLL(name)
    for path in Path(torch.__file__).parents[1].glob(f"nvidia/*/lib/{name}"):
        return ctypes.CDLL(str(path))
    raise CudaError(f"{name} is missing, which is part of torch's CUDA build")
