"""Which model files there are, and which of them make up the model of a job. Loads no torch.

A models folder may be ours, or that of an existing Stable Diffusion WebUI, Forge or ComfyUI install; nothing is ever
written into it. Files are told apart by their headers, never by their names.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..backend.checkpoint import file_sha256
from ..backend.model_files import open_model
from ..errors import EngineError, ModelNotFoundError, UnsupportedCheckpointError
from ..flux.keymaps import Part, Role, find_parts
from ..request import ModelFile

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".bin")

# Folders of Stable Diffusion WebUI, Forge and ComfyUI that hold parts of Flux.
FOLDERS = (
    "Stable-diffusion",
    "checkpoints",
    "unet",
    "diffusion_models",
    "text_encoder",
    "text_encoders",
    "clip",
    "VAE",
    "vae",
)

# Role -> (what a person calls it, the folder that such a file belongs in)
SLOTS: dict[Role, tuple[str, str]] = {
    "transformer": ("checkpoint", "Stable-diffusion"),
    "t5": ("T5 text encoder", "text_encoder"),
    "clip": ("CLIP text encoder", "text_encoder"),
    "autoencoder": ("autoencoder (VAE)", "VAE"),
}

ROLES: tuple[Role, ...] = ("transformer", "t5", "clip", "autoencoder")

TINY = Path(__file__).resolve().parents[1] / "tiny"


@dataclass(frozen=True, eq=False)
class Entry:
    """A file of a models folder: its parts of Flux, or the ``problem`` that keeps it from being used."""

    path: Path
    name: str
    size: int
    parts: Mapping[Role, Part] = field(default_factory=dict)
    problem: str | None = None

    @property
    def roles(self) -> tuple[Role, ...]:
        return tuple(self.parts)

    @property
    def usable(self) -> bool:
        return self.problem is None and all(part.storage == "plain" for part in self.parts.values())


@dataclass(frozen=True)
class ModelSet:
    """The four parts of a model, each from whichever file holds it."""

    name: str
    parts: Mapping[Role, Part]
    root: Path

    @property
    def is_tiny(self) -> bool:
        """Whether this is the demonstration model that ships with the engine."""
        return self.root == TINY

    @property
    def key(self) -> tuple[tuple[str, int, int], ...]:
        """What the parts' files are, cheaply: path, size and time of change."""
        stats = [(part.checkpoint.path, part.checkpoint.path.stat()) for part in self.parts.values()]
        return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)

    def files(self, hashes: HashCache | None = None) -> tuple[ModelFile, ...]:
        """Every file with the roles that it plays, hashed where a cache of hashes is given."""
        return tuple(
            ModelFile(
                role=role,
                name=part.checkpoint.path.stem,
                path=str(part.checkpoint.path),
                sha256=hashes.sha256(part.checkpoint.path) if hashes else None,
            )
            for role, part in self.parts.items()
        )


