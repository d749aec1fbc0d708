"""Pixels, files and their text; saving on disks that are full, forbidden or not there."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import resource
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightweight_engine.core import images
from lightweight_engine.core.images import (
    check_folder,
    encode,
    open_image,
    read_infotext,
    read_sidecar,
    save,
    sidecar_path,
    to_images,
    to_uint8,
)
from lightweight_engine.errors import OutputError, RequestError

TEXT = "a cat, hat: réd 日本\nNegative prompt: bad\nSteps: 20, Sampler: Euler"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


# --- pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda values: values, lambda values: values.numpy()])
def test_levels_are_cut_off_not_rounded(make: object) -> None:
    values = torch.tensor([0.0, 1 / 255 - 1e-6, 0.5, 0.999, 1.0, -3.0, 7.0, float("nan"), float("inf"), -float("inf")])
    pixels = values.view(1, 1, 1, -1).expand(2, 3, 4, -1)
    levels = to_uint8(make(pixels))  # type: ignore[operator]
    assert levels.shape == (2, 4, 10, 3)
    assert levels.dtype == np.uint8
    assert levels[1, 2, :, 1].tolist() == [0, 0, 127, 254, 255, 0, 255, 0, 255, 0]


def test_low_precision_pixels_are_widened_first() -> None:
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert np.array_equal(to_uint8(pixels), to_uint8(pixels.float()))
    assert to_images(pixels)[0].size == (8, 8)


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    "text", [TEXT, "plain", "café, latin", "日本語", "🐈" * 5, "nul \0 inside", "\n lines \n", "", "x" * 30000]
)
def test_text_comes_back(kind: str, text: str) -> None:
    encoded = encode(PICTURE, kind, text)
    assert encoded.warnings == ()
    assert (read_infotext(encoded.data) or "") == text
    assert open_image(encoded.data).mode == "RGB"


def test_half_characters_become_question_marks() -> None:
    for kind in ("png", "jpg", "webp"):
        assert read_infotext(encode(PICTURE, kind, "a\ud800b").data) == "a?b"


def test_without_text_there_is_none() -> None:
    for kind in ("png", "jpg", "webp"):
        assert read_infotext(encode(PICTURE, kind).data) is None


@pytest.mark.parametrize("text", ["long, " * 12000, "日本" * 40000, "x" * 32756])
def test_a_text_too_long_for_exif_is_kept_with_a_warning(text: str) -> None:
    encoded = encode(PICTURE, "jpg", text)
    assert len(encoded.warnings) == 1
    assert "png or webp" in encoded.warnings[0]
    assert read_infotext(encoded.data) == text
    webp = encode(PICTURE, "webp", text)
    assert webp.warnings == ()
    assert read_infotext(webp.data) == text


def test_other_programs_comments_are_not_text() -> None:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "JPEG", comment="CREATOR: something")
    assert read_infotext(buffer.getvalue()) is None
    buffer = io.BytesIO()
    PICTURE.convert("P").save(buffer, "GIF", comment=TEXT.encode())
    assert read_infotext(buffer.getvalue()) == TEXT


@pytest.mark.parametrize(
    "comment", [b"UNICODE\0" + TEXT.encode("utf-16-le"), b"ASCII\0\0\0" + TEXT.encode(), b"\0" * 8 + TEXT.encode()]
)
def test_other_programs_user_comments(comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    buffer = io.BytesIO()
    PICTURE.save(buffer, "JPEG", exif=exif)
    assert read_infotext(buffer.getvalue()) == TEXT


def test_damaged_exif_is_no_text() -> None:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_infotext(buffer.getvalue()) is None


# --- the hidden copy (differences, row 16) ------------------------------------------------------------------------


def test_pngs_have_no_alpha_unless_asked() -> None:
    assert open_image(encode(PICTURE, "png", TEXT).data).mode == "RGB"
    hidden = open_image(encode(PICTURE, "png", TEXT, stealth=True).data)
    assert hidden.mode == "RGBA"
    assert np.array_equal(np.asarray(hidden)[..., :3], np.asarray(PICTURE))
    hidden.info.clear()
    assert read_infotext(hidden) == TEXT


def test_hidden_text_that_does_not_fit_is_said() -> None:
    encoded = encode(PICTURE.crop((0, 0, 8, 8)), "png", TEXT, stealth=True)
    assert "too small" in encoded.warnings[0]
    assert read_infotext(encoded.data) == TEXT


@pytest.mark.parametrize(
    "packed",
    [b"not gzip", gzip.compress(b"\xff\xfe"), gzip.compress(b"x" * 100)[:-9], b""],
    ids=["another format", "no text", "cut off", "empty"],
)
def test_damaged_hidden_text_does_no_harm(packed: bytes) -> None:
    content = b"stealth_pngcomp" + struct.pack(">I", len(packed) * 8) + packed
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    alpha = np.full(64 * 48, 255, np.uint8)
    alpha[: bits.size] = 254 | bits
    picture = PICTURE.convert("RGBA")
    picture.putalpha(Image.fromarray(np.ascontiguousarray(alpha.reshape(64, 48).T)))
    assert read_infotext(picture) in (None, "x" * 100)


# --- bad input ----------------------------------------------------------------------------------------------------


def _png(size: tuple[int, int]) -> bytes:
    """A png that claims a size, with next to no data."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(1000)))
    packed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a picture"),
        (encode(PICTURE, "png", TEXT).data[:3000], "damaged"),
        (encode(PICTURE, "jpg", TEXT).data[:1500], "damaged"),
        (encode(PICTURE, "webp", TEXT).data[:900], "damaged"),
        (_png((60000, 60000)), "pixels"),
        (_png((9500, 9500)), "pixels"),
    ],
)
def test_bad_pictures_are_refused(data: bytes, what: str, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(RequestError, match=what) as caught:
        open_image(data, field="init_image")
    assert caught.value.field == "init_image"
    assert [str(warning.message) for warning in recwarn.list] == []


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "absent.png", "no such file"), (tmp_path, "folder"), ("a\0b", "not a path")):
        with pytest.raises(RequestError, match=what):
            open_image(path)


