"""Which model files there are, and which of them make up the model of a job. Loads no torch.

A models folder may be ours, or that of an existing Stable Diffusion WebUI, Forge or ComfyUI install; nothing is ever
written into it. Files are told apart by their headers, never by their names.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..backend.kept_files import FileVersion
from ..backend.model_files import INDEX, open_model
from ..backend.model_folders import folders_of
from ..errors import (
    CorruptCheckpointError,
    EngineError,
    ModelNotFoundError,
    UnsupportedCheckpointError,
    about,
    closest,
    some_of,
)
from ..flux.keymaps import Part, Role, find_parts, read_params
from ..flux.recognise import check_width, width_fed, width_of
from ..results import ModelFile
from .folders import DECODING, DRAWING, FOLDERS, READING, models_below, put_into, title_of
from .hashes import HashCache

if TYPE_CHECKING:
    from ..config import EngineConfig

log = logging.getLogger(__name__)

FORGE_HASH = re.compile(r" \[[0-9a-f]{6,64}\]$")  # that ends a title of Forge, as "flux.safetensors [0123456789]"


@dataclass(frozen=True)
class Slot:
    """Where files of a role go.

    Attributes:
        what: what a person calls them, with its article.
        folders: that they belong in, ours first.
        setting: that names one.
        published: what the published files are called, and their width.
    """

    what: str
    folders: tuple[str, ...]
    setting: str
    published: str
    width: int | None = None

    @property
    def name(self) -> str:
        """What a person calls them, without an article."""
        return self.what.split(maxsplit=1)[1]


SLOTS: dict[Role, Slot] = {
    "transformer": Slot("a checkpoint", DRAWING, "checkpoint", "flux1-dev.safetensors"),
    "t5": Slot("a T5 text encoder", READING, "t5", "t5xxl_*.safetensors", 4096),
    "clip": Slot("a CLIP text encoder", READING, "clip", "clip_l.safetensors", 768),
    "autoencoder": Slot("an autoencoder (VAE)", DECODING, "vae", "ae.safetensors"),
}

# Variant of a transformer -> what it needs beside a prompt; all others can be drawn with.
OTHER_INPUTS = {
    "fill": "a masked picture as a further input, which this engine does not give",
    "canny/depth": "a control picture as a further input, which this engine does not give",
}

ROLES: tuple[Role, ...] = ("transformer", "t5", "clip", "autoencoder")

CHOICE = (
    "of checkpoints the first by name; of text encoders and autoencoders that fit, where the checkpoint has none "
    "itself, those in their folders first, then the largest, then the first by name"
)
"""Which file is used of several, where no setting names one."""

TINY = Path(__file__).resolve().parents[1] / "tiny"


@dataclass(frozen=True, eq=False)
class Entry:
    """A model of a models folder, in one file or several: its parts of Flux, or the ``problem`` that none can be read.

    Attributes:
        path: a file, the index of its shards, or a folder.
    """

    path: Path
    name: str
    size: int
    parts: Mapping[Role, Part] = field(default_factory=dict)
    problem: str | None = None

    @property
    def roles(self) -> tuple[Role, ...]:
        return tuple(self.parts)

    @property
    def variant(self) -> str | None:
        """Of its transformer, if it has one: ``dev``, ``schnell``, ``canny/depth`` or ``fill``."""
        return self.parts["transformer"].variant if "transformer" in self.parts else None

    @property
    def undrawable(self) -> str | None:
        """Why its transformer cannot draw, though it can be read."""
        needs = OTHER_INPUTS.get(self.variant or "")
        return f"{self.name} is a Flux.1 {self.variant} transformer, which needs {needs}" if needs else None

    def can_be(self, role: Role) -> bool:
        """Whether a job can use it as this part."""
        return role in self.parts and (role != "transformer" or self.undrawable is None)

    def is_called(self, name: str) -> bool:
        """Whether a name means it: its path from the models folder or the last parts of that, with or without suffix,
        or its whole path."""
        parts = PurePosixPath(self.name).parts
        short = (*parts[:-1], title_of(self.path))
        wanted = PurePosixPath(name).parts
        tail = len(wanted) <= len(parts) and wanted in (parts[-len(wanted) :], short[-len(wanted) :])
        return bool(wanted and tail) or Path(name).absolute() == self.path.absolute()

    def is_meant_as(self, role: Role) -> bool:
        """Whether it lies where files of a role go, whatever it is."""
        return not set(SLOTS[role].folders).isdisjoint(PurePosixPath(self.name).parts[:-1])

    def damage(self) -> CorruptCheckpointError | None:
        """What is to be told of it where it is damaged; nothing of what is only of another kind."""
        try:
            if self.problem:
                read_entry(self.path, self.name, strict=True)
        except CorruptCheckpointError as error:
            return error
        except EngineError:
            pass
        return None

    @property
    def usable(self) -> bool:
        """Whether a job can use any part of it."""
        return any(map(self.can_be, self.parts))


def files_of(part: Part) -> tuple[Path, ...]:
    """The files that the tensors of a part lie in."""
    checkpoint = part.checkpoint
    stored = (stored for source in part.sources.values() for stored, _ in source.pieces)
    return tuple(sorted({checkpoint.file_of(each.name) for each in stored}))


def versions_of(part: Part) -> tuple[FileVersion, ...]:
    """What those files are: see ``Checkpoint.version_of``, and so is what it raises."""
    return tuple(map(part.checkpoint.version_of, files_of(part)))


@dataclass(frozen=True)
class ModelSet:
    """The four parts of a model, each from whichever file holds it.

    Attributes:
        originals: the user's parts, where ``parts`` has stand-ins for them that are quantised already. A model is
            known by these all the same.
    """

    name: str
    parts: Mapping[Role, Part]
    root: Path
    originals: Mapping[Role, Part] = field(default_factory=dict)

    @property
    def is_tiny(self) -> bool:
        """Whether this is the demonstration model that ships with the engine."""
        return self.root == TINY

    def with_stand_ins(self, parts: Mapping[Role, Part]) -> ModelSet:
        """The same model, some of its weights read from other files."""
        originals = {role: self.parts[role] for role in parts}
        return replace(self, parts={**self.parts, **parts}, originals={**originals, **self.originals})

    @property
    def own_parts(self) -> dict[Role, Part]:
        """The parts as the user's files have them."""
        return {**self.parts, **self.originals}

    @property
    def key(self) -> tuple[FileVersion, ...]:
        """What the files of all own parts are, cheaply: those that were read, whatever lies at their paths by now."""
        return tuple(version for part in self.own_parts.values() for version in versions_of(part))

    def files(self, hashes: HashCache | None = None) -> tuple[ModelFile, ...]:
        """Every file with the roles that it plays, hashed where a cache of hashes is given."""
        return tuple(
            ModelFile(
                role=role,
                name=title_of(part.checkpoint.path),
                path=str(part.checkpoint.path),
                sha256=hashes.sha256_of(versions_of(part)) if hashes else None,
            )
            for role, part in self.own_parts.items()
        )


