"""Null in a body of the native API: as if the field were left out, whichever may be; others are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from running_service import SMALL, Running

from lightweight_engine import Config
from lightweight_engine.apps.server.bodies import without_nulls
from lightweight_engine.apps.server.native import _as_request
from lightweight_engine.apps.server.schemas import UPSCALE_EXAMPLE, request_schemas
from lightweight_engine.extensions.detailer_args import ADetailerArgs
from lightweight_engine.lora_spec import LoraSpec
from lightweight_engine.request import GenerationRequest, UpscaleRequest

CONFIG: Any = SimpleNamespace(config=Config(steps=7, width=512, distilled_cfg_scale=2.0))
OWN = {"by": 3, "upscaler": "Lanczos", "output_format": "webp"}
PASS = {"ad_model": "face_tiny"}


@pytest.mark.parametrize("name", GenerationRequest.model_fields)
def test_every_field_of_a_request(name: str) -> None:
    """It has the setting's value, where there is one, and nobody has asked for it."""
    given = {**SMALL, "width": 64, name: None}
    made = _as_request(CONFIG, without_nulls(GenerationRequest, given))
    left_out = _as_request(CONFIG, {each: value for each, value in given.items() if each != name})
    assert made == left_out and name not in made.model_fields_set
    assert name not in ("steps", "width") or getattr(made, name) in (7, 512)


@pytest.mark.parametrize("name", [name for name in UpscaleRequest.model_fields if name != "images"])
def test_every_field_of_a_request_to_enlarge(name: str) -> None:
    given = {"images": ["x"], **OWN, name: None}
    made = UpscaleRequest(**without_nulls(UpscaleRequest, given))
    assert made == UpscaleRequest(**{each: value for each, value in given.items() if each != name})


@pytest.mark.parametrize("name", [name for name in LoraSpec.model_fields if name != "name"])
def test_every_field_of_a_lora(name: str) -> None:
    for loras in ({"name": "hat", name: None}, [{"name": "hat", name: None}, "hat"]):
        made = GenerationRequest(**without_nulls(GenerationRequest, {"loras": loras}))
        assert made.loras[0] == LoraSpec(name="hat")


@pytest.mark.parametrize("name", [*ADetailerArgs.model_fields, "ad_disable"])
@pytest.mark.parametrize("field", ["adetailer_args", "adetailer_args_hands", "adetailer_passes"])
def test_every_argument_of_the_detailer(name: str, field: str) -> None:
    given = {**PASS, "ad_steps": 3, name: None}
    said = {each: value for each, value in given.items() if value is not None}
    wanted: Any = [said, "{}"] if field == "adetailer_passes" else said
    assert without_nulls(GenerationRequest, {field: [given, "{}"] if field == "adetailer_passes" else given}) == {
        field: wanted
    }


def test_all_fields_at_once(server: Running) -> None:
    """As a client sends it that knows all of them."""
    nulls = dict.fromkeys(GenerationRequest.model_fields)
    answer = server.post("/generate", {**nulls, **SMALL, "subseed": 0})
    assert answer.status == 200, answer.body
    plain = server.generate(subseed=0).json
    assert (answer.json["images"], answer.json["warnings"]) == (plain["images"], plain["warnings"])
    job = server.post("/jobs", {**nulls, **SMALL, "subseed": 0}, Idempotency_Key="nulls").json["id"]
    assert server.post("/jobs", {**SMALL, "subseed": 0}, Idempotency_Key="nulls").json["id"] == job
    inside = {"loras": [{"name": "hat", "scale": None}], "adetailer_passes": [{**PASS, "ad_confidence": None}]}
    assert server.generate(**inside).status == 200
    picture = server.post("/generate", {**SMALL, "output_format": None}, Accept="image/webp")
    assert (picture.status, picture.headers["content-type"]) == (200, "image/webp")
    assert server.post("/upscale", {**dict.fromkeys(UpscaleRequest.model_fields), **UPSCALE_EXAMPLE}).status == 200


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/generate", {"stepz": None}, "stepz"),
        ("/generate", {"loras": [None]}, "loras[0]"),
        ("/generate", {"loras": [{"name": "hat", "scael": None}]}, "loras[0]"),
        ("/generate", {"lora_urls": [None]}, "lora_urls[0]"),
        ("/generate", {"adetailer_passes": [{**PASS, "ad_confidense": None}]}, "adetailer_passes[0].ad_confidense"),
        ("/upscale", {"images": None}, "images"),
        ("/upscale", {"images": [None]}, "images[0]"),
    ],
    ids=str,
)
def test_what_cannot_be_left_out_or_is_not_there(
    server: Running, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = server.post(path, {**(SMALL if path == "/generate" else UPSCALE_EXAMPLE), **fields})
    assert answer.status == 422 and answer.error["param"].startswith(param), answer.body


def test_the_description_says_so() -> None:
    told = request_schemas()
    assert all("null" in told[kind]["description"] for kind in ("GenerationRequest", "UpscaleRequest"))