class ModelLibrary:
    """The files of one or more models folders, listed once when asked for."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = tuple(roots)
        self._entries: list[Entry] | None = None

    def ls(self) -> list[Entry]:
        """Every file with a model's suffix, whether usable or not, by name."""
        if self._entries is None:
            self._entries = [entry for root in self.roots for entry in _scan(root)]
        return self._entries

    @property
    def has_checkpoint(self) -> bool:
        """Whether any file holds a transformer, usable or not."""
        return any("transformer" in entry.roles for entry in self.ls())

    def find(self, name: str) -> Entry:
        """The entry of that name, stem, relative path, or the file at that path.

        Raises:
            ModelNotFoundError: with the names that there are.
        """
        matches = [e for e in self.ls() if name in (e.name, e.path.name, e.path.stem, str(e.path))]
        if matches:
            return matches[0]
        if Path(name).exists():
            return read_entry(Path(name), Path(name).name)
        names = ", ".join(entry.name for entry in self.ls()) or "none"
        raise ModelNotFoundError(f"no model file is called {name!r}; there are: {names}")

    def choose(self, checkpoint: str | None = None, **named: str | None) -> ModelSet:
        """The parts to use.

        Args:
            checkpoint: file with the transformer; left out, the first usable one.
            named: ``t5``, ``clip``, ``autoencoder``: files that replace what the checkpoint holds itself.

        Raises:
            ModelNotFoundError: a file or a part is missing.
            ModelError: a named file cannot be used.
        """
        main = self._checkpoint(checkpoint)
        parts: dict[Role, Part] = {"transformer": main.parts["transformer"]}
        for role in ROLES[1:]:
            name = named.get(role)
            parts[role] = self._named(name, role) if name else main.parts.get(role) or self._separate(role, main)
        return ModelSet(main.path.stem, parts, _root_of(main.path, self.roots))

    def _checkpoint(self, name: str | None) -> Entry:
        if name:
            return _require(self.find(name), "transformer")
        candidates = [entry for entry in self.ls() if "transformer" in entry.roles]
        usable = [entry for entry in candidates if entry.usable]
        if usable:
            return usable[0]
        if candidates:
            return _require(candidates[0], "transformer")
        folders = ", ".join(str(root) for root in self.roots) or "no folder"
        raise ModelNotFoundError(f"no Flux checkpoint was found in {folders}; put one into {SLOTS['transformer'][1]}/")

    def _named(self, name: str, role: Role) -> Part:
        return _require(self.find(name), role).parts[role]

    def _separate(self, role: Role, main: Entry) -> Part:
        """The best separate file for a part that the checkpoint does not hold: of the right width, most bits first."""
        wanted = _width(main.parts["transformer"], role)
        found = [entry.parts[role] for entry in self.ls() if entry.usable and role in entry.roles]
        fitting = [part for part in found if wanted is None or _width(part, role) == wanted]
        if fitting:
            return max(fitting, key=lambda part: part.nbytes)
        what, folder = SLOTS[role]
        size = f" of width {wanted}" if wanted else ""
        raise ModelNotFoundError(f"{main.name} holds no {what}; put one{size} into {folder}/ or name its file")


def _require(entry: Entry, role: Role) -> Entry:
    """The entry, if it can play the role.

    Raises:
        EngineError: what keeps it from that, the same each time.
    """
    if entry.problem:
        read_entry(entry.path, entry.name, strict=True)
    if role not in entry.roles:
        is_a = " and ".join(SLOTS[r][0] for r in entry.roles)
        raise UnsupportedCheckpointError(f"{entry.name} is a {is_a}, not a {SLOTS[role][0]}; give it for that part")
    return entry


def _width(part: Part, role: Role) -> int | None:
    """The width that a text encoder has, or that a transformer expects of it; None for the autoencoder."""
    keys = {
        ("transformer", "t5"): ("txt_in.weight", 1),
        ("transformer", "clip"): ("vector_in.in_layer.weight", 1),
        ("t5", "t5"): ("shared.weight", 1),
        ("clip", "clip"): ("text_model.embeddings.token_embedding.weight", 1),
    }
    place = keys.get((part.role, role))
    shape = part.shapes.get(place[0]) if place else None
    return shape[place[1]] if place and shape and len(shape) > place[1] else None


def _root_of(path: Path, roots: Sequence[Path]) -> Path:
    return next((root for root in roots if root in path.parents), path.parent)


def read_entry(path: Path, name: str, *, strict: bool = False) -> Entry:
    """What a file is, from its header; with ``strict``, the error itself instead of an entry with a problem."""
    size = path.stat().st_size if path.exists() else 0
    try:
        return Entry(path, name, size, find_parts(open_model(path)))
    except EngineError as error:
        if strict:
            raise
        return Entry(path, name, size, problem=str(error))


def _scan(root: Path) -> list[Entry]:
    folders = [base / name for base in (root, root / "models") for name in FOLDERS]
    files = sorted({path for folder in folders for path in _model_files(folder)})
    return [read_entry(path, str(path.relative_to(root))) for path in files]


def _model_files(folder: Path) -> Iterator[Path]:
    """Files with a model's suffix below a folder; links to folders are followed, each folder once."""
    seen: set[str] = set()
    for current, below, names in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        real = os.path.realpath(current)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        yield from (Path(current, name) for name in names if name.lower().endswith(SUFFIXES))


def _raise_unreadable(error: OSError) -> None:
    """A folder that is not there is none of the folders we look into; one that may not be read hides files."""
    if isinstance(error, PermissionError):
        raise ModelNotFoundError(f"{error.filename} may not be read by this user; change its permissions") from None


class HashCache:
    """SHA-256 of model files, kept in a small JSON file by path, size and time of change, so that each is read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, str] | None = None

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
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
