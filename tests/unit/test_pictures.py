"""Pictures that requests bring: every way to give one, every mode, and all that is refused."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import serving
from PIL import Image, features

from lightweight_engine.config import EngineConfig
from lightweight_engine.core.colours import match_colours
from lightweight_engine.core.pictures import OwnPictures, PictureReader, flattened
from lightweight_engine.errors import (
    BlockedURLError,
    DownloadError,
    DownloadTooLargeError,
    InvalidURLError,
    PictureTooLargeError,
    RequestError,
)

READER = PictureReader()


def sample(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    """A gradient, different in every corner."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    pixels = np.stack([x * 6, y * 10, x + y], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- ways to give one ---------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[bytes, Path], Any]] = {
    "bytes": lambda data, path: data,
    "bytearray": lambda data, path: bytearray(data),
    "path": lambda data, path: path,
    "path as text": lambda data, path: str(path),
    "base64": lambda data, path: text(data),
    "base64 in lines": lambda data, path: base64.encodebytes(data).decode(),
    "base64 without padding": lambda data, path: text(data).rstrip("="),
    "data URL": lambda data, path: f"data:image/png;base64,{text(data)}",
    "data URL of another type": lambda data, path: f"data:image/jpeg;base64,{text(data)}",
    "data URL without a type": lambda data, path: f"data:;base64,{text(data)}",
    "PIL": lambda data, path: Image.open(io.BytesIO(data)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_gives_the_same(tmp_path: Path, way: Callable[[bytes, Path], Any]) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(encoded(sample()))
    made = READER.read(way(path.read_bytes(), path))
    assert np.array_equal(np.array(made), np.array(sample()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_formats(kind: str) -> None:
    assert READER.read(encoded(sample(), kind)).size == (40, 24)


@pytest.mark.parametrize(
    ("kind", "mode"), [("GIF", "P"), ("BMP", "RGB"), ("BMP", "1"), ("TIFF", "RGB"), ("TIFF", "I;16B"), ("AVIF", "RGB")]
)
def test_other_formats_are_told_by_name(tmp_path: Path, kind: str, mode: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow writes none")
    made = Image.new(mode, (40, 24)) if mode == "I;16B" else sample(mode)
    path = tmp_path / "a.png"  # its name says nothing
    path.write_bytes(encoded(made, kind))
    told = rf"image: {path} is a picture in the format {kind}, and only png, jpg and webp are read; convert it to png"
    for ask in (READER.read, READER.check):
        with pytest.raises(RequestError, match=told):
            ask(str(path))


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \x0d\x0a\x87\x0a", "JPEG XL"),
    ],
)
def test_formats_that_nothing_here_writes_are_told_too(head: bytes, kind: str) -> None:
    with pytest.raises(RequestError, match=f"the data given is a picture in the format {kind}, "):
        READER.read(head + bytes(80))


@pytest.mark.parametrize("data", [b"BM and so on", b"II", b"", b"\0\0\0\x18ftypmp42\0\0\0\0isom"])
def test_what_only_begins_like_one_is_no_picture(data: bytes) -> None:
    with pytest.raises(RequestError, match="is not a picture|is empty"):
        READER.read(data)


def test_a_url_is_fetched_behind_the_guards() -> None:
    with serving() as site:
        site.files["a.png"] = encoded(sample())
        site.files["page.html"] = b"<html>secret</html>"
        allowed = PictureReader.of(EngineConfig(allow_hosts=(site.name,)))
        assert allowed.read(site.url("a.png")).size == (40, 24)
        with pytest.raises(RequestError, match="not a picture"):
            allowed.read(site.url("page.html"))
        with pytest.raises(DownloadError):
            allowed.read(site.url("none.png"))
        with pytest.raises((BlockedURLError, InvalidURLError)):
            PictureReader.of(EngineConfig()).read(site.url("a.png"))
        offline = PictureReader.of(EngineConfig(allow_hosts=(site.name,), offline=True))
        with pytest.raises(DownloadError, match="offline"):
            offline.read(site.url("a.png"))


def test_a_long_body_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightweight_engine.core.pictures.MAX_BYTES", 1000)
    with serving() as site:
        site.files["a.png"] = bytes(5000)
        with pytest.raises(DownloadTooLargeError):
            PictureReader.of(EngineConfig(allow_hosts=(site.name,))).read(site.url("a.png"))


# --- modes --------------------------------------------------------------------------------------------------------


def sixteen_bits() -> bytes:
    levels = (np.arange(40 * 24).reshape(24, 40) * 68).astype(np.uint16)
    return encoded(Image.fromarray(levels))


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (encoded(sample("L")), "L"),
        (encoded(sample("1")), "L"),
        (encoded(sample("P")), "RGB"),
        (encoded(sample("RGBA")), "RGBA"),
        (encoded(sample("LA")), "RGBA"),
        (encoded(sample("CMYK"), "JPEG"), "RGB"),
        (encoded(sample("RGB"), "PNG", transparency=(0, 0, 0)), "RGBA"),
        (sixteen_bits(), "L"),
    ],
    ids=["grey", "bilevel", "palette", "alpha", "grey alpha", "cmyk", "transparent colour", "16 bits"],
)
def test_modes(data: bytes, mode: str) -> None:
    made = READER.read(data)
    assert made.mode == mode and made.size == (40, 24)
    assert flattened(made).mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_picture_that_is_given_is_never_worked_on_itself(mode: str) -> None:
    given = sample(mode)
    made, before = READER.read(given), given.tobytes()
    assert made is not given and made.tobytes() == before
    made.paste(0, (0, 0, 20, 20))
    assert given.tobytes() == before != made.tobytes()
    assert (flattened(made) is made) == (mode == "RGB")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_pictures_of_the_engine_itself_are_not_copied(mode: str) -> None:
    given = sample(mode)
    assert (OwnPictures().read(given) is given) == (mode != "RGBA")
    assert OwnPictures().read(given).tobytes() == given.tobytes()


