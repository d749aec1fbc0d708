"""From a body of Forge's API to a ``GenerationRequest``, and what a person should know of the way.

What a body leaves out is Forge's default; for null see ``fields.CONFIGURED``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ....config import EngineConfig
from ....core.infotext_parse import REQUEST_FIELDS, parse_infotext, request_fields, unknown_keys
from ....core.limits import check_length
from ....errors import RequestError
from ....flux.prompt import parse_networks
from ....labels import resolve_sampler
from ....request import GenerationRequest, profile_defaults
from ...wording import their_name, with_their_names
from ..faults import Fault, Refusal
from .catalogue import Catalogue
from .fields import (
    CONFIGURED,
    DEFAULTED,
    HIRES,
    IDLE,
    IMAGE,
    NAMES,
    OF_HIRES,
    OF_MASK,
    OF_PICTURES,
    REFUSED,
    SAME,
    SHARED,
    USUAL,
)
from .models import ImageToImageRequest, TextToImageRequest
from .options import Options, asked_fields, options_by_field, without_effect
from .scripts import detailer_fields, places_of

Body = TextToImageRequest | ImageToImageRequest

DISTILLED_KEY = "Guidance policy"


class UnknownSamplerError(Refusal):
    """No sampler of that name."""


@dataclass(frozen=True)
class Translation:
    """A body as our own request, the options that hold for it, sentences for a person, and keys for ``info``."""

    request: GenerationRequest
    options: Options
    warnings: list[str]
    told: dict[str, Any] = field(default_factory=dict)


def translate(
    body: Body, raw: Mapping[str, Any], session: Options, catalogue: Catalogue, config: EngineConfig
) -> Translation:
    """What a body asks for.

    Args:
        raw: the body as it came, which knows fields that the model has not.
        session: the options that hold.
        catalogue: of the model files that options may name.

    Raises:
        EngineError: a field is wrong or refused.
    """
    warnings = _idle(body, raw)
    overrides = body.override_settings or {}
    options = session.changed(overrides, "override_settings")
    warnings += [f"override_settings: {text}" for text in without_effect(overrides, options)]
    img2img, asked = isinstance(body, ImageToImageRequest), asked_fields(overrides, options)
    idle = set() if img2img else set(OF_PICTURES).difference(asked)
    values = {
        **{name: value for name, value in options.fields().items() if name not in idle},
        **catalogue.fields(options, overrides),
        "output_format": options.output_format,
        **_fields(body, config, warnings),
    }
    values |= detailer_fields(body.alwayson_scripts, warnings, img2img=img2img)
    _check_samplers(values)
    warnings += _outvoted(asked, values)
    request = GenerationRequest.over(values, {}, asked={*asked, *_asked(body)})
    request, told = _guided(body, request, config, warnings)
    return Translation(request, options, warnings, told)


def renamed(fault: Fault, names: Mapping[str, str]) -> Fault:
    """A fault that names a field, with the name that the field has in this API."""
    param = fault.param and their_name(fault.param, names)
    return replace(fault, message=with_their_names(fault.message, names), param=param)


def retold(sentences: Iterable[str], body: Body) -> list[str]:
    """What the engine says of a body's job, likewise."""
    names = names_of(body)
    return [with_their_names(each, names) for each in sentences]


def names_of(body: Body) -> dict[str, str]:
    """What the caller who sent a body knows our fields as, by ours: those that several of theirs may be among them."""
    names, sent = {**NAMES, **places_of(body.alwayson_scripts)}, body.model_fields_set
    for ours, option in options_by_field().items():
        if option in (body.override_settings or {}) and getattr(body, ours, None) is None:
            names[ours] = f"override_settings.{option}"
    if not body.sampler_name and "sampler_index" in sent:
        names["sampler"] = "sampler_index"
    names |= _names_in_text(body)
    if (body.n_iter or 1) == 1:
        names["num_outputs"] = "batch_size"
    if isinstance(body, ImageToImageRequest) and len(body.init_images or []) == 1:
        names["image"] = "init_images[0]"
    if isinstance(body, TextToImageRequest) and body.enable_hr and (body.firstphase_width or body.firstphase_height):
        names |= {"hr_resize_x": "width", "hr_resize_y": "height"}
        names |= {side: f"firstphase_{side}" for side in ("width", "height") if getattr(body, f"firstphase_{side}")}
    return names


