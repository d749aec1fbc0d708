"""``demo``: what the engine does, on the model that ships with it: prompts, LoRAs, and a whole production job."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MissingDependencyError
from ..request import MAX_STEPS, GenerationRequest
from .console import Console
from .options import Debug, Json, Quiet, load_config, read_path
from .session import start_engine, watched

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..core.engine import LightweightEngine

PROMPTS = (
    "a boy with short brown hair, green shirt, two hands up, purple background",
    "an angry man with spiky black hair, tan skin, orange shirt, pink background",
    "a happy person with curly blue hair, dark skin, red shirt, one hand raised, grey background",
    "a calm woman with a grey bun, square glasses, black shirt, yellow background",
    "a girl with a blonde ponytail, purple shirt, white background",
    "a man with sunglasses, short blonde hair, white shirt, orange background",
)
STYLED = "a surprised girl with a pink bun, light skin, purple shirt, both hands raised, green background"
LORAS: tuple[tuple[str, ...], ...] = ((), ("night:0.5",), ("night",), ("hat:0.5",), ("hat",), ("night", "hat"))
PRODUCTION = "a smiling person with curly green hair, red shirt, two hands up, blue background"
STEPS = 20
FIRST_SEED = 100

# The job of the production service, at the size of the demonstration model.
JOB: Mapping[str, Any] = {
    "loras": ("night:0.5",), "hr_scale": 1.5, "hr_steps": 10, "hr_upscaler": "4x_tiny", "denoising_strength": 0.3,
    "adetailer": True, "save_stages": True,
}  # fmt: skip
STAGES = {
    "base": "first pass",
    "upscaled": "enlarged 1.5 times by 4x_tiny",
    "undetailed": "hires pass",
    "found": "what the detectors find",
    "pass 1": "face painted anew",
    "pass 2": "hands painted anew",
}

COLUMNS = 6
CELL, MARGIN = 256, 12
CAPTION_LINES, LINE_HEIGHT, FONT_SIZE, TITLE_HEIGHT = 4, 15, 12, 26

Folder = Annotated[str | None, typer.Option("--output-dir", "-o", metavar="FOLDER", help="(default outputs/demo)")]
Steps = Annotated[
    str,
    typer.Option(
        "--steps",
        "-s",
        metavar="<int>",
        show_default=False,
        help=f"Sampling steps. (1 to {MAX_STEPS}; default {STEPS})",
    ),
]


@dataclass
class Row:
    """A row of the contact sheet: pictures with captions."""

    title: str
    cells: list[tuple[Image, str]] = field(default_factory=list)


@dataclass
class Show:
    """Draws and saves pictures one after another, and says so."""

    console: Console
    engine: LightweightEngine
    folder: Path
    steps: int
    count: int
    saved: list[dict[str, Any]] = field(default_factory=list)

    def draw(self, name: str, **fields: Any) -> tuple[Image, Mapping[str, Image]]:
        """A picture and its stages; its file has the same name at every run, so that a run replaces the last."""
        from ..core.describe import sidecar
        from ..core.images import save

        request = GenerationRequest(steps=self.steps, **fields)
        begin = time.perf_counter()
        with watched(self.console, f"{len(self.saved) + 1}/{self.count}") as options:
            result = self.engine.run(request, **options)
        took = time.perf_counter() - begin
        image, stages = result.images[0], result.stages[0]
        name = f"{len(self.saved) + 1:02}-{name}"
        path = save(image, self.folder, name, infotext=result.infotexts[0], sidecar=sidecar(result, 0)).path
        for stage, picture in stages.items():
            save(picture, self.folder, f"{name}-{stage.replace(' ', '-')}")
        seconds = {stage: round(value, 3) for stage, value in result.timings.items()}
        self.saved.append({"path": str(path), "prompt": request.prompt, "seed": request.seed, "timings": seconds})
        self.console.say(f"{path}  {took:.1f} s  {request.prompt}{''.join(f' + {lora}' for lora in _names(request))}")
        return image, stages


def demo(
    output_dir: Folder = None,
    steps: Steps = str(STEPS),
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw prompts, LoRAs and a production job with the demonstration model `tiny`, and a contact sheet of them."""
    with Console(json=json, quiet=quiet, debug=debug) as console:
        from ..core.images import check_folder, save
        from ..core.models import TINY

        console.typed = ("steps",)
        asked = GenerationRequest.over({}, {"steps": steps})  # reads the text, or says what it may be
        config = load_config({}, models_dir=TINY, offline=True)
        folder = config.output_dir / "demo" if output_dir is None else read_path("--output-dir", output_dir)
        check_folder(folder)
        if find_spec("spandrel") is None:  # told now, and not at the last picture
            raise MissingDependencyError(
                "the production job enlarges with a network, which needs spandrel: "
                "pip install 'lightweight-engine[upscale]'"
            )
        begin = time.perf_counter()
        show = Show(console, start_engine(console, config), folder, asked.steps, len(PROMPTS) + len(LORAS) + 1)
        sheet = save(contact_sheet([prompts(show), loras(show), production(show)]), folder, "contact_sheet").path
        took = time.perf_counter() - begin
        if json:
            console.result({"contact_sheet": str(sheet), "seconds": round(took, 3), "images": show.saved})
        else:
            console.data(str(sheet))
        console.say(f"{len(show.saved)} pictures of {asked.steps} steps in {took:.1f} s; see {sheet}")


