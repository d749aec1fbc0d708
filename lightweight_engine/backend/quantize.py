"""Formats by name: what a matrix takes in one, and the matrix itself in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..errors import ConfigError
from .block_types import BLOCK_TYPES
from .fp8 import Float8, quantize_fp8, quantize_rows, rows_spec
from .gguf import ENCODERS, Blocks, quantize_blocks
from .nf4 import FourBit, quantize_4bit
from .packed import Packed, Spec

ROWS = "fp8_rows"
"""What products of 8-bit floats read; chosen by the setting ``speed`` and not by ``storage_dtype``."""

# The name of a format, as the setting ``storage_dtype`` has it -> what makes it of a matrix.
WRITERS: dict[str, Callable[[Tensor], Packed]] = {
    "nf4": partial(quantize_4bit, kind="nf4"),
    "fp4": partial(quantize_4bit, kind="fp4"),
    "fp8_e4m3": partial(quantize_fp8, kind="fp8_e4m3"),
    "fp8_e5m2": partial(quantize_fp8, kind="fp8_e5m2"),
    ROWS: quantize_rows,
    **{f"gguf:{type}": partial(quantize_blocks, type=type) for type in ENCODERS},
}
SPECS: dict[str, Callable[[tuple[int, int]], Spec]] = {
    "nf4": partial(FourBit, "nf4"),
    "fp4": partial(FourBit, "fp4"),
    "fp8_e4m3": partial(Float8, "fp8_e4m3"),
    "fp8_e5m2": partial(Float8, "fp8_e5m2"),
    ROWS: rows_spec,
    **{f"gguf:{type}": partial(Blocks, type) for type in BLOCK_TYPES},
}


def quantize(matrix: Tensor, format: str) -> Packed:
    """A matrix ``[out, in]`` in a storage format, on its own device.

    Raises:
        ConfigError: the format is unknown, or is only read.
        ValueError: the format cannot hold this matrix; the reason is given.
    """
    _check_name(format)
    if format not in WRITERS:
        raise ConfigError(f"{format} can be read, not written; use one of {', '.join(WRITERS)}")
    return WRITERS[format](matrix)


def spec_for(format: str, shape: tuple[int, int]) -> Spec:
    """What a matrix of ``shape`` becomes in a format, without its numbers; ``nbytes`` tells its size.

    Raises:
        ConfigError: the format is unknown.
        ValueError: a row is no whole number of the format's blocks.
    """
    _check_name(format)
    return SPECS[format](shape)


def _check_name(format: str) -> None:
    if format not in SPECS:
        raise ConfigError(f"{format!r} is no storage format; the formats are {', '.join(SPECS)}")
