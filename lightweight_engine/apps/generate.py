"""``generate``: pictures from a prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..labels import sampler_labels, scheduler_labels
from ..request import GenerationRequest
from .console import Console
from .options import (
    REQUEST_OPTIONS,
    Debug,
    Grouped,
    Json,
    Quiet,
    load_config,
    picture_quality,
    split_request,
    takes_request,
)
from .session import check_request, start_engine, tell_details, watched

if TYPE_CHECKING:
    from ..core.images import Saved
    from ..results import GenerationResult


def _list_samplers(wanted: bool) -> None:
    if wanted:
        typer.echo("\n".join(sampler_labels()))
        raise typer.Exit


def _list_schedulers(wanted: bool) -> None:
    if wanted:
        typer.echo("\n".join(scheduler_labels()))
        raise typer.Exit


Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw; - reads it from standard input.")]
QUALITY = 80  # where none is given
Quality = Annotated[
    str | None,
    typer.Option(
        "--quality",
        metavar="<int>",
        help=f"Quality of jpg and webp. (1 to 100; default {QUALITY})",
        rich_help_panel="Files",
    ),
]
ListSamplers = Annotated[
    bool,
    typer.Option(
        "--list-samplers",
        callback=_list_samplers,
        is_eager=True,
        help="Print the samplers and stop.",
        rich_help_panel="Sampling",
    ),
]
ListSchedulers = Annotated[
    bool,
    typer.Option(
        "--list-schedulers",
        callback=_list_schedulers,
        is_eager=True,
        help="Print the schedulers and stop.",
        rich_help_panel="Sampling",
    ),
]


@takes_request
def generate(
    prompt: Prompt,
    quality: Quality = None,
    list_samplers: ListSamplers = False,
    list_schedulers: ListSchedulers = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **values: Any,
) -> None:
    """Draw pictures from a prompt and print where they were saved."""
    with Console(json=json, quiet=quiet, debug=debug) as console:
        from ..core.images import check_folder

        given, settings = split_request(values)
        config = load_config(settings)
        text = sys.stdin.read().strip() if prompt == "-" else prompt
        console.typed, console.options = given.keys(), REQUEST_OPTIONS
        request = GenerationRequest.over(config.request_defaults(), {**given, "prompt": text})
        kept = picture_quality(console, quality, QUALITY, request.output_format)
        library = check_request(request, config)
        check_folder(config.output_dir)
        engine = start_engine(console, config, library)
        with watched(console) as options:
            result = engine.run(request, **options)
        from ..core.replay import save_result

        saved = save_result(result, config.output_dir, quality=kept)
        warnings = [*result.warnings, *(warning for row in saved for warning in row.warnings)]
        for warning in warnings:
            console.warn(warning)
        if json:
            console.result(_as_data(result, saved, warnings))
        else:
            for row in saved:
                console.data(str(row.path))
        tell_details(console, result.details)
        console.say(f"{len(saved)} picture{'s' * (len(saved) != 1)} in {sum(result.timings.values()):.1f} s")


def _as_data(result: GenerationResult, saved: list[Saved], warnings: list[str]) -> dict[str, Any]:
    images = [
        {
            "path": str(row.path),
            "sidecar": str(row.sidecar) if row.sidecar else None,
            "seed": result.seeds[i],
            "subseed": result.subseeds[i],
            "width": result.images[i].width,
            "height": result.images[i].height,
            "infotext": result.infotexts[i],
            "stages": [str(path) for path in row.stages],
            "detailer": result.details[i].model_dump(mode="json") if result.details else None,
        }
        for i, row in enumerate(saved)
    ]
    return {
        "images": images,
        "models": [file.model_dump() for file in result.models],
        "loras": [row.model_dump(mode="json") for row in result.loras],
        "settings": result.settings,
        "device": result.device,
        "timings": result.timings,
        "peak_memory": result.peak_memory,
        "versions": result.versions,
        "warnings": warnings,
    }


def register(app: typer.Typer) -> None:
    app.command("generate", cls=Grouped)(generate)