def _names_in_text(body: Body) -> dict[str, str]:
    """The keys of a body's infotext, by our fields that it fills."""
    keys = parse_infotext(body.infotext or "", defaults=False)
    filled = {field: key for key, (field, _) in REQUEST_FIELDS.items() if keys.get(key)}
    chosen = _chosen(body)
    filled = {field: key.removesuffix("-1").removesuffix("-2") for field, key in filled.items()}
    return {field: f"infotext.{key}" for field, key in filled.items() if field not in chosen}


def _chosen(body: Body) -> set[str]:
    """Our fields that a body itself says, so that its infotext does not fill them."""
    sent = body.model_fields_set
    chosen = {ours for rows in (SHARED, HIRES, IMAGE) for theirs, ours in rows.items() if theirs in sent}
    others = {"sampler_name": "sampler", "sampler_index": "sampler", "hr_sampler_name": "hr_sampler"}
    others |= {name: name for name in ("hr_scheduler", "enable_hr")}
    return chosen | {ours for theirs, ours in others.items() if theirs in sent}


def _idle(body: Body, raw: Mapping[str, Any]) -> list[str]:
    """A sentence for all fields that the model leaves out, and one for each that has no effect.

    Raises:
        RequestError: a field is refused.
    """
    sentences = type(body).without_effect(raw)
    for name, (nothing, why) in REFUSED.items():
        if getattr(body, name, None) not in nothing:
            raise RequestError(f"{name}: {why}", field=name)
    for name, (nothing, why) in IDLE.items():
        if getattr(body, name, None) not in nothing:
            sentences.append(f"{name} had no effect: {why}")
    if body.sampler_name and body.sampler_index.lower() not in ("euler", body.sampler_name.lower()):
        sentences.append(f"sampler_index had no effect beside sampler_name, which is {body.sampler_name!r:.80}")
    return sentences


def _fields(body: Body, config: EngineConfig, warnings: list[str]) -> dict[str, Any]:
    """Our fields: of the body, else of its infotext, else Forge's defaults."""
    given, chosen = _mapped(body, SHARED, config), _chosen(body)
    given["sampler"] = body.sampler_name or body.sampler_index or type(body).model_fields["sampler_index"].default
    given["scheduler"] = given["scheduler"] or profile_defaults("a1111")["scheduler"]
    if isinstance(body, ImageToImageRequest):
        given |= _image_fields(body, config)
    from_text = _text_fields(body.infotext or "", warnings)
    if isinstance(body, TextToImageRequest):
        given |= _hires_fields(body, from_text, config)
    warnings += _idle_passes(body, given)
    given |= {name: value for name, value in from_text.items() if name not in chosen}
    given |= _numbers(body, given, warnings, config.max_outputs)
    if body.disable_extra_networks:
        _strip_networks(given, warnings, config)
    return given


def _asked(body: Body) -> set[str]:
    """Our fields that a body asks for by rows of ``SHARED``; ``_idle_passes`` tells of those of passes."""
    usual = type(body).model_fields
    sent = body.model_fields_set.intersection(SHARED)
    return {SHARED[name] for name in sent if getattr(body, name) != usual[name].default}


