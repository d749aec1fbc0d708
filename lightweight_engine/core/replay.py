"""Saving results, and making a saved picture again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..request import GenerationRequest, GenerationResult
from .describe import pixels_sha256, sidecar
from .filenames import next_number
from .images import DEFAULT_QUALITY, Saved, open_image, read_infotext, read_sidecar, save
from .infotext_parse import request_fields

if TYPE_CHECKING:
    from .engine import LightweightEngine


def save_result(result: GenerationResult, folder: Path, *, quality: int = DEFAULT_QUALITY) -> list[Saved]:
    """Write every picture as ``NNNNN-SEED.FORMAT`` with a sidecar beside it, those of its stages as ``NAME-STAGE``.

    Raises:
        OutputError: one could not be written; those before it stay, of it nothing is left.
    """
    saved = []
    for index, image in enumerate(result.images):
        name = f"{next_number(folder):05}-{result.seeds[index]}"
        stages = result.stages[index] if result.stages else {}
        kept = [
            save(
                picture,
                folder,
                f"{name}-{stage.replace(' ', '-')}",
                format=result.request.output_format,
                quality=quality,
            )
            for stage, picture in stages.items()
        ]
        saved.append(
            replace(
                save(
                    image,
                    folder,
                    name,
                    format=result.request.output_format,
                    infotext=result.infotexts[index],
                    quality=quality,
                    sidecar=sidecar(result, index),
                ),
                stages=tuple(row.path for row in kept),
            )
        )
    return saved


@dataclass(frozen=True)
class Recipe:
    """How a saved picture was made: one request for that picture alone, and what the sidecar knows of it."""

    request: GenerationRequest
    sidecar: Mapping[str, Any] | None

    @property
    def pixels_sha256(self) -> str | None:
        return self.sidecar.get("pixels_sha256") if self.sidecar else None

    @property
    def interrupted(self) -> bool:
        """The picture's job was ended early, at a step that is not recorded."""
        return bool(self.sidecar and self.sidecar.get("interrupted"))


@dataclass(frozen=True)
class Replay:
    """A picture made again.

    ``identical`` is None where the first one's pixels are unknown (jpg or webp alone), or it was ended early.
    """

    result: GenerationResult
    identical: bool | None
    differences: tuple[str, ...]


def read_recipe(path: Path) -> Recipe:
    """The request behind a picture, from its sidecar, else from the text it carries.

    Raises:
        RequestError: the file is no picture, or carries neither.
    """
    picture = open_image(path)
    data = read_sidecar(path)
    if data is not None:
        try:
            fields = {**data["request"], "seed": data["seed"], "subseed": data["subseed"], "num_outputs": 1}
            return Recipe(GenerationRequest(**fields), data)
        except (KeyError, TypeError):
            raise RequestError(
                f"the sidecar of {path.name} is not one of this engine; delete it to go by the picture's own text",
                field="image",
            ) from None
    text = read_infotext(picture)
    if not text:
        raise RequestError(
            f"{path.name} carries no parameters and has no sidecar; it cannot be made again", field="image"
        )
    return Recipe(GenerationRequest(**request_fields(text)), None)


def replay(engine: LightweightEngine, path: Path, recipe: Recipe | None = None, **run_options: Any) -> Replay:
    """Make a saved picture again and compare.

    Args:
        recipe: left out, that of the picture.
        run_options: for ``LightweightEngine.run``.
    """
    recipe = recipe or read_recipe(path)
    result = engine.run(recipe.request, **run_options)
    known = recipe.pixels_sha256
    if known is None and path.suffix.lower() == ".png":
        known = pixels_sha256(open_image(path))
    identical = None if known is None or recipe.interrupted else pixels_sha256(result.images[0]) == known
    return Replay(result, identical, tuple(_differences(recipe.sidecar, result)))


def _differences(data: Mapping[str, Any] | None, result: GenerationResult) -> list[str]:
    """What is not as it was when the picture was first made."""
    if data is None:
        return []
    found = []
    hashes = {file["role"]: file["sha256"] for file in data.get("models", ())}
    for file in result.models:
        if hashes.get(file.role) != file.sha256:
            found.append(f"another {file.role} file: {file.name}")
    for name, value in data.get("settings", {}).items():
        if result.settings.get(name) != value:
            found.append(f"another {name}: {value} then, {result.settings.get(name)} now")
    if data.get("device") != result.device:
        found.append(f"another device: {data.get('device')} then, {result.device} now")
    for name, version in data.get("versions", {}).items():
        if result.versions.get(name) != version:
            found.append(f"another {name}: {version} then, {result.versions.get(name)} now")
    return found
