"""``upscale``: a picture made larger by a network."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RequestError
from ..request import MODEL_FIELDS, UpscaleRequest
from .console import Console, option
from .options import Debug, Grouped, Json, Quiet, check_models_dir, load_config, picture_quality, takes_settings
from .session import watched

if TYPE_CHECKING:
    from PIL import Image

    from ..config import EngineConfig

Source = Annotated[str | None, typer.Argument(metavar="IMAGE", help="The picture: a path or a URL.")]
# Numbers are text: the request reads them, and says what they may be.
By = Annotated[
    str | None,
    typer.Option("--by", metavar="<float>", help="How many times larger [2]; 1 runs the network all the same."),
]
Width = Annotated[str | None, typer.Option("--width", metavar="<int>", help="Width to reach, in place of --by.")]
Height = Annotated[
    str | None, typer.Option("--height", metavar="<int>", help="Height to reach; with --width, both are covered.")
]
Crop = Annotated[bool, typer.Option("--crop", help="Cut what is beyond --width and --height.")]
Name = Annotated[str | None, typer.Option("--upscaler", metavar="NAME", help="Its name; left out, hr_upscaler.")]
Second = Annotated[str | None, typer.Option("--upscaler-2", metavar="NAME", help="Another, blended over the first.")]
Visibility = Annotated[
    str, typer.Option("--upscaler-2-visibility", metavar="<float>", help="How much of it is seen, 0 to 1.")
]
Format = Annotated[str, typer.Option("--format", metavar="png|jpg|webp", help="File format of the result.")]
QUALITY = 95  # where none is given
Quality = Annotated[
    str | None,
    typer.Option("--quality", metavar="<int>", help=f"Quality of jpg and webp. (1 to 100; default {QUALITY})"),
]
Listing = Annotated[
    bool, typer.Option("--list", help="Print the names of the upscalers, and what is wrong with a file, and stop.")
]

FORMATS = {"png": "png", "jpg": "jpg", "jpeg": "jpg", "webp": "webp"}  # by any spelling

# Every field is an option, and none a setting.
OPTIONS = {
    **{name: option(name) for name in UpscaleRequest.model_fields if name not in ("images", "output_format")},
    "output_format": "--format",
}


@partial(takes_settings, without=(*MODEL_FIELDS, "vae_dtype"))
def upscale(
    source: Source = None,
    by: By = None,
    width: Width = None,
    height: Height = None,
    crop: Crop = False,
    upscaler: Name = None,
    upscaler_2: Second = None,
    upscaler_2_visibility: Visibility = "0",
    format: Format = "png",
    quality: Quality = None,
    listing: Listing = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """Make a picture larger and print where it was saved. No Flux model is needed."""
    with Console(json=json, quiet=quiet, debug=debug) as console:
        config = load_config(settings)
        console.typed = console.options = OPTIONS
        names = {"upscaler": upscaler, "upscaler_2": upscaler_2}
        fields = {"by": by, "width": width, "height": height, "crop": crop, **names}
        fields |= {"upscaler_2_visibility": upscaler_2_visibility, "output_format": FORMATS.get(format.lower(), format)}
        check_models_dir(config)
        from ..core.models import TINY
        from ..upscalers.files import UpscalerFiles

        files = UpscalerFiles([config.models_dir, TINY])
        if listing:
            console.names("upscalers", files.names(), files.problems())
            return
        for field, name in names.items():
            if name is not None:
                files.entry(name, field=field)
        if source is None:
            raise RequestError("there is no picture to enlarge; name one", field="image")
        asked = UpscaleRequest(images=(source,), **fields)  # wrong options are told before anything is read
        _enlarge(console, config, source, asked, picture_quality(console, quality, QUALITY, asked.output_format))


def _enlarge(console: Console, config: EngineConfig, source: str, asked: UpscaleRequest, quality: int) -> None:
    """Read the picture, enlarge it as was asked for, and tell where it is."""
    from ..backend.devices import pick_device
    from ..core.engine import LightweightEngine
    from ..core.images import check_folder
    from ..core.limits import check_upscale
    from ..core.pictures import PictureReader
    from ..core.upscaling import target_of, usual_upscaler

    check_folder(config.output_dir)
    picture = PictureReader.of(config).read(source)
    begin = time.perf_counter()
    engine = LightweightEngine(config)
    name = asked.upscaler or usual_upscaler(config, engine.upscalers)
    request = asked.model_copy(update={"images": (picture,), "upscaler": name})
    check_upscale(request, config)
    target_of(request, picture.size, config)
    pick_device(config.device)
    if asked.upscaler is None and name != config.hr_upscaler:
        console.warn(f"{config.hr_upscaler} is not there: enlarged by {name}, which knows drawings only")
    with watched(console) as options:
        (made,) = engine.run_upscale(request, **options).images
    _keep(console, config.output_dir, source, request, made, quality)
    console.say(f"{picture.width}x{picture.height} to {made.width}x{made.height} in {_seconds(begin)}")


def _keep(
    console: Console, folder: Path, source: str, request: UpscaleRequest, made: Image.Image, quality: int
) -> None:
    """Save the picture under a name of its own, and print that."""
    from ..core.filenames import free_name
    from ..core.image_text import PNG_KEY
    from ..core.images import save
    from ..core.upscaling import USUAL_SCALE

    to_a_size = request.width or request.height
    label = f"{made.width}x{made.height}" if to_a_size else f"{request.by or USUAL_SCALE:g}x"
    name, text = free_name(folder, source, label), made.info.get(PNG_KEY)
    saved = save(made, folder, name, format=request.output_format, infotext=text, quality=quality)
    for warning in saved.warnings:
        console.warn(warning)
    if console.json:
        console.result({"path": str(saved.path), "width": made.width, "height": made.height})
    else:
        console.data(str(saved.path))


def _seconds(begin: float) -> str:
    return f"{time.perf_counter() - begin:.1f} s"


def register(app: typer.Typer) -> None:
    app.command("upscale", cls=Grouped)(upscale)
