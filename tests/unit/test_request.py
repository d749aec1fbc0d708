"""The request: bounds, profiles, and errors that name the field."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from lightweight_engine.apps.server.sdapi.models import BODIES
from lightweight_engine.apps.server.sdapi.options import Options
from lightweight_engine.config import EngineConfig
from lightweight_engine.core.processing import denoising_strength
from lightweight_engine.errors import RequestError
from lightweight_engine.extensions.detailer_args import ADetailerArgs, read_args
from lightweight_engine.extensions.hires_fix import second_pass
from lightweight_engine.fields import NOT_NEEDED, OTHER_NAMES
from lightweight_engine.labels import LATENT_UPSCALERS
from lightweight_engine.lora_spec import LoraSpec
from lightweight_engine.request import (
    MAX_SEED,
    MODEL_FIELDS,
    PROMPTS,
    GenerationRequest,
    UpscaleRequest,
    profile_defaults,
)
from lightweight_engine.upscalers.files import PLAIN_NAMES


def test_the_profiles_have_the_defaults_of_their_services() -> None:
    native, cog, a1111 = (profile_defaults(name) for name in ("native", "cog", "a1111"))  # type: ignore[arg-type]
    assert (native["steps"], native["cfg_scale"], native["distilled_cfg_scale"], native["hr_steps"]) == (
        50,
        1.0,
        3.7,
        10,
    )
    assert (cog["steps"], cog["hr_scale"], cog["denoising_strength"], cog["output_format"]) == (8, 1.3, 0.3, "webp")
    assert (a1111["cfg_scale"], a1111["distilled_cfg_scale"], a1111["scheduler"]) == (7.0, 3.5, "Automatic")


@pytest.mark.parametrize("profile", ["native", "cog", "a1111"])
def test_every_profile_makes_a_request(profile) -> None:
    request = GenerationRequest.from_profile(profile, {"prompt": "x", "seed": 3})
    assert (request.prompt, request.seed) == ("x", 3)


def test_names_of_other_programs_lead_to_fields_of_ours() -> None:
    fields = {*GenerationRequest.model_fields, *UpscaleRequest.model_fields}
    assert set(OTHER_NAMES.values()) <= fields and fields.isdisjoint({*OTHER_NAMES, *NOT_NEEDED})
    with pytest.raises(RequestError, match="did you mean 'by'"):
        UpscaleRequest.model_validate({"images": [], "upscale_by": 2})


def test_every_field_has_help() -> None:
    assert all(info.description for info in GenerationRequest.model_fields.values())


def test_the_help_tells_defaults_that_follow_from_the_pass() -> None:
    told = GenerationRequest.model_fields["denoising_strength"].description or ""
    usual = denoising_strength(GenerationRequest()), second_pass(GenerationRequest()).denoising_strength
    assert told.endswith("left out, {} for image-to-image and {} for hires.".format(*usual))


@pytest.mark.parametrize("name", [*PLAIN_NAMES, *LATENT_UPSCALERS])
def test_the_help_names_every_upscaler_that_needs_no_file(name: str) -> None:
    told = GenerationRequest.model_fields["hr_upscaler"].description or ""
    assert name.removeprefix("Latent ") in told


@pytest.mark.parametrize(
    "field",
    ["sampler", "scheduler", "hr_sampler", "hr_scheduler", "hr_upscaler", "img2img_upscaler", "checkpoint", "vae"],
)
def test_an_empty_name_is_none(field: str) -> None:
    with pytest.raises(RequestError, match=f"^{field}: it is empty; give a text, or leave it out$"):
        GenerationRequest(**{field: ""})


def test_a_hires_pass_that_names_no_sampler_has_that_of_the_first() -> None:
    second = second_pass(GenerationRequest(sampler="Heun", scheduler="Beta", hr_sampler=None))
    assert (second.sampler, second.scheduler) == ("Heun", "Beta")


BOUNDS = [
    ("steps", 0, 1001),
    ("cfg_scale", -0.1, 100.1),
    ("distilled_cfg_scale", -0.1, 100.1),
    ("seed", -2, MAX_SEED + 1),
    ("subseed", -2, MAX_SEED + 1),
    ("subseed_strength", -0.1, 1.1),
    ("num_outputs", 0, None),
    ("batch_size", 0, 65),
    ("denoising_strength", -0.1, 1.1),
    ("width", -1, None),
    ("height", 15, None),
    ("hr_scale", 0.5, 4.1),
    ("s_churn", -1, 1001),
    ("beta_alpha", 0, 11),
]


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, *values in BOUNDS for value in values if value is not None]
)
def test_out_of_range(field: str, value: float) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        GenerationRequest(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "^steps: 0 is too small; give 1 to 1,000$"),
        ({"steps": 5000}, "^steps: 5000 is too large; give 1 to 1,000$"),
        ({"steps": "many"}, "^steps: 'many' is no whole number; give 1 to 1,000$"),
        ({"steps": 2.5}, "^steps: 2.5 is no whole number; give 1 to 1,000$"),
        ({"steps": None}, "^steps: null is no whole number; give 1 to 1,000$"),
        ({"seed": 10**5000}, "^seed: it is too large; give -1 to 9,223,372,036,854,775,807$"),
        ({"seed": "9" * 5000}, "^seed: 9{78}… is too large; give -1 to"),
        ({"width": 3}, "^width: 3 is too small; give 16 or more$"),
        ({"beta_alpha": 0}, "^beta_alpha: 0 is too small; give more than 0, up to 10$"),
        ({"steps": True}, "steps: true and false are no numbers; give 1 to 1,000"),
        ({"prompt": 5}, "^prompt: 5 is no text; give one$"),
        ({"prompt": ["https://me:secret@x"]}, "^prompt: it is no text; give one$"),
        ({"cfg_scale": float("nan")}, "^cfg_scale: nan is no number; give 0 to 100$"),
        ({"cfg_scale": "nan"}, "^cfg_scale: nan is no number; give 0 to 100$"),
        ({"cfg_scale": "much"}, "^cfg_scale: 'much' is no number; give 0 to 100$"),
        ({"adetailer": "maybe"}, "^adetailer: 'maybe' is no switch; give true or false$"),
        ({"checkpoint": "a" * 4097}, "^checkpoint: give at most 4,096 characters .got 4,097.$"),
        ({"lora_urls": 5}, "^lora_urls: give a list .got 5.$"),
        ({"loras": [5]}, r"^loras\[0\]: a LoRA is a name or an address, "),
        ({"loras": [{5: "a"}]}, r"^loras\[0\]: 5: there is no such field"),
        ({"background_color": "red"}, "^background_color: give #rrggbb, as #ffffff for white .got 'red'.$"),
        ({"background_color": "#fff"}, "^background_color: give #rrggbb"),
        (
            {"loras": [{"name": "a", "sha256": "ABC"}]},
            r"^loras\[0\]: sha256: give 64 hex digits, in lower case .got 'ABC'",
        ),
        ({"emphasis": "Loud"}, "^emphasis: 'Loud' is no choice; give Original, No norm, Ignore or None$"),
        ({"noise_source": "Moon"}, "noise_source"),
        ({"compat": "best"}, "compat"),
        ({"output_format": "tiff"}, "output_format"),
        ({"colour": "red"}, "colour: there is no such field; `generate --help` or"),
        ({"": 1}, "^'': there is no such field; "),
        ({"num_inference_steps": 9}, "num_inference_steps: there is no such field; did you mean 'steps'"),
        ({"n_iter": 2}, "n_iter: there is no such field; did you mean 'num_outputs'"),
        ({"cfg": 2}, "cfg: there is no such field; did you mean 'cfg_scale'"),
        ({"strength": 0.5}, "strength: there is no such field; did you mean 'denoising_strength'"),
        ({"send_images": True}, "send_images: there is no such field; the pictures are always in the answer"),
        ({"sampeler": "Heun"}, "sampeler: there is no such field; did you mean 'sampler'"),
        ({"lora_urls": ["a", "b", "c"], "lora_scales": [1, 2]}, "2 numbers for 3 lora_urls"),
        ({"lora_urls": ["a"], "lora_scales": ["much"]}, r"^lora_scales\[0\]: 'much' is no number; give -100 to 100$"),
        ({"loras": ["a", "b:500"]}, r"^loras\[1\]: scale: 500.0 is too large; give -100 to 100$"),
        ({"loras": [{"nam": "a"}], "steps": 0}, r"^steps: .*; loras\[0\]: nam: .* did you mean 'name'"),
        ({"sigma_min": 0.5, "sigma_max": 0.2}, "sigma_min must be below"),
        ({"steps": 0, "width": 3}, "width: .*; steps: "),
    ],
)
def test_wrong_values_are_named(fields: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        GenerationRequest(**fields)


WRONG = (None, [], {}, (), "x", "", 5, -1e9, 1e30, float("nan"), "y" * 100_001, True, [{}] * 2000, b"\xff", object())
LIBRARY = re.compile(r"[Ii]nput|should|valid|unable|permitted|required|literal|dictionary|instance")


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (GenerationRequest, {}),
        (UpscaleRequest, {"images": ["a"]}),
        (LoraSpec, {"name": "a"}),
        *((each, {"image": "a", "imageList": []}) for each in BODIES),
        (Options, {}),
        (ADetailerArgs, {}),
    ],
)
def test_no_fault_speaks_the_language_of_the_library(model: Any, given: dict) -> None:
    read = {Options: lambda fields: Options().changed(fields, "there"), ADetailerArgs: lambda f: read_args(f, "there")}
    make = read.get(model) or getattr(model, "read", None) or (lambda fields: model(**fields))
    for field, value in itertools.product(model.model_fields, WRONG):
        try:
            make({**given, field: value})
        except RequestError as error:
            message = re.sub(r"'.*'|\(got .*", "", str(error), flags=re.DOTALL)
            assert not LIBRARY.search(message), message
            assert error.field is None or field in error.field


def numbers_of(model: type[GenerationRequest | UpscaleRequest]) -> list[tuple[type, str]]:
    """The fields of a model that its schema calls numbers."""
    fields: dict[str, dict] = model.model_json_schema()["properties"]
    kinds = {name: [each.get("type") for each in row.get("anyOf", [row])] for name, row in fields.items()}
    return [(model, name) for name, types in kinds.items() if {"integer", "number"} & set(types)]


@pytest.mark.parametrize(("model", "field"), [*numbers_of(GenerationRequest), *numbers_of(UpscaleRequest)])
@pytest.mark.parametrize("value", [True, False])
def test_true_and_false_are_no_numbers(model: type, field: str, value: bool) -> None:
    with pytest.raises(RequestError, match=rf"\b{field}: true and false are no numbers; give ") as caught:
        model(**{"images": ["x"], field: value} if model is UpscaleRequest else {field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"lora_urls": ["a"], "lora_scales": [0.5, True]}, "lora_scales[1]"),
        ({"lora_urls": ["a"], "lora_scales": [False]}, "lora_scales[0]"),
        ({"loras": [{"name": "a", "scale": True}]}, "loras[0]"),
        ({"loras": ["a", {"name": "b", "text_scale": False}]}, "loras[1]"),
    ],
)
def test_nor_are_they_strengths(fields: dict, place: str) -> None:
    with pytest.raises(RequestError, match="true and false are no numbers; give -100 to 100$") as caught:
        GenerationRequest(**fields)
    assert caught.value.field == place


def test_what_is_a_number_or_a_switch_in_any_spelling() -> None:
    request = GenerationRequest(steps=2.0, seed="7", cfg_scale="2", enable_hr=1, adetailer="true")  # type: ignore[arg-type]
    assert (request.steps, request.seed, request.cfg_scale) == (2, 7, 2.0)
    assert request.enable_hr is True and request.adetailer is True


def test_a_request_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        GenerationRequest().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "hires"),
    [
        ({}, False),
        ({"hr_scale": 1.5}, True),
        ({"hr_scale": 1.5, "enable_hr": False}, False),
        ({"enable_hr": True}, True),
    ],
)
def test_hires_follows_the_scale_unless_it_is_set(fields: dict, hires: bool) -> None:
    assert GenerationRequest(**fields).hires is hires


def test_null_is_what_was_left_out() -> None:
    assert GenerationRequest(width=None).width is None
    assert GenerationRequest(prompt=None).prompt == ""
    assert GenerationRequest(seed=None, subseed=None) == GenerationRequest()


@pytest.mark.parametrize("field", PROMPTS)
@pytest.mark.parametrize(
    ("odd", "told"), [("\0", "U+0000"), ("\x0b", "U+000B"), ("\x1b[0m", "U+001B"), ("\x7f", "U+007F")]
)
def test_control_characters_are_no_text_of_a_prompt(field: str, odd: str, told: str) -> None:
    message = rf"^{field}: the text holds a control character \({re.escape(told)}\); leave it out$"
    with pytest.raises(RequestError, match=message) as caught:
        GenerationRequest(**{field: f"a{odd}b"})
    assert caught.value.field == field


def test_tabs_and_ends_of_lines_are() -> None:
    text = "a\tsmiling\r\nwoman\x85\u2028"
    assert GenerationRequest(prompt=text).prompt == text


def test_a_model_for_one_request() -> None:
    assert set(MODEL_FIELDS) == {"checkpoint", "t5", "clip", "vae", "storage_dtype"} <= set(EngineConfig.model_fields)
    assert not any(GenerationRequest().model_dump(include=set(MODEL_FIELDS)).values())
    assert GenerationRequest(checkpoint="small", storage_dtype="bnb-nf4 (fp16 LoRA)").storage_dtype == "nf4"


@pytest.mark.parametrize("field", MODEL_FIELDS)
@pytest.mark.parametrize("value", ["", "a" * 4097, 7])
def test_what_is_no_name_of_a_model(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        GenerationRequest(**{field: value})
    assert caught.value.field == field


def test_a_storage_format_that_is_none() -> None:
    with pytest.raises(RequestError, match="must be one of auto, bf16") as caught:
        GenerationRequest(storage_dtype="int3")
    assert caught.value.field == "storage_dtype"
