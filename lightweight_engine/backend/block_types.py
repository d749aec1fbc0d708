"""The block types of GGUF files that are read: how many numbers and bytes a block has, and its number in the format.

Loads no torch, so that a file's header can be checked without it; ``gguf`` knows what the bytes mean.

Source: ``ggml.h`` and the type table of gguf-py (MIT).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """How a type lies in a file.

    Attributes:
        number: of the type in a GGUF header.
        elements: numbers in a block; blocks never cross rows.
        nbytes: bytes of a block.
    """

    number: int
    elements: int
    nbytes: int

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of ``width`` numbers.

        Raises:
            ValueError: the row is not a whole number of blocks.
        """
        if width % self.elements:
            raise ValueError(f"a row of {width} numbers cannot be parted into blocks of {self.elements}")
        return width // self.elements * self.nbytes


BLOCK_TYPES = {
    "Q4_0": BlockType(2, 32, 18),
    "Q4_1": BlockType(3, 32, 20),
    "Q5_0": BlockType(6, 32, 22),
    "Q5_1": BlockType(7, 32, 24),
    "Q8_0": BlockType(8, 32, 34),
    "Q2_K": BlockType(10, 256, 84),
    "Q3_K": BlockType(11, 256, 110),
    "Q4_K": BlockType(12, 256, 144),
    "Q5_K": BlockType(13, 256, 176),
    "Q6_K": BlockType(14, 256, 210),
    "IQ4_NL": BlockType(20, 32, 18),
    "IQ4_XS": BlockType(23, 256, 136),
}
