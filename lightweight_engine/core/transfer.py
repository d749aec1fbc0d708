"""One file from a server into a part of the cache, going on from what an earlier attempt left. Loads no torch."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from ..backend.checkpoint import MAX_HEADER
from ..backend.net import Access, Limits, Response, Resume, get
from ..errors import (
    CacheStorageError,
    DownloadBrokenError,
    DownloadTimeoutError,
    DownloadTooLargeError,
    WrongContentError,
)
from ..results import OnBytes
from .file_cache import FileCache, PartState

log = logging.getLogger(__name__)

ATTEMPTS = 5
STEP = 16 << 20  # room that is made at a time where a size is not told
HEAD = 16

SPOILT = (WrongContentError, DownloadTooLargeError, CacheStorageError)
"""Errors after which what has come is of no use to a later attempt."""


@dataclass(frozen=True)
class Wanted:
    """What is fetched. ``sha256`` is of the bytes as the server sends them, where it is known."""

    url: str
    token: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Received:
    path: Path
    size: int
    sha256: str
    host: str


def transfer(wanted: Wanted, cache: FileCache, key: str, limits: Limits, access: Access, progress: OnBytes) -> Received:
    """Fetch a file into the part of ``key``, whose lock the caller holds. A lost connection is taken up again.

    What has come stays for a later call after a loss, a timeout or the end of the process, and goes after all else.

    Raises:
        DownloadError: refused, broken off for good, too long, too slow, a web page, or no room for it.
    """
    deadline = time.monotonic() + limits.max_seconds
    part = cache.part(key)
    for attempt in range(1, ATTEMPTS + 1):
        left = replace(limits, max_seconds=deadline - time.monotonic())
        if left.max_seconds <= 0:
            break
        had = _size(part)
        try:
            return _attempt(wanted, cache, key, left, access, progress)
        except DownloadBrokenError as error:
            if attempt == ATTEMPTS or _size(part) <= had:
                raise
            log.info("%s; going on", error)
        except SPOILT:
            cache.drop(key)
            raise
    raise DownloadTimeoutError(f"the file did not come whole within {limits.max_seconds:g} s; try again")


def _attempt(wanted: Wanted, cache: FileCache, key: str, limits: Limits, access: Access, progress: OnBytes) -> Received:
    part = cache.part(key)
    resume = _resume(cache.state(key), _size(part), pinned=wanted.sha256 is not None)
    with get(wanted.url, limits, access, resume=resume, token=wanted.token) as response:
        if response.is_page:
            raise page_error(response.url)
        if not response.start:  # before its mark is replaced: marks and bytes of two versions must never be together
            part.unlink(missing_ok=True)
        room = _Room(cache, key, response, limits.max_bytes)
        try:
            with part.open("r+b" if response.start else "wb") as file:
                digest = _digest_of(file, response.start)
                size = _copy(response, file, digest, room, progress)
        except OSError as error:
            raise CacheStorageError(
                f"the file from {response.url} cannot be written ({error.strerror}); free space for cache_dir"
            ) from error
        return Received(part, size, digest.hexdigest(), response.url)


def _resume(state: PartState, have: int, *, pinned: bool) -> Resume | None:
    """What to ask for where ``have`` bytes are here; all, unless mixing two versions of a file would be noticed."""
    if not have or not (state.validator or (pinned and state.size)):
        return None
    start = have if state.size is None else min(have, state.size - 1)  # of a whole one, the last byte, as a check
    return Resume(start, state.size, state.validator) if start > 0 else None


class _Room:
    """Room in the cache for a body that comes: for its whole size, or as it grows where that is not told."""

    def __init__(self, cache: FileCache, key: str, response: Response, max_bytes: int) -> None:
        self.cache, self.key, self.max_bytes = cache, key, max_bytes
        self.state = PartState(response.size, response.validator)
        self.grow(response.start if response.size is None else response.size)

    def grow(self, size: int) -> None:
        """Have room for ``size`` bytes; where their end is not known, for some more, if there is."""
        if self.state.reserved and size <= self.state.reserved:
            return
        if self.state.size is None:
            try:
                self._reserve(min(size + STEP, self.max_bytes))
                return
            except CacheStorageError:
                pass  # what comes may be shorter than that
        self._reserve(size)

    def _reserve(self, size: int) -> None:
        self.state = replace(self.state, reserved=size)
        self.cache.reserve(self.key, self.state)


def _digest_of(file: BinaryIO, start: int) -> hashlib._Hash:
    """The hash of the first ``start`` bytes; the file ends there, and is at its end."""
    digest = hashlib.sha256()
    left = start
    while left and (piece := file.read(min(left, 1 << 20))):
        digest.update(piece)
        left -= len(piece)
    file.truncate(start)
    file.seek(start)
    return digest


def _copy(response: Response, file: BinaryIO, digest: hashlib._Hash, room: _Room, progress: OnBytes) -> int:
    """Write the body behind what is here; the bytes of the whole."""
    received, head = response.start, b""
    for piece in response.chunks():
        if response.start == 0 and len(head) < HEAD:
            head += piece[: HEAD - len(head)]
            _check_head(head, response.url)
        received += len(piece)
        room.grow(received)
        file.write(piece)
        digest.update(piece)
        progress(received, response.size)
    file.flush()
    return received


def _check_head(head: bytes, host: str) -> None:
    """Refuse a text in place of a file as soon as its first bytes are here: a page may have no end."""
    is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER
    if len(head) < HEAD or is_safetensors:
        return
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<", b'{"')):
        raise page_error(host)
    if text.startswith(b"version https"):
        raise WrongContentError(f"{host} sent a Git LFS pointer; use the address that the file itself is fetched from")


def page_error(host: str) -> WrongContentError:
    return WrongContentError(
        f"{host} sent a web page or a message, not a safetensors file; it may want a login: set a token for this host "
        "in `tokens`, or check the address"
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
