"""The command line. Only the command that is asked for is imported, so that --help is fast and loads no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from .. import __version__
from .console import EXIT_CODES

# name -> (module with ``register``, what it does)
COMMANDS = {
    "generate": ("generate", "Draw pictures from a prompt."),
    "demo": ("demo", "Draw several prompts with the model that ships with the engine."),
    "serve": ("serve", "Answer requests over HTTP, with a queue, until stopped."),
    "warmup": ("warmup", "Compile what this GPU and model need, so that later starts need not."),
    "upscale": ("upscale", "Make a picture larger; no Flux model is needed."),
    "detail": ("detail", "Paint faces and hands of a picture anew, or show where they are found."),
    "models": ("models", "List, check, describe and convert model files: ls, verify, inspect, convert."),
    "lora": ("lora", "LoRA files: ls, inspect, check, add, rm."),
    "plan": ("plan", "Print what a request would take of a card; nothing is loaded."),
    "info": ("info", "Print what a picture tells of its making."),
    "replay": ("replay", "Make a saved picture again and compare."),
    "cache": ("cache", "List and remove fetched LoRA files and quantised weights: ls, prune."),
    "doctor": ("doctor", "Look for problems and say how to repair each."),
    "config": ("settings", "Look at the settings: show."),
}

HELP = (
    "A Flux.1 image engine. Data goes to stdout, words to stderr. Options follow the command, as in "
    "`lightweight-engine models ls --models-dir FOLDER`."
)
EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, on the arguments of this process if none are given. Always ends in SystemExit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    completing = any(name.endswith("_COMPLETE") and name.startswith(("_LIGHTWEIGHT", "_LWE")) for name in os.environ)
    wanted = None if completing else next((word for word in given if not word.startswith("-")), "")
    build(wanted)(given, prog_name="lightweight-engine")


def build(wanted: str | None) -> typer.Typer:
    """The application with the command ``wanted`` in full and the others as lines of help; None is all in full."""
    app = typer.Typer(
        help=HELP,
        epilog=EPILOG,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_main)
    for name, (module, help_text) in COMMANDS.items():
        if wanted in (None, name):
            import_module(f"{__package__}.{module}").register(app)
        else:
            app.command(name, help=help_text)(_not_loaded)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
]


def _main(version: Version = False) -> None:
    """See ``HELP``: typer shows that in place of this."""


def _not_loaded() -> None:
    """Stands for a command in the list of commands."""
