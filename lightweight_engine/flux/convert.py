"""A part of a model as a file in another storage format: our key names and fused layout, block after block.

What is written loads bit for bit as the original does when it is quantised on load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..backend.checkpoint import DTYPES
from ..backend.packed import Packed
from ..backend.quantize import spec_for
from ..backend.safetensors_writer import header_of, write_safetensors
from ..backend.satellites import WRITABLE, tensors_of
from ..errors import ConfigError, UnsupportedCheckpointError
from .keymaps import Part, Source
from .load import AS_IT_IS, PLAIN, empty_network, give_back, linear_weights, named_tensors, read_as, several

FORMATS = (*PLAIN, *WRITABLE)

# Metadata of the source that tells people what a model is; hints on Kontext and the like are read from it too.
KEPT_METADATA = "modelspec."


def convert_part(part: Part, format: str, path: Path, *, device: torch.device, force: bool = False) -> None:
    """Write a part with its linears in ``format``; all else keeps the dtype that its file has.

    At no time more than a few tensors are in memory.

    Args:
        format: one of ``FORMATS``.
        device: where numbers are converted.
        force: quantise even what another quantisation has rounded already.

    Raises:
        ConfigError: the format cannot be written to such a file.
        UnsupportedCheckpointError: the part has no linears, or would be rounded twice.
        CorruptCheckpointError: a weight that cannot be read, or numbers that are not finite.
        OutputError: the file cannot be written; nothing is left behind.
    """
    kept = _plan(part, format, force)
    metadata = _metadata(part, format)
    write_safetensors(path, _layout(part, kept), metadata, _tensors(part, kept, device))


def check_conversion(part: Part, format: str, *, force: bool = False) -> None:
    """Refuse what ``convert_part`` would refuse before it writes; raises what that raises."""
    _plan(part, format, force)


def converted_size(part: Part, format: str) -> int:
    """Bytes of the file that ``convert_part`` would write; raises what that raises."""
    layout = _layout(part, _plan(part, format, force=True))
    return len(header_of(layout, _metadata(part, format))) + sum(tensor.nbytes for tensor in layout.values())


def rounded_already(part: Part, format: str) -> list[str]:
    """The linears that the file has in a quantised format other than ``format``."""
    linears = linear_weights(empty_network(part))
    return [name for name in part.sources if name in linears and part.sources[name].format not in ("plain", format)]


def _plan(part: Part, format: str, force: bool) -> dict[str, torch.dtype | str]:
    """What each parameter is written as, in the order of the network's own."""
    name = part.checkpoint.path.name
    if format not in FORMATS:
        raise ConfigError(f"{format!r} cannot be written to a safetensors file; use one of {', '.join(FORMATS)}")
    network = empty_network(part)
    linears = linear_weights(network)
    if part.role == "autoencoder":
        raise UnsupportedCheckpointError(
            f"{name}: an autoencoder is small and consists of convolutions; use it as it is"
        )
    twice = rounded_already(part, format) if format not in PLAIN and not force else []
    if twice:
        raise UnsupportedCheckpointError(
            f"{name}: {len(twice)} of its {len(linears)} linears are quantised already "
            f"({twice[0]} as {part.sources[twice[0]].format}); as {format} they would be rounded a second time. "
            "Convert the bf16 or fp16 file of the model, or use --force"
        )
    return {key: _kept_as(part.sources[key], key in linears, format) for key in named_tensors(network)}


def _kept_as(source: Source, linear: bool, format: str) -> torch.dtype | str:
    """The dtype or packed format of a parameter in the new file."""
    formats = {stored.format for stored, _ in source.pieces}
    if format in PLAIN:
        eight = formats != {"plain"} or any(DTYPES[stored.dtype][0] == 1 for stored, _ in source.pieces)
        return PLAIN[format] if linear or eight else AS_IT_IS
    if linear:
        return AS_IT_IS if formats == {format} else format
    # Float32 holds whatever a GGUF block type means: an embedding is rounded once, when it is used.
    return AS_IT_IS if formats <= {"plain", *WRITABLE} else torch.float32


def _layout(part: Part, kept: Mapping[str, torch.dtype | str]) -> dict[str, Tensor]:
    """Every tensor of the new file on the meta device."""
    layout: dict[str, Tensor] = {}
    for name, target in kept.items():
        source = part.sources[name]
        tensors = tensors_of(name, _like(source, target), _dtype_before(source))
        layout |= {key: tensor.to("meta") for key, tensor in tensors.items()}
    return layout


def _like(source: Source, kept: torch.dtype | str) -> Tensor | Packed:
    """What ``read_as`` will return: without numbers, except where only reading tells how pieces are joined."""
    meta = torch.device("meta")
    if isinstance(kept, torch.dtype):
        return torch.empty(source.shape, dtype=kept, device=meta)
    if kept != AS_IT_IS:
        spec = spec_for(kept, (source.shape[0], source.shape[1]))
        return Packed(
            spec, {name: torch.empty(shape, dtype=dtype, device=meta) for name, (shape, dtype) in spec.parts.items()}
        )
    dtypes = {stored.dtype for stored, _ in source.pieces}
    if source.format == "plain" and len(dtypes) == 1:
        return torch.empty(source.shape, dtype=getattr(torch, DTYPES[dtypes.pop()][1]), device=meta)
    return source.read()


def _tensors(part: Part, kept: Mapping[str, torch.dtype | str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for name, value in several(lambda name: read_as(part, name, kept[name], device), list(kept)):
        yield from tensors_of(name, value, _dtype_before(part.sources[name])).items()
        give_back(part.sources[name])


def _dtype_before(source: Source) -> str:
    """The dtype of a weight's numbers before they were packed."""
    stored = source.pieces[0][0]
    return DTYPES[stored.dtype][1] if stored.format == "plain" else str(stored.details.get("dtype", "float32"))


def _metadata(part: Part, format: str) -> dict[str, str]:
    source = part.checkpoint
    kept = {key: value for key, value in source.metadata.items() if key.startswith(KEPT_METADATA)}
    made_from = {"file": source.path.name, "bytes": part.nbytes, "layout": part.layout, "formats": part.formats}
    config = {"config": json.dumps(part.hints)} if part.hints else {}
    return {"format": "pt", **kept, **config, "storage": format, "converted_from": json.dumps(made_from)}
