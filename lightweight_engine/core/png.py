"""A picture as PNG in bands of rows, which several threads pack at once.

Pillow writes the same chunks in one thread, in which a saved picture took as long as two steps of sampling. Bands have
a fixed height, and each is packed with the end of the one before as its dictionary: the bytes do not depend on the
machine, and files are no larger. All bands are filtered before the first is packed: threads take work in the order in
which it is handed out, so that none waits for a band that nobody has begun. Several are filtered at once: that takes
some thirty calls of numpy, between which threads wait for Python's lock.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

Chunk = tuple[bytes, bytes]
"""A chunk's name and its data."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = {"L": (0, 1), "RGB": (2, 3), "RGBA": (6, 4)}  # mode -> (colour type, channels), 8 bits each
_OWN_CHUNKS = {"icc_profile", "transparency"}  # of a picture's ``info``, which Pillow writes
_BAND = 32  # rows: many bands keep all threads busy to the end
_AT_ONCE = 4  # bands that are filtered together: what is computed with still stays in a core's cache
_WINDOW = 1 << 15  # bytes that deflate looks back
# Files are as small as at zlib's usual 6, within 5 %, in half the time; below 4 they grow by a tenth.
LEVEL = 4
# Nothing repeats itself in the differences of a drawn or photographed picture: packing runs alone takes a fourth of the
# time, and files are smaller by up to 5 %. Flat colours and charts, which become smaller than this, have more to find.
_FLAT = 0.4


def can_write(picture: Image) -> bool:
    """Whether ``png`` holds all of a picture."""
    return picture.mode in _COLOURS and min(picture.size) > 0 and not _OWN_CHUNKS & picture.info.keys()


def png(picture: Image, chunks: Sequence[Chunk] = ()) -> bytes:
    """The file of a picture that ``can_write`` allows, with ``chunks`` before its pixels."""
    import numpy as np

    colour, channels = _COLOURS[picture.mode]
    rows = np.asarray(picture).reshape(picture.height, -1)
    count = -(-len(rows) // _BAND)
    with ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        filtered = [pool.submit(_filtered, rows, channels, start) for start in range(0, len(rows), _BAND * _AT_ONCE)]
        packed = [pool.submit(_packed, filtered, number, number == count - 1) for number in range(count)]
        check = 1
        for bands in filtered:
            for band in bands.result():
                check = zlib.adler32(band, check)
    head = struct.pack(">IIBBBBB", *picture.size, 8, colour, 0, 0, 0)
    data = b"".join((b"\x78\x5e", *(each.result() for each in packed), struct.pack(">I", check)))
    return _SIGNATURE + b"".join(_chunk(*each) for each in ((b"IHDR", head), *chunks, (b"IDAT", data), (b"IEND", b"")))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))


def _filtered(rows: Any, channels: int, start: int) -> list[bytes]:
    """Bands, each row as the differences that are smallest in sum, behind the number of their filter."""
    import numpy as np

    now = rows[start : start + _BAND * _AT_ONCE]
    above, left, corner = np.zeros_like(now), np.zeros_like(now), np.zeros_like(now)
    first = 1 if start == 0 else 0
    above[first:] = rows[start - 1 + first : start - 1 + len(now)]
    left[:, channels:], corner[:, channels:] = now[:, :-channels], above[:, :-channels]
    mean = (left & above) + ((left ^ above) >> 1)
    ways = np.empty((5, *now.shape), np.uint8)
    ways[0] = now
    for way, foreseen in enumerate((left, above, mean, _paeth(left, above, corner)), 1):
        np.subtract(now, foreseen, out=ways[way])
    sizes = np.abs(ways.view(np.int8)).view(np.uint8)  # 128 for -128, too
    best = np.argmin(sizes.sum(2, dtype=np.uint32), 0)
    chosen = np.empty((len(now), 1 + now.shape[1]), np.uint8)
    chosen[:, 0], chosen[:, 1:] = best, ways[best, np.arange(len(now))]
    return [chosen[first : first + _BAND].tobytes() for first in range(0, len(chosen), _BAND)]


def _paeth(left: Any, above: Any, corner: Any) -> Any:
    """Of three neighbours the one that is nearest to the sum of the first two less the third.

    In bytes throughout: a third that is not between the others counts as the nearer of them, which leaves the other one
    nearest to the sum, as it is.
    """
    import numpy as np

    low, high = np.minimum(left, above), np.maximum(left, above)
    between = np.minimum(np.maximum(corner, low), high)
    to_low, to_high = high - between, between - low
    nearer = np.minimum(to_low, to_high)
    to_corner = np.maximum(to_low, to_high) - nearer
    return _chosen(to_corner < nearer, corner, _chosen(to_low < to_high, low, high))


def _chosen(first: Any, one: Any, other: Any) -> Any:
    """``numpy.where`` for bytes, in a twentieth of its time where nobody can foresee the choice."""
    return other ^ ((one ^ other) & -first.view("u1"))


def _packed(filtered: Sequence[Future[list[bytes]]], number: int, last: bool) -> bytes:
    """A band of those that are filtered, or will be: by its runs, or by all that repeats itself where that is less."""
    band, end = _band(filtered, number), zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    runs = packer.compress(band) + packer.flush(end)
    if len(runs) > _FLAT * len(band):
        return runs
    before = _band(filtered, number - 1) if number else b""
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, -15, 9, zlib.Z_FILTERED, zdict=before[-_WINDOW:])
    return min(runs, packer.compress(band) + packer.flush(end), key=len)


def _band(filtered: Sequence[Future[list[bytes]]], number: int) -> bytes:
    return filtered[number // _AT_ONCE].result()[number % _AT_ONCE]
