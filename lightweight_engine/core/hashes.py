"""Hashes of model files, each read once. Loads no torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ..backend.checkpoint import file_sha256

log = logging.getLogger(__name__)


class HashCache:
    """SHA-256 of model files, kept in a small JSON file by path, size and time of change, so that each is read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, str] | None = None

    def sha256_of(self, files: Sequence[Path]) -> str:
        """That of the one file; of several, the SHA-256 of theirs, one a line."""
        return _together([self.sha256(path) for path in files])

    def known(self, files: Sequence[Path]) -> str | None:
        """The same of files that were hashed before; None where one was not, or has changed since."""
        try:
            each = [self._load().get(_state(path)) for path in files]
        except OSError:
            return None
        found = [digest for digest in each if digest]
        return _together(found) if len(found) == len(each) else None

    def sha256(self, path: Path) -> str:
        key = _state(path)
        known = self._load()
        if key not in known:
            known[key] = file_sha256(path)
            self._save(known)
        return known[key]

    def _load(self) -> dict[str, str]:
        if self._known is None:
            try:
                self._known = dict(json.loads(self.path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                self._known = {}
        return self._known

    def _save(self, known: dict[str, str]) -> None:
        """A cache that cannot be written costs time, not correctness."""
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(known), encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            log.warning("hashes are not kept: %s", error)
            temporary.unlink(missing_ok=True)


def _together(each: Sequence[str]) -> str:
    return each[0] if len(each) == 1 else hashlib.sha256("\n".join(each).encode()).hexdigest()


def _state(path: Path) -> str:
    """A file's path, size and time of change, by which its hash is kept."""
    stat = path.stat()
    return f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
