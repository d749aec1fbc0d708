"""``demo``: several prompts drawn by the model that ships with the engine, and a contact sheet of them."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..request import GenerationRequest
from .console import Console
from .options import Debug, Json, Quiet, load_config
from .progress import speed
from .session import start_engine, watched

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = (
    "a boy with short brown hair, green shirt, two hands up, purple background",
    "an angry man with spiky black hair, tan skin, orange shirt, pink background",
    "a surprised girl with a pink bun, light skin, purple shirt, both hands raised, green background",
    "a man with sunglasses, short blonde hair, white shirt, orange background",
    "a happy person with curly blue hair, dark skin, red shirt, one hand raised, grey background",
    "a calm woman with a grey bun, square glasses, black shirt, yellow background",
    "a girl with a blonde ponytail, purple shirt, white background",
    "a smiling person with curly green hair, red shirt, waving, blue background",
)
STEPS = 20
FIRST_SEED = 100

COLUMNS = 4
MARGIN = 12
CAPTION_LINES, LINE_HEIGHT, FONT_SIZE = 4, 15, 12

Folder = Annotated[Path | None, typer.Option("--output-dir", "-o", metavar="FOLDER", help="(default outputs/demo)")]
Steps = Annotated[int, typer.Option("--steps", "-s", min=1, max=1000, help="Sampling steps.")]


def demo(
    output_dir: Folder = None, steps: Steps = STEPS, json: Json = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Draw several prompts with the demonstration model `tiny`, and a contact sheet of them."""
    with Console(json=json, quiet=quiet, debug=debug) as console:
        from ..core.describe import sidecar
        from ..core.images import check_folder, save
        from ..core.models import TINY

        config = load_config({}, models_dir=TINY, offline=True)
        folder = output_dir or config.output_dir / "demo"
        check_folder(folder)
        engine = start_engine(console, config)
        begin = time.perf_counter()
        pictures: list[Image] = []
        rows = []
        for number, prompt in enumerate(PROMPTS):
            request = GenerationRequest(prompt=prompt, steps=steps, seed=FIRST_SEED + number)
            with watched(console, f"{number + 1}/{len(PROMPTS)}") as options:
                result = engine.run(request, **options)
            name = f"{number + 1:02}-{request.seed}"  # the same at every run, so that a run replaces the last
            saved = save(result.images[0], folder, name, infotext=result.infotexts[0], sidecar=sidecar(result, 0))
            pictures.append(result.images[0])
            seconds = {name: round(value, 3) for name, value in result.timings.items()}
            rows.append({"path": str(saved.path), "prompt": prompt, "seed": request.seed, "timings": seconds})
            rate = steps / max(result.timings.get("sample", 0.0), 1e-9)
            console.say(f"{saved.path}  {sum(result.timings.values()):.1f} s, {speed(rate)}  {prompt}")
        sheet = save(contact_sheet(pictures, PROMPTS), folder, "contact_sheet").path
        took = time.perf_counter() - begin
        if json:
            console.result({"contact_sheet": str(sheet), "seconds": round(took, 3), "images": rows})
        else:
            console.data(str(sheet))
        console.say(f"{len(pictures)} pictures of {steps} steps in {took:.1f} s; see {sheet}")


def contact_sheet(pictures: list[Image], captions: tuple[str, ...]) -> Image:
    """The pictures in rows, each with its caption below."""
    from PIL import Image, ImageDraw, ImageFont

    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    cell = (width + MARGIN, height + CAPTION_LINES * LINE_HEIGHT + MARGIN)
    columns = min(COLUMNS, len(pictures))
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, lines * cell[1] + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    letters = max(int(width / pen.textlength("abcdefghij", font=font) * 10), 1)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = MARGIN + index % columns * cell[0]
        top = MARGIN + index // columns * cell[1]
        sheet.paste(picture, (left, top))
        for number, line in enumerate(textwrap.wrap(caption, letters)[:CAPTION_LINES]):
            pen.text((left, top + height + 2 + number * LINE_HEIGHT), line, fill="black", font=font)
    return sheet


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)
