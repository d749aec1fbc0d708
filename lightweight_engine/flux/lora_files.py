"""From a LoRA file of any dialect to the changes of parameters, with a report of what was understood and what was not.

Opening reads names and shapes; the tensors stay views of the mapped file until a change is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..backend.checkpoint import Checkpoint
from ..backend.lora import Change, Delta
from ..backend.lora_algorithms import Swapped
from ..backend.lora_modules import TUCKER, ModuleTensors, Options, bias_delta, weight_deltas
from ..backend.pages import release_pages
from ..errors import AdapterError
from ..labels import Compat
from .layouts import Role
from .lora_families import family_of
from .lora_keys import LoraNames, Named, Place
from .lora_metadata import DeclaredScale, declared_scales
from .params import Shapes

log = logging.getLogger(__name__)

NAMES_SHOWN = 5
MAX_RANK = 4096
"""From here on a LoRA is larger than every matrix of the model, and no training made it."""

# Kinds whose columns are the module's inputs.
_INPUTS = ("down", "hada_w1_b", "a2")

# The one parameter whose inputs differ between variants of the model: LoRAs of one may be used with another.
_INPUT_LAYER = "img_in.weight"

_ANOTHER = "use a LoRA that was made for this model"
_AGAIN = "download it again"


@dataclass(frozen=True)
class Ignored:
    """Tensors of a file that change nothing, and why."""

    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class LoraReport:
    """What became of a file.

    Attributes:
        found: modules in the file.
        applied: those of them that fit a network.
        patches: network -> changed parameters, counted as the reference does: parts of a parameter (q, k, v) by
            themselves.
        notes: what a user should know of what was applied.
    """

    file: str
    found: int
    applied: int
    patches: Mapping[Role, int]
    ignored: tuple[Ignored, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = [name for row in self.ignored for name in row.names]
        lines = [f"{self.file}: {self.applied} of {self.found} modules applied"]
        if names:
            reasons = "; ".join(dict.fromkeys(row.reason for row in self.ignored))
            more = ", …" if len(names) > NAMES_SHOWN else ""
            lines.append(f"{len(names)} tensors ignored ({reasons}): {', '.join(names[:NAMES_SHOWN])}{more}")
        return "; ".join([*lines, *self.notes])


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA as numbers: network -> parameter -> its changes, in the order of the file."""

    checkpoint: Checkpoint
    changes: Mapping[Role, Mapping[str, tuple[Change, ...]]]
    report: LoraReport

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    def give_back(self) -> None:
        """Give the pages of the mapped file back to the system; they are read again when they are used."""
        for key in self.checkpoint.tensors:
            release_pages(self.checkpoint, self.checkpoint.raw(key))

    @property
    def input_channels(self) -> int | None:
        """The transformer's inputs that the file asks for: 64, with a control picture 128; None if it says nothing."""
        widths = [change.delta.shape[1] for change in self.changes.get("transformer", {}).get(_INPUT_LAYER, ())]
        return max(widths, default=None)


