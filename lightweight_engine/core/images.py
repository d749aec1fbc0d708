"""Pictures in and out: pixels to bytes with their text and back, and saving that leaves nothing half done.

numpy and Pillow are imported where they are used, torch never: ``info`` on the command line stays fast.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, PictureTooLargeError, RequestError
from .image_text import JPEG_SEGMENT, PNG_KEY, exif_block, find_text, hide, with_comments
from .png import LEVEL, can_write, png

if TYPE_CHECKING:
    from PIL.Image import Image

Source = str | os.PathLike[str] | bytes
"""A picture's file, or its bytes."""

DEFAULT_QUALITY = 80
"""Of jpg and webp, as the reference saves them; the Cog service uses 100."""
MAX_INPUT_PIXELS = 8192 * 8192
MAX_PIXELS_SETTING = "setting max_picture_megapixels"  # holds any other limit
FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}

_MAX_SIDE = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}
_READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
PREVIEW_QUALITY = 75
SMALL_PICTURE = 1 << 20  # bytes that a folder must have room for before a job begins


# --- pixels -------------------------------------------------------------------------------------------------------


def to_uint8(pixels: Any) -> Any:
    """Pixels [B, 3, H, W] in 0..1 (tensor or array) as a uint8 array [B, H, W, 3].

    Outside values are clamped, NaN is 0, and 255 * x is cut off, not rounded: rounding would change every second byte
    of the reference's pictures.
    """
    import numpy as np

    if hasattr(pixels, "detach"):
        return quantised(pixels).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    levels = np.nan_to_num(np.asarray(pixels, dtype=np.float32), nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1) * 255
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(0, 2, 3, 1))


def quantised(pixels: Any) -> Any:
    """A tensor of pixels [B, 3, H, W] as levels of the same shape on its device, as ``to_uint8`` has them."""
    return pixels.detach().float().nan_to_num(nan=0.0, posinf=1.0, neginf=0.0).clamp(0, 1).mul(255).byte()


def to_images(pixels: Any) -> list[Image]:
    """Pixels [B, 3, H, W] in 0..1 as RGB pictures."""
    from PIL import Image

    return [Image.fromarray(array) for array in to_uint8(pixels)]


# --- writing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A picture's file as bytes, and what a person should know of it."""

    data: bytes
    warnings: tuple[str, ...] = ()


def encode(
    image: Any,
    format: str = "png",
    infotext: str | None = None,
    quality: int = DEFAULT_QUALITY,
    *,
    stealth: bool = False,
) -> Encoded:
    """``image`` (a PIL image or a uint8 array [H, W, 3]) as a png, jpg or webp file with its text.

    ``quality``, 1 to 100, is for jpg and webp. Raises RequestError for an unknown format or quality, and for a picture
    that the format cannot hold.
    """
    kind = _kind_of(format)
    if not 1 <= quality <= 100:
        raise RequestError(f"quality must be 1 to 100, not {quality}", field="quality")
    picture = _as_picture(image)
    check_size(picture.size, format)
    text = None if infotext is None else infotext.encode("utf-8", "replace").decode()
    if kind == "PNG":
        return _encode_png(picture, text, stealth)
    return _encode_jpeg(picture, text, quality) if kind == "JPEG" else _encode_webp(picture, text, quality)


def check_size(size: tuple[int, int], format: str) -> None:
    """Refuse a (width, height) that files of a format cannot hold. Raises RequestError, naming ``output_format``."""
    limit = _MAX_SIDE[_kind_of(format)]
    if max(size) > limit:
        raise RequestError(
            f"output_format: a {format} file holds at most {limit} pixels a side, the picture has {size[0]}x{size[1]}; "
            "choose png",
            field="output_format",
        )


def _kind_of(format: str) -> str:
    kind = FORMATS.get(format.lower())
    if kind is None:
        raise RequestError(f"unknown output format {format!r:.40}; choose one of png, jpg, webp", field="output_format")
    return kind


def _as_picture(image: Any) -> Image:
    from PIL import Image

    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def _encode_png(picture: Image, text: str | None, stealth: bool) -> Encoded:
    from PIL.PngImagePlugin import PngInfo

    info, said = PngInfo(), ()
    if text is not None:
        info.add_text(PNG_KEY, text)
        if stealth:
            picture, said = hide(picture, text)
    if can_write(picture):
        return Encoded(png(picture, [(name, data) for name, data, *_ in info.chunks]), said)
    return Encoded(_saved(picture, "PNG", pnginfo=info, compress_level=LEVEL), said)


