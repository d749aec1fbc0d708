"""Pictures that requests bring: from a path, a URL, base64, a data URL, bytes, or PIL; upright, in 8 bits.

What a file claims is checked before it is decoded. Text that is no picture is never repeated in a message.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..backend.net import Access, Limits, get
from ..errors import BlockedURLError, DownloadError, RequestError, about
from .image_text import PNG_KEY, find_text
from .images import check_pixels, open_image

if TYPE_CHECKING:
    from ..config import EngineConfig

FORMATS = ("PNG", "JPEG", "WEBP")
# How files begin in formats that people have and nothing reads here: each decoder is one more for strangers' bytes.
OTHER_FORMATS = {
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{4}\0{4}",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "AVIF": rb".{4}ftyp.{0,48}avi[fs]",
    "HEIC": rb".{4}ftyp(?:hei|hev|mif1|msf1)",
    "JPEG XL": rb"\xff\x0a|\0{3}\x0cJXL ",
}
HEAD = 64  # bytes that tell
MAX_BYTES = 64 << 20  # of a picture's file
MAX_PATH = 4096  # characters
WHITE = "#ffffff"

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*):", re.ASCII)
_BASE64 = re.compile(r"^[A-Za-z0-9+/\s]+={0,2}\s*$", re.ASCII)
_LEAST = 64  # characters of base64 that could be a picture

Fetch = Callable[[str], bytes]


@dataclass(frozen=True)
class PictureReader:
    """Reads pictures.

    Args:
        fetch: gets the bytes of a URL; None refuses URLs.
        paths: whether a text may be the path of a file here.
        max_pixels: of one picture.
    """

    fetch: Fetch | None = None
    paths: bool = True
    max_pixels: int = 40_000_000

    @property
    def _how(self) -> str:
        """What would be read, for messages."""
        ways = [*(["a path"] if self.paths else []), *(["an http(s) URL"] if self.fetch else []), "base64"]
        return f"give {', '.join(ways)} or a data URL of a png, jpg or webp picture"

    @classmethod
    def of(cls, config: EngineConfig, *, paths: bool = True) -> PictureReader:
        """As configured."""
        limits = Limits(MAX_BYTES, config.download_timeout, config.download_seconds, config.download_min_speed)
        access = Access(config.allow_hosts)

        def fetch(url: str) -> bytes:
            if config.offline:
                raise DownloadError("a picture is to be fetched, and offline is on; switch it off or give a file")
            return fetch_bytes(url, limits, access)

        return cls(fetch, paths, int(config.max_picture_megapixels * 1e6))

    def read(self, given: Any, field: str = "image") -> Image.Image:
        """A picture as L, RGB or RGBA, with the text that it carried under ``PNG_KEY`` of its ``info``.

        Raises:
            RequestError: it is none, it is damaged, empty, animated or too large; names ``field``.
            DownloadError: its URL may not be asked (BlockedURLError), or does not give it.
        """
        if isinstance(given, Image.Image):
            picture = given
            with _beginning(field):
                check_pixels(picture.size, "the picture given", field, self.max_pixels)
        else:
            picture = self.open(given, field)
        _check_still(picture, field)
        if not all(picture.size):
            size = "x".join(map(str, picture.size))
            raise RequestError(f"{field}: a picture of {size} has no pixels; give one that has some", field=field)
        made, text = plain(upright(picture), field), find_text(picture)
        if text is not None:
            made.info[PNG_KEY] = text
        return made

    def check(self, given: Any, field: str = "image") -> None:
        """Refuse what ``read`` would of a picture that is not on the web, as far as the head of its file tells."""
        with about(field):
            source = self._source(given, field)
        _check_still(self._opened(source, field, pixels=False), field)

    def fetches(self, given: Any) -> bool:
        """Whether a picture is on the web, and would be got from there."""
        return self.fetch is not None and isinstance(given, str) and is_url(given)

    def open(self, given: Any, field: str = "image") -> Image.Image:
        """A picture as its file has it, with what else the file holds in ``info``. Errors as of ``read``."""
        with about(field):
            source = self._source(given, field)
        return self._opened(source, field)

    def _opened(self, source: bytes | Path, field: str, *, pixels: bool = True) -> Image.Image:
        with _beginning(field):
            _refuse_others(source, field)
            return open_image(source, field=field, max_pixels=self.max_pixels, formats=FORMATS, pixels=pixels)

    def _source(self, given: Any, field: str) -> bytes | Path:
        if isinstance(given, (bytes, bytearray, memoryview)):
            return bytes(given)
        if isinstance(given, os.PathLike) and self.paths:
            return _file(Path(given), field)
        if not isinstance(given, str):
            raise RequestError(f"{field}: {type(given).__name__} is no picture; {self._how}", field=field)
        text = given.strip()
        scheme = _SCHEME.match(text)
        if is_url(text):
            if self.fetch is None:
                raise BlockedURLError("URLs are not fetched here; send the picture itself")
            return self.fetch(text)
        if scheme and (scheme[1].lower() == "data" or "://" in text[:16]):
            return _data_url(text, scheme[1].lower(), field, self._how)
        if self.paths and is_path(text):
            return _file(Path(text), field)
        if len(text) >= _LEAST and _BASE64.match(text):
            return _decoded(text, field, self._how)
        if self.paths and 0 < len(text) < MAX_PATH:
            return Path(text)  # which is not there: the reader of files says so
        raise RequestError(f"{field}: the text given is no picture; {self._how}", field=field)


@dataclass(frozen=True)
class OwnPictures(PictureReader):
    """Reads pictures that the engine made for itself: they are plain and upright, and nobody changes them meanwhile."""

    def read(self, given: Any, field: str = "image") -> Image.Image:
        return given if isinstance(given, Image.Image) and given.mode in ("L", "RGB") else super().read(given, field)


@contextmanager
def _beginning(field: str) -> Iterator[None]:
    """Errors of files, which may be anybody's, begin with the field that brought them."""
    try:
        yield
    except RequestError as error:
        error.args = (f"{field}: {error}",)
        raise


