"""What a caller asks for; ``results`` are what it is told and gets back. Loads no torch.

``GenerationRequest`` declares each field once: its bounds, its help, and its default in each named profile. The
command line, the HTTP schema and the Cog inputs are derived from it; a profile may narrow a bound, never widen it.

Profiles: ``native`` (this engine's own defaults), ``cog`` (the ``predict()`` service), ``a1111`` (Forge's HTTP API).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .errors import RequestError
from .fields import COLOUR, Frozen, bounds_of
from .labels import storage_format
from .lora_spec import LoraScale, LoraSpec, SpelledLora

Profile = Literal["native", "cog", "a1111"]
Compat = Literal["fixed", "forge"]
Emphasis = Literal["Original", "No norm", "Ignore", "None"]
NoiseSource = Literal["GPU", "CPU", "NV"]
ImageFormat = Literal["png", "jpg", "webp"]

MAX_SEED = 2**63 - 1
MAX_LORAS = 16
MAX_DETAILER_PASSES = 16
LARGEST_SCALE = 16.0  # of a picture that is enlarged
SMALLEST_SIDE = 16  # of a picture that is drawn, in pixels
MAX_STEPS = 1000
PROMPTS = ("prompt", "negative_prompt", "hr_prompt", "hr_negative_prompt", "ad_prompt", "ad_hands_prompt")
"""Fields that the text encoders read."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""Characters that no prompt means, and no text of a picture should carry; tabs and ends of lines are others."""


def _field(section: str, default: Any, help: str, *, cog: Any = ..., a1111: Any = ..., **bounds: Any) -> Any:
    """A request field with its help and, where they differ from ``default``, its defaults in the other profiles."""
    named = {"cog": cog, "a1111": a1111}
    profiles = {name: value for name, value in named.items() if value is not ...}
    extra = {"section": section, "profiles": profiles}
    return Field(default, description=help, json_schema_extra=extra, **bounds)


# The sections of the fields, as the help of the command line shows them.
_prompt = partial(_field, "Prompt")
_picture = partial(_field, "Picture")
_sampling = partial(_field, "Sampling")
_noise = partial(_field, "Seeds and noise")
_img2img = partial(_field, "Image-to-image")
_inpaint = partial(_field, "Inpainting")
_hires = partial(_field, "Hires fix")
_detailer = partial(_field, "Detailer")
_lora = partial(_field, "LoRA")
_file = partial(_field, "Files")
_model = partial(_field, "Model", None, min_length=1, max_length=4096)