@dataclass
class _Reader:
    """One file while it is read."""

    file: str
    checkpoint: Checkpoint
    shapes: Mapping[Role, Shapes]
    options: Options
    scales: Mapping[Role, DeclaredScale]
    changes: dict[Role, dict[str, list[Change]]] = field(default_factory=dict)
    ignored: list[Ignored] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    applied: int = 0

    def module(self, alias: str, place: Place, keys: Mapping[str, str]) -> None:
        """Turn the tensors of one module, kind -> name, into changes."""
        if any(kind in keys for kind in TUCKER):
            return self.ignore(keys.values(), "factors of a convolution, which the model does not have")
        tensors = {kind: self.tensor(key) for kind, key in keys.items()}
        shape = _part(self.shapes[place.role][place.parameter], place)
        if (rank := len(tensors.get("down", ()))) >= MAX_RANK:
            raise AdapterError(f"{self.file}: {alias}: the rank {rank:,} is not below {MAX_RANK:,}; {_ANOTHER}")
        module = ModuleTensors(tensors, shape, self.scale_of(alias, place), self.options)
        try:
            deltas, bias = weight_deltas(module), bias_delta(module)
        except ValueError as error:
            raise AdapterError(f"{self.file}: {alias}: {error}; {_AGAIN}") from None
        if bias is not None and place.bias not in self.shapes[place.role]:
            self.ignore([keys["diff_b"]], "the model has no such bias")
            bias = None
        elif not deltas and bias is None:
            self.ignore(keys.values(), "no factors belong to them")
        for delta in deltas:
            self.add(alias, place.parameter, place, delta)
        if bias is not None:
            self.add(alias, place.bias, place, bias)
        if deltas and rank > min(shape):
            self.notes.append(f"{alias} has the rank {rank:,}, its matrix is {list(shape)}")
        self.applied += bool(deltas) or bias is not None

    def add(self, alias: str, parameter: str, place: Place, delta: Delta) -> None:
        expected, found = _part(self.shapes[place.role][parameter], place), tuple(delta.shape)
        input_layer = parameter == _INPUT_LAYER and len(found) == 2 and found[0] == expected[0]
        if found != expected and not input_layer:
            raise _clash(self.file, f"{parameter} ({alias})", expected, found)
        known = self.changes.setdefault(place.role, {}).setdefault(parameter, [])
        known.append(Change(Swapped(delta) if place.swapped else delta, place.rows))

    def scale_of(self, alias: str, place: Place) -> Callable[[int], float]:
        """Rank to the scale of factors without an alpha."""
        declared = self.scales.get(place.role)
        return (lambda rank: 1.0) if declared is None else partial(declared, alias)

    def tensor(self, key: str) -> Tensor:
        """
        Raises:
            AdapterError: it holds no numbers, or some that are not finite.
        """
        tensor = self.checkpoint.tensor(key)
        tensor = tensor.float() if tensor.numel() == 1 else tensor  # some trainers save alpha as a whole number
        if not tensor.is_floating_point():
            raise AdapterError(f"{self.file}: {key!r} is {tensor.dtype}; use a file with floating-point numbers")
        if not torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float()).all():
            raise AdapterError(f"{self.file}: {key!r} has values that are not finite (NaN or infinity); {_AGAIN}")
        return tensor

    def ignore(self, names: Iterable[str], reason: str) -> None:
        self.ignored.append(Ignored(tuple(names), reason))


def read_lora(
    checkpoint: Checkpoint,
    shapes: Mapping[Role, Shapes],
    *,
    compat: Compat = "fixed",
    exact_dora: bool = False,
    name: str | None = None,
) -> LoraFile:
    """Read a LoRA for networks of these shapes. What fits is applied; everything else is in the report and the log.

    Args:
        shapes: network -> its parameters; modules of networks that are not given are ignored.
        compat: ``forge`` lets OFT at strength s act with s², and leaves out what the reference has no name for.
        exact_dora: DoRA measures the rows of the changed weight, as in training; the reference measures the weight.
        name: of the file in messages; left out, its own.

    Raises:
        AdapterError: it is of another model, which is named; nothing fits; shapes clash; numbers are not finite.
    """
    names = LoraNames.of(shapes, compat)
    named = {key: names.read(key) for key in checkpoint.tensors}
    file = name or checkpoint.path.name
    _refuse_foreign(file, checkpoint, named, shapes)
    options = Options(exact_dora, squared_turns=compat == "forge")
    reader = _Reader(file, checkpoint, shapes, options, declared_scales(checkpoint))
    for alias, (place, keys) in _modules(file, named).items():
        reader.module(alias, place, keys)
    if unknown := [key for key, row in named.items() if row.place is None]:
        reader.ignore(unknown, "no such module in the model")
    if unread := [key for key, row in named.items() if row.place is not None and row.kind is None]:
        reader.ignore(unread, "no kind of tensor that is known")
    if reader.scales:
        reader.notes.append("where it has no alpha, the scale is that of its metadata")
    return _finished(reader, found=len({row.alias for row in named.values()}))


