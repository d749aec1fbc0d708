"""The LoRA files of models folders, by name. Loads no torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..backend.checkpoint import open_checkpoint
from ..backend.kept_files import FileVersion, files_below
from ..backend.model_folders import LORAS, folders_of, place_for
from ..errors import AdapterError, EngineError, ModelNotFoundError, RequestError, closest, some_of

SUFFIX = ".safetensors"


def lora_place(root: Path) -> Path:
    """The folder of a models folder that new LoRAs go into."""
    return place_for(root, LORAS)


@dataclass(frozen=True)
class LoraEntry:
    """A LoRA file of a models folder.

    Attributes:
        name: of the file without suffix; with its folders where another file has the same.
        alias: what its trainer called it.
        metadata: what the file says of itself.
        problem: why it cannot be read.
    """

    name: str
    path: Path
    size: int
    alias: str | None = None
    problem: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


class LoraLibrary:
    """The LoRA files in models folders, listed anew whenever they are asked for.

    Args:
        roots: models folders; files lie anywhere below their ``Lora`` or ``loras``.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = tuple(roots)
        self._read: dict[FileVersion, LoraEntry] = {}

    def ls(self) -> list[LoraEntry]:
        """Every file, by name; of two at the same place in different folders, the first. Links to folders are followed;
        what is outside of its folder then is a problem, and takes no name from a file that can be read."""
        found: dict[str, LoraEntry] = {}
        read: dict[FileVersion, LoraEntry] = {}
        for folder in self._folders():
            for path in files_below(folder, (SUFFIX,)):
                found.setdefault(str(path.relative_to(folder).with_suffix("")), self._entry(path, folder, read))
        self._read = read
        stems = Counter(entry.path.stem for entry in found.values())
        usable = Counter(entry.path.stem for entry in found.values() if not entry.problem)
        entries = [
            entry if (stems if entry.problem else usable)[entry.path.stem] == 1 else replace(entry, name=place)
            for place, entry in found.items()
        ]
        return sorted(entries, key=lambda entry: entry.name.lower())

    def find(self, name: str, *, broken: bool = False) -> LoraEntry:
        """The file of that name, file name or alias; ``broken`` ones only where that is set.

        Raises:
            ModelNotFoundError: there is none; close names are told.
            RequestError: there are several.
            AdapterError: it cannot be read.
        """
        entries = self.ls()
        wanted = name.removesuffix(SUFFIX)
        matches = [e for e in entries if wanted == e.name] or [e for e in entries if wanted == e.path.stem]
        matches = matches or [e for e in entries if name == e.alias]
        head, colon, tail = name.rpartition(":")
        if not matches and colon and head in [entry.name for entry in entries]:
            raise RequestError(f"{tail!r:.40} is no strength; write {head}:0.8")
        if not matches:
            raise ModelNotFoundError(f"there is no LoRA called {name!r:.120}; {self._hint(name, entries)}")
        if len(matches) > 1:
            names = ", ".join(entry.name for entry in matches)
            raise RequestError(f"several LoRAs are called {name!r:.120}: {names}; give the whole name")
        if matches[0].problem and not broken:
            raise AdapterError(matches[0].problem)
        return matches[0]

    def _folders(self) -> Iterator[Path]:
        for root in self.roots:
            yield from (folder for folder in folders_of(root, LORAS) if folder.is_dir())

    def _hint(self, name: str, entries: Sequence[LoraEntry]) -> str:
        meant = closest(name, [entry.name for entry in entries])
        if meant:
            return f"did you mean {meant!r}?"
        names = some_of([entry.name for entry in entries])
        folder = lora_place((*self.roots, Path("models"))[0])
        return f"there are: {names}; put the file into {folder} by `lora add FILE`, or give its URL"

    def _entry(self, path: Path, folder: Path, read: dict[FileVersion, LoraEntry]) -> LoraEntry:
        """What a file is, read before or now, and noted in ``read``."""
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            fault = f"{path.name} is, or is behind, a link that leads out of {folder}; put the file itself there"
            return LoraEntry(path.stem, path, 0, problem=fault)
        try:
            version = FileVersion.of(path)
        except OSError as error:
            fault = f"{path.name} cannot be read ({error.strerror}); remove it or mend its permissions"
            return LoraEntry(path.stem, path, 0, problem=fault)
        read[version] = self._read.get(version) or _read_entry(path, version.size)
        return read[version]


def _read_entry(path: Path, size: int) -> LoraEntry:
    try:
        metadata = open_checkpoint(path).metadata
    except (EngineError, OSError) as error:
        return LoraEntry(path.stem, path, size, problem=str(error))
    alias = metadata.get("ss_output_name")
    return LoraEntry(path.stem, path, size, alias if alias != path.stem else None, metadata=metadata)
