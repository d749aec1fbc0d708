"""The arguments of a detailing pass, as ADetailer names them: defaults, bounds, and the forms that they come in.

Several passes come as the reference's API has them, ``[enable, skip_img2img, {…}, {…}]``, or as the two JSON objects
of ``predict()`` for faces and hands. Loads no torch. Source: pipelines.md §d, predict.md.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticKnownError

from ..errors import EngineError, RequestError, closest, some_of
from ..fields import PlainNumbers, limits_at, plain
from ..labels import Compat, resolve_sampler

log = logging.getLogger(__name__)

NONE = "None"
SAME_SAMPLER = "Use same sampler"
SAME_SCHEDULER = "Use same scheduler"
MAX_PASSES = 16
MAX_TEXT = 100_000
DISABLE = "ad_disable"  # of predict(): leaves a pass out
NONE_RUNS = "no pass that is switched on names a detector (ad_model), so that nothing was detailed"
"""What a caller is told who asked for the detailer, and for none of its passes."""


def _whole(value: Any) -> Any:
    """Numbers and texts as whole numbers: fractions are cut off, as the reference's pydantic did."""
    if isinstance(value, str | float):
        try:
            return int(value)
        except (OverflowError, ValueError):  # also of what is no finite number
            raise PydanticKnownError("int_parsing") from None
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]


def _field(default: Any, help: str = "", **bounds: Any) -> Any:
    return Field(default, description=help or None, **bounds)


_ratio = partial(_field, ge=0, le=1)


