"""``config show``: every setting with its value and where that came from."""

from __future__ import annotations

import os
from textwrap import wrap
from typing import Annotated, Any

import typer

from ..config import EngineConfig, empty_variables, refuse_unknown
from .console import Console, table
from .options import Debug, Grouped, Json, load_config, takes_settings

Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these.", show_default=False)]
Explain = Annotated[bool, typer.Option("--explain", help="Say above each setting what it does.")]
Origin = Annotated[bool, typer.Option("--origin", help="Show where each value came from.")]

# Where a setting that nobody gave is not the same everywhere, and what it is on a CPU.
UNSET = {
    "storage_dtype": "on a GPU; as the file has it on a CPU, and of tiny",
    "vae_dtype": "on a GPU; fp32 on a CPU",
}
ON_A_CPU = {"storage_dtype": "auto", "vae_dtype": "fp32"}

config = typer.Typer(help="Look at the settings.", no_args_is_help=True, rich_markup_mode=None)


@config.command("show", cls=Grouped)
@takes_settings
def show(
    names: Names = None,
    origin: Origin = False,
    explain: Explain = False,
    json: Json = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """Print every setting, or those that are named, by precedence: defaults < engine.toml < LWE_* environment < flags.

    Lines that begin with # are headings and words; the file has no tables, only NAME = VALUE.
    """
    with Console(json=json, debug=debug) as console:
        chosen = load_config(settings)
        wanted = [name.replace("-", "_") for name in names or ()]
        refuse_unknown(wanted)
        for variable in empty_variables(os.environ):
            console.warn(f"{variable} is empty, which counts as not set")
        rows = [row for row in chosen.rows() if not wanted or row[1] in wanted]
        if json:
            told = {name: {"value": value, "origin": came, **_noted(name, chosen)} for _, name, value, came in rows}
            console.result(told)
            return
        section = ""
        cells = [
            (name, f"{_shown(value)} {_where(name, chosen)}".rstrip(), *((came,) if origin else ()))
            for _, name, value, came in rows
        ]
        for (heading, name, *_), line in zip(rows, table(cells), strict=True):
            if heading != section:
                console.data(f"{'' if not section else chr(10)}# {heading}")
                section = heading
            for words in _help(name) if explain else ():
                console.data(f"  # {words}")
            console.data(line)


def _where(name: str, chosen: EngineConfig) -> str:
    """Where the value holds, if not everywhere."""
    return "" if chosen.is_set(name) else UNSET.get(name, "")


def _noted(name: str, chosen: EngineConfig) -> dict[str, str]:
    """That as data, with what is in effect where a setting names the device: what ``auto`` takes only torch can say."""
    where = _where(name, chosen)
    if not where:
        return {}
    told = {"note": f"{getattr(chosen, name)} {where}"}
    return {**told, "in_effect": ON_A_CPU[name]} if chosen.device == "cpu" else told


def _help(name: str) -> list[str]:
    return wrap(EngineConfig.model_fields[name].description or "", 100, break_on_hyphens=False)


def _shown(value: Any) -> str:
    """The value as a person writes it, of secrets only what they are for."""
    parts = map(str, value) if isinstance(value, tuple | dict) else [] if value is None else [str(value)]
    text = ", ".join(parts) or "-"
    return text.lower() if isinstance(value, bool) else text


def register(app: typer.Typer) -> None:
    app.add_typer(config, name="config")
