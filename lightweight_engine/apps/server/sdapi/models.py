"""What ``/sdapi/v1`` takes and sends: fields, types and defaults of Forge's API.

Numbers are read as pydantic reads them by default: ``"20"`` and ``20.0`` are integers, ``20.5`` is none; but true and
false are no numbers. Fields that a model does not have are left out, as clients send those of other versions;
``unknown_fields`` names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.json_schema import models_json_schema

from ....errors import RequestError, placed
from ....fields import PlainNumbers, limits_at, plain
from ....request import limits_of
from .fields import HIRES, IMAGE, SHARED

LONGEST_INFOTEXT = 2**20
"""Characters; the prompts of all passes are far below. Keys are found in a text at one go, and nobody is answered
meanwhile."""


class _Model(PlainNumbers):
    model_config = ConfigDict(extra="ignore")

    @classmethod
    def unknown_fields(cls, body: Mapping[str, Any]) -> list[str]:
        """The keys of a body that the model leaves out, in the body's order: material for a warning."""
        return [name for name in body if name not in cls.model_fields]

    @classmethod
    def without_effect(cls, body: Mapping[str, Any]) -> list[str]:
        """A sentence for a person about such keys, where there are any."""
        unknown = cls.unknown_fields(body)
        return [f"fields that do not exist here had no effect: {', '.join(unknown)[:400]}"] if unknown else []

    @classmethod
    def openapi(cls) -> dict[str, Any]:
        """What a route says of its body, where that is read by us."""
        schema = {"$ref": f"#/components/schemas/{cls.__name__}"}
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Self:
        """A body as the model. Raises RequestError, which names the first field that does not fit."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise first_fault(error, cls, {**SHARED, **HIRES, **IMAGE}) from None


def first_fault(
    error: ValidationError, model: type[BaseModel], ours: Mapping[str, str], where: str = ""
) -> RequestError:
    """The first field that does not fit, as an error of ours.

    Args:
        model: that has it.
        ours: fields of a request by their names there, whose limits hold where the model has none.
        where: the field lies, for the message.
    """
    first = error.errors(include_url=False)[0]
    place = first["loc"]
    own = str(place[0]) if len(place) == 1 else ""
    name = placed(*([where] if where else []), *place)
    limits = limits_at(model, place) or limits_of(ours.get(own, own))
    return RequestError(f"{name}: {plain(first, limits)}", field=name)


class _Generation(_Model):
    """What both ways of drawing share. Null is taken wherever a type says so, and means "as configured"."""

    prompt: str | None = ""
    negative_prompt: str | None = ""
    styles: list[str] | None = None
    seed: int | None = -1
    subseed: int | None = -1
    subseed_strength: float | None = 0
    seed_resize_from_h: int | None = -1
    seed_resize_from_w: int | None = -1
    sampler_name: str | None = None
    scheduler: str | None = None
    batch_size: int | None = 1
    n_iter: int | None = 1
    steps: int | None = 50
    cfg_scale: float | None = 7.0
    distilled_cfg_scale: float | None = 3.5
    width: int | None = 512
    height: int | None = 512
    restore_faces: bool | None = None
    tiling: bool | None = None
    do_not_save_samples: bool | None = False
    do_not_save_grid: bool | None = False
    eta: float | None = None
    s_min_uncond: float | None = None
    s_churn: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    s_noise: float | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = True
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    disable_extra_networks: bool | None = False
    firstpass_image: str | None = None
    comments: dict | None = None
    hr_distilled_cfg: float | None = 3.5
    force_task_id: str | None = None
    sampler_index: str = Field("Euler", description="The sampler where sampler_name is null.")
    script_name: str | None = None
    script_args: list = Field(default_factory=list)
    send_images: bool = True
    save_images: bool = False
    alwayson_scripts: dict = Field(default_factory=dict)
    infotext: str | None = Field(None, max_length=LONGEST_INFOTEXT)


class TextToImageRequest(_Generation):
    """The body of ``POST /sdapi/v1/txt2img``."""

    denoising_strength: float | None = Field(None, description="Must be given with enable_hr.")
    enable_hr: bool | None = False
    firstphase_width: int | None = 0
    firstphase_height: int | None = 0
    hr_scale: float | None = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = 0
    hr_resize_x: int | None = 0
    hr_resize_y: int | None = 0
    hr_checkpoint_name: str | None = None
    hr_additional_modules: list | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = ""
    hr_negative_prompt: str | None = ""
    hr_cfg: float | None = 1.0


class ImageToImageRequest(_Generation):
    """The body of ``POST /sdapi/v1/img2img``."""

    denoising_strength: float = 0.75
    init_images: list | None = None
    resize_mode: int | None = 0
    image_cfg_scale: float | None = None
    mask: str | None = None
    mask_blur_x: int | None = 4
    mask_blur_y: int | None = 4
    mask_blur: int | None = Field(None, description="Both of mask_blur_x and mask_blur_y; null keeps them.")
    mask_round: bool | None = True
    inpainting_fill: int | None = 0
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = 0
    inpainting_mask_invert: int | None = 0
    initial_noise_multiplier: float | None = None
    latent_mask: str | None = None
    include_init_images: bool = False

    @field_validator("inpainting_mask_invert", mode="before")
    @classmethod
    def _switched(cls, value: Any) -> Any:
        """A switch that Forge declares as a number: clients may send it as either."""
        return int(value) if isinstance(value, bool) else value


class ExtraRequest(_Model):
    """What both ways of enlarging share."""

    resize_mode: Literal[0, 1] = Field(0, description="0: by upscaling_resize; 1: to upscaling_resize_w and _h.")
    show_extras_results: bool = True
    gfpgan_visibility: float = 0
    codeformer_visibility: float = 0
    codeformer_weight: float = 0
    upscaling_resize: float = Field(2, gt=0)
    upscaling_resize_w: int = 512
    upscaling_resize_h: int = 512
    upscaling_crop: bool = True
    upscaler_1: str = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: float = 0
    upscale_first: bool = False


class ExtraSingleRequest(ExtraRequest):
    """The body of ``POST /sdapi/v1/extra-single-image``."""

    image: str = Field("", description="The picture's file, in base64.")


class NamedPicture(_Model):
    """One of several pictures: its file in base64, and a name, which is of no effect."""

    data: str
    name: str


class ExtraBatchRequest(ExtraRequest):
    """The body of ``POST /sdapi/v1/extra-batch-images``."""

    imageList: list[NamedPicture]


class ExtraSingleResponse(_Model):
    """A picture in base64, and sentences for a person."""

    html_info: str
    image: str | None = None


class ExtraBatchResponse(_Model):
    """Pictures in base64, in their order, and sentences for a person."""

    html_info: str
    images: list[str]


class ProgressRequest(_Model):
    """The query of ``GET /sdapi/v1/progress``."""

    skip_current_image: bool = False


class ProgressResponse(_Model):
    """``progress`` is of 0 to 1, ``eta_relative`` in seconds."""

    progress: float
    eta_relative: float
    state: dict
    current_image: str | None = None
    textinfo: str | None = None


class TaskProgressRequest(_Model):
    """The body of ``POST /internal/progress``."""

    id_task: str | None = None
    id_live_preview: int = -1
    live_preview: bool = True


class TaskProgressResponse(_Model):
    """``progress`` is of 0 to 1, ``eta`` in seconds; the preview is a data URL, where there is a new one."""

    active: bool
    queued: bool
    completed: bool
    progress: float | None = None
    eta: float | None = None
    live_preview: str | None = None
    id_live_preview: int | None = None
    textinfo: str | None = None


class PngInfoRequest(_Model):
    """The body of ``POST /sdapi/v1/png-info``."""

    image: str = Field(description="The picture's file, in base64.")


class PngInfoResponse(_Model):
    """The text that a picture carries, what else is in it, and the text taken apart."""

    info: str
    items: dict
    parameters: dict


class MemoryResponse(_Model):
    """Memory of the machine and of the device, in bytes."""

    ram: dict
    cuda: dict


class GenerationResponse(_Model):
    """Pictures in base64, the request as it was read, and what became of it as a JSON text."""

    images: list[str] | None = None
    parameters: dict
    info: str


BODIES = (
    *(TextToImageRequest, ImageToImageRequest, ExtraSingleRequest, ExtraBatchRequest, PngInfoRequest),
    TaskProgressRequest,
)
"""Bodies that are read by ourselves, so that FastAPI knows nothing of them."""


def body_schemas() -> dict[str, Any]:
    """The schemas of those bodies and of what they are made of, by name, for OpenAPI."""
    _, made = models_json_schema(
        [(model, "validation") for model in BODIES], ref_template="#/components/schemas/{model}"
    )
    return made["$defs"]