def _outvoted(asked: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """A sentence for options beside which a body or its infotext says something else."""
    options = options_by_field()
    names = [options[name] for name, value in asked.items() if values[name] != value]
    told = f"override_settings: {', '.join(names)} had no effect: a field of the request says something else"
    return [told] if names else []


def _text_fields(text: str, warnings: list[str]) -> dict[str, Any]:
    """Our fields that a picture's text names; what it says besides is told, unless pictures carry it."""
    if not text:
        return {}
    if unknown := unknown_keys(text):
        warnings.append(f"infotext: keys that do not exist had no effect: {', '.join(unknown)[:400]}")
    try:
        return request_fields(text)
    except RequestError as error:
        raise RequestError(f"infotext: {error}", field="infotext") from None


def _idle_passes(body: Body, given: Mapping[str, Any]) -> list[str]:
    """A sentence for fields of a second pass or a mask that there is not."""
    if isinstance(body, TextToImageRequest):
        idle = [] if given["enable_hr"] else _meant(body, OF_HIRES, "enable_hr")
        return [f"{', '.join(idle)} had no effect without enable_hr"] if idle else []
    idle = [] if body.mask else _meant(body, OF_MASK, "mask")
    return [f"{', '.join(idle)} had no effect without mask"] if idle else []


def _meant(body: Body, names: Iterable[str], switch: str) -> list[str]:
    """Those names that a caller sent and may have meant something by.

    Clients that always send the whole form have defaults in it, which ask for nothing. A form is whole that has the
    ``switch`` in it, or a field that is nothing.
    """
    sent = {name: getattr(body, name) for name in names if name in body.model_fields_set}
    whole = switch in body.model_fields_set or not all(sent.values())
    usual = {name: (type(body).model_fields[name].default, USUAL.get(name)) for name in sent}
    asked = {name: value for name, value in sent.items() if value and str(value).lower() not in SAME}
    return [name for name, value in asked.items() if not whole or value not in usual[name]]


def _mapped(body: Body, rows: Mapping[str, str], config: EngineConfig) -> dict[str, Any]:
    """The fields of some rows."""
    usual = {name: value for name, value in profile_defaults("a1111").items() if name in DEFAULTED}
    instead = {**usual, **{name: getattr(config, name) for name in CONFIGURED}}
    fields = {}
    for theirs, ours in rows.items():
        value = getattr(body, theirs)
        if value is None:
            value = instead.get(ours)
        if value is not None:
            fields[ours] = value
    return fields


def _hires_fields(body: TextToImageRequest, from_text: Mapping[str, Any], config: EngineConfig) -> dict[str, Any]:
    """The second pass; with ``firstphase_…`` the first one has that size, and the second that of the picture."""
    wanted = body.enable_hr if "enable_hr" in body.model_fields_set else from_text.get("enable_hr", False)
    if not wanted:
        return {"enable_hr": False}
    modules = [str(name) for name in body.hr_additional_modules or []]
    for name, values in (("hr_checkpoint_name", [body.hr_checkpoint_name or ""]), ("hr_additional_modules", modules)):
        if not all(value.lower() in SAME for value in values):
            raise RequestError(f"{name}: the second pass draws with the model of the first; leave it out", field=name)
    fields = _mapped(body, HIRES, config)
    for theirs, ours in (("hr_sampler_name", "hr_sampler"), ("hr_scheduler", "hr_scheduler")):
        name = getattr(body, theirs) or ""
        fields[ours] = None if name.lower() in SAME else name
    if body.firstphase_width or body.firstphase_height:
        fields |= {"hr_resize_x": body.width or 0, "hr_resize_y": body.height or 0}
        fields |= {"width": body.firstphase_width or body.width, "height": body.firstphase_height or body.height}
    return {"enable_hr": True, **fields}


def _image_fields(body: ImageToImageRequest, config: EngineConfig) -> dict[str, Any]:
    """Start pictures, and how the mask is used where there is one."""
    if not body.init_images:
        raise RequestError("init_images: there is no picture; send one in base64", field="init_images")
    for number, given in enumerate(body.init_images):
        if not given:  # which a request would take for "no picture"
            field = f"init_images[{number}]"
            raise RequestError(f"{field}: there is no picture; send one in base64", field=field)
    rows = IMAGE if body.mask else {name: IMAGE[name] for name in ("resize_mode", "initial_noise_multiplier")}
    fields = _mapped(body, rows, config)
    if body.mask and body.mask_blur is not None:  # both of them, as one field, which a fault names once
        fields = {name: value for name, value in fields.items() if name not in ("mask_blur_x", "mask_blur_y")}
        fields["mask_blur"] = body.mask_blur
    return fields


def _numbers(body: Body, given: Mapping[str, Any], warnings: list[str], most: int) -> dict[str, Any]:
    """How many pictures: rounds times a batch, or times the start pictures where there are several.

    Args:
        most: pictures that a request may ask for; the list of start pictures grows no longer than to be refused.
    """
    rounds = 1 if body.n_iter is None else body.n_iter
    if rounds < 1:
        raise RequestError(f"n_iter: draw 1 or more times (got {rounds})", field="n_iter")
    batch = given.get("batch_size", 1)
    if not isinstance(body, ImageToImageRequest):
        return {"num_outputs": rounds * max(batch, 1)}
    pictures = body.init_images or []
    if len(pictures) == 1:
        return {"num_outputs": rounds * max(batch, 1), "image": pictures[0]}
    if "batch_size" in body.model_fields_set and batch not in (1, len(pictures)):
        warnings.append(
            f"batch_size {batch} draws no more pictures: there are {len(pictures)} init_images, and one is drawn of "
            "each; n_iter draws them again"
        )
    return {"num_outputs": rounds * len(pictures), "image": pictures * min(rounds, most)}


def _strip_networks(given: dict[str, Any], warnings: list[str], config: EngineConfig) -> None:
    for name in ("prompt", "negative_prompt", "hr_prompt", "hr_negative_prompt"):
        check_length(name, given.get(name, ""), config)
        text, tags = parse_networks(given.get(name, ""))
        if tags:
            given[name] = text
            warnings.append(f"{name}: tags of extra networks were left out, as disable_extra_networks asks")


def _guided(
    body: Body, request: GenerationRequest, config: EngineConfig, warnings: list[str]
) -> tuple[GenerationRequest, dict[str, Any]]:
    """What becomes of a cfg_scale that clients of older models send by habit: see the setting ``sdapi_cfg``.

    Returns:
        The request, and keys for ``info`` where something was changed.
    """
    sent = request.cfg_scale
    if sent == 1 or request.negative_prompt:
        return request, {}
    if config.sdapi_cfg == "literal" or "distilled_cfg_scale" in body.model_fields_set:
        warnings.append(
            f"cfg_scale {sent} takes twice the time of 1, and is seldom meant for Flux, where distilled_cfg_scale "
            "guides; see the setting sdapi_cfg"
        )
        return request, {}
    told = f"cfg_scale {sent} was taken as cfg_scale 1 and distilled_cfg_scale 3.5"
    warnings.append(f"{told} (setting sdapi_cfg)")
    return request.model_copy(update={"cfg_scale": 1.0, "distilled_cfg_scale": 3.5}), {DISTILLED_KEY: told}


def _check_samplers(values: Mapping[str, Any]) -> None:
    """
    Raises:
        UnknownSamplerError: a sampler does not exist, or not for Flux; lists those that do.
        RequestError: a scheduler likewise.
    """
    passes = {("sampler", "scheduler"): (values["sampler"], values["scheduler"])}
    if values.get("hr_sampler") or values.get("hr_scheduler"):
        second = values.get("hr_sampler") or values["sampler"], values.get("hr_scheduler") or values["scheduler"]
        passes["hr_sampler", "hr_scheduler"] = second
    for fields, pair in passes.items():
        try:
            resolve_sampler(*pair, fields=fields)
        except RequestError as error:
            name, scheduler = fields
            if error.field == scheduler:
                raise
            told = str(error).removeprefix(f"{name}: ")
            raise UnknownSamplerError(f"{name}: Sampler not found: {told}", param=name) from None
