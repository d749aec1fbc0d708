"""Locks between processes, and small files that are written whole: what the cache of fetched files is built of.

A lock is that of flock on the file itself, and ends with the process that holds it. Loads no torch.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SHARED = fcntl.LOCK_SH
ALONE = fcntl.LOCK_EX
AT_ONCE = fcntl.LOCK_EX | fcntl.LOCK_NB


def lock(path: Path, kind: int, *, create: bool = False) -> int | None:
    """A handle with a lock on the file that ``path`` names at that moment; None where there is none, or it is taken."""
    flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
    while True:
        try:
            handle = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, kind)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass
        os.close(handle)  # it was removed before the lock was had: look again


@dataclass(frozen=True)
class Item:
    """What one removal frees: a file, or all that belongs to an unfinished one.

    Attributes:
        key: of an unfinished file; empty for a whole one.
        sha256: of a whole file; empty for an unfinished one.
        size: bytes on the disk.
        reserved: bytes that it may grow to.
        used: seconds since the epoch.
        lock: the file whose lock tells that it is in use.
    """

    key: str
    sha256: str
    size: int
    reserved: int
    used: float
    lock: Path
    paths: tuple[Path, ...]

    @property
    def room(self) -> int:
        return max(self.size, self.reserved)

    def in_use(self) -> bool:
        return is_locked(self.lock)

    def remove(self) -> bool:
        """Whether it is gone now: it was not in use."""
        handle = lock(self.lock, AT_ONCE)
        if handle is None and self.lock.exists():
            return False
        try:
            for path in self.paths:
                path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s stays in the cache: %s", self.paths[0].name, error)
            return False
        finally:
            if handle is not None:
                os.close(handle)
        return True


def is_locked(path: Path) -> bool:
    handle = lock(path, AT_ONCE)
    if handle is not None:
        os.close(handle)
    return handle is None and path.exists()


def whole_item(path: Path) -> Item | None:
    """A whole file, named by its hash; None where it has gone."""
    stat = _stat(path)
    return None if stat is None else Item("", path.stem, stat.st_size, 0, stat.st_mtime, path, (path,))


def unfinished_item(key: str, paths: Iterable[Path], locks: Path, reserved: int) -> Item:
    """All files of one unfinished fetch; what is reserved for it counts while somebody is at it."""
    paths = tuple(paths)
    stats = [stat for stat in map(_stat, paths) if stat is not None]
    used = max((stat.st_mtime for stat in stats), default=0.0)
    held = locks / key
    return Item(key, "", sum(s.st_size for s in stats), reserved if is_locked(held) else 0, used, held, paths)


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object; one that is missing or damaged is empty."""
    try:
        return as_json(path.read_bytes())
    except OSError:
        return {}


def as_json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all; only its owner may read it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
