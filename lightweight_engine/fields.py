"""Models whose fields callers give: nothing changes them, and a wrong one is told with what to write in its place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from .errors import RequestError, closest, placed, plain

# Names that other programs have for our fields; those which are near by their letters often mean something else.
OTHER_NAMES = {
    "num_inference_steps": "steps",
    "num_steps": "steps",
    "sample_steps": "steps",
    "n_iter": "num_outputs",
    "n": "num_outputs",
    "num_images": "num_outputs",
    "num_images_per_prompt": "num_outputs",
    "cfg": "cfg_scale",
    "true_cfg_scale": "cfg_scale",
    "guidance": "distilled_cfg_scale",
    "guidance_scale": "distilled_cfg_scale",
    "sampler_name": "sampler",
    "sampler_index": "sampler",
    "hr_sampler_name": "hr_sampler",
    "hr_second_pass_steps": "hr_steps",
    "strength": "denoising_strength",
    "denoise": "denoising_strength",
    "prompt_strength": "denoising_strength",
    "init_image": "image",
    "init_images": "image",
    "input_image": "image",
    "mask_image": "mask",
    "model": "checkpoint",
    "sd_model_checkpoint": "checkpoint",
    "sd_vae": "vae",
    "upscaling_resize": "by",
    "upscale_by": "by",
    "upscaler_1": "upscaler",
}

# Fields that other programs have, and nothing is needed for here.
NOT_NEEDED = {
    "send_images": "the pictures are always in the answer",
    "save_images": "only Forge's API takes it",
}


COLOUR = r"^#[0-9a-fA-F]{6}$"
SHA256 = r"^[0-9a-f]{64}$"
FORMS = {COLOUR: "#rrggbb, as #ffffff for white", SHA256: "64 hex digits, in lower case"}
"""What texts of a pattern are, in words."""


def _hint(name: str, fields: Collection[str]) -> str:
    """What to write in place of a field that there is not."""
    if name in NOT_NEEDED:
        return NOT_NEEDED[name]
    other = OTHER_NAMES.get(name)
    meant = other if other in fields else closest(name, fields)
    return f"did you mean {meant!r}?" if meant else _names(fields)


def _one_line(error: ValidationError, fields: Mapping[str, FieldInfo]) -> tuple[str, str | None]:
    """A validation error as one sentence per field, and the name of the first field."""
    parts, first = [], None
    for item in error.errors(include_url=False):
        name = placed(*item["loc"]) or None
        first = first or name
        message = plain(item, bounds_of(fields.get(name or "")))
        if item["type"] == "extra_forbidden":
            message = f"there is no such field; {_hint(name or '', fields)}"
        parts.append(f"{name}: {message}" if name else message)
    return "; ".join(parts), first


def _names(fields: Iterable[str]) -> str:
    """Where the names of fields are found: here, if they are few."""
    names = list(fields)
    return f"there are: {', '.join(names)}" if len(names) < 10 else "`generate --help` or /openapi.json lists the names"


def bounds_of(info: FieldInfo | None) -> str:
    """What a field may be, as a person reads it: of numbers the least and the greatest, of texts their form; else
    nothing."""
    bounds = info.metadata if info else []
    form = next((FORMS[each.pattern] for each in bounds if getattr(each, "pattern", None) in FORMS), None)
    if form is not None:
        return form
    low = next((each.ge for each in bounds if hasattr(each, "ge")), None)
    high = next((each.le for each in bounds if hasattr(each, "le")), None)
    return "" if low is None or high is None else f"{low:,} to {high:,}"


def no_switch(value: Any, limits: str = "") -> Any:
    """What stands where a number does: Python counts True and False among them. Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError(f"true and false are no numbers; give {limits or 'a number'}")
    return value


def _is_number(kind: Any) -> bool:
    """Whether a type is of numbers, or of nothing beside them, as ``int | None``."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is_number(parts[0])
    if origin is Literal:
        return all(type(each) is int for each in parts)
    if origin in (Union, UnionType):
        return all(_is_number(each) for each in parts if each is not NoneType)
    return kind in (int, float)


class PlainNumbers(BaseModel):
    """A model whose numbers are refused where they are true or false, which pydantic reads as 1 and 0."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_switches(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        return no_switch(value, bounds_of(field)) if _is_number(field.annotation) else value


class Frozen(PlainNumbers):
    """A model that nothing changes. Wrong fields raise ``RequestError``, which names the first."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            message, field = _one_line(error, type(self).model_fields)
            raise RequestError(message, field=field) from None