def prompts(show: Show) -> Row:
    row = Row("Prompts")
    for number, prompt in enumerate(PROMPTS):
        row.cells.append((show.draw("prompt", prompt=prompt, seed=FIRST_SEED + number)[0], prompt))
    return row


def loras(show: Show) -> Row:
    """One prompt and seed with LoRAs alone, together, and at half strength."""
    row = Row(f"LoRAs: {STYLED}")
    for chosen in LORAS:
        name = "-".join(("lora", *chosen)).replace(":", "-")
        image, _ = show.draw(name, prompt=STYLED, seed=FIRST_SEED, loras=chosen)
        row.cells.append((image, " + ".join(chosen) or "none"))
    return row


def production(show: Show) -> Row:
    """Every stage of a job with all that a service asks for."""
    row = Row(f"A production job, stage by stage: {PRODUCTION}")
    fields = {"prompt": PRODUCTION, "seed": FIRST_SEED, **JOB}
    _, stages = show.draw("production", **fields)
    found = show.engine.find(stages["undetailed"], GenerationRequest(**fields))[1]
    pictures = {**stages, "found": found}
    row.cells = [(pictures[stage], caption) for stage, caption in STAGES.items()]
    return row


def _names(request: GenerationRequest) -> list[str]:
    return [f"{spec.name}{'' if spec.scale == 1 else f':{spec.scale:g}'}" for spec in request.loras]


def contact_sheet(rows: list[Row]) -> Image:
    """Rows of pictures, each row below its title and each picture above its caption."""
    from PIL import Image, ImageDraw, ImageFont

    cell = (CELL + MARGIN, CELL + CAPTION_LINES * LINE_HEIGHT + MARGIN)
    sheet = Image.new("RGB", (COLUMNS * cell[0] + MARGIN, len(rows) * (cell[1] + TITLE_HEIGHT) + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    title_font, font = ImageFont.load_default(FONT_SIZE + 4), ImageFont.load_default(FONT_SIZE)
    letters = max(int(CELL / pen.textlength("abcdefghij", font=font) * 10), 1)
    for number, row in enumerate(rows):
        top = MARGIN + number * (cell[1] + TITLE_HEIGHT)
        pen.text((MARGIN, top), row.title, fill="black", font=title_font)
        for column, (picture, caption) in enumerate(row.cells):
            left = MARGIN + column * cell[0]
            sheet.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top + TITLE_HEIGHT))
            for line, text in enumerate(textwrap.wrap(caption, letters)[:CAPTION_LINES]):
                place = (left, top + TITLE_HEIGHT + CELL + 2 + line * LINE_HEIGHT)
                pen.text(place, text, fill="black", font=font)
    return sheet


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)
