"""Eight-bit floating point: each number by itself, with no scale, one scale for the matrix, or one for each row.

``fp8_e4m3`` is float8_e4m3fn (largest value 448, no infinity), ``fp8_e5m2`` is float8_e5m2 (57344).

Source: FP8 Formats for Deep Learning (Micikevicius et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .packed import Packed, Spec, check_finite, check_matrix, divided, pieces, reading, satellite, stacked_shape

if TYPE_CHECKING:
    from .stored import Stored

Kind = Literal["fp8_e4m3", "fp8_e5m2"]
DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Float8(Spec):
    """A matrix of 8-bit floats.

    Attributes:
        scales: how many float32 scales it has: none, one for the matrix, or as many as rows.
    """

    kind: Kind
    shape: tuple[int, int]
    scales: int = 0

    def __post_init__(self) -> None:
        if self.scales not in (0, 1, self.shape[0]):
            raise ValueError(f"it has {self.scales} scales; one, or one for each of {self.shape[0]} rows, are read")

    @property
    def name(self) -> str:
        return self.kind

    @property
    def by_rows(self) -> bool:
        """Whether it is ``fp8_rows``, which products of 8-bit floats read."""
        return self.kind == "fp8_e4m3" and self.scales == self.shape[0]

    @property
    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        scale = {"scale": ((self.scales,), torch.float32)} if self.scales else {}
        return {"values": (self.shape, DTYPES[self.kind]), **scale}

    @property
    def has_program(self) -> bool:
        return self.scales > 0

    def _by_torch(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        values = parts["values"]
        if not self.scales:
            return values.to(dtype)  # each of the values is one of float16, bfloat16 and float32 too
        out = torch.empty(self.shape, dtype=dtype, device=values.device)
        scale = parts["scale"].expand(self.shape[0])
        for piece in pieces(*self.shape, values.device):
            torch.mul(values[piece].float(), scale[piece, None], out=out[piece])
        return out

    def _by_program(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        from .kernels.dequantize import float8

        float8(parts["values"], parts["scale"], out)

    def take(self, parts: Mapping[str, Tensor], start: int, stop: int) -> Packed:
        taken = {name: tensor[start:stop] if len(tensor) > 1 else tensor for name, tensor in parts.items()}
        scales = len(taken["scale"]) if self.scales else 0
        return Packed(replace(self, shape=(stop - start, self.shape[1]), scales=scales), taken)

    def stack(self, matrices: Sequence[Packed]) -> Packed:
        shape = stacked_shape(matrices)
        values = torch.cat([m.parts["values"].view(torch.uint8) for m in matrices]).view(DTYPES[self.kind])
        scales = [_scale(m) for m in matrices]
        if not any("scale" in m.parts for m in matrices):
            return Packed(Float8(self.kind, shape), {"values": values})
        if all(torch.equal(scale, scales[0]) for scale in scales) and len(scales[0]) == 1:
            return Packed(Float8(self.kind, shape, 1), {"values": values, "scale": scales[0]})
        rows = torch.cat([scale.expand(m.shape[0]) for m, scale in zip(matrices, scales, strict=True)])
        return Packed(Float8(self.kind, shape, shape[0]), {"values": values, "scale": rows})


def _scale(matrix: Packed) -> Tensor:
    """The scales of a matrix; one where it has none."""
    values = matrix.parts["values"]
    return matrix.parts.get("scale", torch.ones(1, device=values.device))


def quantize_fp8(matrix: Tensor, kind: Kind, scaled: bool = False) -> Packed:
    """The nearest 8-bit floats of a matrix ``[out, in]``, ties to even.

    Args:
        scaled: with one scale, which brings the largest value of the matrix to the largest of the type. Otherwise
            values beyond that become it.

    Raises:
        ValueError: it is no matrix, or has values that are not finite.
    """
    check_matrix(matrix)
    dtype = DTYPES[kind]
    largest = torch.finfo(dtype).max
    spec = Float8(kind, (matrix.shape[0], matrix.shape[1]), int(scaled))
    values = torch.empty(spec.shape, dtype=dtype, device=matrix.device)
    scale = divided(_largest(matrix), largest) if scaled else torch.ones((), device=matrix.device)
    scale = torch.where(scale == 0, 1.0, scale)
    for piece in pieces(*spec.shape, matrix.device):
        # Clamped first: what a cast does beyond the largest value differs between devices and versions of torch.
        values[piece] = (matrix[piece].float() / scale).clamp(-largest, largest).to(dtype)
    return Packed(spec, {"values": values, **({"scale": scale.view(1)} if scaled else {})})


def rows_spec(shape: tuple[int, int]) -> Float8:
    """What ``quantize_rows`` makes of a matrix of this shape."""
    return Float8("fp8_e4m3", shape, shape[0])


def quantize_rows(matrix: Tensor) -> Packed:
    """The nearest 8-bit floats of a matrix ``[out, in]``, with a scale for each row; ties to even.

    Raises:
        ValueError: it is no matrix, or has values that are not finite.
    """
    check_matrix(matrix)
    spec = rows_spec((matrix.shape[0], matrix.shape[1]))
    largest = torch.finfo(torch.float8_e4m3fn).max
    values = torch.empty(spec.shape, dtype=torch.float8_e4m3fn, device=matrix.device)
    scale = torch.empty(spec.scales, dtype=torch.float32, device=matrix.device)
    for piece in pieces(*spec.shape, matrix.device):
        wide = matrix[piece].float()
        found = divided(wide.abs().amax(-1), largest)
        scale[piece] = torch.where(found == 0, 1.0, found)
        values[piece] = (wide / scale[piece, None]).clamp(-largest, largest).to(values.dtype)
    return Packed(spec, {"values": values, "scale": scale})


def as_rows(packed: Packed) -> Packed | None:
    """An ``fp8_e4m3`` matrix with a scale for each row, its numbers unchanged; None for another format."""
    spec = packed.spec
    if not isinstance(spec, Float8) or spec.kind != "fp8_e4m3":
        return None
    scale = _scale(packed).expand(spec.shape[0]).contiguous()
    return Packed(rows_spec(spec.shape), {"values": packed.parts["values"], "scale": scale})


def _largest(matrix: Tensor) -> Tensor:
    low, high = torch.aminmax(matrix)
    return torch.maximum(-low, high).float()


def read_packed(stored: Stored) -> Packed:
    """An fp8 matrix of a file, as views of it.

    Raises:
        CorruptCheckpointError: dtype or number of scales do not fit, or a scale is not finite.
    """
    with reading(stored):
        kind: Kind = "fp8_e5m2" if stored.format == "fp8_e5m2" else "fp8_e4m3"
        values = stored.checkpoint.tensor(stored.name)
        if values.dtype != DTYPES[kind] or tuple(values.shape) != tuple(stored.shape):
            raise ValueError(f"it is {values.dtype} of the shape {list(values.shape)}, {list(stored.shape)} expected")
        parts, scales = {"values": values}, 0
        if "scale" in stored.satellites:
            scale = satellite(stored, "scale").view(-1).float()
            check_finite(scale, "scale")
            parts["scale"], scales = scale, len(scale)
            if not scales:
                raise ValueError("its scale is empty")
        return Packed(Float8(kind, (stored.shape[0], stored.shape[1]), scales), parts)