State = tuple[FileVersion | None, ...]
"""What files are; None of one that cannot be looked at, which may be another at any time."""


@dataclass(frozen=True)
class _Read:
    """An entry, with the files beside its path that it was read from, and what all of these were."""

    entry: Entry
    others: tuple[Path, ...]
    state: State


class ModelLibrary:
    """The files of one or more models folders, listed once when asked for, and anew after ``refresh``.

    Args:
        otherwise: a further folder, where no checkpoint is in the others.
    """

    def __init__(self, roots: Sequence[Path], *, otherwise: Path | None = None) -> None:
        self.roots = (*roots, *filter(None, [otherwise]))
        self._otherwise = otherwise
        self._entries: list[Entry] | None = None
        self._read: dict[Path, _Read] = {}

    @classmethod
    def of(cls, config: EngineConfig) -> ModelLibrary:
        """The files that a model can be made of: where no checkpoint is among them, with the demonstration model."""
        return cls([config.models_dir], otherwise=TINY if config.models_dir != TINY else None)

    def ls(self) -> list[Entry]:
        """Every file with a model's suffix, whether usable or not, by name."""
        if self._entries is None:
            entries: list[Entry] = []
            read: dict[Path, _Read] = {}  # a file that is gone or replaced is let go of: it was mapped, maybe
            for root in self.roots:
                if root != self._otherwise or not _hold_checkpoint(entries):
                    entries += [self._entry(path, root, read) for path in _scan(root)]
            self._entries, self._read = entries, read
        return self._entries

    def refresh(self) -> ModelLibrary:
        """List the folders anew when next asked; headers of files that are as they were are not read again."""
        self._entries = None
        return self

    def _entry(self, path: Path, root: Path, read: dict[Path, _Read]) -> Entry:
        """The entry of a path, as it was read before where its files are as they were; noted in ``read``."""
        kept, state = self._read.get(path), _states([path])
        if kept is None or None in kept.state or kept.state != state + _states(kept.others):
            entry = read_entry(path, str(path.relative_to(root)))
            others = _others(entry)
            if others is None:
                return entry
            kept = _Read(entry, others, state + _states(others))
        read[path] = kept
        return kept.entry

    @property
    def has_checkpoint(self) -> bool:
        """Whether any file holds a transformer, usable or not."""
        return _hold_checkpoint(self.ls())

    def find(self, name: str, *, listed: bool = False, field: str | None = None) -> Entry:
        """The entry that a name means, which may be a title of Forge; else the file at that path.

        Args:
            listed: only one of the folders; no other path is looked at.
            field: that holds the name, for the error.

        Raises:
            ModelNotFoundError: with close names, and those that there are.
        """
        wanted = FORGE_HASH.sub("", name)
        matches = [entry for entry in self.ls() if entry.is_called(wanted)]
        if matches:
            _tell_choice(f"of the name {name!r}", [entry.name for entry in matches], "the first by name")
            return matches[0]
        if not listed and os.path.exists(name):
            return read_entry(Path(name), Path(name).name)
        where, hint = f"{field}: " if field else "", self._hint(wanted, field)
        raise ModelNotFoundError(f"{where}no model file is called {name!r:.120}; {hint}", field=field)

    def _hint(self, name: str, field: str | None) -> str:
        """Names for a message: the close one, else some; of all files, or for a setting of those that it takes."""
        fitting = self.ls()
        for role in ROLES:
            if SLOTS[role].setting == field:
                fitting = [entry for entry in fitting if entry.can_be(role)]
        meant = closest(name, [called for entry in fitting for called in (title_of(entry.path), entry.path.name)])
        if meant:
            return f"did you mean {meant!r}?"
        return f"there are: {some_of([entry.name for entry in fitting])}"

    def choose(self, checkpoint: str | None = None, **named: str | None) -> ModelSet:
        """The parts to use.

        Args:
            checkpoint: file with the transformer; left out, the first usable one.
            named: ``t5``, ``clip``, ``autoencoder``: files that replace what the checkpoint holds itself.

        Raises:
            ModelNotFoundError: a file or a part is missing.
            ModelError: a named file cannot be used, or does not fit the checkpoint.
        """
        main = self._checkpoint(checkpoint)
        parts: dict[Role, Part] = {"transformer": main.parts["transformer"]}
        for role in ROLES[1:]:
            name = named.get(role)
            parts[role] = self._named(name, role, main) if name else main.parts.get(role) or self._separate(role, main)
        return ModelSet(title_of(main.path), parts, _root_of(main.path, self.roots))

    def _checkpoint(self, name: str | None) -> Entry:
        if name:
            with about("checkpoint"):
                return _require(self.find(name, field="checkpoint"), "transformer")
        candidates = [entry for entry in self.ls() if "transformer" in entry.roles]
        usable = [entry for entry in candidates if entry.can_be("transformer")]
        if usable:
            _tell_choice("with a transformer", [entry.name for entry in usable], "the first by name")
            return usable[0]
        if candidates:
            return _require(candidates[0], "transformer")
        folders = ", ".join(str(root) for root in self.roots) or "no folder"
        raise ModelNotFoundError(f"no Flux checkpoint was found in {folders}; put one into {self._place(DRAWING)}")

    def _named(self, name: str, role: Role, main: Entry) -> Part:
        with about(SLOTS[role].setting):
            entry = _require(self.find(name, field=SLOTS[role].setting), role)
        check_width(role, entry.name, entry.parts[role].shapes, main.parts["transformer"].shapes)
        return entry.parts[role]

    def _separate(self, role: Role, main: Entry) -> Part:
        """The best separate file for a part that the checkpoint does not hold: of the right width, those that lie where
        such parts go before others, then most bits first, then by name.

        Those of the checkpoint's own models folder alone, where it lies in one. Where none is left, a damaged file
        in its place is what is told.
        """
        wanted = width_fed(role, main.parts["transformer"].shapes)
        root = _root_of(main.path, self.roots)
        near = [entry for entry in self.ls() if root not in self.roots or root in entry.path.parents]
        able = [entry for entry in near if entry.can_be(role)]
        found = {entry.name: entry.parts[role] for entry in able}
        widths = {name: width_of(role, part.shapes) for name, part in found.items()}
        fitting = [name for name in found if wanted is None or widths[name] == wanted]
        if fitting:
            proper = {entry.name for entry in able if entry.is_meant_as(role)}
            fitting.sort(key=lambda name: (name not in proper, -found[name].nbytes))
            rule = f"the largest{' in its folder' if fitting[0] in proper else ''}"
            _tell_choice(f"with a fitting {role}", fitting, rule)
            return found[fitting[0]]
        for entry in near:
            if entry.is_meant_as(role) and (damage := entry.damage()):
                raise damage
        slot = SLOTS[role]
        others = ", ".join(f"{name} has {width:,}" for name, width in widths.items())
        size = f" of width {wanted:,}{f' ({others})' if others else ''}" if wanted else ""
        such_as = f", such as {slot.published}," if wanted in (None, slot.width) else ""
        raise ModelNotFoundError(
            f"{main.name} holds no {slot.name}; choose one{size}{such_as} with the setting "
            f"{slot.setting}, or put it into {self._place(slot.folders, root)}"
        )

    def _place(self, folders: Sequence[str], root: Path | None = None) -> str:
        """The folder that a new file goes into: of a models folder, else of the first one."""
        return put_into(root if root in self.roots else (*self.roots, Path("models"))[0], folders)