def _refuse_others(source: bytes | Path, field: str) -> None:
    """Name the format of a picture that is not read, which is no fault of its file."""
    head = _head(source)
    kind = next((kind for kind, begin in OTHER_FORMATS.items() if re.match(begin, head, re.DOTALL)), None)
    if kind is not None:
        name = source if isinstance(source, Path) else "the data given"
        raise RequestError(
            f"{name} is a picture in the format {kind}, and only png, jpg and webp are read; convert it to png, in a "
            "program that shows it or by ImageMagick's `magick IN OUT.png`",
            field=field,
        )


def _head(source: bytes | Path) -> bytes:
    """The first bytes; none of what cannot be read, which the reader of files tells."""
    if isinstance(source, bytes):
        return source[:HEAD]
    try:
        with source.open("rb") as file:
            return file.read(HEAD)
    except (OSError, ValueError):  # a NUL
        return b""


def fetch_bytes(url: str, limits: Limits, access: Access) -> bytes:
    """The body at a URL, behind the guards of ``backend.net``. Raises DownloadError, by kind of fault."""
    with get(url, limits, access) as response:
        return b"".join(response.chunks())


def is_url(text: str) -> bool:
    """Whether a text is the address of a picture on the web."""
    return text.strip().lower().startswith(("http://", "https://"))


def pictures_in(given: Any) -> list[Any]:
    """The pictures of a field that holds none, one or several."""
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def is_path(given: str | os.PathLike[str]) -> bool:
    """Whether there is a file of that name."""
    try:
        return len(os.fspath(given)) < MAX_PATH and os.path.exists(given)
    except ValueError:  # a NUL
        return False


def _check_still(picture: Image.Image, field: str) -> None:
    """A JPEG of a phone may hold a second picture, for depth; it is the first that people mean."""
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise RequestError(
            f"{field}: the picture is animated ({getattr(picture, 'n_frames', 2)} frames); give a still one",
            field=field,
        )


def _file(path: Path, field: str) -> Path:
    """The path, if it is of a file that could be a picture's; a device might never end."""
    if path.exists() and not path.is_dir() and (not path.is_file() or path.stat().st_size > MAX_BYTES):
        raise RequestError(
            f"{field}: {path} is no file of at most {MAX_BYTES >> 20} MiB; give a picture's file", field=field
        )
    return path


def _data_url(text: str, scheme: str, field: str, how: str) -> bytes:
    header, comma, body = text.partition(",")
    kind, *rest = header[5:].split(";")
    if scheme != "data":
        raise RequestError(f"{field}: pictures are not read from {scheme}: addresses; {how}", field=field)
    if not comma or "base64" not in rest or not (kind.startswith("image/") or kind in ("", "application/octet-stream")):
        raise RequestError(f"{field}: the data URL is not of a picture in base64; {how}", field=field)
    return _decoded(body, field, how)


def _decoded(text: str, field: str, how: str) -> bytes:
    compact = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{field}: the text given is not valid base64; {how}", field=field) from None


def upright(picture: Image.Image) -> Image.Image:
    """A picture turned as its EXIF says; itself where that says nothing, or cannot be read."""
    try:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(picture) if turned else picture
    except Exception:  # noqa: BLE001 - foreign EXIF makes its reader raise nearly anything, and it is no part of the pixels
        return picture


def plain(picture: Image.Image, field: str = "image") -> Image.Image:
    """A new picture as L, RGB or, with transparency, RGBA; 16 bits are brought to 8."""
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.int64)
        return Image.fromarray((levels.clip(0, 65535) / 257).round().astype(np.uint8))
    if picture.mode == "F":
        raise RequestError(f"{field}: the picture has floating-point pixels; save it with 8 or 16 bits", field=field)
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    return picture.convert("L" if picture.mode in ("L", "1") else "RGB")


def flattened(picture: Image.Image, background: str = WHITE) -> Image.Image:
    """A picture as RGB, what is transparent on ``background`` (#rrggbb); itself where it is RGB."""
    if picture.mode == "RGBA":
        canvas = Image.new("RGB", picture.size, background)
        canvas.paste(picture, mask=picture)
        return canvas
    return picture if picture.mode == "RGB" else picture.convert("RGB")
