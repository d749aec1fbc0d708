"""Where the entries of an uncompressed zip archive lie, so that they can be read as views of the mapped file.

Python's own reader takes a whole directory into memory and inflates on demand. torch writes neither compressed entries
nor large directories, so anything of the kind is refused before it costs anything.

Source: the APPNOTE of the zip format. Loads no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import CorruptCheckpointError
from .checkpoint import MAX_NAME, MAX_TENSORS, corrupt

END = struct.Struct("<4s4H2IH")  # end of the directory
END64_PLACE = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
ROW = struct.Struct("<4s6H3I5H2I")  # a row of the directory
LOCAL = struct.Struct("<4s5H3I2H")  # the header before an entry's bytes

MAX_COMMENT = 0xFFFF
MAX_DIRECTORY = 32 << 20
NOT_HERE, NOT_HERE64 = 0xFFFF, 0xFFFFFFFF  # the number is in the 64-bit record
STORED, ENCRYPTED = 0, 1


@dataclass(frozen=True)
class Entry:
    """Bytes ``start`` to ``end`` of the archive."""

    start: int
    end: int


def read_entries(path: Path) -> dict[str, Entry]:
    """The entries of an archive by name.

    Raises:
        CorruptCheckpointError: truncated, compressed, encrypted, overlapping, or two entries of one name.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            start, length, count = _find_directory(path, file, size)
            file.seek(start)
            directory = file.read(length)
            entries = {}
            for name, header, span in _rows(path, directory, count):
                if name in entries:
                    raise corrupt(path, f"the archive has two entries {name!r}")
                entries[name] = _entry(path, file, name, header, span)
        except (struct.error, OSError):
            raise corrupt(path, "it is no whole zip archive") from None
    _check_ranges(path, entries, start)
    return entries


def _find_directory(path: Path, file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Start, length and number of rows of the directory, which is at the end."""
    tail_start = max(size - END.size - MAX_COMMENT, 0)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise corrupt(path, "it is incomplete: the directory at the end of the zip archive is missing")
    _, _, _, _, count, length, start, _ = END.unpack_from(tail, at)
    end = tail_start + at
    place = end - END64_PLACE.size
    if place >= 0 and (count == NOT_HERE or length == NOT_HERE64 or start == NOT_HERE64):
        file.seek(place)
        signature, _, end64, _ = END64_PLACE.unpack(file.read(END64_PLACE.size))
        if signature == b"PK\x06\x07" and end64 < place:
            file.seek(end64)
            *_, count, length, start = END64.unpack(file.read(END64.size))
            end = end64
    if count > MAX_TENSORS or length > MAX_DIRECTORY or start + length > end:
        raise corrupt(path, f"its directory claims {count:,} entries in {length:,} bytes, which cannot be")
    return start, length, count


def _rows(path: Path, directory: bytes, count: int) -> Iterator[tuple[str, int, int]]:
    """Name, place of the local header, and bytes of each entry."""
    at = 0
    for _ in range(count):
        signature, _, _, flags, method, _, _, _, packed, span, n, extra, comment, _, _, _, header = ROW.unpack_from(
            directory, at
        )
        if signature != b"PK\x01\x02" or n > MAX_NAME:
            raise corrupt(path, "the directory of the zip archive is damaged")
        name = directory[at + ROW.size : at + ROW.size + n].decode("utf-8", "replace")
        fields = directory[at + ROW.size + n : at + ROW.size + n + extra]
        span, packed, header = _wide(fields, span, packed, header)
        if method != STORED or packed != span or flags & ENCRYPTED:
            raise CorruptCheckpointError(
                f"{path.name}: the entry {name!r} is compressed or encrypted, which torch never does; "
                "use the safetensors file of the model"
            )
        at += ROW.size + n + extra + comment
        yield name, header, span


def _wide(fields: bytes, *numbers: int) -> Iterator[int]:
    """The numbers, those that did not fit into 32 bits taken from the 64-bit field."""
    wide = iter(())
    at = 0
    while at + 4 <= len(fields):
        kind, length = struct.unpack_from("<2H", fields, at)
        if kind == 1:
            body = fields[at + 4 : at + 4 + length]
            wide = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
        at += 4 + length
    for number in numbers:
        yield next(wide, number) if number == NOT_HERE64 else number


def _entry(path: Path, file: BinaryIO, name: str, header: int, span: int) -> Entry:
    file.seek(header)
    signature, *_, n, extra = LOCAL.unpack(file.read(LOCAL.size))
    if signature != b"PK\x03\x04" or file.read(n).decode("utf-8", "replace") != name:
        raise corrupt(path, f"the entry {name!r} is not where the directory of the zip archive says")
    start = header + LOCAL.size + n + extra
    return Entry(start, start + span)


def _check_ranges(path: Path, entries: dict[str, Entry], limit: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < end or entry.end > limit:
            raise corrupt(path, f"the entry {name!r} overlaps others or leaves the file")
        end = entry.end