def _hold_checkpoint(entries: Iterable[Entry]) -> bool:
    return any("transformer" in entry.roles for entry in entries)


def _others(entry: Entry) -> tuple[Path, ...] | None:
    """The files beside its path that an entry was read from; None where a model in several cannot be read: they are
    not known, and what is missing may come."""
    if entry.problem and (entry.path.is_dir() or entry.path.name.endswith(INDEX)):
        return None
    files = {file for part in entry.parts.values() for file in part.checkpoint.all_files}
    return tuple(sorted(files - {entry.path}))


def _states(files: Iterable[Path]) -> State:
    return tuple(map(_state, files))


def _state(path: Path) -> FileVersion | None:
    try:
        return FileVersion.of(path)
    except OSError:
        return None


def _tell_choice(what: str, names: Sequence[str], rule: str) -> None:
    """Which of several files is used, in the log."""
    if len(names) > 1:
        log.info("%d files %s: %s is used, %s; others are %s", len(names), what, names[0], rule, ", ".join(names[1:]))


def _require(entry: Entry, role: Role) -> Entry:
    """The entry, if it can play the role.

    Raises:
        EngineError: what keeps it from that, the same each time.
    """
    if entry.problem:
        read_entry(entry.path, entry.name, strict=True)
    if role not in entry.roles:
        is_a = " and ".join(SLOTS[r].what for r in entry.roles)
        belongs = " and ".join(dict.fromkeys(SLOTS[r].setting for r in entry.roles))
        raise UnsupportedCheckpointError(
            f"{entry.name} is {is_a}, not {SLOTS[role].what}; it belongs in the setting {belongs}"
        )
    if not entry.can_be(role):
        raise UnsupportedCheckpointError(f"{entry.undrawable}; choose a dev or schnell checkpoint")
    return entry


def _root_of(path: Path, roots: Sequence[Path]) -> Path:
    return next((root for root in roots if root in path.parents), path.parent)


def read_entry(path: Path, name: str, *, strict: bool = False) -> Entry:
    """What a model is, from its header; with ``strict``, the error itself instead of an entry with a problem."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        checkpoint = open_model(path)
        size = sum(file.stat().st_size for file in checkpoint.all_files)
        parts = find_parts(checkpoint)
        for part in parts.values():
            read_params(part)  # a part that no network can be built of is a problem now
        return Entry(path, name, size, parts)
    except EngineError as error:
        if strict:
            raise
        return Entry(path, name, size, problem=str(error))


def _scan(root: Path) -> list[Path]:
    return sorted({path for folder in folders_of(root, FOLDERS) for path in models_below(folder)})