class ADetailerArgs(PlainNumbers):
    """One pass. Names are the reference's, and bounds too; where it has none, they are those of a request."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

    ad_model: Text = _field(NONE, "Detector: the name of its file; None leaves the pass out.")
    ad_model_classes: Text = _field("", "Names of classes, divided by commas; blank is all.")
    ad_tab_enable: bool = _field(True, "Whether the pass runs.")
    ad_prompt: Text = _field("", "Prompt; blank is the main one. [SEP] [PROMPT] [SKIP] have a meaning.")
    ad_negative_prompt: Text = _field("", "Negative prompt, likewise.")
    ad_confidence: float = _field(0.3, "What is less sure is not seen.", ge=0, le=1)
    ad_mask_filter_method: Literal["Area", "Confidence"] = _field("Area", "By what the top k are chosen.")
    ad_mask_k: Whole = _field(0, "How many are kept, the largest or surest; 0 is all.", ge=0)
    ad_mask_min_ratio: float = _field(0.0, "Smaller shares of the picture are left.", ge=0, le=1)
    ad_mask_max_ratio: float = _field(1.0, "Larger shares of the picture are left.", ge=0, le=1)
    ad_dilate_erode: Whole = _field(4, "Pixels that a mask grows, or shrinks below 0.", ge=-4096, le=4096)
    ad_x_offset: Whole = _field(0, "Pixels that a mask moves right.", ge=-65536, le=65536)
    ad_y_offset: Whole = _field(0, "Pixels that a mask moves up.", ge=-65536, le=65536)
    ad_mask_merge_invert: Literal["None", "Merge", "Merge and Invert"] = _field("None", "One mask of all.")
    ad_mask_blur: Whole = _field(4, "Blur of a mask's edge, in pixels.", ge=0, le=256)
    ad_denoising_strength: float = _field(0.4, "Share of the schedule that runs.", ge=0, le=1)
    ad_inpaint_only_masked: bool = _field(True, "Draw the masked part alone, at the full size.")
    ad_inpaint_only_masked_padding: Whole = _field(32, "Pixels around it drawn with it.", ge=0, le=4096)
    ad_use_inpaint_width_height: bool = _field(False, "Draw at the size that follows.")
    ad_inpaint_width: Whole = _field(512, gt=0, le=65536)
    ad_inpaint_height: Whole = _field(512, gt=0, le=65536)
    ad_use_steps: bool = _field(False, "Take the number of steps that follows.")
    ad_steps: Whole = _field(28, gt=0, le=1000)
    ad_use_cfg_scale: bool = _field(False, "Take the CFG scale that follows.")
    ad_cfg_scale: float = _field(7.0, ge=0, le=100)
    ad_use_checkpoint: bool = False
    ad_checkpoint: Text | None = None
    ad_use_vae: bool = False
    ad_vae: Text | None = None
    ad_use_sampler: bool = _field(False, "Take the sampler and the scheduler that follow.")
    ad_sampler: Text = "DPM++ 2M Karras"
    ad_scheduler: Text = SAME_SCHEDULER
    ad_use_noise_multiplier: bool = False
    ad_noise_multiplier: float = _field(1.0, ge=0.5, le=1.5)
    ad_use_clip_skip: bool = False
    ad_clip_skip: Whole = _field(1, ge=1, le=12)
    ad_restore_face: bool = False
    ad_controlnet_model: Text = NONE
    ad_controlnet_module: Text = NONE
    ad_controlnet_weight: float = _ratio(1.0)
    ad_controlnet_guidance_start: float = _ratio(0.0)
    ad_controlnet_guidance_end: float = _ratio(1.0)
    is_api: Annotated[bool, BeforeValidator(lambda value: not isinstance(value, tuple))] = True

    @property
    def is_skipped(self) -> bool:
        return not self.ad_tab_enable or self.ad_model == NONE

    @property
    def is_mediapipe(self) -> bool:
        return self.ad_model.lower().startswith("mediapipe")

    @property
    def own_sampler(self) -> str | None:
        """None where it is that of the job; a scheduler likewise."""
        return self.ad_sampler if self.ad_use_sampler and self.ad_sampler != SAME_SAMPLER else None

    @property
    def own_scheduler(self) -> str | None:
        return self.ad_scheduler if self.ad_use_sampler and self.ad_scheduler != SAME_SCHEDULER else None

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.ad_model_classes.split(",") if name.strip())


# Where the values that the service of predict() starts from are not those above.
_SERVICE = {
    "ad_inpaint_width": 1024,
    "ad_inpaint_height": 1024,
    "ad_use_steps": True,
    "ad_use_cfg_scale": True,
}
FACES: Mapping[str, Any] = {
    **_SERVICE,
    "ad_model": "face_yolov8n.pt",
    "ad_denoising_strength": 0.04,
    "ad_inpaint_only_masked_padding": 20,
    "ad_steps": 40,
    "ad_cfg_scale": 3.4,
}
HANDS: Mapping[str, Any] = {
    **_SERVICE,
    "ad_model": "hand_yolov8n.pt",
    "ad_confidence": 0.28,
    "ad_mask_filter_method": "Confidence",
    "ad_dilate_erode": 16,
    "ad_mask_blur": 8,
    "ad_denoising_strength": 0.35,
    "ad_inpaint_only_masked_padding": 72,
    "ad_steps": 35,
    "ad_cfg_scale": 3.5,
}


def read_args(values: Mapping[str, Any], field: str) -> ADetailerArgs:
    """Arguments from names and values.

    Args:
        field: of the request that holds them, for the message.

    Raises:
        RequestError: a name that does not exist, or a value that does not fit; says all of them, and names the first.
    """
    try:
        return ADetailerArgs(**{str(name): value for name, value in values.items()})
    except ValidationError as error:
        faults = error.errors(include_url=False)
        told = "; ".join(_fault(item) for item in faults)
        raise RequestError(f"{field}.{told}", field=f"{field}.{_name(faults[0])}") from None


def _name(item: Any) -> str:
    return ".".join(str(part) for part in item["loc"])[:80]


def _fault(item: Any) -> str:
    name = _name(item)
    if item["type"] == "extra_forbidden":
        meant = closest(name, ADetailerArgs.model_fields)
        hint = f"did you mean {meant!r}?" if meant else f"there are {some_of(list(ADetailerArgs.model_fields))}"
        return f"{name}: there is no such argument; {hint}"
    return f"{name}: {plain(item, limits_at(ADetailerArgs, item['loc']))}"


@dataclass(frozen=True)
class Passes:
    """The passes of a job.

    Attributes:
        passes: in order, with those that are skipped, which count in the infotext all the same.
        skip_img2img: an image-to-image job is not drawn itself: detailing starts from its start picture.
        places: what the caller knows each pass as, for messages.
    """

    passes: tuple[ADetailerArgs, ...]
    skip_img2img: bool = False
    places: tuple[str, ...] = ()

    @property
    def placed(self) -> tuple[tuple[str, ADetailerArgs], ...]:
        """The active passes, each with its place."""
        places = self.places or ("",) * len(self.passes)
        return tuple((place, args) for place, args in zip(places, self.passes, strict=True) if not args.is_skipped)

    @property
    def active(self) -> tuple[ADetailerArgs, ...]:
        return tuple(args for args in self.passes if not args.is_skipped)


# Arguments that the reference hands to programs which this engine does not have; value that asks for nothing; why.
UNSUPPORTED = (
    ("ad_restore_face", False, "there are no face restorers; a face pass draws the face anew"),
    ("ad_controlnet_model", NONE, "ControlNet is not run"),
    ("ad_use_checkpoint", False, "a pass is drawn with the model of the job"),
    ("ad_use_vae", False, "a pass is drawn with the autoencoder of the job"),
    ("ad_use_clip_skip", False, "Flux takes no hidden layer of CLIP, so that there is none to skip"),
)


@contextmanager
def of_pass(place: str) -> Iterator[None]:
    """Faults of arguments in the block, which know no request, name the pass at ``place`` that has them."""
    try:
        yield
    except EngineError as error:
        if place and (error.field or "").startswith("ad_"):
            error.put_before(f"{place}.")
        raise


def check_supported(passes: Passes) -> None:
    """Refuse arguments that this engine has nothing for.

    Raises:
        RequestError: names the argument, and the value that asks for nothing.
    """
    for place, args in passes.placed:
        for name, off, what in UNSUPPORTED:
            if getattr(args, name) != off:
                with of_pass(place):
                    raise RequestError(f"{name}: {what}; leave it at {off!r}", field=name)


def check_samplers(passes: Passes, sampler: str, scheduler: str, compat: Compat = "fixed") -> None:
    """Refuse names of no sampler or schedule, whether a pass will find something or not.

    Args:
        sampler, scheduler: of the job, for passes that have none of their own.

    Raises:
        RequestError: names the argument, and those that there are.
    """
    for place, args in passes.placed:
        if args.own_sampler or args.own_scheduler:
            pair = args.own_sampler or sampler, args.own_scheduler or scheduler
            with of_pass(place):
                resolve_sampler(*pair, compat, fields=("ad_sampler", "ad_scheduler"))


# Switches, and the arguments that count where they are on.
_SWITCHES = {
    "ad_use_steps": ("ad_steps",),
    "ad_use_cfg_scale": ("ad_cfg_scale",),
    "ad_use_sampler": ("ad_sampler", "ad_scheduler"),
    "ad_use_noise_multiplier": ("ad_noise_multiplier",),
    "ad_use_inpaint_width_height": ("ad_inpaint_width", "ad_inpaint_height"),
}


def idle_arguments(passes: Passes) -> list[str]:
    """A sentence for each thing that arguments ask in vain; not where their switch was sent too, and so was meant."""
    told = []
    for place, args in passes.placed:
        prefix = f"{place}." if place else ""
        for switch, names in _SWITCHES.items():
            if switch not in args.model_fields_set and (sent := [name for name in names if _asks(args, name)]):
                told.append(f"{prefix}{', '.join(sent)} had no effect without {switch}")
        if args.ad_mask_min_ratio > args.ad_mask_max_ratio:
            told.append(f"{prefix}ad_mask_min_ratio is above ad_mask_max_ratio: no mask is left")
    return told


def _asks(args: ADetailerArgs, name: str) -> bool:
    usual = (ADetailerArgs.model_fields[name].default, _SERVICE.get(name))
    return name in args.model_fields_set and getattr(args, name) not in usual


def read_passes(
    args: Sequence[Any], compat: Compat = "fixed", field: str = "alwayson_scripts.ADetailer.args"
) -> Passes:
    """Passes in the form of the reference's API: ``[enable, skip_img2img, {…}, {…}]``, with or without the booleans.

    What is wrong is an error; with "forge" it is left out, with a warning where it is a pass, and the others run.

    Raises:
        RequestError: an object is wrong, or something else than booleans and objects is there.
    """
    enabled, skip_img2img = (
        args[place] if len(args) > place and isinstance(args[place], bool) else default
        for place, default in enumerate((True, False))
    )
    objects = [(place, value) for place, value in enumerate(args) if isinstance(value, Mapping)]
    others = [value for place, value in enumerate(args) if not isinstance(value, Mapping | bool)]
    if (others and compat != "forge") or len(objects) > MAX_PASSES:
        raise RequestError(f"{field}: give two booleans at most, then up to {MAX_PASSES} objects", field=field)
    passes: dict[str, ADetailerArgs] = {}
    for place, values in objects if enabled else ():
        try:
            passes[f"{field}[{place}]"] = read_args(values, f"{field}[{place}]")
        except RequestError as error:
            if compat != "forge":
                raise
            log.warning("%s; the pass is left out", error)
    return Passes(tuple(passes.values()), skip_img2img, tuple(passes))


def service_passes(
    faces: str | Mapping[str, Any] = "{}",
    hands: str | Mapping[str, Any] = "{}",
    *,
    faces_prompt: str = "",
    hands_prompt: str = "",
) -> Passes:
    """The two passes of ``predict()``: JSON objects over the defaults of its service.

    Args:
        faces_prompt: counts where the object has no ``ad_prompt``.

    Raises:
        RequestError: no JSON object, or arguments that are wrong.
    """
    rows = (
        ("adetailer_args", faces, FACES, faces_prompt),
        ("adetailer_args_hands", hands, HANDS, hands_prompt),
    )
    passes: dict[str, ADetailerArgs] = {}
    for field, given, defaults, prompt in rows:
        values = dict(_object(given, field))
        disabled = values.pop(DISABLE, False)
        if not isinstance(disabled, bool):
            raise RequestError(f"{field}: {DISABLE} is true or false (got {disabled!r:.80})", field=field)
        if not disabled:
            passes[field] = read_args({**defaults, "ad_prompt": prompt, **values}, field)
    return Passes(tuple(passes.values()), places=tuple(passes))


def _object(given: str | Mapping[str, Any], field: str) -> Mapping[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{field}: it is no JSON ({str(error)[:80]}); give an object", field=field) from None
    if not isinstance(given, Mapping):
        raise RequestError(f"{field}: it is no JSON object; give names and values, such as {{}}", field=field)
    return given
