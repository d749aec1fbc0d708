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
    return folder / "reader" / f"{zlib.crc32(SOURCE.read_bytes()):08x}-{os.uname().machine}.so"


def read_pieces(folder: Path) -> Any:
    """The loop, ``(job, stream, buffer, buffer)``, where it has been built; None else.

    Args:
        folder: of compiled programs. Whoever may write there is trusted, as by Triton; in the loop's own folder, nobody
            but this user and the machine's.
    """
    if sys.platform != "linux":
        return None
    try:
        path = library_path(folder)
        for each in (path.parent, path):
            found = each.stat()
            if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
                raise PermissionError(f"others may write to {each}")
        loop = ctypes.CDLL(str(path)).lwe_read_pieces
    except FileNotFoundError:
        return None
    except (OSError, AttributeError) as error:
        _say("files are read by Python, more slowly: %s", error)
        return None
    loop.argtypes, loop.restype = (POINTER(Job), c_void_p, c_void_p, c_void_p), None
    return loop


def _say(words: str, *of: object) -> None:
    import logging  # not at a start

    logging.getLogger(__name__).info(words, *of)


def build(folder: Path) -> Path | None:
    """Build the loop, where it has not been; None where that cannot be done here."""
    import shutil  # none of these at a start
    import subprocess
    import tempfile

    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if sys.platform != "linux" or compiler is None:
        return None
    try:
        path = library_path(folder)
        if read_pieces(folder) is not None:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch, path.name)
            command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(made), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
            made.chmod(0o700)
            with made.open("rb") as file:
                os.fsync(file.fileno())  # one that is cut off would end whoever loads it
            made.replace(path)  # whole, or not at all
    except (OSError, subprocess.SubprocessError) as error:
        _say("the loop that reads files cannot be built: %s", error)
        return None
    return path


def build_later(folder: Path) -> threading.Thread | None:
    """Build it for the next start, in a thread; a process that is over sooner ends once that is done."""
    thread = threading.Thread(target=build, args=(folder,), name="reader")
    with suppress(RuntimeError):  # the system gives no more
        thread.start()
        return thread
    return None


def table(pieces: Sequence[tuple[int, int, int, int]]) -> Any:
    """Pieces, each by descriptor, first byte, count and place, as ``reader.c`` reads them."""
    return (Piece * len(pieces))(*pieces)


def flags(of: bytearray) -> Any:
    """The same bytes, as ``reader.c`` writes them."""
    return ctypes.cast((c_char * len(of)).from_buffer(of), POINTER(c_uint8))
