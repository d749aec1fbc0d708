"""Where a picture's text lies in its file: written as Forge writes it, so that its readers find it, and found again.

png         tEXt "parameters", or iTXt where the text is not latin-1
jpg, webp   EXIF UserComment: b"UNICODE\\0" and the text in UTF-16, big endian
jpg, long   a JPEG holds 64 KiB of EXIF; a longer text goes, whole, into comment segments
gif         the comment (read only)
stealth     the lowest bit of a png's alpha channel
"""

from __future__ import annotations

import gzip
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

PNG_KEY = "parameters"
JPEG_SEGMENT = 0xFFFF - 2
"""Bytes in one JPEG segment, its own length field taken off."""

_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_UNICODE = b"UNICODE\0"
_COMMENT_MARK = b"parameters\0"
_STEALTH = b"stealth_pngcomp"
_STEALTH_PLAIN = b"stealth_pnginfo"
_MAX_STEALTH_BYTES = 1 << 24


def exif_block(text: str) -> bytes:
    """An EXIF block that holds ``text`` as its UserComment."""
    from PIL import Image

    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + text.encode("utf-16-be")
    return exif.tobytes()


def with_comments(data: bytes, text: str) -> bytes:
    """A JPEG file with ``text`` in as many comment segments as it takes, behind the JFIF header."""
    room = JPEG_SEGMENT - len(_COMMENT_MARK)
    content = text.encode()
    pieces = [_COMMENT_MARK + content[start : start + room] for start in range(0, len(content), room)]
    segments = b"".join(b"\xff\xfe" + struct.pack(">H", len(piece) + 2) + piece for piece in pieces)
    header = 4 + struct.unpack(">H", data[4:6])[0] if data[2:4] == b"\xff\xe0" else 2
    return data[:header] + segments + data[header:]


def hide(picture: Image, text: str) -> tuple[Image, tuple[str, ...]]:
    """``picture`` with ``text`` in the lowest bit of its alpha channel, column by column, alpha being 255 elsewhere."""
    import numpy as np
    from PIL import Image

    packed = gzip.compress(text.encode(), mtime=0)
    content = _STEALTH + struct.pack(">I", len(packed) * 8) + packed
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    if bits.size > picture.width * picture.height:
        return picture, ("the picture is too small to hide its text in; stealth_pnginfo had no effect",)
    alpha = np.full(picture.width * picture.height, 255, np.uint8)
    alpha[: bits.size] = 254 | bits
    hidden = picture.convert("RGBA")
    hidden.putalpha(Image.fromarray(np.ascontiguousarray(alpha.reshape(picture.width, picture.height).T)))
    return hidden, ()


def find_text(picture: Image) -> str | None:
    """The text of a wholly read picture, wherever it lies; None where it has none."""
    text = picture.info.get(PNG_KEY)
    if isinstance(text, str):
        return text
    return _read_user_comment(picture) or _read_comments(picture) or _read_hidden(picture)


def _read_user_comment(picture: Image) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            comment = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except Exception:  # noqa: BLE001 - a damaged EXIF block is no text, whatever the parser stumbles over
        return None
    if isinstance(comment, str):
        return comment.strip("\0 ") or None
    if not isinstance(comment, bytes):
        return None
    charset, content = comment[:8], comment[8:]
    if charset != _UNICODE:
        return content.decode("utf-8", "replace").strip("\0 ") or None
    # Some programs write little-endian. Latin letters, which every such text has, show the side of the zero bytes.
    little = content[1::2].count(0) > content[0::2].count(0)
    return content.decode("utf-16-le" if little else "utf-16-be", "replace").removeprefix("\ufeff") or None


def _read_comments(picture: Image) -> str | None:
    """Of a JPEG only comments that we wrote: other programs leave their names there."""
    if picture.format == "GIF":
        comment = picture.info.get("comment", b"")
        return comment.decode("utf-8", "ignore") or None
    pieces = [content for name, content in getattr(picture, "applist", ()) if name == "COM"]
    ours = [piece.removeprefix(_COMMENT_MARK) for piece in pieces if piece.startswith(_COMMENT_MARK)]
    return b"".join(ours).decode("utf-8", "replace") or None


def _read_hidden(picture: Image) -> str | None:
    if picture.mode != "RGBA":
        return None
    import numpy as np

    bits = (np.asarray(picture.getchannel("A")) & 1).T.reshape(-1)
    start = len(_STEALTH) + 4
    head = np.packbits(bits[: start * 8]).tobytes()
    if len(head) < start or not head.startswith((_STEALTH, _STEALTH_PLAIN)):
        return None
    length = struct.unpack(">I", head[-4:])[0]
    content = np.packbits(bits[start * 8 : start * 8 + length]).tobytes()
    try:
        if head.startswith(_STEALTH):
            content = zlib.decompressobj(wbits=31).decompress(content, _MAX_STEALTH_BYTES)
        return content.decode() or None
    except (zlib.error, UnicodeDecodeError):
        return None