def test_bad_formats_and_qualities_are_refused() -> None:
    with pytest.raises(RequestError, match="png, jpg, webp") as caught:
        encode(PICTURE, "tga")
    assert caught.value.field == "output_format"
    with pytest.raises(RequestError, match="quality"):
        encode(PICTURE, "jpg", quality=0)
    with pytest.raises(RequestError, match="16383.*16384x1; choose png") as caught:
        encode(Image.new("L", (16384, 1)), "webp")
    assert caught.value.field == "output_format" and encode(Image.new("L", (16384, 1)), "png").data


def test_quality_matters_and_alpha_is_dropped() -> None:
    assert len(encode(PICTURE, "jpg", quality=100).data) > len(encode(PICTURE, "jpg").data)
    assert open_image(encode(PICTURE.convert("RGBA"), "jpg").data).mode == "RGB"


# --- saving -------------------------------------------------------------------------------------------------------


def test_a_pair_is_saved(tmp_path: Path) -> None:
    data = {"prompt": "日本 \ud800", "seed": 2**63 - 1, "path": Path("x"), "nested": {"a": (1, None)}}
    saved = save(PICTURE, tmp_path / "new" / "folder", "00000-5", infotext=TEXT, sidecar=data)
    assert sorted(path.name for path in saved.path.parent.iterdir()) == ["00000-5.json", "00000-5.png"]
    assert read_infotext(saved.path) == TEXT
    assert saved.sidecar == sidecar_path(saved.path)
    assert read_sidecar(saved.path) == {**data, "path": "x", "nested": {"a": [1, None]}}
    assert "日本" in saved.sidecar.read_text(encoding="utf-8")


