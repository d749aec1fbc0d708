"""What a model file is, in words and numbers, from its header alone. Loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..backend.model_files import open_model
from ..errors import EngineError
from ..flux.keymaps import Part, find_parts, read_params, unused_keys
from ..flux.recognise import width_of

MAX_TEXT = 200
MAX_METADATA = 20


@dataclass(frozen=True)
class PartDescription:
    """One part of Flux in a file.

    Attributes:
        layout: whose key names it has; ``prefix`` stands before them.
        variant: of a transformer: ``dev``, ``schnell``, ``canny/depth``, ``fill``.
        hint: what only the file's name or title says: ``kontext``, ``krea``, ``de-distilled``.
        formats: bytes in each storage format.
        sizes: blocks, widths and so on; empty where ``problem`` says why they cannot be read.
        ignored: keys of the file that the network does not read.
    """

    role: str
    layout: str
    prefix: str
    variant: str | None
    hint: str | None
    parameters: int
    tensors: int
    bytes: int
    formats: dict[str, int]
    sizes: dict[str, Any]
    ignored: list[str]
    problem: str | None = None


@dataclass(frozen=True)
class FileDescription:
    """A model file or folder; one that cannot be used has a ``problem``, and whatever was read before it showed."""

    path: str
    bytes: int
    container: str | None = None
    files: list[str] = field(default_factory=list)
    tensors: int = 0
    parts: list[PartDescription] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe_file(path: str | Path) -> FileDescription:
    """Describe a model file or folder. What is wrong with it is part of the description, not an error."""
    path = Path(path)
    known: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size if path.is_file() else 0}
    try:
        checkpoint = open_model(path)
        files = checkpoint.all_files
        known |= {
            "bytes": sum(file.stat().st_size for file in files),
            "container": checkpoint.container,
            "files": [str(file) for file in files],
            "tensors": len(checkpoint.tensors),
            "metadata": _short(checkpoint.metadata),
        }
        parts = find_parts(checkpoint)
        known["parts"] = [_describe_part(part) for part in parts.values()]
        known["unused"] = unused_keys(checkpoint, parts)
    except EngineError as error:
        known["problem"] = str(error)
    return FileDescription(**known)


def _describe_part(part: Part) -> PartDescription:
    sizes: dict[str, Any] = {}
    problem = None
    try:
        sizes = asdict(read_params(part))
    except EngineError as error:
        problem = str(error)
    width = width_of(part.role, part.shapes)
    return PartDescription(
        role=part.role,
        layout=part.layout,
        prefix=part.prefix,
        variant=part.variant,
        hint=part.hint,
        parameters=sum(source.elements for source in part.sources.values()),
        tensors=len(part.sources),
        bytes=part.nbytes,
        formats=dict(sorted(part.formats.items(), key=lambda item: -item[1])),
        sizes=sizes or ({"hidden_size": width} if width else {}),
        ignored=list(part.ignored),
        problem=problem,
    )


def _short(metadata: Any) -> dict[str, str]:
    """The first entries, each cut to a line's length."""
    rows = sorted(metadata.items())[:MAX_METADATA]
    return {key: value if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]}…" for key, value in rows}
