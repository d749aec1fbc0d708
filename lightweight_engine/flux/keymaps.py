"""Which parts of Flux a file holds, and where each parameter of theirs comes from.

Told by keys and shapes alone, never by a file's name. The key names of other layouts are data (``layouts``); here is
what reads them. Prefixes are discovered: what stands before the anchor of a layout is the prefix of all keys of that
part. Loads no torch before a weight is read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..backend.checkpoint import DTYPES, Checkpoint
from ..backend.stored import Stored, find_stored
from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from .layouts import IGNORED_ANYWHERE, IGNORED_BETWEEN, LAYOUTS, Layout, Role, Row
from .params import PARAMS, count_blocks
from .recognise import (
    INSTEAD,
    foreign_size,
    hint_of,
    refuse_other_models,
    unknown_file,
    variant_of,
    width_fed,
)
from .sources import Rows, Source, joined_shape, nbytes_of

log = logging.getLogger(__name__)

# Class in a folder's config.json -> sizes that shapes do not tell: their key there, and ours.
CONFIG_SIZES: Mapping[str, Mapping[str, str]] = {
    "FluxTransformer2DModel": {"axes_dims_rope": "axes_dim"},
    "CLIPTextModel": {"num_attention_heads": "num_attention_heads"},
    "T5EncoderModel": {"relative_attention_max_distance": "max_distance"},
    "AutoencoderKL": {"scaling_factor": "scale", "shift_factor": "shift"},
}


@dataclass(frozen=True, eq=False)
class Part:
    """One network inside a file: parameter name -> where it comes from.

    Attributes:
        layout: whose key names the file has: ``bfl``, ``diffusers``, ``gguf`` …
        prefix: what stands before the keys of this part.
        ignored: keys that the network does not read.
        given: sizes that a caller adds, where neither shapes nor the file's metadata tell them.
    """

    role: Role
    checkpoint: Checkpoint
    sources: Mapping[str, Source]
    ignored: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "bfl"
    prefix: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: source.shape for name, source in self.sources.items()}

    @property
    def variant(self) -> str | None:
        """Of a transformer: ``dev``, ``schnell``, ``canny/depth`` or ``fill``, by its inputs."""
        return variant_of(self.shapes) if self.role == "transformer" else None

    @property
    def hint(self) -> str | None:
        """Of a transformer: ``kontext``, ``krea`` or ``de-distilled``, if its name or title says so."""
        return hint_of(self.checkpoint) if self.role == "transformer" else None

    @property
    def hints(self) -> dict[str, Any]:
        """Sizes that shapes do not tell: a folder's ``config.json``, the metadata's ``config``, those ``given``."""
        config = self._metadata_object(f"{self.prefix}config.json")
        kinds = str([config.get("_class_name"), config.get("architectures")])
        renamed = next((sizes for kind, sizes in CONFIG_SIZES.items() if kind in kinds), {})
        sizes = {ours: config[theirs] for theirs, ours in renamed.items() if config.get(theirs) is not None}
        return {**sizes, **self._metadata_object("config"), **self.given}

    def _metadata_object(self, key: str) -> dict[str, Any]:
        try:
            rows = json.loads(self.checkpoint.metadata.get(key, "{}"))
        except (ValueError, RecursionError):
            rows = None
        if not isinstance(rows, dict):
            raise CorruptCheckpointError(
                f"{self.checkpoint.path.name}: its metadata {key!r} is not a JSON object; save it again"
            )
        return rows

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(source.nbytes for source in self.sources.values())

    @cached_property
    def formats(self) -> dict[str, int]:
        """Bytes in each format; a plain tensor counts under its dtype (``BF16``)."""
        return self._bytes_by(lambda stored: stored.dtype if stored.format == "plain" else stored.format)

    @property
    def storage(self) -> str:
        """The format that most bytes are in: a quantised one, or ``plain``."""
        sizes = self.formats
        name = max(sizes, key=lambda name: sizes[name])
        return "plain" if name in DTYPES else name

    @property
    def dtype(self) -> str:
        """The dtype that most bytes are in, in safetensors' spelling."""
        sizes = self._bytes_by(lambda stored: stored.dtype)
        return max(sizes, key=lambda name: sizes[name])

    def _bytes_by(self, name_of: Callable[[Stored], str]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for source in self.sources.values():
            for stored, rows in source.pieces:
                name = name_of(stored)
                sizes[name] = sizes.get(name, 0) + nbytes_of(stored, rows)
        return sizes


def read_params(part: Part) -> Any:
    """The sizes of a part's network, from its shapes and hints.

    Raises:
        UnsupportedCheckpointError: a tensor that tells a size is missing, or sizes that no network of ours has.
        CorruptCheckpointError: sizes that cannot be.
    """
    name = f"{part.checkpoint.path.name}: its {part.role}"
    try:
        return PARAMS[part.role].from_shapes(part.shapes, part.hints)
    except UnsupportedCheckpointError as error:
        raise UnsupportedCheckpointError(f"{name} cannot be used: {error}") from None
    except (ValueError, TypeError, ZeroDivisionError, IndexError) as error:
        raise CorruptCheckpointError(f"{name} has impossible sizes ({error}); download it again") from None


def find_parts(checkpoint: Checkpoint) -> dict[Role, Part]:
    """The parts of Flux in a file.

    Raises:
        UnsupportedCheckpointError: there is none, the message says what the file is, where that is known; or a format
            or a variant that is not read.
        CorruptCheckpointError: quantised tensors that do not fit together.
    """
    refuse_other_models(checkpoint)
    stored = find_stored(checkpoint)
    places: dict[Role, tuple[Layout, str]] = {}
    for layout in LAYOUTS:
        prefix = _prefix(stored, layout)
        if prefix is not None:
            places.setdefault(layout.role, (layout, prefix))
    if not places:
        raise unknown_file(checkpoint)
    prefixes = {prefix for _, prefix in places.values()}
    parts: dict[Role, Part] = {
        role: _part(checkpoint, layout, prefix, _below(stored, prefix, prefixes))
        for role, (layout, prefix) in places.items()
    }
    _check_parts(checkpoint, parts)
    rest = unused_keys(checkpoint, parts)
    if rest:
        log.warning("%s: %d keys belong to no part of Flux.1: %s", checkpoint.path.name, len(rest), ", ".join(rest[:3]))
    return parts


def unused_keys(checkpoint: Checkpoint, parts: Mapping[Role, Part]) -> list[str]:
    """Keys of a file that neither a part uses nor a rule ignores."""
    used = {key for part in parts.values() for key in part.ignored}
    used |= {
        key
        for part in parts.values()
        for source in part.sources.values()
        for stored, _ in source.pieces
        for key in stored.keys
    }
    return [key for key in checkpoint.tensors if key not in used and not IGNORED_BETWEEN.search(key)]


def _prefix(stored: Mapping[str, Stored], layout: Layout) -> str | None:
    """The prefix of the part in this layout; of several, the shortest whose size is not that of another model."""

    def complete(prefix: str) -> bool:
        return all(
            any(key.startswith(prefix + name) for key in stored) if name.endswith(".") else prefix + name in stored
            for name in layout.beside
        )

    anchor = layout.anchor
    found = (key[: -len(anchor)] for key in stored if key == anchor or key.endswith("." + anchor))
    prefixes = sorted(filter(complete, found), key=len)

    def foreign(prefix: str) -> bool:
        shapes = {key[len(prefix) :]: each.shape for key, each in stored.items() if key.startswith(prefix)}
        return foreign_size(layout.role, shapes) is not None

    own = next((prefix for prefix in prefixes if len(prefixes) > 1 and not foreign(prefix)), None)
    return own if own is not None else next(iter(prefixes), None)


def _below(stored: Mapping[str, Stored], prefix: str, prefixes: set[str]) -> dict[str, Stored]:
    """The tensors under a prefix by the rest of their names, without those of other parts."""
    others = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    return {
        key[len(prefix) :]: each
        for key, each in stored.items()
        if key.startswith(prefix) and not (others and key.startswith(others))
    }


def _part(checkpoint: Checkpoint, layout: Layout, prefix: str, stored: Mapping[str, Stored]) -> Part:
    """Every tensor under a part's prefix becomes a parameter, a piece of one, or an ignored key."""
    pieces: dict[str, dict[int, tuple[Stored, Row]]] = {}
    ignored: list[str] = []
    levels = count_blocks({name: each.shape for name, each in stored.items()}, "decoder.up_blocks")
    for name, each in stored.items():
        if layout.ignored.search(name) or IGNORED_ANYWHERE.search(name):
            ignored += each.keys
            continue
        for row in _rows_of(layout, name) or (Row(name, name),):
            known = pieces.setdefault(_ours(row, name, levels), {})
            twin = known.setdefault(row.at, (each, row))[0]
            if twin is not each:  # one table under two names, as T5 has it
                _check_twin(checkpoint, twin, each)
                ignored += each.keys
    sources = {name: _source(checkpoint, layout, name, known) for name, known in pieces.items()}
    return Part(layout.role, checkpoint, sources, tuple(ignored), layout=layout.name, prefix=prefix)


def _check_twin(checkpoint: Checkpoint, first: Stored, second: Stored) -> None:
    if first.shape != second.shape:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path.name}: {first.name} {list(first.shape)} and {second.name} {list(second.shape)} "
            "stand for one parameter; use a file with one of them"
        )


