"""The loop that reads files for a GPU, in C: in Python each turn of it waits for the lock that imports hold.

Built once where a machine has a compiler, as what Triton starts its programs with is, and kept beside those. Where it
has none, or is not Linux, the loop in Python does the same. Loads no torch.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import zlib
from collections.abc import Sequence
from contextlib import suppress
from ctypes import POINTER, Structure, c_char, c_int64, c_uint8, c_uint64, c_void_p
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("reader.c")
COMPILERS = ("cc", "gcc", "clang")
SECONDS = 20
"""That a compiler may take; it takes a tenth of one."""


class Piece(Structure):
    """Bytes of a file, and where on the GPU they go; as ``reader.c`` has it."""

    _fields_ = (("file", c_int64), ("start", c_int64), ("nbytes", c_int64), ("target", c_uint64))


class Job(Structure):
    """What all threads that read share; as ``reader.c`` has it."""

    _fields_ = (
        ("pieces", POINTER(Piece)),
        ("count", c_int64),
        ("next", c_int64),
        ("stop", c_int64),
        ("there", POINTER(c_uint8)),
        ("enter", c_void_p),
        ("context", c_void_p),
        ("copy", c_void_p),
        ("settle", c_void_p),
    )


def library_path(folder: Path) -> Path:
    """Where the loop is kept: by its source and the kind of machine, so that a changed one is built anew."""
    return folder / f"reader-{zlib.crc32(SOURCE.read_bytes()):08x}-{os.uname().machine}.so"


def read_pieces(folder: Path) -> Any:
    """The loop, ``(job, stream, buffer, buffer)``, where it has been built and nobody else could have; None else."""
    if sys.platform != "linux":
        return None
    with suppress(OSError, AttributeError):
        path = library_path(folder)
        if _is_own(path) and _is_own(folder):
            loop = ctypes.CDLL(str(path)).lwe_read_pieces
            loop.argtypes, loop.restype = (POINTER(Job), c_void_p, c_void_p, c_void_p), None
            return loop
    return None


def _is_own(path: Path) -> bool:
    """Whether it is this user's or the machine's, and not everybody may write there."""
    found = path.stat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o002


def build(folder: Path) -> Path | None:
    """Build the loop, where it has not been; None where that cannot be done here."""
    import shutil  # none of these at a start
    import subprocess
    import tempfile

    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if sys.platform != "linux" or compiler is None:
        return None
    path = library_path(folder)
    if path.is_file():
        return path
    with suppress(OSError, subprocess.SubprocessError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".reader-") as scratch:
            made = Path(scratch, path.name)
            command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(made), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
            made.chmod(0o755)
            made.replace(path)  # whole, or not at all
        return path
    return None


def build_later(folder: Path) -> threading.Thread:
    """Build it for the next start, in a thread; a process that is over sooner ends once that is done."""
    thread = threading.Thread(target=build, args=(folder,), name="reader")
    thread.start()
    return thread


def table(pieces: Sequence[tuple[int, int, int, int]]) -> Any:
    """Pieces, each by descriptor, first byte, count and place, as ``reader.c`` reads them."""
    return (Piece * len(pieces))(*pieces)


def flags(of: bytearray) -> Any:
    """The same bytes, as ``reader.c`` writes them."""
    return ctypes.cast((c_char * len(of)).from_buffer(of), POINTER(c_uint8))
