"""From the inputs of ``predict()`` to a request of the engine, and to the model that it is for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import EngineConfig
from ...core.choice import choose_models
from ...core.folders import put_into
from ...core.models import SLOTS, ModelLibrary, title_of
from ...core.pictures import PictureReader
from ...errors import ModelNotFoundError, RequestError
from ...labels import resolve_sampler, storage_name
from ...request import GenerationRequest
from .inputs import ASPECT_RATIOS, AUTOMATIC, INPUTS, SAMPLERS, SCHEDULERS

if TYPE_CHECKING:
    from PIL.Image import Image

NO_IMAGE = ("", "runpod")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):", re.ASCII)
CELL = 16  # pixels that a side is a multiple of

# Input -> setting, role, and the file that the service of old took the module from.
MODULES = {
    "enable_clip_l": ("clip", "clip", "clip_l"),
    "enable_t5xxl_fp16": ("t5", "t5", "t5xxl_fp16"),
    "enable_ae": ("vae", "autoencoder", "ae"),
}


def names_of(inputs: Mapping[str, Any]) -> dict[str, str]:
    """What the caller of these inputs knows the fields of a request as, by the fields, where that is another name."""
    names = {row.field: name for name, row in INPUTS.items() if row.field and row.field != name}
    names |= {setting: name for name, (setting, _, _) in MODULES.items() if inputs[name]}
    if inputs["debug_flux_checkpoint_url"]:
        names["checkpoint"] = "debug_flux_checkpoint_url"
    if inputs["image"].strip() not in NO_IMAGE:
        names["denoising_strength"] = "prompt_strength"
    return {**names, "storage_dtype": "forge_unet_storage_dtype"}


def request_of(inputs: Mapping[str, Any], reader: PictureReader) -> GenerationRequest:
    """The request of inputs that were checked.

    Raises:
        RequestError: a value has no meaning for Flux, or the picture cannot be read.
        DownloadError: the picture's URL may not be asked, or does not give it.
    """
    # Before a picture is fetched for nothing.
    resolve_sampler(inputs["sampler"], inputs["scheduler"], offered=(SAMPLERS, SCHEDULERS))
    fields = {row.field: inputs[name] for name, row in INPUTS.items() if row.field}
    if inputs["lora_urls"]:
        fields["lora_scales"] = inputs["lora_scales"]
    picture = _picture(inputs["image"].strip(), reader)
    if picture is not None:
        fields |= {"image": picture, "denoising_strength": inputs["prompt_strength"], "enable_hr": False}
    else:
        fields["resize_mode"] = 0  # the profile's is for pictures, and would be told to have no effect
    fields["width"], fields["height"] = size_of(inputs, picture)
    return GenerationRequest.from_profile("cog", fields)


def without_effect(inputs: Mapping[str, Any]) -> list[str]:
    """A sentence for each input that no field of the request came of. Cog fills in what a caller leaves out, so that
    a default asks for nothing."""
    pictured, sides = inputs["image"].strip() not in NO_IMAGE, bool(inputs["width"]) + bool(inputs["height"])
    asked = {name for name in ("prompt_strength", "aspect_ratio") if inputs[name] != INPUTS[name].default}
    sentences = []
    if "prompt_strength" in asked and not pictured:
        sentences.append("prompt_strength had no effect without image")
    if "aspect_ratio" in asked and sides + pictured > 1:
        beside = "width and height" if sides == 2 else "image and a side"
        sentences.append(f"aspect_ratio had no effect beside {beside}")
    return sentences


def _picture(given: str, reader: PictureReader) -> Image | None:
    if given in NO_IMAGE:
        return None
    scheme = _SCHEME.match(given)
    if scheme and scheme[1].lower() not in ("http", "https", "data"):
        raise RequestError(
            f"image: unsupported input, an address with {scheme[1]:.20}:; give a data URL, base64 or an http(s) URL",
            field="image",
        )
    return reader.read(given)


def size_of(inputs: Mapping[str, Any], picture: Image | None) -> tuple[int, int]:
    """Width and height in pixels: as given; a side that is 0 follows the picture's aspect, else ``aspect_ratio``."""
    width, height = inputs["width"], inputs["height"]
    usual = ASPECT_RATIOS[inputs["aspect_ratio"]]
    if width and height:
        return width, height
    if picture is None and not (width or height):
        return usual
    across, down = usual if picture is None else picture.size
    if not (width or height):
        unit = math.sqrt(usual[0] * usual[1] / (across * down))  # as many pixels as without a picture
        return _side(across * unit), _side(down * unit)
    return (width, _side(width * down / across)) if width else (_side(height * across / down), height)


def _side(length: float) -> int:
    return max(round(length / CELL), 1) * CELL


def model_of(inputs: Mapping[str, Any], config: EngineConfig, checkpoint: Path | None) -> dict[str, Any]:
    """The fields of a request that name the model which the inputs ask for, where it is not the configured one.

    Args:
        checkpoint: file that was fetched for it.

    Raises:
        ModelNotFoundError: a module has no file of its own.
    """
    chosen: dict[str, Any] = {}
    if checkpoint is not None:
        chosen["checkpoint"] = str(checkpoint)
    storage = inputs["forge_unet_storage_dtype"]
    if not storage.startswith(AUTOMATIC):
        chosen["storage_dtype"] = storage_name(storage)
    wanted = [name for name in MODULES if inputs[name]]
    if wanted:
        models = choose_models(config, [])
        library = ModelLibrary([models.root])
        for name in wanted:
            setting, role, usual = MODULES[name]
            chosen[setting] = _own_file(library, name, role, usual, getattr(config, setting))
        if checkpoint is None and config.checkpoint is None and not models.is_tiny:  # of which a warning tells
            chosen["checkpoint"] = str(models.own_parts["transformer"].checkpoint.path)
    return chosen


def _own_file(library: ModelLibrary, name: str, role: Any, usual: str, configured: str | None) -> str:
    """The path of a file that holds one module alone: the configured one, that of the usual name, else the largest."""
    if configured:
        return configured
    found = [entry for entry in library.ls() if entry.can_be(role) and "transformer" not in entry.roles]
    found.sort(key=lambda entry: (title_of(entry.path) == usual, entry.size), reverse=True)
    if not found:
        root = library.roots[0]
        raise ModelNotFoundError(
            f"{name}: there is no file of its own for {role} in {root}; put {usual}.safetensors into "
            f"{put_into(root, SLOTS[role].folders)} there"
        )
    return str(found[0].path)
