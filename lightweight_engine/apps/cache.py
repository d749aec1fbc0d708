"""``cache``: the LoRA files that were fetched and the weights that were quantised, and removing those not wanted."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from .console import Console, human_memory, table
from .options import Debug, Grouped, Json, load_config, read_number, takes_settings

if TYPE_CHECKING:
    from ..config import EngineConfig
    from ..core.quantized_cache import QuantizedCache

DAY = 24 * 3600

Everything = Annotated[bool, typer.Option("--all", help="Remove every file that is not in use.")]
Room = Annotated[str | None, typer.Option("--to", metavar="GIB", help="Leave at most this many GiB of each kind.")]
Unused = Annotated[str | None, typer.Option("--unused", metavar="DAYS", help="Remove what was not used for so long.")]

cache = typer.Typer(
    help="Fetched LoRA files and quantised weights: list and remove them.", no_args_is_help=True, rich_markup_mode=None
)


@cache.command("ls", cls=Grouped)
@takes_settings
def ls(json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """List fetched files, last used first, * those in use now; then weights that were quantised on load."""
    with Console(json=json, debug=debug) as console:
        from ..core.download import cache_of

        config = load_config(settings)
        held, quantized = cache_of(config), _quantized(config)
        entries = held.ls()
        total = sum(entry.size for entry in entries)
        if json:
            files = [asdict(entry) for entry in entries]
            fetched = {"folder": str(held.folder), "bytes": total, "limit": held.limit, "files": files}
            console.result({**fetched, "quantized": quantized and _as_data(quantized)})
            return
        rows = [
            ("*" if entry.in_use else "", ", ".join(entry.names) or "(unfinished)", human_memory(entry.size),
             _ago(entry.used), entry.sha256)
            for entry in entries
        ]  # fmt: skip
        for line in table([("", "NAME", "SIZE", "LAST USED", "SHA256"), *rows]):
            console.data(line)
        console.say(f"{human_memory(total)} of {human_memory(held.limit)} in {held.folder}")
        if quantized is not None:
            _list_quantized(console, quantized)


@cache.command("prune", cls=Grouped)
@takes_settings
def prune(
    everything: Everything = False,
    to: Room = None,
    unused: Unused = None,
    json: Json = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """Remove unfinished files, and those used longest ago until the rest of each kind fits; files in use stay."""
    with Console(json=json, debug=debug) as console:
        from ..backend.host_memory import GIB
        from ..core.download import cache_of

        gib, days = _number("--to", to, "GiB"), _number("--unused", unused, "days")
        config = load_config(settings)
        held, quantized = cache_of(config), _quantized(config)
        limit = 0 if everything else None if gib is None else int(gib * GIB)
        before = 0.0 if days is None else time.time() - days * DAY
        gone = held.prune(limit, before)
        left = sum(entry.size for entry in held.ls())
        if quantized is not None:
            gone += quantized.prune(limit, before)
            left += sum(stat.st_size for _, stat in quantized.ls())
        if json:
            console.result({"removed": gone, "bytes": left})
        else:
            console.data(f"removed {human_memory(gone)}, {human_memory(left)} left")


def _number(name: str, given: str | None, unit: str) -> float | None:
    kind = Annotated[float, Field(ge=0, le=1e9)]
    return None if given is None else read_number(name, given, kind, unit=unit)


def _quantized(config: EngineConfig) -> QuantizedCache | None:
    """The cache of quantised weights, where there is one."""
    from ..core.folders import quantized_folder

    if not quantized_folder(config.cache_dir).is_dir():  # nothing to list: torch need not be loaded for it
        return None
    from ..core.quantized_cache import QuantizedCache

    return QuantizedCache.of(config)


def _as_data(cache: QuantizedCache) -> dict[str, Any]:
    files = [{"name": path.name, "size": stat.st_size, "used": stat.st_mtime} for path, stat in cache.ls()]
    return {"folder": str(cache.folder), "bytes": sum(file["size"] for file in files), "limit": cache.limit,
            "files": files}  # fmt: skip


def _list_quantized(console: Console, cache: QuantizedCache) -> None:
    data = _as_data(cache)
    rows = [("", file["name"], human_memory(file["size"]), _ago(file["used"])) for file in data["files"]]
    for line in table([("", "QUANTISED", "SIZE", "LAST USED"), *rows]):
        console.data(line)
    console.say(f"{human_memory(data['bytes'])} of {human_memory(cache.limit)} in {cache.folder}")


def _ago(moment: float) -> str:
    """How long ago, in the one unit that a person would use."""
    seconds = max(time.time() - moment, 0.0)
    for unit, size in (("day", DAY), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (count != 1)} ago"
    return "just now"


def register(app: typer.Typer) -> None:
    app.add_typer(cache, name="cache")