def _encode_jpeg(picture: Image, text: str | None, quality: int) -> Encoded:
    options: dict[str, Any] = {"quality": quality}
    exif = exif_block(text) if text is not None else b""
    fits = len(exif) <= JPEG_SEGMENT
    if exif and fits:
        options["exif"] = exif
    data = _saved(_opaque(picture), "JPEG", **options)
    if text is None or fits:
        return Encoded(data)
    warning = (
        f"the picture's text ({len(text)} characters) is longer than a JPEG's EXIF can hold; it is stored in comment "
        "segments that other programs do not read: choose png or webp to keep it readable for them"
    )
    return Encoded(with_comments(data, text), (warning,))


def _encode_webp(picture: Image, text: str | None, quality: int) -> Encoded:
    options: dict[str, Any] = {"quality": quality, "lossless": False}
    if text is not None:
        options["exif"] = exif_block(text)
    return Encoded(_saved(_opaque(picture), "WEBP", **options))


def _saved(picture: Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _opaque(picture: Image) -> Image:
    return picture if picture.mode in ("RGB", "L") else picture.convert("RGB")


# --- reading ------------------------------------------------------------------------------------------------------


def open_image(
    source: Source,
    *,
    field: str = "image",
    max_pixels: int = MAX_INPUT_PIXELS,
    formats: tuple[str, ...] = _READABLE,
    pixels: bool = True,
) -> Image:
    """The picture of a file or of bytes, wholly read. RequestError, naming ``field``, for anything that is not one.

    Without ``pixels`` only its head is looked at, which is cheap however large it is.
    """
    from PIL import Image, UnidentifiedImageError

    name = "the data given" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        reason = {errno.ENOENT: "there is no such file", errno.EISDIR: "it is a folder"}.get(
            error.errno or 0, error.strerror or str(error)
        )
        raise RequestError(f"cannot read {name}: {reason}; give the path of a picture", field=field) from None
    except ValueError:
        raise RequestError(f"{name!r:.80} is not a path; give the path of a picture", field=field) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is refused below, or does no harm
            picture = Image.open(io.BytesIO(data), formats=formats)
            check_pixels(picture.size, name, field, max_pixels)
            if pixels:
                picture.load()
    except PictureTooLargeError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(name, field, max_pixels) from None
    except UnidentifiedImageError:
        known = ", ".join(kind.lower().replace("jpeg", "jpg") for kind in formats)
        what = "is empty" if not data else f"is not a picture that can be read ({known})"
        raise RequestError(f"{name} {what}; give another file", field=field) from None
    except Exception as error:  # noqa: BLE001 - foreign bytes make decoders raise nearly anything
        raise RequestError(f"{name} is damaged ({error}); give an intact picture", field=field) from None
    return picture


def check_pixels(size: tuple[int, int], name: str, field: str, max_pixels: int) -> None:
    """Refuse a picture of more than ``max_pixels``. Raises PictureTooLargeError."""
    if size[0] * size[1] > max_pixels:
        raise _too_large(name, field, max_pixels)


def _too_large(name: str, field: str, max_pixels: int) -> PictureTooLargeError:
    limit = (
        f"{max_pixels:,} pixels" if max_pixels == MAX_INPUT_PIXELS else f"{max_pixels:,} pixels ({MAX_PIXELS_SETTING})"
    )
    return PictureTooLargeError(f"{name} has more than {limit}; give a smaller picture", field=field)


def read_infotext(source: Source | Image) -> str | None:
    """The text that a picture carries, wherever it lies; None where it has none. Errors as of ``open_image``."""
    picture = open_image(source) if isinstance(source, (str, bytes, os.PathLike)) else source
    return find_text(picture)


# --- saving -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """Where a picture and its sidecar lie, and what a person should know."""

    path: Path
    sidecar: Path | None
    warnings: tuple[str, ...] = ()
    stages: tuple[Path, ...] = ()


def save(
    image: Any,
    folder: str | os.PathLike[str],
    name: str,
    *,
    format: str = "png",
    infotext: str | None = None,
    quality: int = DEFAULT_QUALITY,
    stealth: bool = False,
    sidecar: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
) -> Saved:
    """Write ``FOLDER/NAME.FORMAT``, and ``NAME.json`` beside it where ``sidecar`` is given.

    Both files appear whole or not at all. The folder is made. Raises OutputError, with the one thing to do.

    Args:
        sidecar: what it tells, or what makes that, which runs while the picture is encoded.
    """
    path = Path(folder) / f"{name}.{format.lower()}"
    if sidecar is None:
        encoded = encode(image, format, infotext, quality, stealth=stealth)
        _write_together([(path, encoded.data)])
        return Saved(path, None, encoded.warnings)
    with ThreadPoolExecutor(1) as beside:
        told = beside.submit(lambda: _json(sidecar() if callable(sidecar) else sidecar))
        encoded = encode(image, format, infotext, quality, stealth=stealth)
    _write_together([(sidecar_path(path), told.result()), (path, encoded.data)])
    return Saved(path, sidecar_path(path), encoded.warnings)


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise OutputError where a folder cannot be made or written to; nothing is left there.

    It is tried: permissions alone do not tell what root may do, nor what a file system refuses, nor a full disk.
    """
    try:
        _try_folder(Path(folder).absolute())
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and (room := _little_room(Path(folder))):
            raise OutputError(f"cannot write {folder}: {room}; {_REASONS[errno.ENOSPC][1]}") from error
        raise _output_error(error, Path(folder)) from error


def _little_room(folder: Path) -> str | None:
    """What a disk has left that is not full, and is too full to begin a job; None where it is full, or has more."""
    there = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free >> 10
    if not 0 < free < SMALL_PICTURE >> 10:
        return None
    return f"only {free} KiB are free there; at least {SMALL_PICTURE >> 20} MiB is asked for"


def _try_folder(wanted: Path) -> None:
    """Write a file without a name in a folder. What is missing of it is made in a folder for trial beside its place: a
    job that makes and fills the folder itself meanwhile is not disturbed.

    Raises:
        OSError, ValueError: as of making it.
    """
    there, missing = wanted, []
    while not os.path.lexists(there):
        there, missing = there.parent, [there.name, *missing]
    if not missing:
        _try_file(there)
        return
    back = missing.index("..") if ".." in missing else len(missing)
    with tempfile.TemporaryDirectory(dir=there) as trial:
        made = Path(trial, *missing[:back])
        made.mkdir(parents=True, exist_ok=True)
        _try_file(made)
    if back < len(missing):  # which leads back to what was tried, or to what is there
        _try_folder(there.joinpath(*missing[: back - 1], *missing[back + 1 :]))


def _try_file(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(SMALL_PICTURE))
        file.flush()


def sidecar_path(picture: str | os.PathLike[str]) -> Path:
    """The sidecar of a picture: the same name, ending in .json."""
    return Path(picture).with_suffix(".json")


def read_sidecar(picture: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The sidecar of a picture (or at its own path); None where there is none, RequestError where it is damaged."""
    path = sidecar_path(picture)
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}; make it readable", field="image") from None
    except ValueError as error:
        raise RequestError(
            f"{path} is not valid JSON ({error}); delete it to go by the picture's own text", field="image"
        ) from None
    if not isinstance(data, dict):
        raise RequestError(f"{path} is not a sidecar; delete it to go by the picture's own text", field="image")
    return data


