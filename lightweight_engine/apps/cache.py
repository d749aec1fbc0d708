"""``cache``: the LoRA files that were fetched, and removing those that are not wanted any more."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .console import Console, human_bytes, table
from .options import Debug, Grouped, Json, load_config, takes_settings

DAY = 24 * 3600

Everything = Annotated[bool, typer.Option("--all", help="Remove every file that is not in use.")]
Room = Annotated[float | None, typer.Option("--to", metavar="GIB", help="Leave at most this many GiB.")]
Unused = Annotated[float | None, typer.Option("--unused", metavar="DAYS", help="Remove what was not used for so long.")]

cache = typer.Typer(help="Fetched LoRA files: list and remove them.", no_args_is_help=True, rich_markup_mode=None)


@cache.command("ls", cls=Grouped)
@takes_settings
def ls(json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """List the fetched files, last used first; * marks those in use now."""
    with Console(json=json, debug=debug) as console:
        from ..core.download import cache_of

        held = cache_of(load_config(settings))
        entries = held.ls()
        total = sum(entry.size for entry in entries)
        if json:
            files = [asdict(entry) for entry in entries]
            console.result({"folder": str(held.folder), "bytes": total, "limit": held.limit, "files": files})
            return
        rows = [
            ("*" if entry.in_use else "", ", ".join(entry.names) or "(unfinished)", human_bytes(entry.size),
             _ago(entry.used), entry.sha256)
            for entry in entries
        ]  # fmt: skip
        for line in table([("", "NAME", "SIZE", "LAST USED", "SHA256"), *rows]):
            console.data(line)
        console.say(f"{human_bytes(total)} of {human_bytes(held.limit)} in {held.folder}")


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
    """Remove unfinished files, and those used longest ago until the rest fits; files in use stay."""
    with Console(json=json, debug=debug) as console:
        from ..core.download import GIB, cache_of

        if (to is not None and to < 0) or (unused is not None and unused < 0):
            raise ConfigError("--to and --unused take 0 or more")
        held = cache_of(load_config(settings))
        limit = 0 if everything else None if to is None else int(to * GIB)
        gone = held.prune(limit, 0.0 if unused is None else time.time() - unused * DAY)
        left = sum(entry.size for entry in held.ls())
        if json:
            console.result({"removed": gone, "bytes": left})
        else:
            console.data(f"removed {human_bytes(gone)}, {human_bytes(left)} left")


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
