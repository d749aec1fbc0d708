"""Saving results, and making a saved picture again."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import OutputError, RequestError, counted
from ..request import GenerationRequest
from ..results import GenerationResult
from .describe import picture_hashes, pixels_sha256, sidecar
from .filenames import picture_name
from .images import DEFAULT_QUALITY, Saved, open_image, read_infotext, read_sidecar, save
from .loras import lora_library
from .pictures import pictures_in
from .recipe_text import OURS, Told, loras_of_text, read_text

if TYPE_CHECKING:
    from ..config import EngineConfig
    from .engine import LightweightEngine

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".webp")
"""Of pictures that have sidecars."""


def save_result(result: GenerationResult, folder: Path, *, quality: int = DEFAULT_QUALITY) -> list[Saved]:
    """Write every picture as ``NNNNN-SEED.FORMAT`` with a sidecar beside it, those of its stages as ``NAME-STAGE``.

    Raises:
        OutputError: one could not be written; those before it stay, and are told. Of it nothing is left.
    """
    saved: list[Saved] = []
    try:
        for index in range(len(result.images)):
            saved.append(_save_one(result, index, folder, quality))
    except OutputError as error:
        if len(result.images) > 1:
            error.args = (f"{error}; {len(saved)} of {len(result.images)} pictures were saved",)
        error.saved = tuple(str(row.path) for row in saved)
        raise
    return saved


def _save_one(result: GenerationResult, index: int, folder: Path, quality: int) -> Saved:
    name = picture_name(folder, result.seeds[index])
    keep = partial(save, folder=folder, format=result.request.output_format, quality=quality)
    stages = result.stages[index] if result.stages else {}
    kept = [keep(picture, name=f"{name}-{stage.replace(' ', '-')}") for stage, picture in stages.items()]
    whole = keep(
        result.images[index],
        name=name,
        infotext=result.infotexts[index],
        sidecar=partial(sidecar, result, index),
    )
    return replace(whole, stages=tuple(row.path for row in kept))


@dataclass(frozen=True)
class Recipe:
    """How a saved picture was made: one request for that picture alone, and what the sidecar knows of it.

    Attributes:
        told: what the picture's text tells, where there is no sidecar.
        warnings: a sentence for each thing that is not known, or not done again.
    """

    request: GenerationRequest
    sidecar: Mapping[str, Any] | None
    told: Told | None = None
    warnings: tuple[str, ...] = ()

    @property
    def pixels_sha256(self) -> str | None:
        return self.sidecar.get("pixels_sha256") if self.sidecar else None

    @property
    def interrupted(self) -> bool:
        """The picture's job was ended early, at a step that is not recorded."""
        return bool(self.sidecar and self.sidecar.get("interrupted"))


def with_pictures(recipe: Recipe, given: Mapping[str, Sequence[Path]], warnings: list[str]) -> Recipe:
    """A recipe with the files of pictures that only a hash was kept of, as of all that are sent to a service.

    Where none was, files stand for the paths that were kept, as of pictures that lie elsewhere by now.

    Args:
        given: files by the request's field, ``image`` or ``mask``, in the order in which they were sent.
        warnings: gets a sentence for each file that does not have the hash, or of which none was kept.

    Raises:
        RequestError: a file is missing, too much, or no picture.
    """
    found: dict[str, Any] = {}
    for field in ("image", "mask"):
        held, files = getattr(recipe.request, field), given.get(field, ())
        if recipe.told is not None:
            found[field] = _told_picture(recipe.told, field, files, warnings)
            continue
        every = pictures_in(held)
        hashes = [each for each in every if _is_hash(each)]
        if files and not hashes:
            told = [] if recipe.sidecar and field in recipe.sidecar.get("pictures", {}) else warnings
            found[field] = _in_place(held, every, field, files, told)
            continue
        if len(files) != len(hashes):
            raise RequestError(
                f"{field}: {_kept(recipe, field, hashes)}, and {_given(files)}; give as many, by --{field} FILE",
                field=field,
            )
        known = dict(zip(hashes, files, strict=True))
        warnings += [
            f"{field}: {file} is not the file that was sent, or was written otherwise: its hash is not {kept}"
            for kept, file in known.items()
            if kept not in _hashes(file)
        ]
        every = [known[each] if _is_hash(each) else each for each in every]
        if hashes:
            found[field] = tuple(every) if isinstance(held, (list, tuple)) else every[0]
        _check_there(every, field)
    return replace(recipe, request=recipe.request.model_copy(update=found))


