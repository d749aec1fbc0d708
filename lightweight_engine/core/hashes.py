"""Hashes of model files, each read once, in threads beside whatever else is done. Loads no torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..backend.kept_files import FileVersion

log = logging.getLogger(__name__)

AT_ONCE = 2
"""Files that are read at a time: a checkpoint of 24 GB takes a core 10 to 20 seconds."""

LOOK_SECONDS = 0.1


class HashCache:
    """SHA-256 of model files, kept in a small JSON file by path, size and time of change, so that each is read once.

    A hash is that of the very file that is asked for: where another lies at its path by now, there is none, unless it
    was known before. Threads may ask for them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, str] | None = None
        self._reading: dict[str, Future[str]] = {}
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(AT_ONCE)
        self._told = False

    def begin(self, files: Iterable[FileVersion]) -> None:
        """Hash files that nothing is known of, in threads that a process does not wait for when it ends."""
        for each in files:
            self._begin(each)

    def sha256_of(self, files: Sequence[FileVersion]) -> str | None:
        """That of the one file; of several, the SHA-256 of theirs, one a line. None where one cannot be read any more.

        A hash is information: what was made with a file is not lost with it.
        """
        try:
            return _together([self._begin(each).result() for each in files])
        except OSError:
            return None

    def known(self, files: Sequence[FileVersion]) -> str | None:
        """The same of files that were hashed before; None where one was not."""
        with self._lock:
            each = [self._load().get(_key(version)) for version in files]
        found = [digest for digest in each if digest]
        return _together(found) if len(found) == len(each) else None

    def wait(self, files: Iterable[FileVersion], check: Callable[[], None]) -> None:
        """Until all of them that are there are hashed; ``check`` is called now and then, and may raise."""
        for each in files:
            found = self._begin(each)
            while not found.done():
                check()
                wait([found], timeout=LOOK_SECONDS)

    def sha256(self, path: Path) -> str:
        """That of the file that lies at a path now; waits where it is being read."""
        return self._begin(FileVersion.of(path)).result()

    def _begin(self, version: FileVersion) -> Future[str]:
        key = _key(version)
        with self._lock:
            known = self._load()
            if key in self._reading:
                return self._reading[key]
            found: Future[str] = Future()
            if key in known:
                found.set_result(known[key])
                return found
            self._reading[key] = found
        name = f"hash {Path(version.path).name}"
        threading.Thread(target=self._read, args=(key, version, found), name=name, daemon=True).start()
        return found

    def _read(self, key: str, version: FileVersion, found: Future[str]) -> None:
        tell = found.cancel  # whatever happens, nobody waits for ever
        try:
            with self._turns:
                digest = read_sha256(version)
            with self._lock:
                known = self._load()
                known[key] = digest
                self._save(known)
            tell = partial(found.set_result, digest)
        except OSError as error:
            tell = partial(found.set_exception, error)
        finally:
            with self._lock:
                del self._reading[key]
            tell()

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
            if not self._told:
                folder, reason = self.path.parent, error.strerror or error
                log.warning(
                    "hashes are read anew at each start, as %s cannot be written (%s): set cache_dir", folder, reason
                )
            self._told = True
            with suppress(OSError):
                temporary.unlink()


def _together(each: Sequence[str]) -> str:
    return each[0] if len(each) == 1 else hashlib.sha256("\n".join(each).encode()).hexdigest()


def read_sha256(version: FileVersion) -> str:
    """SHA-256 of a file's content, in hex, read in pieces; of one that is another already nothing is read, as each job
    asks anew.

    Raises:
        OSError: it cannot be read, or is another one by now.
    """
    path = Path(version.path)
    with path.open("rb") as file:

        def check() -> None:
            if FileVersion.of(path, file.fileno()) != version:
                raise OSError(f"{path} was changed or replaced")

        check()
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        check()
    return digest


def _key(version: FileVersion) -> str:
    """What the hash of a file is kept by."""
    return "|".join(map(str, version))
