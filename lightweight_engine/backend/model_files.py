"""Opening a model, whatever holds it: safetensors, GGUF, a file of torch.save, shards with their index, a folder.

Containers are told apart by their first bytes. What lies in a folder may not lead out of it by a link; a file or folder
that is opened by its own name may be a link, as people do link their models. Loads no torch.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CorruptCheckpointError, EngineError, ModelNotFoundError, UnsupportedCheckpointError
from .checkpoint import Checkpoint, TensorInfo, corrupt, open_checkpoint, unique

INDEX = ".index.json"
CONFIG = "config.json"
MAX_INDEX = 16 << 20
MAX_CONFIG = 1 << 20

# How files begin; everything else is tried as safetensors.
SAFETENSORS = b"\0\0\0\0{"  # from the fifth byte: the high half of the header's length, and its first letter
GGUF = b"GGUF"
ARCHIVE = b"PK\x03\x04"
PICKLE = b"\x80"

# First letters of a text -> what it is and what to do.
TEXTS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"version https://git-lfs",), "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    ((b"<!doctype", b"<html", b"<?xml", b"{"), "a web page or an error message; download it again"),
)

SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")

# Folders of a pipeline, whose names become the prefixes of their tensors.
COMPONENTS = ("transformer", "text_encoder", "text_encoder_2", "vae")


def open_model(path: str | Path) -> Checkpoint:
    """Open a model file, the index of its shards, or a folder that holds one or several components.

    Raises:
        ModelNotFoundError: nothing there, nothing in the folder, or no permission to read it.
        CorruptCheckpointError: empty, truncated, a web page, or a header that does not add up.
        UnsupportedCheckpointError: a container or a type that is not read, one shard alone, a link out of its folder.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.name.endswith(INDEX):
            return _open_shards(path)
        _refuse_lone_shard(path)
        return _open_file(path)
    except FileNotFoundError:
        if path.is_symlink():
            gone = f"{path} is a link to {path.readlink()}, which is not there; mend or remove it"
            raise ModelNotFoundError(gone) from None
        raise ModelNotFoundError(f"{path} does not exist; check the name") from None
    except PermissionError:
        raise ModelNotFoundError(f"{path} may not be read by this user; change its permissions") from None
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error.strerror}; check the disk and the link") from None


def problem_of(path: Path, opened: Callable[[Path], object] = open_model) -> str | None:
    """Why a file cannot be opened; None where its header can be read."""
    try:
        opened(path)
    except EngineError as error:
        return str(error)
    return None


def _open_file(path: Path) -> Checkpoint:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ModelNotFoundError(f"{path} is no file; name a model file")
    if status.st_size == 0:
        raise CorruptCheckpointError(f"{path.name} is empty; download it again")
    with path.open("rb") as file:
        start = file.read(64)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginnings, what in TEXTS:
        # A safetensors file may begin with any byte, but has zeros among its first eight.
        if b"\0" not in start and text.startswith(beginnings):
            raise CorruptCheckpointError(f"{path.name} is not a model: it is {what} ({status.st_size:,} bytes)")
    return _reader_of(start)(path)


def _reader_of(start: bytes) -> Callable[[Path], Checkpoint]:
    """What opens a file that begins so. Readers of what is no safetensors are imported with the first such file: a
    start waits for these imports, and seldom needs one."""
    if start[4:9] == SAFETENSORS:  # the low half of the length may look like any other beginning
        return open_checkpoint
    if start.startswith(GGUF):
        from .gguf_file import open_gguf

        return open_gguf
    if start.startswith(ARCHIVE):
        from .pickles import open_pickle

        return open_pickle
    if start.startswith(PICKLE):
        from .legacy_pickles import open_legacy_pickle

        return open_legacy_pickle
    return open_checkpoint


def _refuse_lone_shard(path: Path) -> None:
    shard = SHARD.match(path.name)
    if shard is None or int(shard["count"]) < 2:
        return
    index = path.with_name(f"{shard['stem']}{shard['suffix']}{INDEX}")
    where = f"open {index.name} or its folder" if index.exists() else f"put it beside the others and their {index.name}"
    raise UnsupportedCheckpointError(
        f"{path.name} is piece {int(shard['number'])} of {int(shard['count'])} of a model; {where}"
    )


def _open_folder(folder: Path) -> Checkpoint:
    """A folder with one model, or that of a diffusers pipeline."""
    components = [folder / name for name in COMPONENTS if (folder / name).is_dir()]
    if not components or not ((folder / "model_index.json").exists() or (folder / "transformer").is_dir()):
        return _open_component(folder, folder)
    opened = {component.name: _open_component(component, folder) for component in components}
    return _join(folder, {f"{name}.": checkpoint for name, checkpoint in opened.items()})


