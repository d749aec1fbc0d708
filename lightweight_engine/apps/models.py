"""``models``: which model files there are, what each is, whether it is whole, and writing one in another format."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, EngineError, ModelError, OutputError, RequestError
from ..labels import storage_name
from .console import Console, human_bytes, table
from .options import Debug, Grouped, Json, check_models_dir, load_config, read_path, takes_settings

if TYPE_CHECKING:
    from ..config import EngineConfig
    from ..core.inspect import FileDescription, PartDescription
    from ..core.models import Entry, ModelLibrary
    from ..flux.keymaps import Part

Name = Annotated[str, typer.Argument(metavar="NAME", help="A name that `models ls` shows, or the path of a file.")]
Target = Annotated[str, typer.Option("--to", metavar="FORMAT", help="nf4, fp4, fp8_e4m3, fp8_e5m2, bf16, fp16, fp32.")]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FILE", help="(default NAME-FORMAT.safetensors, in this folder)"),
]
PartName = Annotated[
    str | None,
    typer.Option("--part", metavar="PART", help="Of a file with several: transformer, t5, clip (default the first)."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Overwrite, and quantise what is quantised already in another format.")
]

LITTLE = 0.01
"""Share of a file's bytes below which a format is not worth a word in a list."""

models = typer.Typer(help="List, check, describe and convert model files.", no_args_is_help=True, rich_markup_mode=None)


