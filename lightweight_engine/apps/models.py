"""``models ls`` and ``models verify``: which model files there are, and whether one is whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CorruptCheckpointError, EngineError
from .console import Console, human_bytes, table
from .options import Debug, Json, check_models_dir, load_config, takes_settings

if TYPE_CHECKING:
    from ..config import EngineConfig
    from ..core.models import Entry, ModelLibrary
    from ..flux.keymaps import Part

Name = Annotated[str, typer.Argument(metavar="NAME", help="A name that `models ls` shows, or the path of a file.")]

models = typer.Typer(help="List and check model files.", no_args_is_help=True, rich_markup_mode=None)


@models.command("ls")
@takes_settings
def ls(json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """List the model files with what each is, told by its header; * marks those that would be used."""
    with Console(json=json, debug=debug) as console:
        config = load_config(settings)
        library, fallback = _library(config)
        used = _used(library, config)
        rows = [_row(entry, used) for entry in library.ls()]
        if json:
            console.result({"folder": str(config.models_dir), "fallback": fallback, "files": rows})
            return
        if fallback:
            console.say(f"no model file was found in {config.models_dir}; `tiny`, the demonstration model, is used")
        header = ("", "NAME", "IS", "STORED AS", "SIZE", "PROBLEM")
        cells = [
            ("*" if row["used"] else "", row["name"], " + ".join(row["roles"]) or "?", row["storage"] or "?",
             human_bytes(row["bytes"]), row["problem"] or "")
            for row in rows
        ]  # fmt: skip
        for line in table([header, *cells]):
            console.data(line)


@models.command("verify")
@takes_settings
def verify(name: Name, json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """Read a file whole: every tensor has its place and holds finite numbers. Prints its SHA-256."""
    with Console(json=json, debug=debug) as console:
        from ..backend.checkpoint import file_sha256
        from ..core.models import read_entry

        found = _library(load_config(settings))[0].find(name)
        entry = read_entry(found.path, found.name, strict=True)
        console.say(f"reading {entry.path} ({human_bytes(entry.size)}) ...")
        parts = {role: _verify_part(part) for role, part in entry.parts.items()}
        digest = file_sha256(entry.path)
        if json:
            console.result({"name": entry.name, "path": str(entry.path), "parts": parts, "sha256": digest})
            return
        for role, count in parts.items():
            console.data(f"{role}: {count} tensors, all in place and finite")
        console.data(f"sha256: {digest}")


def _library(config: EngineConfig) -> tuple[ModelLibrary, bool]:
    """The files of the models folder, or those of `tiny` where there are none."""
    from ..core.models import TINY, ModelLibrary

    check_models_dir(config)
    library = ModelLibrary([config.models_dir])
    return (library, False) if library.ls() else (ModelLibrary([TINY]), True)


def _used(library: ModelLibrary, config: EngineConfig) -> set[Path]:
    """The files that a job would take; none where a part is missing."""
    try:
        chosen = library.choose(config.checkpoint, t5=config.t5, clip=config.clip, autoencoder=config.vae)
    except EngineError:
        return set()
    return {part.checkpoint.path for part in chosen.parts.values()}


def _row(entry: Entry, used: set[Path]) -> dict[str, Any]:
    storage = {part.storage if part.storage != "plain" else part.dtype for part in entry.parts.values()}
    return {
        "name": entry.name,
        "path": str(entry.path),
        "roles": list(entry.roles),
        "storage": ", ".join(sorted(storage)) or None,
        "bytes": entry.size,
        "used": entry.path in used,
        "problem": entry.problem,
    }


def _verify_part(part: Part) -> int:
    """How many tensors a network took, each finite. Tensors stay views of the mapped file, so memory stays flat."""
    import torch

    from ..backend.checkpoint import DTYPES
    from ..flux.load import Storage, load_part

    dtype = getattr(torch, DTYPES[part.dtype][1])
    network = load_part(part, Storage("file", dtype), device=torch.device("cpu"))
    tensors = network.state_dict()
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            name = part.checkpoint.path.name
            raise CorruptCheckpointError(f"{name}: {key} holds numbers that are not finite; download it again")
    return len(tensors)


def register(app: typer.Typer) -> None:
    app.add_typer(models, name="models")
