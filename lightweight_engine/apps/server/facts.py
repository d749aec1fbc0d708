"""What the worker tells the front of itself, as JSON data: its model, the files that requests may name, its memory.

Files are told by their place in the models folder. Headers are read once for as long as a file is as it was, and
nothing is hashed: of a checkpoint the hash is told if some job has needed it.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...backend.devices import memory_figures
from ...core.choice import broken_checkpoints
from ...core.describe import device_name, versions
from ...core.engine import LightweightEngine
from ...core.hashes import HashCache
from ...core.loras import lora_library
from ...core.models import SLOTS, ModelLibrary, files_of, title_of, versions_of
from ...core.models import Entry as ModelEntry
from ...core.precision import in_effect
from ...errors import EngineError
from ...extensions.lora_library import LoraLibrary
from ...flux.keymaps import Part
from ...upscalers.files import Entry, UpscalerFiles
from ...upscalers.upscaler import PLAIN
from ..wording import without_paths

log = logging.getLogger(__name__)

HASH_SHOWN = 10  # letters, as in Forge's titles
MAX_TOLD = 20  # checkpoints that cannot be used, in the log of a start and in the notes
MAX_METADATA = 4096  # letters of a value; counts of training tags may take megabytes
_SCALE = re.compile(r"(?<!\d)([1-8])x(?!\d)|x([1-8])(?!\d)", re.IGNORECASE)


class Facts:
    """Looks at an engine and its folders, as they are at each call.

    Attributes:
        unusable: checkpoints that somebody has to look at.

    Raises:
        EngineError: the folders cannot be read at first.
    """

    def __init__(self, engine: LightweightEngine) -> None:
        self.models = engine.library
        self._engine = engine
        self._configured = files_of(engine.models.own_parts["transformer"])  # as no request has named another yet
        self._in_effect = in_effect(engine.networks.precision, engine.models)  # likewise
        self._loras = lora_library(engine.config, with_tiny=engine.models.is_tiny)
        self._seen: list[tuple[Any, ...]] | None = None
        self.unusable: list[ModelEntry] = []
        self._last = self._looked()

    def __call__(self) -> dict[str, Any]:
        """What there is now; what there was, where a folder cannot be read: that is no reason to end."""
        try:
            self._last = self._looked()
        except (EngineError, OSError) as error:
            log.warning("the models folder cannot be listed: %s", error)
        return self._last

    def _looked(self) -> dict[str, Any]:
        engine, library = self._engine, self.models.refresh()
        models, networks = engine.models, engine.networks
        return {
            "model": models.name,
            "demonstration": models.is_tiny,
            "device": device_name(networks.device),
            "versions": versions(),
            "files": [file.model_dump(include={"role", "name"}) for file in models.files()],
            "held_bytes": networks.held,
            "memory": memory_figures(networks.device),
            "configured": self._name_of(library),
            "in_effect": self._in_effect,
            "checkpoints": list(checkpoint_rows(library, engine.hashes)),
            "modules": list(module_rows(library)),
            "upscalers": list(upscaler_rows(engine.upscalers)),
            "detectors": engine.detectors.names(),
            "loras": list(lora_rows(self._loras)),
            "notes": [without_paths(note) for note in (*engine.notes, *self._notes_on(library))],
        }

    def _notes_on(self, library: ModelLibrary) -> Iterator[str]:
        """A sentence on each checkpoint that cannot be used, up to ``MAX_TOLD`` of them.

        Which are damaged, their headers have to tell: they are read for it only where the folder has changed.
        """
        seen = [(entry.name, entry.problem, entry.roles) for entry in library.ls()]
        if seen != self._seen:
            self.unusable, self._seen = broken_checkpoints(library), seen
        for entry in self.unusable[:MAX_TOLD]:
            yield f"{entry.name} cannot be used: {entry.problem}"
        if (more := len(self.unusable) - MAX_TOLD) > 0:
            yield f"{more} more checkpoint{'s' * (more > 1)} cannot be used; see `lightweight-engine doctor`"

    def _name_of(self, library: ModelLibrary) -> str | None:
        """The ``filename`` of the checkpoint that is used where a request names none."""
        entries = (entry for entry in library.ls() if "transformer" in entry.parts)
        return next((each.name for each in entries if files_of(each.parts["transformer"]) == self._configured), None)


def checkpoint_rows(library: ModelLibrary, hashes: HashCache) -> Iterator[dict[str, Any]]:
    """The checkpoints that can be drawn with; ``title`` is what the field ``checkpoint`` takes, as in Forge."""
    entries = [entry for entry in library.ls() if entry.can_be("transformer")]
    count = Counter(entry.path.name for entry in entries)
    for entry in entries:
        sha256 = _known_hash(entry.parts["transformer"], hashes)
        name = entry.path.name if count[entry.path.name] == 1 else entry.name
        yield {
            "title": f"{name} [{sha256[:HASH_SHOWN]}]" if sha256 else name,
            "model_name": title_of(entry.path),
            "filename": entry.name,
            "hash": sha256[:HASH_SHOWN] if sha256 else None,
            "sha256": sha256,
        }


def _known_hash(transformer: Part, hashes: HashCache) -> str | None:
    try:
        return hashes.known(versions_of(transformer))
    except OSError:  # a file that has gone since it was listed
        return None


def module_rows(library: ModelLibrary) -> Iterator[dict[str, Any]]:
    """The text encoders and autoencoders in files of their own, with the field that takes each."""
    for entry in library.ls():
        for role in entry.roles if "transformer" not in entry.roles else ():
            told = {"model_name": entry.path.name, "filename": entry.name}
            yield {**told, "role": role, "field": SLOTS[role].setting}


def upscaler_rows(library: UpscalerFiles) -> Iterator[dict[str, Any]]:
    """The upscalers; ``scale`` is that of one pass, as far as the name tells it: no file is opened."""
    for plain in PLAIN:
        yield {"name": plain.name, "path": None, "scale": plain.scale}
    for entry in library.entries():
        yield {"name": entry.name, "path": _below(entry.path, library.roots), "scale": scale_of(entry)}


def scale_of(entry: Entry) -> int | None:
    """The scale that an upscaler's name or its file's has, as in 4x-UltraSharp or RealESRGAN_x2plus."""
    found = _SCALE.search(entry.name) or _SCALE.search(entry.path.stem)
    return int(found[1] or found[2]) if found else None


def lora_rows(library: LoraLibrary) -> Iterator[dict[str, Any]]:
    """The LoRA files that can be read; values of their metadata are left out where they are very long."""
    for entry in library.ls():
        if not entry.problem:
            metadata = {key: value for key, value in entry.metadata.items() if len(value) <= MAX_METADATA}
            place = _below(entry.path, library.roots)
            yield {"name": entry.name, "alias": entry.alias or entry.name, "path": place, "metadata": metadata}


def _below(path: Path, roots: Sequence[Path]) -> str:
    return next((str(path.relative_to(root)) for root in roots if path.is_relative_to(root)), path.name)
