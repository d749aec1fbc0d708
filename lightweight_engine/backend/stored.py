"""The logical tensors of a model file: what a weight and its satellites (scales, code books) hold together.

A plain file has one tensor for each parameter. A quantised one has several, told apart by their names and dtypes,
tensor by tensor: mixed files are common. Loads no torch and reads no weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from .checkpoint import Checkpoint, corrupt, unique

if TYPE_CHECKING:
    from torch import Tensor

    from .packed import Packed

MAX_JSON = 4096
MAX_DECLARED = 4 << 20
BLOCK_SIZES = tuple(2**n for n in range(5, 13))
FLOAT8 = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
READ_AS = "use the bf16, fp8, nf4 or GGUF file of the same model"

# Format that a file declares for a layer -> the dtype that its weight then has. All others are refused by their names.
DECLARED = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}

# Role of an fp8 weight's satellite -> its spellings after the layer's name.
FLOAT8_SATELLITES = {
    "scale": ("scale_weight", "weight_scale"),
    "input_scale": ("scale_input", "input_scale"),
    "declaration": ("comfy_quant",),
}

QUANT_STATE = re.compile(r"^(?P<weight>.+)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)$")
SATELLITE = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[^.]+"
    r"|scale_weight|weight_scale|scale_input|input_scale|comfy_quant)$"
)
FLOAT8_ENDINGS = tuple(f".{name}" for names in FLOAT8_SATELLITES.values() for name in names)

# What only files of formats that are not read have, most telling first: key -> the format's name.
UNREAD: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.MULTILINE), name)
    for pattern, name in (
        (
            r"\.(wscales|wzeros|wcscales|wtscale|smooth|smooth_factor|smooth_factor_orig|proj_down|proj_up)$"
            r"|\.(qkv_proj|mlp_fc1|mlp_context_fc1|mlp_fc2)\.",
            "SVDQuant/nunchaku (W4A4 kernel format)",
        ),
        (r"\.(qweight|qzeros|g_idx)$", "AWQ or GPTQ"),
        (r"\.float8_data$", "fp8 of flux-fp8-api"),
        (r"\.weight(:|\.|_)(qdata|int_data|tensor_impl|layout_tensor|_layout)\b|\.layout_tensor\b", "TorchAO"),
        (r"\._(data|scale|shift)$", "quanto"),
        (r"\.(svd_up|svd_down|zero_point)$", "SDNQ"),
        (r"\.(SCB|weight_format)$", "LLM.int8 of bitsandbytes"),
        (r"\.weight_scale_2$", "nvfp4"),
    )
)

# Dtype of a layer's scales, or of a weight with scales -> the format that has them.
UNREAD_SCALES = {"F8_E4M3": "nvfp4", "F8_E8M0": "mxfp8", "U8": "mxfp8"}
UNREAD_WEIGHTS = {"I8": "int8", "U8": "nvfp4 or another 4-bit format"}


@dataclass(frozen=True, eq=False)
class Stored:
    """One parameter as a file has it.

    Attributes:
        name: the key of the weight itself, which names the parameter.
        format: ``plain``, ``nf4``, ``fp4``, ``fp8_e4m3``, ``fp8_e5m2`` or ``gguf:TYPE``.
        shape: of the parameter, whatever shape its bytes have in the file.
        satellites: what else belongs to it: role (``absmax``, ``scale`` …) to key.
        details: numbers that the format's reader needs (block size, offset of nested scales …).
    """

    checkpoint: Checkpoint
    name: str
    format: str
    shape: tuple[int, ...]
    satellites: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key of the file that it consists of."""
        return (self.name, *self.satellites.values())

    @property
    def nbytes(self) -> int:
        """Bytes in the file, satellites included."""
        return sum(self.checkpoint.tensors[key].nbytes for key in self.keys)

    @property
    def dtype(self) -> str:
        """The file's dtype of the weight's bytes, in safetensors' spelling."""
        return self.checkpoint.tensors[self.name].dtype

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def read(self, look: bool = True) -> Tensor | Packed:
        """The tensor, or the packed matrix, as views of the mapped file where that can be.

        Args:
            look: refuse scales that are not finite; else whoever asks does it, where the scales go.
        """
        if self.format == "plain":
            return self.checkpoint.tensor(self.name)
        from . import fp8, gguf, nf4

        if self.format in ("nf4", "fp4"):
            return nf4.read_packed(self, look)
        readers = {"fp8_e4m3": fp8, "fp8_e5m2": fp8}
        return readers.get(self.format, gguf).read_packed(self)