def _source(checkpoint: Checkpoint, layout: Layout, name: str, pieces: Mapping[int, tuple[Stored, Row]]) -> Source:
    ordered = [pieces[at] for at in sorted(pieces)]
    first, row = ordered[0]
    wanted = 1 + max((r.at for r in layout.rows if _matched(r.ours, name) is not None), default=0)
    shapes = [stored.shape for stored, _ in ordered]
    parted = len(shapes) > 1 or row.third is not None
    unfit = parted and (() in shapes or shapes[0][0] % (1 if row.third is None else 3))
    if len(pieces) != wanted or len({shape[1:] for shape in shapes}) > 1 or unfit:
        names = ", ".join(f"{stored.name} {list(stored.shape)}" for stored, _ in ordered)
        raise UnsupportedCheckpointError(
            f"{checkpoint.path.name}: {name} is made of {wanted} tensors of one width, the file has {names}; "
            "use the complete file"
        )
    shape = joined_shape(shapes) if len(shapes) > 1 else first.shape
    cuts: list[tuple[Stored, Rows]] = [(stored, None) for stored, _ in ordered]
    if row.third is not None:
        third = shape[0] // 3
        cuts[0], shape = (first, (third * row.third, third * (row.third + 1))), (third, *shape[1:])
    if row.conv and len(shape) == 2:
        shape = (*shape, 1, 1)
    return Source(tuple(cuts), shape, swapped=row.swapped)


