"""``warmup``: programs for this GPU compiled, and a tiny job drawn, before anybody waits for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import typer

from .console import Console, table
from .options import Debug, Grouped, Json, Quiet, load_config, takes_settings
from .session import start_engine

if TYPE_CHECKING:
    from ..core.warm_up import WarmedUp


@takes_settings
def warmup(json: Json = False, quiet: Quiet = False, debug: Debug = False, **settings: Any) -> None:
    """Compile what this GPU and model need, for all later starts, and print what each stage takes at first and again.

    On a CPU there is nothing to compile; the job is drawn all the same.
    """
    with Console(json=json, quiet=quiet, debug=debug) as console:
        begin = time.perf_counter()
        engine = start_engine(console, load_config(settings))
        ready = time.perf_counter() - begin
        from ..core.warm_up import warm_up

        done = warm_up(engine)
        device = str(engine.networks.device)
        if json:
            folder = str(done.folder) if done.folder else None
            model = {"model": engine.models.name, "warnings": list(engine.notes)}
            told = {**model, "device": device, "ready": ready, "first": dict(done.first), "again": dict(done.again)}
            console.result({**told, "folder": folder, "compiled": done.compiled, "kept": done.kept})
            return
        for line in table(_rows(ready, done)):
            console.data(line)
        console.say(
            f"{done.compiled} programs compiled for the job, {done.kept} kept in {done.folder}"
            if done.folder
            else f"there is nothing to compile for {device}"
        )


def _rows(ready: float, done: WarmedUp) -> list[tuple[str, ...]]:
    stages = [(name, f"{took:.3f} s", f"{done.again.get(name, 0.0):.3f} s") for name, took in done.first.items()]
    return [("stage", "first", "again"), ("ready", f"{ready:.3f} s", ""), *stages]


def register(app: typer.Typer) -> None:
    app.command("warmup", cls=Grouped)(warmup)