def _open_component(folder: Path, home: Path) -> Checkpoint:
    """The one model of a folder, with its ``config.json`` as metadata of that name."""
    names = sorted(entry.name for entry in folder.iterdir())
    if {"transformer_blocks.safetensors", "unquantized_layers.safetensors"} <= set(names):
        raise UnsupportedCheckpointError(
            f"{folder} is an SVDQuant/nunchaku checkpoint (W4A4 kernel format); "
            "use the bf16, fp8, nf4 or GGUF file of the same model"
        )
    main = _main_file([name for name in names if name.endswith(INDEX)], folder)
    if main is None:
        suffixes = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
        found = ([n for n in names if n.endswith(suffix) and not SHARD.match(n)] for suffix in suffixes)
        main = _main_file(next(filter(None, found), []), folder)
    if main is None:
        raise ModelNotFoundError(f"{folder} is a folder and holds no model; name a model file")
    path = _inside(folder / main, home)
    checkpoint = _open_shards(path, home) if main.endswith(INDEX) else _open_file(path)
    metadata = dict(checkpoint.metadata)
    if CONFIG in names:
        metadata[CONFIG] = json.dumps(_read_json(_inside(folder / CONFIG, home), MAX_CONFIG))
    return replace(checkpoint, path=folder, files=checkpoint.all_files, metadata=metadata, container="folder")


def _main_file(names: list[str], folder: Path) -> str | None:
    """The file to take: the only one, or the only one without a variant in its name (``model.fp16.safetensors``)."""
    plain = [name for name in names if name.removesuffix(INDEX).count(".") == 1]
    chosen = plain if len(names) > 1 and plain else names
    if len(chosen) > 1:
        raise UnsupportedCheckpointError(f"{folder} holds several models ({', '.join(chosen[:4])}); name one of them")
    return chosen[0] if chosen else None


def _open_shards(index: Path, home: Path | None = None) -> Checkpoint:
    """The shards that an index lists, as one model. Every tensor lies where the index says, and nowhere else."""
    rows = _read_json(index, MAX_INDEX)
    places = rows.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise corrupt(index, "it has no weight_map")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    names = sorted(set(places.values()))
    for number, name in enumerate(names):
        if name != os.path.basename(name) or "\\" in name or name in ("", ".", ".."):
            raise UnsupportedCheckpointError(f"{index.name} names {name!r}, which is no file beside it; correct it")
        if not (index.parent / name).exists():
            raise ModelNotFoundError(f"{index.name} names {name}, which is not beside it; download that file too")
        shard = _open_file(_inside(index.parent / name, home or index.parent))
        for key, info in shard.tensors.items():
            if key in tensors:
                raise corrupt(index, f"the tensor {key!r} is in two of its files")
            if places.get(key, name) != name:
                raise corrupt(index, f"the tensor {key!r} is in {name} and not in {places[key]}")
            tensors[key] = replace(info, file=number)
        metadata |= shard.metadata
    missing = [key for key in places if key not in tensors]
    if missing:
        raise corrupt(index, f"{len(missing)} tensors are in none of its files ({', '.join(missing[:3])})")
    files = tuple(index.parent / name for name in names)
    return Checkpoint(index, tensors, metadata, files, container="folder")


def _join(folder: Path, parts: Mapping[str, Checkpoint]) -> Checkpoint:
    """Several models as one, the tensors and metadata of each under its prefix."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    files: tuple[Path, ...] = ()
    for prefix, part in parts.items():
        tensors |= {prefix + key: replace(info, file=info.file + len(files)) for key, info in part.tensors.items()}
        metadata |= {prefix + key: value for key, value in part.metadata.items()}
        files += part.files
    return Checkpoint(folder, tensors, metadata, files, container="folder")


def _inside(path: Path, home: Path) -> Path:
    """The path, if it lies below ``home`` once links are followed.

    A snapshot of the Hugging Face cache consists of links to the ``blobs`` beside it, so there its repository is home.
    """
    root = Path(os.path.realpath(home))
    for parent in (root, *root.parents):
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            root = parent.parent
            break
    if root not in Path(os.path.realpath(path)).parents:
        raise UnsupportedCheckpointError(
            f"{path} is a link that leads out of its folder; put the file itself there, or open that one"
        )
    return path


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    try:
        if path.stat().st_size > limit:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        rows = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
        if not isinstance(rows, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"it is damaged ({error})") from None
    return rows