def _modules(file: str, named: Mapping[str, Named]) -> dict[str, tuple[Place, dict[str, str]]]:
    """Alias -> its place and, by kind, its tensors; of all that is understood.

    Raises:
        AdapterError: a module has two tensors of a kind.
    """
    modules: dict[str, tuple[Place, dict[str, str]]] = {}
    for key, row in named.items():
        if row.place is None or row.kind is None or row.kind == "reshape_weight":  # repeats what shapes say
            continue
        twin = modules.setdefault(row.alias, (row.place, {}))[1].setdefault(row.kind, key)
        if twin != key:
            raise AdapterError(f"{file}: {twin!r} and {key!r} stand for one tensor; {_AGAIN}")
    return modules


def _refuse_foreign(
    file: str, checkpoint: Checkpoint, named: Mapping[str, Named], shapes: Mapping[Role, Shapes]
) -> None:
    """
    Raises:
        AdapterError: the file is a LoRA of another model, no LoRA, or one of which nothing fits.
    """
    first = ", ".join(list(checkpoint.tensors)[:3]) or "none"
    unknown = [key for key, row in named.items() if row.place is None]
    places = [row.place for row in named.values() if row.place is not None and row.kind is not None]
    nothing_fits = all(place.role != "transformer" for place in places)
    family = family_of(unknown, _foreign_widths(checkpoint, named, shapes, nothing_fits), nothing_fits)
    if family:
        raise AdapterError(
            f"{file} is {family} ({(unknown or list(named))[0]}); it cannot be used as a LoRA of Flux.1, {_ANOTHER}"
        )
    if all(row.kind is None or row.alias == key for key, row in named.items()):  # replaced scales alone make no LoRA
        raise AdapterError(f"{file} is no LoRA that this engine knows (first keys: {first}); {_ANOTHER}")
    if not places:
        raise AdapterError(f"{file}: no tensor fits Flux.1, nothing applied (first keys: {first}); {_ANOTHER}")


def _foreign_widths(
    checkpoint: Checkpoint, named: Mapping[str, Named], shapes: Mapping[Role, Shapes], nothing_fits: bool
) -> set[int]:
    """Inputs of factors that are not those of their module; of modules that are unknown too, where all are."""
    widths = set()
    for key, (_, kind, place) in named.items():
        shape = checkpoint.tensors[key].shape
        if kind not in _INPUTS or len(shape) < 2 or (place is not None and place.role != "transformer"):
            continue
        if nothing_fits if place is None else shape[1] != shapes[place.role][place.parameter][-1]:
            widths.add(shape[1])
    return widths


def _part(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """The shape of the rows of a parameter that a place means."""
    return (place.rows[1] - place.rows[0], *shape[1:]) if place.rows else tuple(shape)


def _clash(file: str, what: str, expected: tuple[int, ...], found: tuple[int, ...]) -> AdapterError:
    if len(expected) == len(found) == 2 and expected[1] != found[1]:
        sizes = f"{expected[1]:,} inputs, the file has {found[1]:,}"
    else:
        sizes = f"the shape {list(expected)}, the file has {list(found)}"
    return AdapterError(f"{file}: {what} expects {sizes}; {_ANOTHER}")


def _finished(reader: _Reader, found: int) -> LoraFile:
    patches: dict[Role, int] = {}
    for role, parameters in reader.changes.items():
        for parameter, known in parameters.items():
            places = {change.rows for change in known}
            patches[role] = patches.get(role, 0) + len(places)
            if len(places) < len(known):
                reader.notes.append(f"several modules of the file change {parameter}, they are added up")
    report = LoraReport(reader.file, found, reader.applied, patches, tuple(reader.ignored), tuple(reader.notes))
    if not reader.changes:
        raise AdapterError(f"{report}; {_ANOTHER}")
    log.log(logging.WARNING if report.ignored or report.notes else logging.INFO, "%s", report)
    changes: dict[Role, Mapping[str, tuple[Change, ...]]] = {
        role: {parameter: tuple(rows) for parameter, rows in parameters.items()}
        for role, parameters in reader.changes.items()
    }
    return LoraFile(reader.checkpoint, changes, report)
