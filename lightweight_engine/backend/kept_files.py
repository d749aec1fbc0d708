"""Files below a folder, and what is read from files and kept for the next time. Loads no torch."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

T = TypeVar("T")


def folders_below(
    folder: Path, onerror: Callable[[OSError], object] | None = None
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """A folder and those below it, each with the names of its folders and of its files, in order.

    Links to folders are followed, each folder once. Folders whose names are taken out of their list are left out.

    Args:
        onerror: told of folders that cannot be read.
    """
    seen: set[str] = set()
    for current, below, names in os.walk(folder, followlinks=True, onerror=onerror):
        real = os.path.realpath(current)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        yield Path(current), below, sorted(names)


def files_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files with one of these suffixes (lower case), in order; see ``folders_below``."""
    for current, _, names in folders_below(folder):
        yield from (current / name for name in names if name.lower().endswith(suffixes))


class Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def by_name(entries: Iterable[N]) -> list[N]:
    """What was found, sorted by name in any case; of several of one name, the first."""
    found: dict[str, N] = {}
    for entry in entries:
        found.setdefault(entry.name, entry)
    return sorted(found.values(), key=lambda entry: entry.name.lower())


class FileVersion(NamedTuple):
    """What a file is at a moment: one that is changed or replaced has another size or time of change.

    The number that its file system has for it is left out: some on a network give another one at each look.
    """

    path: str
    size: int
    changed: int  # in nanoseconds

    @classmethod
    def of(cls, path: Path, opened: int | None = None) -> FileVersion:
        """That of the file at ``path``, or of the one that was opened there; raises OSError where there is none."""
        stat = os.stat(path if opened is None else opened)
        return cls(str(path), stat.st_size, stat.st_mtime_ns)


class KeptFiles(Generic[T]):
    """What was read from files, the last used ones; a file that has changed is read anew.

    Args:
        keep: at most so many.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._kept: OrderedDict[Path, tuple[FileVersion, T]] = OrderedDict()

    def get(self, path: Path, read: Callable[[], T]) -> T:
        """What ``read`` makes of the file at ``path``, or made of it before."""
        version = FileVersion.of(path)
        kept = self._kept.pop(path, None)
        if kept is None or kept[0] != version:
            kept = version, read()
        self._kept[path] = kept
        while len(self._kept) > self.keep:
            self._kept.popitem(last=False)
        return kept[1]

    def values(self) -> list[T]:
        return [value for _, value in self._kept.values()]

    def clear(self) -> None:
        self._kept.clear()
