"""``lora``: which LoRA files there are, what each does to the model in use, and putting one there or taking it away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AdapterError, EngineError, ModelNotFoundError, closest
from .console import Console, human_bytes, table
from .options import Debug, Grouped, Json, check_models_dir, load_config, takes_settings

if TYPE_CHECKING:
    from ..config import EngineConfig
    from ..extensions.lora import LoRAManager
    from ..flux.lora_set import LoraUse

Name = Annotated[str, typer.Argument(metavar="LORA", help="A name that `lora ls` shows, the path of a file, or a URL.")]
Listed = Annotated[str, typer.Argument(metavar="NAME", help="A name that `lora ls` shows.")]
Source = Annotated[str, typer.Argument(metavar="FILE_OR_URL", help="A .safetensors file, or the URL of one.")]
NewName = Annotated[str | None, typer.Option("--name", metavar="NAME", help="(default that of the file)")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file of the same name.")]

# What trainers write down that a user wants to know, in the words of their files.
TOLD = (
    "modelspec.title",
    "modelspec.trigger_phrase",
    "ss_output_name",
    "ss_base_model_version",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_num_train_images",
    "modelspec.author",
    "modelspec.license",
)
VALUE_SHOWN = 200

lora = typer.Typer(help="LoRA files: list, describe, check, add, remove.", no_args_is_help=True, rich_markup_mode=None)


@lora.command("ls", cls=Grouped)
@takes_settings
def ls(json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """List the LoRA files that a request may name."""
    with Console(json=json, debug=debug) as console:
        from ..core.loras import lora_library
        from ..extensions.lora_library import lora_place

        config = _config(settings)
        library = lora_library(config)
        entries = library.ls()
        if json:
            rows = [{**asdict(entry), "path": str(entry.path)} for entry in entries]
            console.result({"folders": [str(root) for root in library.roots], "files": rows})
            return
        cells = [(e.name, e.alias or "", human_bytes(e.size), e.problem or "") for e in entries]
        for line in table([("NAME", "ALSO CALLED", "SIZE", "PROBLEM"), *cells]):
            console.data(line)
        if not entries:
            console.say(f"there are none; put files into {lora_place(config.models_dir)}, or use `lora add`")


@lora.command("inspect", cls=Grouped)
@takes_settings
def inspect(name: Name, json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """Describe a LoRA: its algorithms and ranks, what it changes, and what its trainer wrote down."""
    with Console(json=json, debug=debug) as console, _read(name, _config(settings)) as use:
        described = _described(use)
        if json:
            console.result(described)
            return
        for key in ("file", "sha256", "bytes", "algorithms", "ranks", "dtypes", "changes"):
            console.data(f"{key}: {_words(described[key])}")
        for key, value in described["metadata"].items():
            console.data(f"{key}: {value}")
        console.data(str(use.file.report))


@lora.command("check", cls=Grouped)
@takes_settings
def check(name: Name, json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """Say what a LoRA would change in the model in use. Ends with code 3 where it cannot be used."""
    with Console(json=json, debug=debug) as console, _read(name, _config(settings)) as use:
        report = use.file.report
        if json:
            console.result({"sha256": use.sha256, **asdict(report)})
        else:
            console.data(str(report))
            console.data(f"changed parameters: {_words(dict(report.patches))}")


@lora.command("add", cls=Grouped)
@takes_settings
def add(
    source: Source,
    name: NewName = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """Check a file, or fetch the one at a URL, and copy it to the LoRAs of the models folder."""
    with Console(json=json, debug=debug) as console:
        from ..core.loras import add_lora

        config = _config(settings)
        with _read(source, config, by_name=False) as use:
            target = add_lora(config, use.file.path, name or use.name, force=force)
            console.say(str(use.file.report))
        if json:
            console.result({"name": target.stem, "path": str(target), "sha256": use.sha256})
        else:
            console.data(str(target))


@lora.command("rm", cls=Grouped)
@takes_settings
def rm(name: Listed, json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """Remove a LoRA file from the models folder."""
    with Console(json=json, debug=debug) as console:
        from ..core.loras import remove_lora

        gone = remove_lora(_config(settings), name)
        if json:
            console.result({"removed": str(gone.path), "bytes": gone.size})
        else:
            console.data(f"removed {gone.path}")


def _config(settings: dict[str, Any]) -> EngineConfig:
    config = load_config(settings)
    check_models_dir(config)
    return config


@contextmanager
def _read(given: str, config: EngineConfig, *, by_name: bool = True) -> Iterator[LoraUse]:
    """A LoRA by path or URL, or by name, read for the model in use; nothing of that is loaded."""
    from ..core.engine import LightweightEngine
    from ..lora_spec import LoraSpec

    manager = LightweightEngine(config).loras
    path = Path(given)
    if "://" in given:
        yield manager.use([LoraSpec(url=given)]).uses[0]
    elif path.is_file():
        yield _of_file(lambda: manager.read(path, path.stem))
    elif by_name:
        yield _of_name(manager, given)
    else:
        raise ModelNotFoundError(f"there is no file {given!r:.120}; give the path of a .safetensors file, or its URL")


def _of_name(manager: LoRAManager, given: str) -> LoraUse:
    """A LoRA by its name; what looks like a path is told to be none."""
    from ..extensions.lora_library import SUFFIX
    from ..lora_spec import LoraSpec

    try:
        return manager.use([LoraSpec(name=given)]).uses[0]
    except ModelNotFoundError:
        if not given.endswith(SUFFIX) and Path(given).name == given:
            raise
        meant = closest(given.removesuffix(SUFFIX), [entry.name for entry in manager.library.ls()])
        hint = f"did you mean {meant!r}?" if meant else "give a path, a name that `lora ls` shows, or a URL"
        raise ModelNotFoundError(f"there is no file {given!r:.120}, and no LoRA of that name; {hint}") from None


def _of_file(read: Any) -> LoraUse:
    """Any fault of a file that was named by its path is one of a LoRA."""
    try:
        return read()
    except AdapterError:
        raise
    except EngineError as error:
        raise AdapterError(f"{error}; a LoRA is a .safetensors file") from error


def _described(use: LoraUse) -> dict[str, Any]:
    deltas = [row.delta for rows in use.file.changes.values() for changes in rows.values() for row in changes]
    checkpoint = use.file.checkpoint
    metadata = {key: checkpoint.metadata[key][:VALUE_SHOWN] for key in TOLD if checkpoint.metadata.get(key)}
    return {
        "file": use.name,
        "sha256": use.sha256,
        "bytes": checkpoint.path.stat().st_size,
        "algorithms": dict(Counter(delta.algorithm for delta in deltas)),
        "ranks": {str(rank): count for rank, count in Counter(d.rank for d in deltas if d.rank).items()},
        "dtypes": dict(Counter(info.dtype for info in checkpoint.tensors.values())),
        "changes": dict(use.file.report.patches),
        "metadata": metadata,
    }


def _words(value: Any) -> str:
    if not isinstance(value, dict):
        return human_bytes(value) if isinstance(value, int) else str(value)
    return ", ".join(f"{key} ({count})" for key, count in value.items()) or "none"


def register(app: typer.Typer) -> None:
    app.add_typer(lora, name="lora")
