"""``detail``: faces and hands of a picture painted anew, or shown where they are found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RequestError
from ..request import SMALLEST_SIDE, GenerationRequest
from .console import Console
from .options import REQUEST_OPTIONS, Debug, Grouped, Json, Quiet, load_config, split_request, takes_request
from .session import check_request, start_engine, tell_details, watched

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

    from ..config import EngineConfig

Source = Annotated[str, typer.Argument(metavar="IMAGE", help="The picture: a path or a URL.")]
Text = Annotated[str, typer.Option("--prompt", help="What the picture shows; the passes' own prompts win.")]
Preview = Annotated[bool, typer.Option("--preview", help="Only show what is found: boxes and masks; paint nothing.")]
LISTED = "Print the names of the detectors, and what is wrong with a file, and stop."
Listing = Annotated[bool, typer.Option("--list", is_eager=True, help=LISTED)]

CELL = 8  # sides are drawn in cells of so many pixels


@takes_request
def detail(
    source: Source = "",
    prompt: Text = "",
    preview: Preview = False,
    listing: Listing = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **values: Any,
) -> None:
    """Detail a picture and print where the result was saved. What no mask covers stays as it is, to the byte."""
    with Console(json=json, quiet=quiet, debug=debug) as console:
        given, settings = split_request(values)
        config = load_config(settings)
        if listing:
            from ..core.models import TINY
            from ..extensions.detector_list import DetectorList

            detectors = DetectorList([config.models_dir, TINY])
            console.names("detectors", detectors.names(), detectors.problems())
            return
        if not source:
            raise RequestError("there is no picture to detail; name one", field="image")
        from ..core.images import check_folder
        from ..core.pictures import PictureReader

        console.typed, console.options = given.keys(), REQUEST_OPTIONS
        image = PictureReader.of(config).read(source)
        size = {} if preview else _drawn_size(image, given, config)  # finding draws at no size
        usual = {**config.request_defaults(), **size, "adetailer": True, "skip_img2img": True}
        request = GenerationRequest.over(usual, {**given, "prompt": prompt, "image": source})
        library = check_request(request, config)
        check_folder(config.output_dir)
        if preview:
            _preview(console, config, request, image, source)
            return
        engine = start_engine(console, config, library)
        with watched(console) as options:
            result = engine.run(request, **options)
        from ..core.replay import save_result

        saved = save_result(result, config.output_dir)
        for warning in result.warnings:
            console.warn(warning)
        passes = [dict(each) for each in result.details[0].passes] if result.details else []
        if json:
            console.result({"path": str(saved[0].path), "passes": passes})
        else:
            console.data(str(saved[0].path))
        tell_details(console, result.details)


def _drawn_size(image: Image, given: Mapping[str, Any], config: EngineConfig) -> dict[str, int]:
    """The sides that masks are drawn at where nobody gave them: those of the picture."""
    told = f"the picture of {image.width}x{image.height} has a side of "
    remedy = "give --width and --height, at which masks are drawn then"
    sides = {"width": image.width, "height": image.height}
    for side in (length for name, length in sides.items() if given.get(name) is None):
        if side > config.max_side:
            raise RequestError(f"{told}over {config.max_side} pixels (setting max_side); {remedy}", field="image")
        if side < SMALLEST_SIDE:
            raise RequestError(f"{told}less than {SMALLEST_SIDE} pixels; {remedy}", field="image")
    return {name: length // CELL * CELL for name, length in sides.items()}


def _preview(console: Console, config: EngineConfig, request: GenerationRequest, image: Image, source: str) -> None:
    from ..core.engine import LightweightEngine
    from ..core.filenames import free_name
    from ..core.images import save

    found, shown = LightweightEngine(config).find(image.convert("RGB"), request)
    saved = save(shown, config.output_dir, free_name(config.output_dir, source, "found"))
    rows = [[{"box": each.box, "score": each.score, "label": each.label} for each in pass_] for pass_ in found]
    if console.json:
        console.result({"path": str(saved.path), "passes": rows})
        return
    console.data(str(saved.path))
    for number, pass_ in enumerate(found, 1):
        words = ", ".join(f"{each.label} {each.score:.2f}" for each in pass_) or "nothing"
        console.say(f"pass {number}: {words}")


def register(app: typer.Typer) -> None:
    app.command("detail", cls=Grouped)(detail)