def test_16_bits_are_scaled_and_not_cut() -> None:
    made = np.array(READER.read(sixteen_bits())).ravel()
    assert made[-1] == round(959 * 68 / 257) and len(np.unique(made)) > 200


def test_transparent_parts_show_the_background() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert flattened(image).getpixel((0, 0)) == (255, 255, 255)
    assert flattened(image, "#102030").getpixel((0, 0)) == (16, 32, 48)


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (39, 23)), (6, (0, 23)), (8, (39, 0))])
def test_pictures_are_turned_upright(orientation: int, corner: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    made = READER.read(encoded(sample(), exif=exif))
    assert made.getpixel((0, 0)) == sample().getpixel(corner)


def test_damaged_exif_does_no_harm() -> None:
    data = encoded(sample(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert READER.read(data).size == (40, 24)


# --- what is refused ----------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """The header of a picture that has none of its pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    whole = encoded(sample())
    body = b"Comment\0\0" + zlib.compress(bytes(200 << 20), 9)
    bomb = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return whole[:33] + bomb + whole[33:]


def animated(kind: str) -> bytes:
    return encoded(sample(), kind, save_all=True, append_images=[sample("L").convert("RGB")], duration=100)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>' * 3
NOT_PICTURES = {
    "nothing": ("", "no picture"),
    "no base64": ("?" * 80, "there is no such file"),
    "broken base64": ("A" * 65 + "=" * 2, "not valid base64"),
    "text in base64": (text(b"root:x:0:0:" * 20), "not a picture"),
    "svg": (SVG, "not a picture"),
    "pdf": (b"%PDF-1.7" + bytes(100), "not a picture"),
    "gif": (
        encoded(sample("P"), "GIF"),
        "a picture in the format GIF, and only png, jpg and webp are read; convert it",
    ),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0" + bytes(100), "not a picture"),
    "empty": (b"", "is empty"),
    "data URL of text": (f"data:text/plain;base64,{text(b'secret' * 20)}", "not of a picture"),
    "data URL without base64": ("data:image/png,secret", "not of a picture"),
    "file address": ("file:///etc/passwd", "not read from file"),
    "ftp address": ("ftp://example.com/a.png", "not read from ftp"),
    "animated png": (animated("PNG"), "animated"),
    "animated webp": (animated("WEBP"), "animated"),
    "truncated jpeg": (encoded(sample(size=(400, 240)), "JPEG")[:3000], "damaged"),
    "truncated png": (encoded(sample(size=(400, 240)))[:300], "damaged"),
    "text bomb": (text_bomb(), "damaged"),
    "number": (5, "int is no picture"),
    "device": ("/dev/zero", "no file of at most"),
    "folder": ("/", "it is a folder"),
    "NUL": ("a\0b", "not a path"),
}


@pytest.mark.parametrize(("given", "said"), NOT_PICTURES.values(), ids=NOT_PICTURES)
def test_what_is_no_picture_is_refused_by_name(given: Any, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        READER.read(given, "mask")
    message = str(caught.value)
    assert said in message and caught.value.field == "mask" and message.startswith("mask: ")
    assert "secret" not in message and "root:" not in message and len(message) < 400


@pytest.mark.parametrize("size", [(30_000, 30_000), (8000, 5001), (2**30, 2)])
def test_size_is_checked_before_decoding(size: tuple[int, int]) -> None:
    limit = r"^image: .* has more than 40,000,000 pixels \(setting max_picture_megapixels\)"
    with pytest.raises(PictureTooLargeError, match=limit) as caught:
        READER.read(png_of(*size))
    assert caught.value.http_status == 413


def test_a_picture_in_memory_has_the_same_limit() -> None:
    with pytest.raises(PictureTooLargeError):
        PictureReader(max_pixels=100).read(Image.new("L", (11, 10)))


@pytest.mark.parametrize(("field", "size"), [("image", (0, 0)), ("mask", (0, 5)), ("images", (5, 0))])
def test_a_picture_without_pixels_is_refused(field: str, size: tuple[int, int]) -> None:
    told = f"^{field}: a picture of {size[0]}x{size[1]} has no pixels; give one that has some$"
    with pytest.raises(RequestError, match=told) as caught:
        READER.read(Image.new("RGB", size), field)
    assert caught.value.field == field


def test_a_service_reads_no_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(sample()))
    reader = PictureReader(paths=False)
    for given in (str(path), path, "/etc/passwd"):
        with pytest.raises(RequestError):
            reader.read(given)
    with pytest.raises(BlockedURLError, match="not fetched here"):
        reader.read("https://example.com/a.png")
    assert reader.read(text(path.read_bytes())).size == (40, 24)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="no file"):
        READER.read(tmp_path / "pipe")


# --- colours ------------------------------------------------------------------------------------------------------


def test_colours_are_taken_and_light_is_kept() -> None:
    grey = sample("L").convert("RGB")
    red = Image.merge("RGB", [sample("L"), Image.new("L", (40, 24), 20), Image.new("L", (40, 24), 20)])
    made = np.array(match_colours(grey, red)).astype(float)
    light = np.array([0.3, 0.59, 0.11])
    assert made[..., 0].mean() > made[..., 1].mean() + 20
    assert np.abs(made @ light - np.array(grey) @ light).mean() < 4
    same = np.array(match_colours(grey, grey)).astype(int)
    assert np.abs(same - np.array(grey)).max() <= 3