def _json(data: Mapping[str, Any]) -> bytes:
    """Readable JSON; half characters, which UTF-8 cannot hold, become the escapes that JSON has for them."""
    text = json.dumps(data, ensure_ascii=False, indent=2, default=_plain)
    return f"{text}\n".encode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def _write_together(files: Sequence[tuple[Path, bytes]]) -> None:
    """All of the files, or none: written beside their places, forced to disk, then renamed."""
    target = files[-1][0]
    made: list[Path] = []
    try:
        for path, _ in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.append(path.with_name(f".{secrets.token_hex(8)}.tmp"))
        with ThreadPoolExecutor(len(files)) as disks:  # which are waited for once
            list(disks.map(_write, made, [data for _, data in files]))
        for index, (path, _) in enumerate(files):
            os.replace(made[index], path)
            made[index] = path
    except BaseException as error:
        for path in made:
            _remove(path)
        if isinstance(error, (OSError, ValueError)):
            raise _output_error(error, target) from error
        raise


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another output folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another output folder"),
    errno.EFBIG: ("the file is larger than this process may write", "raise the limit (ulimit -f)"),
    errno.EACCES: ("no permission to write there", "choose another output folder or change its permissions"),
    errno.EPERM: ("no permission to write there", "choose another output folder or change its permissions"),
    errno.EROFS: ("the file system is read-only", "choose another output folder"),
    errno.ENOENT: ("no folder can be made there", "choose another output folder"),
    errno.ENOTDIR: ("a part of its path is a file, not a folder", "choose another output folder"),
    errno.EEXIST: ("its folder's name is taken by a file", "choose another output folder"),
    errno.EISDIR: ("its name is taken by a folder", "choose another name"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name pattern"),
}


def _output_error(error: OSError | ValueError, path: Path) -> OutputError:
    number, text = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
    reason, fix = _REASONS.get(number or 0, (text or str(error), "choose another output folder"))
    return OutputError(f"cannot write {path}: {reason}; {fix}")


def preview_jpeg(picture: Image) -> bytes:
    """A preview as a small file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=PREVIEW_QUALITY)
    return buffer.getvalue()
