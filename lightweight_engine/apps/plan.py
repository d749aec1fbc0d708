"""``plan``: what a request would take of a card, from the headers of the model's files alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from ..errors import ConfigError, MemoryBudgetError
from ..request import GenerationRequest
from .console import Console
from .options import (
    REQUEST_OPTIONS,
    Debug,
    Grouped,
    Json,
    check_models_dir,
    load_config,
    read_number,
    split_request,
    takes_request,
)
from .session import check_request

if TYPE_CHECKING:
    from ..backend.devices import Card
    from ..core.plan import Plan

Prompt = Annotated[str, typer.Argument(metavar="[PROMPT]", help="What would be drawn; its length counts.")]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram", metavar="GIB", help="Plan for a GPU with this much memory, which need not be here.",
        rich_help_panel="Card",
    ),
]  # fmt: skip
CardName = Annotated[
    str | None,
    typer.Option("--card", metavar="NAME", help='Whose speed counts, as "RTX 4090".', rich_help_panel="Card"),
]


@takes_request
def plan(
    prompt: Prompt = "",
    vram: Vram = None,
    card: CardName = None,
    json: Json = False,
    debug: Debug = False,
    **values: Any,
) -> None:
    """Print what a request would take of a card, stage by stage; nothing is loaded. Code 4 where it does not fit."""
    with Console(json=json, debug=debug) as console:
        given, settings = split_request(values)
        config = load_config(settings)
        console.typed, console.options = given.keys(), REQUEST_OPTIONS
        request = GenerationRequest(**{**config.request_defaults(), **given, "prompt": prompt})
        check_request(request, config)
        check_models_dir(config)
        planned = planned_card(console, vram, card)
        from ..core.engine import LightweightEngine

        engine = LightweightEngine(config)
        made = engine.plan(request, planned)
        for note in engine.notes:
            console.warn(note)
        console.result(as_data(made)) if json else console.data(made.table())
        try:
            made.check()
        except MemoryBudgetError as error:
            console.say(f"it does not fit: {str(error).removesuffix(error.plan).strip()}")
            raise typer.Exit(error.exit_code) from None


def planned_card(console: Console, given: str | None, name: str | None) -> Card | None:
    """The card of ``--vram`` and ``--card``; None is the device of the settings."""
    if given is None:
        if name is not None:
            raise ConfigError("--card: a name says nothing of memory; give --vram too")
        return None
    vram = read_number("--vram", given, Annotated[float, Field(gt=0, le=1024)], unit="GiB")
    from ..backend.devices import RATES, Card, known_card
    from ..backend.host_memory import GIB

    if name is not None and known_card(name) is None:
        console.warn(f"--card: the speed of {name!r} is not known; known are {', '.join(RATES)}")
    total = int(vram * GIB)
    return Card(name or f"a card of {vram:g} GiB", "cuda", total, total)


def as_data(plan: Plan) -> dict[str, Any]:
    """Everything of a plan, bytes and seconds, for JSON."""
    return {
        "card": plan.card.name,
        "total": plan.card.total,
        "free": plan.card.free,
        "budget": plan.budget.total,
        "peak": plan.peak,
        "fits": plan.fits,
        "vram_state": plan.state,
        "residency": plan.residency,
        "storage": dict(plan.storages),
        "stages": plan.rows(),
    }


def register(app: typer.Typer) -> None:
    app.command("plan", cls=Grouped)(plan)
