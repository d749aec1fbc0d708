"""Whole saved files: what the reference wrote is read back, and what we write carries the same text in the same place.

File bytes differ between encoder versions; the text, its place, the mode, the size and the pixels of a png do not.
"""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from goldens import Case
from PIL import Image

from lightweight_engine.core.images import FORMATS, encode, open_image, read_infotext

USER_COMMENT = 0x9286
MARK = b"UNICODE\0"


def check(case: Case) -> None:
    if case["kind"] == "file":
        _file(case)
        return
    stored = [data for value in case.data.values() if (data := _stored(value))]
    if "text" not in case.data or not stored:
        pytest.skip(f"a row of kind {case['kind']!r} with no text and UserComment in its fields {sorted(case.data)}")
    for data in stored:
        assert _user_comment(open_image(encode(_picture(), "jpg", case["text"]).data)) == data


def _stored(value: object) -> bytes | None:
    """The UserComment in a field of hexadecimal or base64 digits, alone or at the end of an EXIF block."""
    if not isinstance(value, str):
        return None
    for read in (bytes.fromhex, lambda text: base64.b64decode(text, validate=True)):
        try:
            data = read(value)
        except ValueError:
            continue
        if MARK in data:
            return data[data.index(MARK) :]
    return None


def _file(case: Case) -> None:
    data = base64.b64decode(case["b64"])
    theirs = open_image(data)
    assert read_infotext(data) == case["read_back"]
    if case["ext"] not in FORMATS:
        return  # a format that is read but not written
    stealth = case["ext"] == "png" and case.get("stealth") == "Alpha"
    encoded = encode(theirs.convert("RGB"), case["ext"], case["text"], stealth=stealth)
    ours = open_image(encoded.data)
    assert encoded.warnings == ()
    assert read_infotext(encoded.data) == case["read_back"]
    assert (ours.mode, list(ours.size)) == (case["mode_on_disk"], case["size"])
    assert _text_chunks(encoded.data) == case["png_chunks"]
    if case["ext"] == "png":
        assert np.array_equal(np.asarray(ours)[..., :3], np.asarray(theirs)[..., :3])
        if stealth:
            for file in (theirs, ours):
                del file.info["parameters"]
                assert read_infotext(file) == case["text"]
    else:
        assert _user_comment(ours) == _user_comment(theirs)


def _picture() -> Image.Image:
    return Image.new("RGB", (64, 48), (1, 2, 3))


def _user_comment(image: Image.Image) -> bytes:
    return image.getexif().get_ifd(0x8769)[USER_COMMENT]


def _text_chunks(data: bytes) -> list[str]:
    """The names of a png's text chunks, in order; none for other files."""
    found, stream = [], io.BytesIO(data)
    if stream.read(8) != b"\x89PNG\r\n\x1a\n":
        return found
    while head := stream.read(8):
        name = head[4:].decode("ascii")
        stream.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
        if name in ("tEXt", "iTXt", "zTXt"):
            found.append(name)
    return found
