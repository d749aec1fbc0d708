"""``config show``: every setting with its value and where that came from."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .console import Console, table
from .options import Debug, Grouped, Json, load_config, takes_settings

Origin = Annotated[bool, typer.Option("--origin", help="Show where each value came from.")]

config = typer.Typer(help="Look at the settings.", no_args_is_help=True, rich_markup_mode=None)


@config.command("show", cls=Grouped)
@takes_settings
def show(origin: Origin = False, json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """Print every setting, by precedence: defaults < engine.toml < LWE_* environment < flags."""
    with Console(json=json, debug=debug) as console:
        rows = list(load_config(settings).rows())
        if json:
            console.result({name: {"value": value, "origin": came} for _, name, value, came in rows})
            return
        section = ""
        cells = [(name, _shown(name, value)) + ((came,) if origin else ()) for _, name, value, came in rows]
        for (heading, *_), line in zip(rows, table(cells), strict=True):
            if heading != section:
                console.data(f"{'' if not section else chr(10)}[{heading}]")
                section = heading
            console.data(line)


def _shown(name: str, value: Any) -> str:
    """The value as a person writes it, of secrets only what they are for."""
    parts = map(str, value) if isinstance(value, tuple | dict) else [] if value is None else [str(value)]
    text = ", ".join(parts) or "-"
    return text.lower() if isinstance(value, bool) else text


def register(app: typer.Typer) -> None:
    app.add_typer(config, name="config")