def with_loras(recipe: Recipe, given: Sequence[str], config: EngineConfig, warnings: list[str]) -> Recipe:
    """A recipe of a text with the LoRAs that it names without a strength.

    Args:
        given: those LoRAs, as ``loras`` of a request.
        warnings: gets a sentence for each that stands for another, or for none.

    Raises:
        RequestError: one is missing; or a sidecar tells them all.
        ModelNotFoundError: there is none of that name.
    """
    if recipe.told is None:
        if given:
            raise RequestError("loras: the sidecar tells those of the picture; leave --lora out", field="loras")
        return recipe
    request, told = loras_of_text(recipe.told, recipe.request, given, cache(partial(lora_library, config)))
    warnings += told
    return replace(recipe, request=request)


def _told_picture(told: Told, field: str, files: Sequence[Path], warnings: list[str]) -> str | None:
    """The file for a picture that a text only says there was. Of a mask without blur it does not say even that."""
    if field in told.pictures and not files:
        what = "a start picture" if field == "image" else "a mask"
        raise RequestError(
            f"{field}: the picture was made with {what}, which its text does not hold; give it by --{field} FILE",
            field=field,
        )
    most = 1 if told.pictures else 0
    if len(files) > most:
        raise RequestError(
            f"{field}: the picture was made with {most or 'none'}, and {_given(files)}; give as many",
            field=field,
        )
    for file in files:
        open_image(file)
        warnings.append(f"{field}: whether {file} is what the picture was made with is not known")
    return str(files[0]) if files else None


def _in_place(held: Any, every: Sequence[Any], field: str, files: Sequence[Path], warnings: list[str]) -> Any:
    """Files in place of the paths or addresses that a request had in a field."""
    if len(files) != len(every):
        raise RequestError(
            f"{field}: the picture was made with {len(every) or 'none'}, and {_given(files)}; give as many, or leave "
            "them out",
            field=field,
        )
    for file, before in zip(files, every, strict=True):
        open_image(file)
        warnings.append(f"{field}: {file} stands for {before}; whether it is the same is not known")
    return tuple(map(str, files)) if isinstance(held, (list, tuple)) else str(files[0])


def _given(files: Sequence[Path]) -> str:
    return f"{counted(len(files), 'file')} {'was' if len(files) == 1 else 'were'} given"


def _check_there(every: Sequence[Any], field: str) -> None:
    """Refuse a recipe with a picture that is not where it was."""
    for each in every:
        if isinstance(each, str) and "://" not in each and not os.path.exists(each):
            raise RequestError(
                f"{field}: {each:.200} is not there any more; say where it is now by --{field} FILE", field=field
            )


def _kept(recipe: Recipe, field: str, hashes: Sequence[str]) -> str:
    """How many pictures of a field were not kept; of a list, which of those that were sent this one began with."""
    told = f"{len(hashes)} pictures of it were not kept, only their hashes"
    sent = recipe.sidecar["request"].get(field) if recipe.sidecar else None
    if not (hashes and recipe.sidecar and isinstance(sent, list) and len(sent) > 1):
        return told
    return f"{told}: this one began with number {recipe.sidecar['index'] + 1} of {len(sent)} that were sent"


def _is_hash(given: Any) -> bool:
    return isinstance(given, str) and given.startswith("sha256:")


def _hashes(file: Path) -> Iterator[str]:
    """What ``describe`` may have written of a picture: by its file, its base64 with or without a head, its pixels."""
    picture, data = open_image(file), file.read_bytes()
    text = base64.b64encode(data)
    for sent in (data, text, *(b"data:image/%b;base64,%b" % (kind, text) for kind in (b"png", b"jpeg", b"webp"))):
        yield f"sha256:{hashlib.sha256(sent).hexdigest()}"
    yield f"sha256:{pixels_sha256(picture)}"


@dataclass(frozen=True)
class Replay:
    """A picture made again.

    ``identical`` is None where the first one's pixels are unknown (jpg or webp alone), or it was ended early.
    """

    result: GenerationResult
    identical: bool | None
    differences: tuple[str, ...]


def picture_of(path: Path) -> Path:
    """The picture that a sidecar lies beside; of any other file, the file itself.

    Raises:
        RequestError: there is none.
    """
    if path.suffix.lower() != ".json" or not path.is_file():
        return path
    beside = [path.with_suffix(suffix) for suffix in SUFFIXES]
    found = next((each for each in beside if each.is_file()), None)
    if found is None:
        names = " or ".join(each.name for each in beside)
        raise RequestError(f"{path}: its picture ({names}) is not beside it; put it there", field="image")
    return found