class GenerationRequest(Frozen):
    """One job: a prompt and how to draw it. Wrong fields raise ``RequestError``, which names the field."""

    prompt: str = _prompt("", "What to draw. Understands (emphasis:1.2), [from:to:when], [a|b], AND, BREAK.")
    negative_prompt: str = _prompt("", "What to avoid; used only where cfg_scale is not 1.")
    width: int | None = _picture(None, "Width in pixels; left out, the model's own.", a1111=512, ge=SMALLEST_SIDE)
    height: int | None = _picture(None, "Height in pixels, likewise.", a1111=512, ge=SMALLEST_SIDE)
    steps: int = _sampling(50, "Sampling steps.", cog=8, ge=1, le=MAX_STEPS)
    cfg_scale: float = _sampling(1.0, "True guidance; 1 leaves the negative prompt out.", a1111=7.0, ge=0, le=100)
    distilled_cfg_scale: float | None = _sampling(
        3.7, "Distilled guidance, the main one of Flux dev.", cog=3.5, a1111=3.5, ge=0, le=100
    )
    sampler: str = _sampling("Euler", "Sampler; --list-samplers prints the names.", min_length=1)
    scheduler: str = _sampling(
        "Simple", "Noise schedule; --list-schedulers prints the names.", a1111="Automatic", min_length=1
    )
    seed: int = _picture(-1, "Seed of the first picture; -1 draws one.", ge=-1, le=MAX_SEED)
    num_outputs: int = _picture(1, "How many pictures, with seeds seed, seed+1, …", ge=1)
    batch_size: int = _picture(1, "How many pictures are drawn at once; more is not always faster.", ge=1, le=64)
    subseed: int = _noise(-1, "Seed of the variation.", ge=-1, le=MAX_SEED)
    subseed_strength: float = _noise(0.0, "How far towards the variation, 0 to 1.", ge=0, le=1)
    seed_resize_from_w: int = _noise(0, "Width whose noise is reused; 0 is off.", a1111=-1, ge=-1, le=16384)
    seed_resize_from_h: int = _noise(0, "Height whose noise is reused; 0 is off.", a1111=-1, ge=-1, le=16384)
    eta_noise_seed_delta: int = _noise(0, "ENSD: added to the seed of the noise after the first.", ge=0, le=MAX_SEED)
    noise_source: NoiseSource | None = _noise(None, "Where noise is drawn; left out, as configured.")
    emphasis: Emphasis = _prompt("Original", "What (word:1.2) does to the text encoder's output.")
    eta: float | None = _sampling(None, "Noise multiplier of ancestral samplers; left out, 1.", ge=0, le=10)
    s_churn: float = _sampling(0.0, "Churn of Euler, Heun and DPM2.", ge=0, le=1000)
    s_tmin: float = _sampling(0.0, "Lowest sigma with churn.", ge=0, le=1000)
    s_tmax: float = _sampling(0.0, "Highest sigma with churn; 0 is no limit.", ge=0, le=1000)
    s_noise: float = _sampling(1.0, "Multiplier of the noise that samplers add.", ge=0, le=10)
    s_min_uncond: float = _sampling(0.0, "Below this sigma every other step skips the negative prompt.", ge=0, le=15)
    s_min_uncond_all: bool = _sampling(False, "With s_min_uncond: skip at every step, not every other.")
    skip_early_cond: float = _sampling(0.0, "Fraction of the first steps without negative prompt.", ge=0, le=1)
    sigma_min: float = _sampling(0.0, "Lowest sigma of the schedule; 0 is the model's.", ge=0, le=1000)
    sigma_max: float = _sampling(0.0, "Highest sigma of the schedule; 0 is the model's.", ge=0, le=1000)
    rho: float = _sampling(0.0, "Curvature of Karras and Polyexponential; 0 is the schedule's own.", ge=0, le=100)
    beta_alpha: float = _sampling(0.6, "Alpha of the Beta schedule.", gt=0, le=10)
    beta_beta: float = _sampling(0.6, "Beta of the Beta schedule.", gt=0, le=10)
    use_old_karras: bool = _sampling(False, "Karras between 0.1 and 10, as old versions had it.")
    discard_next_to_last: bool = _sampling(False, "Drop the next-to-last sigma of every schedule.")
    image: Any = _img2img(
        None, "Start from this picture: a path, a URL, base64, or a PIL image; or a list of them, one for each output."
    )
    denoising_strength: float | None = _img2img(
        None,
        "How much of the schedule a pass from a picture runs; left out, 0.75 for image-to-image and 0.7 for hires.",
        cog=0.3,
        ge=0,
        le=1,
    )
    resize_mode: int = _img2img(
        0,
        "How a start picture gets the size: 0 stretch, 1 cut to fit, 2 fit and fill, 3 resize its latent.",
        cog=1,
        ge=0,
        le=3,
    )
    img2img_upscaler: str = _img2img(
        "None", "Upscaler that enlarges a start picture which is smaller; None, Lanczos.", min_length=1
    )
    background_color: str = _img2img(
        "#ffffff", "What lies under transparent parts of a start picture: #rrggbb.", pattern=COLOUR
    )
    initial_noise_multiplier: float = _img2img(1.0, "Multiplier of the noise added to a start picture.", ge=0, le=2)
    img2img_extra_noise: float = _img2img(0.0, "Further noise added to a start picture.", ge=0, le=1)
    img2img_fix_steps: bool = _img2img(False, "Run exactly `steps` steps whatever the strength.")
    color_correction: bool = _img2img(False, "Give the result the colours of the start picture.")
    mask: Any = _inpaint(None, "White where the start picture is painted anew: as `image`.")
    inpainting_mask_invert: bool = _inpaint(False, "Paint where the mask is black.")
    mask_round: bool = _inpaint(True, "Cells of the latent are painted wholly or not at all.")
    mask_blur: int = _inpaint(4, "Blur of the mask's edge, in pixels.", ge=0, le=256)
    mask_blur_x: int | None = _inpaint(None, "Blur along rows; left out, mask_blur.", ge=0, le=256)
    mask_blur_y: int | None = _inpaint(None, "Blur along columns; left out, mask_blur.", ge=0, le=256)
    inpainting_fill: int = _inpaint(
        1, "What painting starts from: 0 blurred surroundings, 1 the picture, 2 noise, 3 nothing.", a1111=0, ge=0, le=3
    )
    inpaint_full_res: bool = _inpaint(
        False, "Draw only the masked part, at the full size, and paste it back into the picture.", a1111=True
    )
    inpaint_full_res_padding: int = _inpaint(
        32, "Pixels around the mask that are drawn with it.", a1111=0, ge=0, le=4096
    )
    enable_hr: bool | None = _hires(
        None, "Enlarge and refine the picture; left out, it follows from hr_scale > 1.", cog=True, a1111=False
    )
    hr_scale: float = _hires(1.0, "Scale of the hires pass.", cog=1.3, a1111=2.0, ge=1, le=4)
    hr_resize_x: int = _hires(0, "Width of the hires pass, in place of hr_scale; 0 follows from the height.", ge=0)
    hr_resize_y: int = _hires(0, "Height of the hires pass, likewise.", ge=0)
    hr_steps: int = _hires(10, "Steps of the hires pass; 0 repeats `steps`.", cog=8, a1111=0, ge=0, le=MAX_STEPS)
    hr_upscaler: str = _hires(
        "4x-UltraSharp",
        "Upscaler of the hires pass: a network of `upscale --list`; without one None, Lanczos or Nearest; or Latent, "
        "also with (antialiased), (bicubic), (bicubic antialiased), (nearest) or (nearest-exact).",
        a1111="Latent",
        min_length=1,
    )
    hr_cfg: float | None = _hires(
        None, "True guidance of the hires pass; left out, cfg_scale.", cog=1.0, a1111=1.0, ge=0, le=100
    )
    hr_distilled_cfg: float | None = _hires(
        None, "Distilled guidance; left out, distilled_cfg_scale.", cog=3.5, a1111=3.5, ge=0, le=100
    )
    hr_prompt: str = _hires("", "Prompt of the hires pass; left out, the prompt.")
    hr_negative_prompt: str = _hires("", "Negative prompt of the hires pass; left out, the negative prompt.")
    hr_sampler: str | None = _hires(None, "Sampler of the hires pass; left out, the sampler.", min_length=1)
    hr_scheduler: str | None = _hires(None, "Noise schedule of the hires pass; left out, the scheduler.", min_length=1)
    lora_urls: tuple[str, ...] = _lora((), "Addresses of LoRA files to apply.", max_length=MAX_LORAS, repr=False)
    lora_scales: tuple[LoraScale, ...] = _lora((), "One strength for each of lora_urls, or one for all; left out, 1.")
    loras: tuple[SpelledLora, ...] = _lora(
        (), "LoRAs to apply, by name or address, with strengths: NAME_OR_URL[:SCALE].", max_length=MAX_LORAS
    )
    adetailer: bool = _detailer(False, "Paint faces and hands anew, larger, where detectors find them.")
    adetailer_args: Any = _detailer(
        "{}", "Arguments of the pass for faces (ad_…), a JSON object over its defaults; ad_disable leaves it out."
    )
    adetailer_args_hands: Any = _detailer("{}", "Likewise of the pass for hands.")
    ad_prompt: str = _detailer("", "Prompt of the pass for faces; left out, the prompt.")
    ad_hands_prompt: str = _detailer("", "Prompt of the pass for hands; left out, the prompt.")
    adetailer_passes: tuple[Any, ...] = _detailer(
        (), "Passes in place of those two: a JSON object of ad_… arguments each.", max_length=MAX_DETAILER_PASSES
    )
    skip_img2img: bool = _detailer(False, "Detail the start picture as it is, without drawing it anew.")
    checkpoint: str | None = _model("Checkpoint for this request, as `models ls` names it; left out, as configured.")
    t5: str | None = _model("T5 text encoder for this request; left out, as configured.")
    clip: str | None = _model("CLIP text encoder for this request; left out, as configured.")
    vae: str | None = _model("Autoencoder for this request; left out, as configured.")
    storage_dtype: str | None = _model(
        "How the transformer's weights are kept for this request, as the setting has it; left out, as configured."
    )
    save_stages: bool = _file(
        False, "Keep the picture of every stage, as first pass and enlarged one, beside the last."
    )
    output_format: ImageFormat = _file("png", "File format of the pictures.", cog="webp")
    compat: Compat = _sampling("fixed", "'forge' reproduces the reference's defects too.")

    @classmethod
    def from_profile(cls, profile: Profile, values: Mapping[str, Any]) -> GenerationRequest:
        """A request with the defaults of a profile under ``values``; those that differ from them were asked for."""
        usual = profile_defaults(profile)
        return cls.over(usual, values, asked=[name for name in values if values[name] != usual[name]])

    @classmethod
    def over(
        cls, defaults: Mapping[str, Any], values: Mapping[str, Any], *, asked: Iterable[str] | None = None
    ) -> GenerationRequest:
        """A request with ``defaults``, which nobody asked for, under ``values``.

        Args:
            asked: those of its fields that its caller asked for, its ``model_fields_set``; left out, all of ``values``.

        Raises:
            RequestError: a field is wrong; names it.
        """
        made = cls(**{**defaults, **values})
        return cls.model_construct(_fields_set=set(values if asked is None else asked), **vars(made))

    @field_validator("prompt", "negative_prompt", "hr_prompt", "hr_negative_prompt", mode="before")
    @classmethod
    def _no_null(cls, value: Any) -> Any:
        return "" if value is None else value

    @field_validator(*PROMPTS)
    @classmethod
    def _printable(cls, value: str) -> str:
        if odd := CONTROL.search(value):
            raise ValueError(f"the text holds a control character (U+{ord(odd[0]):04X}); leave it out")
        return value

    @field_validator("seed", "subseed", mode="before")
    @classmethod
    def _any_seed(cls, value: Any) -> Any:
        return -1 if value is None else value

    @field_validator("lora_urls", mode="before")
    @classmethod
    def _one_url(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("loras", mode="before")
    @classmethod
    def _one_lora(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | LoraSpec | Mapping) else value

    @field_validator("adetailer_passes", mode="before")
    @classmethod
    def _json_passes(cls, value: Any) -> Any:
        given = (value,) if isinstance(value, str | Mapping) else value
        if not isinstance(given, Sequence):
            return given
        try:
            return tuple(json.loads(each) if isinstance(each, str) else each for each in given)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is no JSON ({str(error)[:80]}); give objects of ad_… arguments") from None

    @field_validator("storage_dtype")
    @classmethod
    def _storage(cls, value: str | None) -> str | None:
        return None if value is None else storage_format(value)

    @field_validator("hr_resize_x", "hr_resize_y")
    @classmethod
    def _size(cls, value: int) -> int:
        if 0 < value < 16:
            raise ValueError("a side is at least 16 pixels; give 16 or more, or leave it out")
        return value

    @model_validator(mode="after")
    def _pairs(self) -> GenerationRequest:
        if self.lora_scales and len(self.lora_scales) not in (1, len(self.lora_urls)):
            raise RequestError(
                f"lora_scales has {len(self.lora_scales)} numbers for {len(self.lora_urls)} lora_urls; give one each",
                field="lora_scales",
            )
        if self.skip_img2img and (self.image is None or not self.detailed):
            raise RequestError(
                "skip_img2img details a start picture: give image, and adetailer or adetailer_passes",
                field="skip_img2img",
            )
        if self.sigma_min and self.sigma_max and self.sigma_min >= self.sigma_max:
            raise RequestError("sigma_min must be below sigma_max", field="sigma_min")
        return self

    @property
    def hires(self) -> bool:
        """Whether a hires pass is asked for."""
        return self.hr_scale > 1 if self.enable_hr is None else self.enable_hr

    @property
    def detailed(self) -> bool:
        """Whether the detailer is asked for."""
        return self.adetailer or bool(self.adetailer_passes)


def _fields_of(section: str) -> tuple[str, ...]:
    extras: Any = {name: info.json_schema_extra for name, info in GenerationRequest.model_fields.items()}
    return tuple(name for name, extra in extras.items() if extra["section"] == section)


MODEL_FIELDS = _fields_of("Model")
"""Those that stand for settings of the same names, for one request; a command line has those settings already."""


def limits_of(name: str) -> str:
    """What a field may be, as ``bounds_of`` says it."""
    return bounds_of(GenerationRequest.model_fields.get(name))


def profile_defaults(profile: Profile) -> dict[str, Any]:
    """The default of every field in a profile."""
    defaults = {}
    for name, info in GenerationRequest.model_fields.items():
        extra: Any = info.json_schema_extra
        defaults[name] = extra["profiles"].get(profile, info.default)
    return defaults


class UpscaleRequest(Frozen):
    """Pictures to make larger, with nothing drawn. Wrong fields raise ``RequestError``, which names the field."""

    images: tuple[Any, ...] = Field(
        min_length=1, repr=False, description="Pictures: base64 or data URLs, as `image` of a request."
    )
    by: float | None = Field(default=None, gt=0, le=LARGEST_SCALE, description="Scale; left out with both sides, 2.")
    width: int | None = Field(
        default=None, ge=1, description="Width to reach, in place of a scale; alone, the height follows."
    )
    height: int | None = Field(
        default=None, ge=1, description="Height to reach, likewise; with both, the picture covers them."
    )
    crop: bool = Field(default=False, description="Cut what is beyond width and height, half on each side.")
    upscaler: str | None = Field(
        default=None, min_length=1, description="Its name; left out, as configured (hr_upscaler)."
    )
    upscaler_2: str | None = Field(
        default=None, min_length=1, description="Another, whose picture is blended over the first."
    )
    upscaler_2_visibility: float = Field(default=0.0, ge=0, le=1, description="How much of the second is seen.")
    output_format: ImageFormat = Field(default="png", description="File format of the pictures.")

    @field_validator("images", mode="before")
    @classmethod
    def _one_picture(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else (value,)

    @model_validator(mode="after")
    def _agreeing(self) -> UpscaleRequest:
        if self.by is not None and (self.width or self.height):
            raise RequestError("by, width and height cannot all hold; give by, or width and height", field="by")
        if self.crop and not (self.width and self.height):
            raise RequestError("crop needs a size to cut to; give width and height", field="crop")
        if self.upscaler_2_visibility > 0 and self.upscaler_2 is None:
            raise RequestError(
                "upscaler_2_visibility is of a second upscaler; name it in upscaler_2", field="upscaler_2_visibility"
            )
        if self.upscaler_2 is not None and self.upscaler_2_visibility == 0:
            raise RequestError(
                "upscaler_2 would not be seen; give upscaler_2_visibility above 0, or leave it out", field="upscaler_2"
            )
        return self


Task = GenerationRequest | UpscaleRequest
"""What the engine can be asked for."""