def find_stored(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every parameter of a file by name. Each key of the file belongs to exactly one.

    Raises:
        UnsupportedCheckpointError: a layer is stored in a format that is not read; layer and format are named.
        CorruptCheckpointError: satellites are missing, or do not fit.
    """
    declared = _declared_formats(checkpoint)
    _refuse_unread(checkpoint)
    packed = {
        stored.name: stored
        for found in (_four_bit(checkpoint), _float8(checkpoint, declared), _blocks(checkpoint))
        for stored in found
    }
    claimed = {key for stored in packed.values() for key in stored.keys}
    for key in checkpoint.tensors:
        if key not in claimed and SATELLITE.search(key):
            raise _corrupt(checkpoint, f"{key!r} belongs to no quantised weight of the file")
    return {
        key: packed.get(key) or Stored(checkpoint, key, "plain", info.shape)
        for key, info in checkpoint.tensors.items()
        if key in packed or key not in claimed
    }


def _corrupt(checkpoint: Checkpoint, fault: str) -> CorruptCheckpointError:
    return corrupt(checkpoint.path, fault)


def _unread(checkpoint: Checkpoint, layer: str, name: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"{checkpoint.path.name}: this file stores layer {layer!r} as {name}; not supported: {READ_AS}"
    )


def _refuse_unread(checkpoint: Checkpoint) -> None:
    declared = " ".join(checkpoint.metadata.get(key, "") for key in ("model_class", "quantization_config")).lower()
    if "nunchaku" in declared or "svdquant" in declared:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path.name} is an SVDQuant/nunchaku checkpoint (W4A4 kernel format); {READ_AS}"
        )
    keys = "\n".join(checkpoint.tensors)  # a search in all is a tenth of the time of one in each
    for pattern, name in UNREAD:
        for key in checkpoint.tensors if pattern.search(keys) else ():
            if match := pattern.search(key):
                raise _unread(checkpoint, key[: match.start()], name)


def _parse(checkpoint: Checkpoint, text: str | bytes, what: str) -> dict[str, Any]:
    try:
        rows = json.loads(text, object_pairs_hook=unique)
        if not isinstance(rows, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise _corrupt(checkpoint, f"{what} is damaged ({error})") from None
    return rows


def _declared_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """Layer -> format, where the file says so, in its metadata or in a tensor beside the layer's weight.

    Layers of the metadata may lack the prefix that their keys have.

    Raises:
        UnsupportedCheckpointError: a declared format is not read.
    """
    text = checkpoint.metadata.get("_quantization_metadata", "{}")
    if len(text) > MAX_DECLARED:
        raise _corrupt(checkpoint, f"its '_quantization_metadata' has {len(text):,} characters")
    rows = _parse(checkpoint, text, "its metadata '_quantization_metadata'").get("layers", {})
    formats = {}
    for layer in (key.removesuffix(".weight") for key in checkpoint.tensors if key.endswith(".weight")):
        key = f"{layer}.comfy_quant"
        if key in checkpoint.tensors:
            row = _parse(checkpoint, checkpoint.read_bytes(key, MAX_JSON), repr(key))
        else:
            row = next((rows[name] for name in _endings(layer) if name in rows), None) if rows else None
        if row is not None:
            formats[layer] = row.get("format") if isinstance(row, dict) else None
            if formats[layer] not in DECLARED:
                raise _unread(checkpoint, layer, str(formats[layer])[:100])
    return formats


def _endings(layer: str) -> Iterator[str]:
    """The name, and what is left of it without its first part, its first two …"""
    while layer:
        yield layer
        layer = layer.partition(".")[2]


def _four_bit(checkpoint: Checkpoint) -> Iterator[Stored]:
    """The weights of bitsandbytes: shape and block size are in a small JSON beside each."""
    matches = {key: match for key in checkpoint.tensors if (match := QUANT_STATE.match(key))}
    for key, content in checkpoint.read_several(matches, MAX_JSON):
        weight, kind = matches[key]["weight"], matches[key]["kind"]
        state = _parse(checkpoint, content, repr(key))
        nested = "nested_blocksize" in state or f"{weight}.nested_absmax" in checkpoint.tensors
        roles = ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if nested else ()))
        satellites = {role: f"{weight}.{role}" for role in roles}
        for name in (weight, *satellites.values()):
            if name not in checkpoint.tensors:
                raise _corrupt(checkpoint, f"{name!r} is missing, which {key!r} needs")
        details, shape = _quant_state(checkpoint, key, state, nested)
        stored = Stored(checkpoint, weight, kind, shape, {**satellites, "quant_state": key}, details)
        _check_four_bit(stored, state.get("quant_type", kind))
        yield stored


def _quant_state(
    checkpoint: Checkpoint, key: str, state: Mapping[str, Any], nested: bool
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Details and shape of a 4-bit weight, from its JSON."""
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise _corrupt(checkpoint, f"{key!r} has no shape of two whole numbers")
    details = {"block_size": state.get("blocksize"), "dtype": state.get("dtype", "float32")}
    if nested:
        details["nested_block_size"] = state.get("nested_blocksize")
        details["nested_offset"] = offset = state.get("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
            raise _corrupt(checkpoint, f"{key!r} has no finite nested_offset")
    for name in ("block_size", "nested_block_size")[: 1 + nested]:
        if type(details[name]) is not int or details[name] not in BLOCK_SIZES:
            raise _corrupt(
                checkpoint, f"{key!r} has the {name} {details[name]!r}, which is no power of two in 32..4096"
            )
    return details, tuple(shape)


def _check_four_bit(stored: Stored, kind: str) -> None:
    """The sizes of a 4-bit weight's tensors, which follow from its shape and block size."""
    tensors, details = stored.checkpoint.tensors, stored.details
    blocks = -(-stored.elements // details["block_size"])
    counts = {"absmax": blocks, "quant_map": 16}
    if "nested_absmax" in stored.satellites:
        counts |= {"nested_absmax": -(-blocks // details["nested_block_size"]), "nested_quant_map": 256}
    found = {role: math.prod(tensors[stored.satellites[role]].shape) for role in counts}
    counts["packed bytes"], found["packed bytes"] = -(-stored.elements // 2), tensors[stored.name].nbytes
    wrong = [f"{found[role]:,} {role}, {count:,} expected" for role, count in counts.items() if found[role] != count]
    if kind != stored.format:
        wrong.append(f"quant_type {kind!r}")
    if wrong:
        fault = f"{stored.name!r} {list(stored.shape)} has {'; '.join(wrong)}"
        raise _corrupt(stored.checkpoint, fault)


def _float8(checkpoint: Checkpoint, declared: Mapping[str, str]) -> Iterator[Stored]:
    """Matrices of 8-bit floats, with a scale or without. Other fp8 tensors are plain: they are read by a cast."""
    if not declared and not any(
        info.dtype in FLOAT8 or key.endswith(FLOAT8_ENDINGS) for key, info in checkpoint.tensors.items()
    ):
        return
    for key, info in checkpoint.tensors.items():
        layer = key.removesuffix(".weight")
        satellites = _float8_satellites(checkpoint, layer) if layer != key else {}
        scale = satellites.get("scale")
        wanted = DECLARED.get(declared.get(layer, ""), info.dtype)
        if info.dtype not in FLOAT8 or len(info.shape) != 2:
            if scale and info.dtype in UNREAD_WEIGHTS:
                raise _unread(checkpoint, layer, UNREAD_WEIGHTS[info.dtype])
            if scale or wanted != info.dtype:
                fault = f"{key!r} is {info.dtype} {list(info.shape)}, where a scaled fp8 matrix is expected"
                raise _corrupt(checkpoint, fault)
            continue
        if wanted != info.dtype or (layer in declared and not scale):
            raise _corrupt(checkpoint, f"{key!r} is declared as {declared[layer]}, and its dtype or scale does not fit")
        if scale:
            _check_scale(checkpoint, key, scale)
        yield Stored(checkpoint, key, FLOAT8[info.dtype], info.shape, satellites)


def _float8_satellites(checkpoint: Checkpoint, layer: str) -> dict[str, str]:
    keys = {role: [f"{layer}.{name}" for name in names] for role, names in FLOAT8_SATELLITES.items()}
    found = {role: [key for key in names if key in checkpoint.tensors] for role, names in keys.items()}
    twice = next((names for names in found.values() if len(names) > 1), None)
    if twice:
        raise _corrupt(checkpoint, f"{' and '.join(twice)} are two spellings of one scale")
    return {role: names[0] for role, names in found.items() if names}


def _check_scale(checkpoint: Checkpoint, key: str, scale: str) -> None:
    """One scale for the matrix, or one for each row."""
    info = checkpoint.tensors[scale]
    if info.dtype in UNREAD_SCALES:
        raise _unread(checkpoint, key.removesuffix(".weight"), UNREAD_SCALES[info.dtype])
    count, rows = math.prod(info.shape), checkpoint.tensors[key].shape[0]
    if count not in (1, rows) or info.dtype not in ("F32", "F16", "BF16"):
        raise _corrupt(
            checkpoint, f"{scale!r} is {info.dtype} {list(info.shape)}, where 1 or {rows:,} scales are expected"
        )


def _blocks(checkpoint: Checkpoint) -> Iterator[Stored]:
    """The matrices of a GGUF file in block types."""
    for key, info in checkpoint.tensors.items():
        if info.dtype.startswith("gguf:"):
            if len(info.shape) != 2:
                raise _corrupt(checkpoint, f"{key!r} {list(info.shape)} is stored in blocks and is no matrix")
            yield Stored(checkpoint, key, info.dtype, info.shape)