def _whole_of(stage: Path) -> str:
    """A hint where a file is the picture of a stage of another beside it, as ``save_result`` names them."""
    found = re.match(r"\d+-\d+(?=-\D)", stage.stem)
    whole = stage.with_name(f"{found[0]}{stage.suffix}") if found else stage
    return f", but {whole.name} may, whose stage it is" if whole != stage and whole.is_file() else ""


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
            starts = fields.get("image")
            if isinstance(starts, list) and len(starts) > 1:  # one for each picture that was asked for
                fields["image"] = starts[data["index"]]
            return Recipe(GenerationRequest.over(fields, {}), data)  # what had no effect was told to who asked
        except (KeyError, TypeError, IndexError):
            raise RequestError(
                f"the sidecar of {path.name} is not one of this engine; delete it to go by the picture's own text",
                field="image",
            ) from None
    text = read_infotext(picture)
    if not text:
        raise RequestError(
            f"{path.name} carries no parameters and has no sidecar; it cannot be made again{_whole_of(path)}",
            field="image",
        )
    told = read_text(text)
    alone = (
        f"{path.with_suffix('.json').name} is not there, so that the picture's own text is gone by: settings and text "
        "encoders, which it does not tell, are those of now, and fields that it has no key for are at their defaults"
    )
    return Recipe(GenerationRequest.over(told.fields, {}), None, told, (alone, *told.warnings))


def replay(engine: LightweightEngine, path: Path, recipe: Recipe | None = None, **run_options: Any) -> Replay:
    """Make a saved picture again and compare.

    Args:
        recipe: left out, that of the picture, whose warnings are logged.
        run_options: for ``LightweightEngine.run``.
    """
    if recipe is None:
        recipe = with_loras(with_pictures(read_recipe(path), {}, []), (), engine.config, [])
        for sentence in recipe.warnings:
            log.warning("%s", sentence)
    result = engine.run(recipe.request, **run_options)
    known = recipe.pixels_sha256
    if known is None and path.suffix.lower() == ".png":
        known = pixels_sha256(open_image(path))
    identical = None if known is None or recipe.interrupted else pixels_sha256(result.images[0]) == known
    if recipe.told is not None:
        return Replay(result, identical, tuple(_differences_in_text(recipe.told, result)))
    return Replay(result, identical, tuple(_differences(recipe.sidecar or {}, result)))


def _differences_in_text(told: Told, result: GenerationResult) -> Iterator[str]:
    """What is not as the picture's text has it: of other programs, a LoRA's hash may be of a part of its file."""
    drawn = next((file for file in result.models if file.role == "transformer"), None)
    if drawn is not None and told.model_hash and drawn.sha256:
        if not drawn.sha256.startswith(told.model_hash.lower()):
            yield f"another transformer file: {drawn.name}, where the text has {told.model} ({told.model_hash})"
    elif drawn is not None:
        yield f"perhaps another transformer file: {drawn.name}, whose hash is not known"
    if not told.is_ours:
        return
    hashes = [row.sha256 for row in result.loras]
    for name, digest in told.loras.items():
        if not any(sha256.startswith(digest) for sha256 in hashes):
            yield f"another LoRA file: {name} had the hash {digest}"
    if told.version != f"{OURS} {__version__}":
        yield f"another version: {told.version} then, {OURS} {__version__} now"


def _differences(data: Mapping[str, Any], result: GenerationResult) -> list[str]:
    """What is not as it was when the picture was first made."""
    found = []
    hashes = {file["role"]: file["sha256"] for file in data.get("models", ())}
    for file in result.models:
        before = hashes.get(file.role, "")
        if before is None or file.sha256 is None:
            found.append(f"perhaps another {file.role} file: {file.name}, whose hash is not known")
        elif before != file.sha256:
            found.append(f"another {file.role} file: {file.name}")
    for name, value in data.get("settings", {}).items():
        if result.settings.get(name) != value:
            found.append(f"another {name}: {value} then, {result.settings.get(name)} now")
    now = picture_hashes(result.request)
    for field, kept in data.get("pictures", {}).items():
        mine = [kept[data["index"]]] if field == "image" and len(kept) > 1 else kept
        if field in now and now[field] != mine:
            found.append(f"another {field}: its file is not what it was")
    if (together := _at_once(data)) > 1:
        found.append(f"drawn alone: {together} at once then, which rounds otherwise")
    if data.get("device") != result.device:
        found.append(f"another device: {data.get('device')} then, {result.device} now")
    for name, version in data.get("versions", {}).items():
        if result.versions.get(name) != version:
            found.append(f"another {name}: {version} then, {result.versions.get(name)} now")
    return found


def _at_once(data: Mapping[str, Any]) -> int:
    """How many pictures were drawn with this one, itself included."""
    asked = data.get("request", {})
    size, count = asked.get("batch_size", 1), asked.get("num_outputs", 1)
    return min(size, count - data.get("index", 0) // size * size)