def test_a_sidecar_is_made_while_its_picture_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other to have begun; what making the sidecar raises is raised, with nothing written."""
    both, encode = threading.Barrier(2, timeout=20), images.encode

    def encoded(*args: Any, **options: Any) -> images.Encoded:
        both.wait()
        return encode(*args, **options)

    def sidecar() -> dict[str, int]:
        both.wait()
        return {"a": 1}

    monkeypatch.setattr(images, "encode", encoded)
    saved = save(PICTURE, tmp_path, "x", sidecar=sidecar)
    assert read_sidecar(saved.path) == {"a": 1} and open_image(saved.path).size == PICTURE.size
    monkeypatch.setattr(images, "encode", encode)
    with pytest.raises(ZeroDivisionError):
        save(PICTURE, tmp_path / "none", "x", sidecar=lambda: {"a": 1 // 0})
    assert not (tmp_path / "none").exists()


def test_a_disk_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, sync = threading.Barrier(2, timeout=20), os.fsync

    def meet(descriptor: int) -> None:
        both.wait()
        sync(descriptor)

    monkeypatch.setattr(images.os, "fsync", meet)
    assert save(PICTURE, tmp_path, "x", sidecar={"a": 1}).path.exists()


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    saved = save(PICTURE, tmp_path, "x")
    assert stat.S_IMODE(saved.path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        saved = save(Image.new("RGB", (8, 8), colour), tmp_path, "x")
    assert open_image(saved.path).getpixel((0, 0)) == (0, 0, 255)
    assert len(list(tmp_path.iterdir())) == 1


def test_sidecars_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    assert read_sidecar(tmp_path / "x.png") is None
    for content in ("{", "[]", "\x00"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(RequestError, match="x.json"):
            read_sidecar(tmp_path / "x.png")
    save(PICTURE, tmp_path, "x", sidecar={"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_no_half_pair_when_the_second_rename_fails(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    with pytest.raises(OutputError, match="taken by a folder"):
        save(PICTURE, tmp_path, "x", sidecar={"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(images.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(PICTURE, tmp_path, "x", sidecar={"a": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["n" * 300, "a\0b"])
def test_impossible_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError):
        save(PICTURE, tmp_path, name, sidecar={"a": 1})
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    for folder in ("taken", "taken/below"):
        with pytest.raises(OutputError, match="choose another output folder"):
            save(PICTURE, tmp_path / folder, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


SAVE = """
import os
import sys
from PIL import Image
from lightweight_engine.core.images import encode, save
from lightweight_engine.errors import OutputError
picture = Image.effect_noise((512, 512), 100).convert("RGB")
encode(picture, "png", "text")  # loads all modules while they can be read
os.seteuid(int(sys.argv[2]))
try:
    save(picture, sys.argv[1], "x", infotext="text", sidecar={"a": 1})
except OutputError as error:
    sys.exit(f"OutputError {error}")
"""


def _save_elsewhere(folder: Path, *, user: int | None = None, prepare: Callable[[], None] | None = None) -> str:
    """What saving says in a process of its own, as another user where asked; empty where it worked."""
    command = [sys.executable, "-c", SAVE, str(folder), str(os.geteuid() if user is None else user)]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=prepare).stderr.strip()


def test_a_folder_is_checked_without_being_made(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "deeper")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "place")
    for folder in ("taken", "taken/below", "taken/../x", "a" * 300, f"new/{'a' * 300}", "link", "link/below", "\0"):
        with pytest.raises(OutputError, match="cannot write"):
            check_folder(tmp_path / folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "taken"]


def test_a_folder_behind_one_that_is_missing_is_checked_as_it_would_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    for folder in ("new/../out", "new/deep/../../../out", "new/../new/../out/x"):
        check_folder(tmp_path / "here" / folder)
    for folder in ("new/../taken", "taken/../out", "new/deep/../../taken/x"):
        with pytest.raises(OutputError, match="a part of its path is a file"):
            check_folder(tmp_path / "here" / ".." / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc, where nobody can make a folder")
@pytest.mark.parametrize(
    "folder", ["/proc/new", "/proc/new/deeper", "/proc/new/../../tmp/out", "/tmp/new-x/../../proc/new"]
)
def test_a_folder_that_a_file_system_refuses(folder: str) -> None:
    with pytest.raises(OutputError, match=f"cannot write {folder}: no folder can be made there; choose another"):
        check_folder(folder)


def test_a_write_cut_off_by_a_limit(tmp_path: Path) -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    assert _save_elsewhere(tmp_path, prepare=limit).startswith("OutputError cannot write")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        said = _save_elsewhere(disk)
        assert "the disk is full; free some space" in said
        assert not list(disk.iterdir())
        for folder in (disk, disk / "new"):
            with pytest.raises(
                OutputError, match="only 256 KiB are free there; at least 1 MiB is asked for; free some"
            ):
                check_folder(folder)
        assert not list(disk.iterdir())
        (disk / "other").write_bytes(bytes(256 << 10))
        with pytest.raises(OutputError, match="the disk is full; free some space"):
            check_folder(disk)
        (disk / "other").unlink()
        save(PICTURE, disk, "small", sidecar={"a": 1})
        assert len(list(disk.iterdir())) == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_device_as_the_system_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no disk can be mounted: the bytes really go to /dev/full, whose every write fails."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")

    def write(path: Path, data: bytes) -> None:
        path.touch()
        with open("/dev/full", "wb") as file:
            file.write(data)

    monkeypatch.setattr(images, "_write", write)
    with pytest.raises(OutputError, match="the disk is full") as caught:
        save(PICTURE, tmp_path, "x", sidecar={"a": 1})
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_folder_without_permission() -> None:
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        locked = Path(root, "locked")
        locked.mkdir(mode=0o555)
        nobody = None if os.geteuid() else 65534
        assert "no permission to write there; choose another output folder" in _save_elsewhere(locked, user=nobody)
        assert not list(locked.iterdir())
