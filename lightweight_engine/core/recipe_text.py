"""The request behind a picture's text alone: what it tells, and a word on each thing that it does not.

The text is Forge's, which names a start picture, a mask and LoRAs that acted without saying what they are. A request
without them would draw another picture, so that they have to be given. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import EngineError, RequestError, about, some_of
from ..extensions.detailer_infotext import PREFIX as DETAILER
from ..extensions.detailer_infotext import passes_in
from ..flux.prompt import parse_networks, read_lora_tag
from ..lora_spec import LoraSpec
from ..request import GenerationRequest
from .infotext import LORA_HASHES, MASKED_CONTENT, SAME_CHOICES, lora_key
from .infotext_parse import DEFAULTS, REQUEST_FIELDS, Rows, fields_in, parse_infotext, request_fields
from .lora_sources import kept_source

if TYPE_CHECKING:
    from ..extensions.lora_library import LoraLibrary

OURS = "lightweight-engine"

MASK_FIELDS: Rows = {
    "Mask mode": ("inpainting_mask_invert", lambda text: text == "Inpaint not masked"),
    "Mask blur": ("mask_blur", int),
    "Inpaint area": ("inpaint_full_res", lambda text: text == "Only masked"),
    "Masked area padding": ("inpaint_full_res_padding", int),
    "Masked content": ("inpainting_fill", MASKED_CONTENT.index),
}
"""Which request field a key of inpainting fills; whichever is there says that there was a mask."""

_OF_IMAGE = ("Init image hash", "Noise multiplier", *MASK_FIELDS)
_NEEDED = {"Steps": "steps", "Sampler": "sampler", "CFG scale": "cfg_scale", "Size-1": "width and height"}
# Fields of image-to-image that no key tells, and those of a mask.
_UNTOLD = "resize_mode, img2img_upscaler, background_color, img2img_extra_noise, img2img_fix_steps, color_correction"
_UNTOLD_OF_MASK = "mask_blur_y, mask_round"
# Keys that are looked at here, or that change nothing of a picture drawn by Flux.
_READ = frozenset(
    (
        *("Prompt", "Negative prompt", *REQUEST_FIELDS, *_OF_IMAGE, LORA_HASHES, "Model", "Model hash"),
        *("Version", "User", "Batch size", "Batch pos", "Clip skip", "Image CFG scale", "Conditional mask weight"),
    )
)


@dataclass(frozen=True)
class Told:
    """What a picture's text tells.

    Attributes:
        fields: of the request.
        pictures: those fields of it that hold a picture which the text only says there was.
        loras: name -> short hash of those that acted.
        model: name of the checkpoint; with ``model_hash``, the first digits of its SHA-256.
        version: what made the picture.
        warnings: a sentence for each thing that the text does not tell, or that this engine does not do.
    """

    fields: Mapping[str, Any]
    pictures: tuple[str, ...] = ()
    loras: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    model_hash: str | None = None
    version: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        return self.version.startswith(OURS)


def read_text(text: str) -> Told:
    """
    Raises:
        RequestError: the text has no seed, or a value that cannot be read.
    """
    keys = parse_infotext(text, defaults=False)
    if "Seed" not in keys:
        raise RequestError(
            "seed: the picture's text tells none, without which it cannot be made again; give what it tells to "
            "`generate`",
            field="seed",
        )
    passes, not_run = passes_in(keys)
    pictures = _pictures(keys)
    fields = {"noise_source": DEFAULTS["RNG"], **request_fields(text), "adetailer_passes": passes}
    if pictures:
        fields |= {"mask_blur": 0, **fields_in(keys, MASK_FIELDS)}  # a blur of 0 is left out of the text
    told = Told(
        fields,
        pictures,
        _hashes(keys.get(LORA_HASHES, "")),
        keys.get("Model"),
        keys.get("Model hash"),
        keys.get("Version", ""),
    )
    return replace(told, warnings=(*_untold(told, keys), *_not_done(keys, not_run)))


def _pictures(keys: Mapping[str, str]) -> tuple[str, ...]:
    """Fields of the pictures that a job began with: it has a strength, and none of a hires pass."""
    if not any(key in keys for key in _OF_IMAGE) and ("Denoising strength" not in keys or "Hires upscaler" in keys):
        return ()
    return ("image", "mask") if any(key in keys for key in MASK_FIELDS) else ("image",)


def _hashes(text: str) -> dict[str, str]:
    """The names and hashes of ``Lora hashes``."""
    pairs = (pair.rpartition(":") for pair in text.split(","))
    return {name.strip(): digest.strip() for name, colon, digest in pairs if colon}


def _untold(told: Told, keys: Mapping[str, str]) -> Iterator[str]:
    missing = [name for key, name in _NEEDED.items() if key not in keys]
    if missing:
        yield f"the picture's text does not tell {', '.join(missing)}; the defaults are taken"
    if not told.is_ours:
        made = f" ({told.version[:80]})" if told.version else ""
        yield f"the picture was not made by this engine{made}, whose numbers are others: do not expect the same pixels"
    if told.pictures:
        masked = f", {_UNTOLD_OF_MASK}" if "mask" in told.pictures else ", or whether there was a mask without blur"
        skipped = ", skip_img2img" if told.fields["adetailer_passes"] else ""
        yield f"image: the picture's text does not tell {_UNTOLD}{skipped}{masked}; the defaults are taken"


def _not_done(keys: Mapping[str, str], not_run: Sequence[str]) -> Iterator[str]:
    """A sentence on the keys that have no effect here."""
    others = [key for key in keys if key not in _READ and not key.startswith(DETAILER)]
    nothing = (SAME_CHOICES, "Built-in")
    told = [key for key in others if keys[key] not in nothing and keys[key] != str(DEFAULTS.get(key))]
    if told or not_run:
        yield f"the picture's text names what is not done again: {some_of([*told, *not_run])}"


def loras_of_text(
    told: Told, request: GenerationRequest, given: Sequence[str], library: Callable[[], LoraLibrary]
) -> tuple[GenerationRequest, list[str]]:
    """A request with the LoRAs that its text names and no tag of a prompt asks for: at which strength it does not say.

    Args:
        given: those LoRAs as ``loras`` has them; one that the text knows by another name stands for the next of them.
        library: gives the files that may be named; it is asked where a name alone does not settle it.

    Returns:
        The request, its LoRAs in the order of the text; and a sentence for each that stands for another, or for none.

    Raises:
        RequestError: one is not given.
        ModelNotFoundError: there is none of that name.
    """
    specs = [LoraSpec.parse(text) for text in given]
    missing = _untagged(told, request, library)
    chosen: dict[str, LoraSpec] = {}
    others = []
    for spec in specs:
        key = lora_key(_name(spec, library))
        if key in missing and key not in chosen:
            chosen[key] = spec
        else:
            others.append(spec)
    warnings = []
    for name in [name for name in missing if name not in chosen][: len(others)]:
        chosen[name] = others.pop(0)
        shown = _shown(chosen[name])
        warnings.append(f"loras: {shown} stands for {name} ({missing[name]}); whether it is the same is not known")
    if lacking := [f"{name} ({digest})" for name, digest in missing.items() if name not in chosen]:
        raise RequestError(
            f"loras: the picture's text names {some_of(lacking)} without a strength; give each by "
            "--lora NAME_OR_URL:STRENGTH",
            field="loras",
        )
    warnings += [f"loras: the picture's text does not name {_shown(spec)}, which acts all the same" for spec in others]
    loras = (*(chosen[name] for name in missing), *others)
    return request.model_copy(update={"loras": loras}), warnings


def _untagged(told: Told, request: GenerationRequest, library: Callable[[], LoraLibrary]) -> dict[str, str]:
    """Names and hashes of the LoRAs that acted by no tag."""
    passes = [each.get("ad_prompt", "") for each in request.adetailer_passes]
    names = {
        read_lora_tag(tag).name
        for prompt in (request.prompt, request.hr_prompt, *passes)
        for tag in parse_networks(prompt)[1]
        if tag.kind == "lora"
    }
    tagged = set(map(lora_key, names))
    missing = {name: digest for name, digest in told.loras.items() if name not in tagged}
    if missing and names:  # a tag may have called one otherwise
        called = {_called(name, library) for name in names}
        missing = {name: digest for name, digest in missing.items() if name not in called}
    return missing


def _called(name: str, library: Callable[[], LoraLibrary]) -> str:
    """What a text calls the LoRA of that name; of one that cannot be had, the name, which is refused in its turn."""
    try:
        return lora_key(library().find(name).name)
    except EngineError:
        return lora_key(name)


def _name(spec: LoraSpec, library: Callable[[], LoraLibrary]) -> str:
    with about("loras"):
        return library().find(spec.name).name if spec.name is not None else kept_source(spec.url or "").name


def _shown(spec: LoraSpec) -> str:
    return spec.name or kept_source(spec.url or "").name
