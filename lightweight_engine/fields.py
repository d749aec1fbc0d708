"""Models whose fields callers give: nothing changes them, and a wrong one is told with what to write in its place."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from .errors import RequestError, closest, placed

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


# What is wrong with a value, by the kind of pydantic's error; what to give instead, where its field has no limits.
FAULTS = {
    "greater_than_equal": ("is too small", "{ge} or more"),
    "greater_than": ("is too small", "more than {gt}"),
    "less_than_equal": ("is too large", "{le} or less"),
    "less_than": ("is too large", "less than {lt}"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), ("is no whole number", "one")),
    "int_parsing_size": ("is too large", "a smaller number"),
    **dict.fromkeys(("float_type", "float_parsing"), ("is no number", "one")),
    "finite_number": ("is not finite", "a number that is"),
    **dict.fromkeys(("bool_type", "bool_parsing"), ("is no switch", "true or false")),
    **dict.fromkeys(("string_type", "string_unicode"), ("is no text", "one")),
    "literal_error": ("is no choice", "{expected}"),
    "path_type": ("is no path", "one as a text"),
}
ASKED = {
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type"), "an object of names and values"),
    "string_pattern_mismatch": "a text of the form {pattern}",
}
"""What to give, by kinds that need no word on what is wrong."""
SWITCH = "switch_for_number"
"""The kind that ``no_switch`` raises."""
_FAULTS_TOLD = 20  # in one message; a list may hold thousands of wrong values
COMPARED = ("greater_than_equal", "greater_than", "less_than_equal", "less_than", "int_parsing_size")


def plain(item: Mapping[str, Any], limits: str = "") -> str:
    """What a person is told of an item of pydantic's ``errors()``: what is wrong with what was given, and what may be.

    Args:
        limits: of the field, as ``bounds_of`` says them.
    """
    kind, given, bounds = item["type"], item["input"], item.get("ctx", {})
    if kind == "missing":
        return "it is missing; give it"
    if kind == "string_too_short" and not given:
        return "it is empty; give a text, or leave it out"
    if kind in ("string_too_short", "string_too_long"):
        most = (
            f"at least {bounds['min_length']:,}" if kind == "string_too_short" else f"at most {bounds['max_length']:,}"
        )
        return f"give {most} characters (got {len(given):,})"
    if kind in ("too_short", "too_long"):
        most = f"at least {bounds['min_length']}" if kind == "too_short" else f"at most {bounds['max_length']}"
        return f"give {most} (got {bounds['actual_length']})"
    if kind == SWITCH:
        return f"{item['msg']}; give {limits or 'a number'}"
    if kind in ASKED:
        shown = _shown(given)
        return f"give {limits or ASKED[kind].format(**bounds)}{f' (got {shown})' if shown else ''}"
    if kind not in FAULTS:
        return item["msg"].removeprefix("Value error, ")
    shown = shown_of(given)
    if kind in COMPARED:  # numbers, also where they came as texts
        kind, shown = "float_type" if _is_nan(given) else kind, shown.strip("'")
    wrong, usual = FAULTS[kind]
    return f"{shown} {wrong}; give {limits or usual.format(**bounds)}"


def _is_nan(given: Any) -> bool:
    """Whether a number, or a text of one, is NaN, which is neither too small nor too large."""
    try:
        return math.isnan(float(given))
    except (TypeError, ValueError, OverflowError):
        return False


def shown_of(given: Any) -> str:
    """A value in at most 80 characters; "it" in place of one that cannot be shown."""
    return _shown(given) or "it"


def _shown(given: Any) -> str:
    """A value in at most 80 characters; nothing where it holds an address, which may be secret."""
    try:
        text = json.dumps(given) if given is None or isinstance(given, bool) else repr(given)
    except ValueError:  # of a number with thousands of digits
        return ""
    if "://" in text:
        return ""
    return text if len(text) <= 80 else text[:79] + "…"


def _hint(name: str, fields: Collection[str]) -> str:
    """What to write in place of a field that there is not."""
    if name in NOT_NEEDED:
        return NOT_NEEDED[name]
    other = OTHER_NAMES.get(name)
    meant = other if other in fields else closest(name, fields)
    return f"did you mean {meant!r}?" if meant else _names(fields)


def _one_line(error: ValidationError, model: type[BaseModel]) -> tuple[str, str | None]:
    """A validation error as one sentence per field, for the first of them, and the name of the first field."""
    parts, first = [], None
    items = error.errors(include_url=False)
    for item in items[:_FAULTS_TOLD]:
        name = placed(*item["loc"]) or ("''" if item["loc"] else None)  # one may be named by nothing
        first = first or name
        message = plain(item, limits_at(model, item["loc"]))
        if item["type"] == "extra_forbidden":
            message = f"there is no such field; {_hint(name or '', model.model_fields)}"
        parts.append(f"{name}: {message}" if name else message)
    more = f"; and {len(items) - _FAULTS_TOLD} more" if len(items) > _FAULTS_TOLD else ""
    return "; ".join(parts) + more, first


def _names(fields: Iterable[str]) -> str:
    """Where the names of fields are found: here, if they are few."""
    names = list(fields)
    return f"there are: {', '.join(names)}" if len(names) < 10 else "`generate --help` or /openapi.json lists the names"


def bounds_of(info: FieldInfo | None) -> str:
    """What a field may be, as a person reads it: numbers between which, one of some choices, a text of some form; else
    nothing."""
    return _bounds(info.annotation, info.metadata) if info else ""


def limits_at(model: type[BaseModel], place: Sequence[str | int]) -> str:
    """The same of what stands at a place of a model: in a field, or in a list that one holds."""
    name, *within = place or ("",)
    info = model.model_fields.get(str(name))
    kind, rules = (info.annotation, info.metadata) if info else (None, [])
    for part in within:
        if not isinstance(part, int) or get_origin(kind) not in (list, tuple):
            return ""
        kind, rules = get_args(kind)[0], []
    return _bounds(kind, rules)


def _bounds(kind: Any, rules: Iterable[Any]) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        own = [rule for each in parts[1:] for rule in (each.metadata if isinstance(each, FieldInfo) else [each])]
        return _bounds(parts[0], [*rules, *own])
    if origin in (Union, UnionType):
        kinds = [each for each in parts if each is not NoneType]
        return _bounds(kinds[0], rules) if len(kinds) == 1 else ""
    if origin is Literal:
        *names, last = map(str, parts)
        return f"{', '.join(names)} or {last}" if names else last
    if kind in (int, float):
        return _between(kind, rules)
    return next((FORMS[rule.pattern] for rule in rules if getattr(rule, "pattern", None) in FORMS), "")


def _between(kind: type[int] | type[float], rules: Iterable[Any]) -> str:
    """The least and the greatest number, as far as there are."""
    found = {name: getattr(rule, name) for rule in rules for name in ("ge", "gt", "le") if hasattr(rule, name)}
    if kind is int and "gt" in found:
        found["ge"] = found.pop("gt") + 1
    low, above, high = (_number(found[name]) if name in found else "" for name in ("ge", "gt", "le"))
    if above:
        return f"more than {above}, up to {high}" if high else f"more than {above}"
    if low and high:
        return f"{low} to {high}"
    return f"{low} or more" if low else f"{high} or less" if high else ""


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def no_switch(value: Any) -> Any:
    """What stands where a number does: Python counts True and False among them.

    Raises:
        PydanticCustomError: it is one of them.
    """
    if isinstance(value, bool):
        raise PydanticCustomError(SWITCH, "true and false are no numbers")
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
        return no_switch(value) if _is_number(field.annotation) else value


class Frozen(PlainNumbers):
    """A model that nothing changes. Wrong fields raise ``RequestError``, which names the first."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            message, field = _one_line(error, type(self))
            raise RequestError(message, field=field) from None