def _matched(template: str, name: str) -> list[str] | None:
    """What a name has where a name of ``layouts`` has ``{n}``, any number, and, where that ends in a dot, its leaf
    (weight or bias); None where they differ. No expressions: compiling 350 takes longer than reading a header."""
    first, *others = template.split("{n}")
    if not name.startswith(first):
        return None
    values, rest = [], name[len(first) :]
    for part in others:
        after = rest.lstrip("0123456789")
        if len(after) == len(rest) or not after.startswith(part):
            return None
        values.append(rest[: len(rest) - len(after)])
        rest = after[len(part) :]
    if not template.endswith("."):
        return None if rest else values
    return [*values, rest] if rest in ("weight", "bias") else None


def _rows_of(layout: Layout, name: str) -> tuple[Row, ...]:
    return tuple(row for row in layout.rows if _matched(row.theirs, name) is not None)


def _ours(row: Row, name: str, levels: int) -> str:
    """The parameter's name, the numbers and the leaf of ``name`` put into the row's."""
    values = _matched(row.theirs, name) or []
    leaf = values.pop() if row.theirs.endswith(".") else ""
    if row.reversed:
        values[0] = str(levels - 1 - int(values[0]))
    ours = row.ours
    for value in values:
        ours = ours.replace("{n}", value, 1)
    return ours + leaf


def _check_parts(checkpoint: Checkpoint, parts: Mapping[Role, Part]) -> None:
    """
    Raises:
        UnsupportedCheckpointError: a part has the size of another model's, and no transformer of the file asks for it;
            or a transformer takes inputs that no variant takes.
    """
    transformer = parts["transformer"].shapes if "transformer" in parts else {}
    if transformer:
        try:
            variant_of(transformer)
        except UnsupportedCheckpointError as error:
            raise UnsupportedCheckpointError(f"{checkpoint.path.name}: {error}") from None
    for role, part in parts.items():
        what = foreign_size(role, part.shapes, asked_for=width_fed(role, transformer))
        if what:
            raise UnsupportedCheckpointError(f"{checkpoint.path.name} is {what}, not of Flux.1; {INSTEAD[role]}")
