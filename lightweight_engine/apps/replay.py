"""``replay``: a saved picture made again and compared with itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import EngineConfig
from ..request import MODEL_FIELDS
from .console import DIFFERENT, Console
from .options import Debug, Grouped, Json, Quiet, assigned, load_config, takes_settings
from .session import check_request, start_engine, watched

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ..core.replay import Recipe, Replay

Picture = Annotated[
    Path,
    typer.Argument(metavar="IMAGE", help="A picture that was saved by this engine, or its sidecar; or one by Forge."),
]
Save = Annotated[bool, typer.Option("--save", help="Save the new picture too.")]
StartImage = Annotated[
    list[Path],
    typer.Option(
        "--image",
        metavar="FILE",
        help="The start picture, where only its hash was kept or it lies elsewhere; repeatable.",
    ),
]
Mask = Annotated[list[Path], typer.Option("--mask", metavar="FILE", help="Likewise its mask.")]
Loras = Annotated[
    list[str],
    typer.Option(
        "--lora",
        metavar="LORA",
        help="A LoRA, NAME_OR_URL[:SCALE], that a picture without its sidecar names without a strength; repeatable.",
    ),
]
ROLES = {"transformer": "checkpoint", "t5": "t5", "clip": "clip", "autoencoder": "vae"}


@takes_settings
def replay(
    image: Picture,
    start: StartImage = [],  # noqa: B006 - read only
    mask: Mask = [],  # noqa: B006
    lora: Loras = [],  # noqa: B006
    save: Save = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """Make a picture again from its sidecar or its text, and say whether it is the same, bit for bit.

    Settings that are defaults of requests, as steps, have no effect: the picture tells its own.
    """
    with Console(json=json, quiet=quiet, debug=debug) as console:
        from ..core.images import check_folder
        from ..core.replay import picture_of, read_recipe, save_result, with_loras, with_pictures
        from ..core.replay import replay as make_again

        image = picture_of(image)
        doubts: list[str] = []
        moved = {"image": start, "mask": mask}
        console.typed = [field for field, files in {**moved, "loras": lora}.items() if files]
        recipe = with_pictures(read_recipe(image), moved, doubts)
        given = _given(settings)
        same = [*_same_settings(recipe.sidecar, given), *settings["assignments"]]
        files = (_same_files if recipe.told is None else _same_checkpoint)(recipe, load_config(given), doubts)
        config = load_config({**files, **given, "assignments": same})
        recipe = with_loras(recipe, lora, config, doubts)
        for doubt in [*recipe.warnings, *doubts]:
            console.warn(doubt)
        recipe = _settled(recipe, {*files, *given, *assigned({"assignments": same})})
        idle = [name for name in assigned(settings) if name in config.request_defaults()]
        if idle:
            console.warn(f"{', '.join(idle)} had no effect by --set: the picture tells what it was made with")
        library = check_request(recipe.request, config)
        if save:
            check_folder(config.output_dir)
        engine = start_engine(console, config, library)
        with watched(console) as options:
            outcome = make_again(engine, image, recipe, **options)
        for warning in outcome.result.warnings:
            console.warn(warning)
        paths = [str(row.path) for row in save_result(outcome.result, engine.config.output_dir)] if save else []
        if json:
            differences = list(outcome.differences)
            console.result({"identical": outcome.identical, "differences": differences, "saved": paths})
        else:
            for line in [_verdict(outcome, recipe), *outcome.differences, *paths]:
                console.data(line)
    if outcome.identical is False:
        raise typer.Exit(DIFFERENT)


def _verdict(outcome: Replay, recipe: Recipe) -> str:
    if recipe.interrupted:
        return "made again, to its end; the first picture was ended early and cannot be compared with it"
    if outcome.identical is None:
        return "made again; whether it is the same is not known, as the first picture's pixels were not kept exactly"
    return "identical: every pixel is the same" if outcome.identical else "different: not every pixel is the same"


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value not in (None, [])}


def _settled(recipe: Recipe, settings: Collection[str]) -> Recipe:
    """The recipe without the choice of a model that settings of now have made already."""
    chosen = dict.fromkeys(name for name in MODEL_FIELDS if name in settings)
    return replace(recipe, request=recipe.request.model_copy(update=chosen))


def _same_settings(sidecar: Mapping[str, Any] | None, given: Collection[str]) -> list[str]:
    """The settings that the picture was made with, as ``--set`` takes them, but for those given by options of now."""
    recorded = (sidecar or {}).get("settings") or {}
    return [
        f"{name}={value}" for name, value in recorded.items() if name in EngineConfig.model_fields and name not in given
    ]


def _same_checkpoint(recipe: Recipe, config: EngineConfig, doubts: list[str]) -> dict[str, Any]:
    """The setting that chooses the checkpoint which a picture's text names, where none is chosen."""
    from ..core.models import TINY, ModelLibrary

    name = recipe.told.model if recipe.told else None
    if name is None or config.checkpoint:
        return {}
    for root in (config.models_dir, TINY):
        named = [each for each in ModelLibrary([root]).ls() if each.is_called(name) and each.can_be("transformer")]
        if named and root == TINY:
            return _tiny_setting(config)
        if named:
            return {"checkpoint": str(named[0].path)}
    doubts.append(f"no checkpoint is called {name:.120}, as the picture's text has it; name it by --checkpoint")
    return {}


def _tiny_setting(config: EngineConfig) -> dict[str, Any]:
    """The demonstration model needs none in a folder without another: LoRAs of that folder act on it too."""
    from ..core.models import TINY, ModelLibrary

    return {"models_dir": TINY} if ModelLibrary([config.models_dir]).has_checkpoint else {}


def _same_files(recipe: Recipe, config: EngineConfig, doubts: list[str]) -> dict[str, Any]:
    """The settings that choose the files which the picture was made with, where they are still there."""
    from ..core.models import TINY

    rows = (recipe.sidecar or {}).get("models") or ()
    paths = {ROLES[row["role"]]: Path(row["path"]) for row in rows if row.get("role") in ROLES}
    if paths and all(path.parent.parent.name == TINY.name and _ours(path, TINY) for path in paths.values()):
        return _tiny_setting(config)
    return {name: str(path) for name, path in paths.items() if path.is_file()}


def _ours(path: Path, folder: Path) -> bool:
    """Whether a file of that name lies at that place of ``folder``, wherever the package was installed then."""
    return (folder / path.parent.name / path.name).is_file()


def register(app: typer.Typer) -> None:
    app.command("replay", cls=Grouped)(replay)
