"""The models of Forge's API against ``pipelines/api_models.json`` and ``api_validation.json``."""

from __future__ import annotations

import json

import pytest
from checks import api_models, api_validation
from goldens import Case, golden_dir, pipeline_cases, pipeline_families

from lightweight_engine.apps.server.sdapi.models import BODIES, ImageToImageRequest, TextToImageRequest
from lightweight_engine.apps.server.sdapi.options import Options
from lightweight_engine.errors import RequestError


def model_cases() -> list[Case]:
    """A case for each model: the file is a table by name, not a list."""
    folder = golden_dir() / "pipelines"
    path = folder / "api_models.json"
    tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return [Case("api_models", name, {"fields": fields}, folder) for name, fields in tables.items()]


def validation_cases() -> list[Case]:
    return pipeline_cases("api_validation") if "api_validation" in pipeline_families() else []


@pytest.mark.parametrize("case", model_cases(), ids=lambda case: case.id)
def test_fields(case: Case) -> None:
    api_models.check(case)


@pytest.mark.parametrize("case", validation_cases(), ids=lambda case: case.id)
def test_validation(case: Case) -> None:
    api_validation.check(case)


def test_fields_that_are_left_out_are_named() -> None:
    assert TextToImageRequest.unknown_fields({"steps": 20, "foo": 1, "bar": None}) == ["foo", "bar"]


@pytest.mark.parametrize("model", BODIES, ids=lambda model: model.__name__)
def test_true_and_false_are_no_numbers(model: type) -> None:
    for name, row in model.model_json_schema()["properties"].items():
        kinds = {each.get("type") for each in row.get("anyOf", [row])}
        if {"integer", "number"} & kinds and name != "inpainting_mask_invert":
            with pytest.raises(RequestError, match=f"^{name}: true and false are no numbers") as caught:
                model.read({"image": "x", "imageList": [], name: True})
            assert caught.value.field == name
    with pytest.raises(RequestError, match=r"^override_settings\.eta_ancestral: true and false are no numbers"):
        Options().changed({"eta_ancestral": True}, "override_settings")


def test_a_switch_that_the_reference_has_as_a_number() -> None:
    read = [ImageToImageRequest.read({"inpainting_mask_invert": each}) for each in (True, False, 1, "0")]
    assert [body.inpainting_mask_invert for body in read] == [1, 0, 1, 0]
