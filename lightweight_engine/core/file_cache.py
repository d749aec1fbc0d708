"""Fetched files, kept by content: bounded in bytes, shared by any number of processes, whole or not there at all.

    content/SHA256.safetensors   checked files; the time of change is that of the last use
    names/KEY.json               what the URL of KEY was fetched as
    parts/KEY.*                  what has come of an unfinished fetch, and what is needed to go on
    locks/KEY                    held by whoever fetches; ``all``, by whoever adds or removes

Locks are those of flock: they end with the process that holds them, whatever ends it. A file in use carries a shared
lock on itself, which keeps it from being removed. A KEY is a keyed hash, so that no name tells a URL or its token.
Loads no torch.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import errors
from ..errors import CacheStorageError, DownloadError, DownloadTimeoutError
from .locked_files import (
    ALONE,
    AT_ONCE,
    SHARED,
    Item,
    as_json,
    lock,
    read_json,
    unfinished_item,
    whole_item,
    write_whole,
)

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
POLL = 0.02
FOLDERS = ("content", "names", "parts", "locks")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PartState:
    """What is known of an unfinished file: its size (None: not told), the server's mark of its content, and the bytes
    that are kept free for it."""

    size: int | None = None
    validator: str = ""
    reserved: int = 0


@dataclass(frozen=True)
class CacheEntry:
    """A file of the cache, or an unfinished one (``sha256`` is empty). ``used`` is in seconds since the epoch."""

    sha256: str
    size: int
    used: float
    names: tuple[str, ...]
    in_use: bool


class Held:
    """A file of the cache that stays until this is closed; as a context, until its end.

    Attributes:
        path: the file. What is mapped from it stays readable after closing too.
        name: what a person may be told it is.
    """

    def __init__(self, path: Path, name: str, handle: int) -> None:
        self._handle: int | None = handle
        self.path = path
        self.name = name
        self.sha256 = path.stem
        self.size = os.fstat(handle).st_size

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class FileCache:
    """A folder of fetched files.

    Args:
        limit: bytes that its files may take together; those used longest ago go first, and those in use never.
        setting: where the limit comes from, for messages.
    """

    def __init__(self, folder: Path, limit: int, setting: str = "download_cache_gib") -> None:
        self.folder = folder
        self.limit = limit
        self.setting = setting
        self._secret: bytes | None = None

    # --- looking up -----------------------------------------------------------------------------------------------

    def key(self, url: str) -> str:
        """The name of a URL in this cache. Whoever gives another token in it has another."""
        if self._secret is None:
            with self._alone():
                path = self.folder / "secret"
                if not path.exists():
                    write_whole(path, secrets.token_bytes(32))
                self._secret = path.read_bytes()
        return hmac.new(self._secret, url.encode(), hashlib.sha256).hexdigest()[:40]

    def find(self, key: str) -> Held | None:
        """The file that a URL was fetched as, held; None where it is not here."""
        known = read_json(self._name(key))
        sha256, name, size = known.get("sha256"), known.get("name"), known.get("size")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            return None
        held = self.find_content(sha256, str(name))
        if held is None or held.size == size:
            return held
        log.warning("%s in the cache has changed its size; it is fetched anew", held.path.name)
        held.path.unlink(missing_ok=True)
        held.close()
        return None

    def find_content(self, sha256: str, name: str) -> Held | None:
        """The file with this hash, held; None where it is not here."""
        path = self._content(sha256)
        handle = lock(path, SHARED)
        if handle is None:
            return None
        try:
            os.utime(path)
        except OSError:  # a folder that is only read has no order of use
            pass
        return Held(path, name, handle)

    # --- fetching -------------------------------------------------------------------------------------------------

    @contextmanager
    def filling(self, key: str, wait: float, tick: Callable[[], None]) -> Iterator[None]:
        """Be the only one who fetches ``key``. Whoever waited for one that failed gets that failure, and no turn.

        Args:
            wait: seconds to wait for another at most.
            tick: called while waiting; what it raises ends that.

        Raises:
            DownloadTimeoutError: another is at it for longer.
        """
        began, deadline = time.time(), time.monotonic() + wait
        path = self._made("locks") / key
        while (handle := self._opened(path, AT_ONCE)) is None:
            if time.monotonic() > deadline:
                raise DownloadTimeoutError(f"another fetch of this file takes longer than {wait:g} s; try again")
            tick()
            time.sleep(POLL)
        try:
            _raise_failure(as_json(os.read(handle, 1 << 16)), since=began)
            try:
                yield
            except DownloadError as error:
                _note_failure(handle, error)
                raise
        finally:
            os.close(handle)

    def part(self, key: str, kind: str = "part") -> Path:
        """Where what has come of ``key`` is kept; ``kind`` tells several files apart."""
        return self._made("parts") / f"{key}.{kind}"

    def state(self, key: str) -> PartState:
        """What is known of the part of ``key``; of one that nothing is known of, nothing."""
        try:
            return PartState(**read_json(self.part(key, "json")))
        except TypeError:
            return PartState()

    def reserve(self, key: str, state: PartState) -> None:
        """Remember ``state``, and make room for ``state.reserved`` bytes in all for ``key``.

        Raises:
            CacheStorageError: the cache may not be as large, what could go is in use, or the disk is full.
        """
        if state.reserved > self.limit:
            raise CacheStorageError(
                f"{state.reserved:,} bytes are more than the cache may hold ({self.limit:,}); raise {self.setting}"
            )
        with self._alone():
            items = self._items()
            others = sum(item.room for item in items if item.key != key)
            mine = sum(item.size for item in items if item.key == key)
            disk = os.statvfs(self.folder)
            excess = max(others + state.reserved - self.limit, state.reserved - mine - disk.f_bavail * disk.f_frsize)
            unused = [item for item in items if item.key != key and not item.in_use()]
            if sum(item.size for item in unused) < excess or self._evict(unused, excess) < excess:
                raise CacheStorageError(
                    f"no room for {state.reserved:,} bytes in {self.folder}: the rest is in use, or the disk is full; "
                    f"free space, or raise {self.setting}"
                )
            write_whole(self.part(key, "json"), json.dumps(asdict(state)).encode())

    def drop(self, key: str) -> None:
        """Forget the parts of ``key``."""
        for path in self._made("parts").glob(f"{key}.*"):
            path.unlink(missing_ok=True)

    def adopt(self, key: str, path: Path, sha256: str, name: str) -> Held:
        """Take a whole, checked file of the cache's disk as the content of ``key``, and hold it.

        Raises:
            CacheStorageError: it cannot be kept.
        """
        with self._alone():
            content = self._content(sha256)
            size = path.stat().st_size
            with path.open("rb") as file:
                os.fsync(file.fileno())
            if not content.exists() or content.stat().st_size != size:
                path.chmod(0o600)
                os.replace(path, content)
            write_whole(self._name(key), json.dumps({"sha256": sha256, "size": size, "name": name}).encode())
            self.drop(key)
            held = self.find_content(sha256, name)
        if held is None:
            raise CacheStorageError(f"{content} was removed as soon as it was written; check the disk")
        return held

    # --- keeping house --------------------------------------------------------------------------------------------

    def ls(self) -> list[CacheEntry]:
        """What is in the cache, last used first."""
        names: dict[str, list[str]] = {}
        for path in self.folder.glob("names/*.json"):
            known = read_json(path)
            names.setdefault(str(known.get("sha256")), []).append(str(known.get("name")))
        return [
            CacheEntry(item.sha256, item.size, item.used, tuple(sorted(set(names.get(item.sha256, ())))), item.in_use())
            for item in reversed(self._items())
        ]

    def prune(self, limit: int | None = None, unused_since: float = 0.0) -> int:
        """Remove unfinished files, what was last used before ``unused_since`` (epoch), and the rest by age until at
        most ``limit`` bytes are left (left out, the cache's own). Files in use stay.

        Returns:
            Bytes that are gone.
        """
        if not self.folder.is_dir():
            return 0
        with self._alone():
            items = self._items()
            old = [item for item in items if not item.sha256 or item.used < unused_since]
            kept = [item for item in items if item not in old]
            gone = self._evict(old, sum(item.size for item in old))
            left = sum(item.size for item in items) - gone
            gone += self._evict(kept, left - (self.limit if limit is None else limit))
            self._tidy()
            return gone

    def _evict(self, items: list[Item], excess: int) -> int:
        """Remove in the order given until ``excess`` bytes are gone, or nothing is left; the bytes that are."""
        gone = 0
        for item in items:
            if gone >= excess:
                break
            if item.remove():
                log.info("%s leaves the cache", item.sha256 or f"the unfinished {item.key}")
                gone += item.size
        return gone

    def _items(self) -> list[Item]:
        """What takes room, used longest ago first."""
        whole = map(whole_item, self.folder.glob(f"content/*{SUFFIX}"))
        parts: dict[str, list[Path]] = {}
        for path in self.folder.glob("parts/*"):
            parts.setdefault(path.name.partition(".")[0], []).append(path)
        locks = self.folder / "locks"
        unfinished = [unfinished_item(key, paths, locks, self.state(key).reserved) for key, paths in parts.items()]
        return sorted([*filter(None, whole), *unfinished], key=lambda item: item.used)

    def _tidy(self) -> None:
        """Remove names of files that are gone, and locks that nobody needs."""
        for path in self.folder.glob("names/*.json"):
            if not self._content(str(read_json(path).get("sha256"))).exists():
                path.unlink(missing_ok=True)
        for path in self.folder.glob("locks/*"):
            handle = lock(path, AT_ONCE) if path.name != "all" else None
            if handle is not None:
                path.unlink(missing_ok=True)
                os.close(handle)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only one who adds or removes; not for long, as everybody waits."""
        handle = self._opened(self._made("locks") / "all", ALONE)
        try:
            with self._storage_errors():
                yield
        finally:
            if handle is not None:
                os.close(handle)

    def _opened(self, path: Path, kind: int) -> int | None:
        with self._storage_errors():
            return lock(path, kind, create=True)

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheStorageError(
                f"the cache {self.folder} cannot be written ({error.strerror}); free space, or set cache_dir to a "
                "folder of yours"
            ) from error

    def _made(self, name: str) -> Path:
        with self._storage_errors():
            for folder in (self.folder, *(self.folder / each for each in FOLDERS)):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self.folder / name

    def _content(self, sha256: str) -> Path:
        return self.folder / "content" / f"{sha256}{SUFFIX}"

    def _name(self, key: str) -> Path:
        return self.folder / "names" / f"{key}.json"


def _raise_failure(failed: dict[str, Any], since: float) -> None:
    """Raise what ended a fetch that was under way at the time ``since``."""
    if isinstance(at := failed.get("at"), float) and since <= at <= time.time():
        kind = getattr(errors, str(failed.get("type")), DownloadError)
        raise (kind if isinstance(kind, type) and issubclass(kind, DownloadError) else DownloadError)(failed["message"])


def _note_failure(handle: int, error: DownloadError) -> None:
    """Leave word for those who wait for this fetch; on a full disk there is no room for it, and they try themselves."""
    failed = {"at": time.time(), "type": type(error).__name__, "message": str(error)}
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(failed).encode(), 0)
    except OSError:
        pass