@models.command("ls", cls=Grouped)
@takes_settings
def ls(json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """List the model files with what each is, told by its header; * marks those that would be used."""
    with Console(json=json, debug=debug) as console:
        from ..core.folders import stray_models
        from ..core.models import CHOICE, ROLES

        config = load_config(settings)
        library, fallback = _library(config)
        used = _used(library, config)
        rows = [_row(entry, used) for entry in library.ls()]
        if json:
            console.result({"folder": str(config.models_dir), "fallback": fallback, "files": rows})
            return
        if fallback:
            console.say(f"no model file was found in {config.models_dir}; `tiny`, the demonstration model, is used")
        if stray := stray_models(config.models_dir):
            console.warn(stray)
        header = ("", "NAME", "IS", "LAYOUT", "STORED AS", "VARIANT", "SIZE", "PROBLEM")
        cells = [
            ("*" if row["used"] else "", row["name"], " + ".join(row["roles"]) or "?", row["layout"] or "?",
             row["storage"] or "?", row["variant"] or "", human_bytes(row["bytes"]), row["problem"] or "")
            for row in rows
        ]  # fmt: skip
        for line in table([header, *cells]):
            console.data(line)
        if any(sum(role in row["roles"] for row in rows) > 1 for role in ROLES):
            console.say(f"* is used: {CHOICE}, unless set")


@models.command("verify", cls=Grouped)
@takes_settings
def verify(name: Name, json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """Read a model whole: every tensor has its place and holds finite numbers. Prints the SHA-256 of its files."""
    with Console(json=json, debug=debug) as console:
        from ..backend.checkpoint import file_sha256
        from ..core.models import read_entry
        from ..flux.verify import verify_part

        found = _find(name, load_config(settings))
        entry = read_entry(found.path, found.name, strict=True)
        console.say(f"reading {entry.path} ({human_bytes(entry.size)}) ...")
        parts = {role: verify_part(part) for role, part in entry.parts.items()}
        checkpoint = next(iter(entry.parts.values())).checkpoint
        digests = {str(path): file_sha256(path) for path in checkpoint.all_files}
        if json:
            only = next(iter(digests.values())) if len(digests) == 1 else None
            files = [{"path": path, "sha256": digest} for path, digest in digests.items()]
            console.result(
                {"name": entry.name, "path": str(entry.path), "parts": parts, "sha256": only, "files": files}
            )
            return
        for role, count in parts.items():
            console.data(f"{role}: {count} tensors, all in place and finite")
        for path, digest in digests.items():
            console.data(f"sha256: {digest}{f'  {Path(path).name}' if len(digests) > 1 else ''}")


@models.command("inspect", cls=Grouped)
@takes_settings
def inspect(name: Name, json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """Describe a model file from its header: container, parts, layouts, formats, sizes. Code 3 if it is unusable."""
    with Console(json=json, debug=debug) as console:
        from ..core.inspect import describe_file

        # A path first: what lies there is described even where it is no model at all.
        path = Path(name) if Path(name).exists() else _find(name, load_config(settings)).path
        described = describe_file(path)
        if json:
            console.result(described.as_dict())
        else:
            for line in _lines(described):
                console.data(line)
        if described.problem:
            raise typer.Exit(ModelError.exit_code)


def _own_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """Leave out the setting ``output_dir``: here ``-o`` names the file."""
    own = signature(function)
    kept = [parameter for name, parameter in own.parameters.items() if name != "output_dir"]
    setattr(function, "__signature__", own.replace(parameters=kept))  # noqa: B010 - unknown to type checkers
    function.__annotations__.pop("output_dir", None)
    return function


@models.command("convert", cls=Grouped)
@_own_output
@takes_settings
def convert(
    name: Name,
    to: Target,
    output: Output = None,
    part: PartName = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """Write a part of a model in another storage format, as a safetensors file that loads without conversion."""
    with Console(json=json, debug=debug) as console:
        config = load_config(settings)
        library, fallback = _library(config)
        entry = library.find(name)
        from ..backend.devices import pick_device
        from ..core.folders import title_of
        from ..core.models import read_entry
        from ..flux.convert import check_conversion, convert_part

        to = storage_name(to) or to
        parts = read_entry(entry.path, entry.name, strict=True).parts
        chosen = _part(parts, part, entry.name)
        ending = f"-{chosen.role}" if len(parts) > 1 else ""
        usual = f"{title_of(entry.path)}{ending}-{to.replace(':', '-')}.safetensors"
        path = read_path("--output", usual if output is None else output).absolute()
        _check_target(path, chosen, force)
        try:
            check_conversion(chosen, to, force=force)
        except ConfigError as error:  # of the format alone
            raise ConfigError(f"--to: {error}") from None
        others = [role for role in parts if role not in (chosen.role, "autoencoder")]
        if others:
            console.say(f"of {entry.name}, {chosen.role} is written; {', '.join(others)} by --part")
        console.say(f"writing {path} ...")
        convert_part(chosen, to, path, device=pick_device(config.device), force=force)
        size = path.stat().st_size
        if json:
            console.result({"path": str(path), "role": chosen.role, "format": to, "bytes": size, "from": chosen.nbytes})
        else:
            console.data(str(path))
        console.say(
            f"{human_bytes(chosen.nbytes)} became {human_bytes(size)}; {_use_of(path, chosen, config, fallback)}"
        )


def _use_of(path: Path, part: Part, config: EngineConfig, fallback: bool) -> str:
    """What to do with a part that was written. One of `tiny` is named by its path, as its other parts are not in the
    models folder."""
    from ..backend.model_folders import folders_of
    from ..core.folders import put_into
    from ..core.models import SLOTS

    slot = SLOTS[part.role]
    named = f"use it by --{slot.setting} {quote(str(path))}"
    root = config.models_dir.absolute()
    if fallback or any(path.is_relative_to(folder) for folder in folders_of(root, slot.folders)):
        return named
    return f"{named}, or put it into {root / put_into(root, slot.folders)} to find it by its name"


def _library(config: EngineConfig) -> tuple[ModelLibrary, bool]:
    """The files of the models folder, or those of `tiny` where there are none."""
    from ..core.models import TINY, ModelLibrary

    check_models_dir(config)
    library = ModelLibrary([config.models_dir])
    return (library, False) if library.ls() else (ModelLibrary([TINY]), True)


def _find(name: str, config: EngineConfig) -> Entry:
    return _library(config)[0].find(name)


def _used(library: ModelLibrary, config: EngineConfig) -> set[Path]:
    """The files that a job would take; none where a part is missing."""
    try:
        chosen = library.choose(config.checkpoint, t5=config.t5, clip=config.clip, autoencoder=config.vae)
    except EngineError:
        return set()
    return {part.checkpoint.path for part in chosen.parts.values()}


def _row(entry: Entry, used: set[Path]) -> dict[str, Any]:
    parts = entry.parts.values()
    formats: dict[str, int] = {}
    for part in parts:
        for name, nbytes in part.formats.items():
            formats[name] = formats.get(name, 0) + nbytes
    many = [name for name in formats if formats[name] >= LITTLE * sum(formats.values())]
    return {
        "name": entry.name,
        "path": str(entry.path),
        "roles": list(entry.roles),
        "layout": ", ".join(dict.fromkeys(part.layout for part in parts)) or None,
        "storage": ", ".join(sorted(many, key=lambda name: -formats[name])) or None,
        "formats": formats,
        "variant": entry.variant,
        "bytes": entry.size,
        "usable": entry.usable,
        "used": entry.path in used,
        "problem": entry.problem or entry.undrawable,
    }


def _part(parts: Any, role: str | None, name: str) -> Part:
    """The part that was asked for, or the first: a transformer where there is one."""
    if role is None:
        return parts.get("transformer") or next(iter(parts.values()))
    if role not in parts:
        raise RequestError(f"--part: {name} holds {', '.join(parts)}, no {role}")
    return parts[role]


def _check_target(path: Path, part: Part, force: bool) -> None:
    """Refuse to write over the file that is read, or without being asked over any other."""
    sources = {file.resolve() for file in (part.checkpoint.path, *part.checkpoint.files)}
    if path.resolve() in sources:
        raise OutputError(f"{path} is the file that is read; name another with -o")
    if path.suffix != ".safetensors":
        raise ConfigError(f"-o: {path} would be a safetensors file; give it that ending")
    if path.exists() and not force:
        raise OutputError(f"{path} is there already; name another with -o, or use --force")


def _lines(described: FileDescription) -> list[str]:
    """A description as words."""
    rows = [("path", described.path), ("size", human_bytes(described.bytes))]
    if described.container:
        rows += [("container", described.container), ("tensors", f"{described.tensors:,}")]
    if len(described.files) > 1:
        rows.append(("files", ", ".join(Path(file).name for file in described.files)))
    for part in described.parts:
        rows += [("", ""), *_part_rows(part)]
    if described.unused:
        rows += [("", ""), ("unused keys", _first(described.unused))]
    if described.metadata:
        rows += [("", ""), *((f"metadata {key}", value) for key, value in described.metadata.items())]
    if described.problem:
        rows += [("", ""), ("problem", described.problem)]
    return table(rows)


def _part_rows(part: PartDescription) -> list[tuple[str, str]]:
    rows = [
        ("part", part.role),
        ("layout", f"{part.layout}{f', below {part.prefix!r}' if part.prefix else ''}"),
        ("variant", " ".join(filter(None, (part.variant, f"(perhaps {part.hint})" if part.hint else "")))),
        ("parameters", f"{part.parameters:,} in {part.tensors:,} tensors"),
        ("stored as", ", ".join(f"{name} {human_bytes(nbytes)}" for name, nbytes in part.formats.items())),
        *((name, str(value)) for name, value in part.sizes.items() if value is not None),
        ("ignored keys", _first(part.ignored)),
        ("problem", part.problem or ""),
    ]
    return [row for row in rows if row[1]]


def _first(names: list[str]) -> str:
    return f"{len(names):,}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}" if names else ""


def register(app: typer.Typer) -> None:
    app.add_typer(models, name="models")
