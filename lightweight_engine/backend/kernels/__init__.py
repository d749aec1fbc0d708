"""Programs for the GPU in Triton, each with a twin in plain torch that gives the same bits.

``dequantize`` and ``quantize`` are what the storage formats call where programs are ``available``. The modules that
hold the programs import Triton, and are imported when they are first needed.
"""

from __future__ import annotations

from .launch import available, keep_in, kept_in

__all__ = ["available", "keep_in", "kept_in"]
