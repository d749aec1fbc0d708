"""Forge's options, as far as an API's clients set or need them: their names, types, defaults, and what they act on.

``POST /options`` changes what holds until the service ends; ``override_settings`` what holds for one request. Values
are read as leniently as the fields of a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from ....fields import PlainNumbers
from ....labels import storage_format
from ....request import Emphasis, NoiseSource
from .models import first_fault

NO_CHOICE = ("", "none", "automatic")
"""Names of a model or a format that leave it to the configuration, in any case."""


def _acts(field: str, default: Any, **bounds: Any) -> Any:
    """An option that is a field of ``GenerationRequest``."""
    return Field(default, json_schema_extra={"field": field}, **bounds)


def _own(default: Any, **bounds: Any) -> Any:
    """An option that the API itself goes by."""
    return Field(default, json_schema_extra={"own": True}, **bounds)


def _shown(default: Any, **bounds: Any) -> Any:
    """An option that clients ask for, and that has no effect here: another value than the default is a warning."""
    return Field(default, **bounds)


class Options(PlainNumbers):
    """Every option that there is. ``model_fields_set`` are those that somebody chose."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False)

    sd_model_checkpoint: str | None = _own(None, max_length=4096)
    sd_vae: str | None = _own("Automatic", max_length=4096)
    forge_additional_modules: list[str] = _own([], max_length=8)
    forge_preset: Literal["flux"] = _shown("flux")
    forge_unet_storage_dtype: str = _own("Automatic", max_length=64)
    samples_format: str = _own("png")
    show_progress_every_n_steps: int = _own(10, ge=-1, le=1000)
    live_previews_enable: bool = _own(True)
    CLIP_stop_at_last_layers: int = _shown(1)
    eta_noise_seed_delta: int = _acts("eta_noise_seed_delta", 0)
    randn_source: NoiseSource = _acts("noise_source", "GPU")
    emphasis: Emphasis = _acts("emphasis", "Original")
    eta_ancestral: float = _acts("eta", 1.0)
    s_churn: float = _acts("s_churn", 0.0)
    s_tmin: float = _acts("s_tmin", 0.0)
    s_tmax: float = _acts("s_tmax", 0.0)
    s_noise: float = _acts("s_noise", 1.0)
    s_min_uncond: float = _acts("s_min_uncond", 0.0)
    s_min_uncond_all: bool = _acts("s_min_uncond_all", False)
    skip_early_cond: float = _acts("skip_early_cond", 0.0)
    sigma_min: float = _acts("sigma_min", 0.0)
    sigma_max: float = _acts("sigma_max", 0.0)
    rho: float = _acts("rho", 0.0)
    beta_dist_alpha: float = _acts("beta_alpha", 0.6)
    beta_dist_beta: float = _acts("beta_beta", 0.6)
    use_old_karras_scheduler_sigmas: bool = _acts("use_old_karras", False)
    always_discard_next_to_last_sigma: bool = _acts("discard_next_to_last", False)
    upscaler_for_img2img: str | None = _acts("img2img_upscaler", None)
    img2img_background_color: str = _acts("background_color", "#ffffff")
    img2img_color_correction: bool = _acts("color_correction", False)
    img2img_fix_steps: bool = _acts("img2img_fix_steps", False)
    img2img_extra_noise: float = _acts("img2img_extra_noise", 0.0)
    initial_noise_multiplier: float = _acts("initial_noise_multiplier", 1.0)

    @field_validator("samples_format")
    @classmethod
    def _format(cls, value: str) -> str:
        name = value.strip().lower().lstrip(".")
        if name not in ("png", "jpg", "jpeg", "webp"):
            raise ValueError("choose one of png, jpg, jpeg, webp")
        return name

    @field_validator("forge_unet_storage_dtype")
    @classmethod
    def _storage(cls, value: str) -> str:
        if value.lower() not in NO_CHOICE:
            storage_format(value)
        return value

    @field_validator("upscaler_for_img2img")
    @classmethod
    def _upscaler(cls, value: str | None) -> str | None:
        return value or None

    @property
    def output_format(self) -> str:
        """The format of pictures, as a request names it."""
        return "jpg" if self.samples_format == "jpeg" else self.samples_format

    @property
    def preview_every(self) -> int:
        """Steps between previews; 0 is none."""
        return max(self.show_progress_every_n_steps, 0) if self.live_previews_enable else 0

    def changed(self, values: Mapping[str, Any], where: str) -> Options:
        """These options with others on top; names that do not exist are left out, which
        ``without_effect`` tells.

        Args:
            where: they came from, for the message.

        Raises:
            RequestError: a value does not fit.
        """
        known = {name: value for name, value in values.items() if name in Options.model_fields}
        try:
            return Options(**{**self.model_dump(exclude_unset=True), **known})
        except ValidationError as error:
            ours = {option: field for field, option in options_by_field().items()}
            raise first_fault(error, Options, ours, where) from None

    def fields(self) -> dict[str, Any]:
        """Fields of a request that follow from the options which somebody chose."""
        rows = ((name, _extra(name).get("field")) for name in self.model_fields_set)
        fields = {field: getattr(self, name) for name, field in rows if field}
        return {field: value for field, value in fields.items() if value is not None}


def options_by_field() -> dict[str, str]:
    """What an option is called, by the field of a request that it is."""
    return {_extra(name)["field"]: name for name in Options.model_fields if "field" in _extra(name)}


def asked_fields(values: Mapping[str, Any], chosen: Options) -> dict[str, Any]:
    """Fields of a request that ``values`` set by options, each to another value than the usual one."""
    rows = ((field, name) for field, name in options_by_field().items() if name in values)
    return {field: getattr(chosen, name) for field, name in rows if getattr(chosen, name) != _default(name)}


def _extra(name: str) -> dict[str, Any]:
    extra: Any = Options.model_fields[name].json_schema_extra
    return extra or {}


def without_effect(values: Mapping[str, Any], chosen: Options) -> list[str]:
    """A sentence for options that do not exist here, and one for each that exists and does nothing."""
    unknown = [name for name in values if name not in Options.model_fields]
    sentences = [f"options that do not exist here had no effect: {', '.join(unknown)[:400]}"] if unknown else []
    for name in values:
        if name in Options.model_fields and not _extra(name) and getattr(chosen, name) != _default(name):
            sentences.append(f"the option {name} has no effect on Flux here")
    return sentences


def _default(name: str) -> Any:
    return Options.model_fields[name].default
