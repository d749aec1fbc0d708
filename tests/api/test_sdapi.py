"""Forge's API against the real service: policies, answers, bad input, and the sequences of clients (C30 to C32)."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from running_service import PROJECT, Answer, Running, service, wait

from lightweight_engine.apps.server.sdapi.catalogue import Catalogue
from lightweight_engine.apps.server.sdapi.models import ExtraSingleRequest, ImageToImageRequest, TextToImageRequest
from lightweight_engine.apps.server.sdapi.options import Options
from lightweight_engine.apps.server.sdapi.translate import Translation, translate
from lightweight_engine.config import EngineConfig
from lightweight_engine.core.images import encode
from lightweight_engine.core.infotext_parse import unknown_keys
from lightweight_engine.extensions.detailer_args import NONE_RUNS

SMALL: dict[str, Any] = {"prompt": "a smiling woman", "width": 64, "height": 64, "steps": 1, "seed": 7, "cfg_scale": 1}
V1 = "/sdapi/v1"
SECRET = "https://example.org/a.png?token=sparrow"
PNG = base64.b64encode(encode(Image.effect_noise((32, 32), 80).convert("RGB"), "png").data).decode()
DAMAGED = base64.b64encode(base64.b64decode(PNG)[:600]).decode()
CATALOGUE = Catalogue(
    checkpoints=[
        {"title": "a.safetensors [0123456789]", "model_name": "a", "filename": "Stable-diffusion/a.safetensors"},
        {"title": "b.gguf", "model_name": "b", "filename": "Stable-diffusion/sub/b.gguf", "sha256": "ab" * 32},
    ],
    modules=[
        {"model_name": "ae.safetensors", "filename": "VAE/ae.safetensors", "role": "autoencoder", "field": "vae"},
        {"model_name": "t5.safetensors", "filename": "text_encoder/t5.safetensors", "role": "t5", "field": "t5"},
    ],
    configured="Stable-diffusion/a.safetensors",
    models_dir=Path("models"),
)
INFO = {
    "prompt",
    "all_prompts",
    "negative_prompt",
    "all_negative_prompts",
    "seed",
    "all_seeds",
    "subseed",
    "all_subseeds",
    "subseed_strength",
    "width",
    "height",
    "sampler_name",
    "cfg_scale",
    "steps",
    "batch_size",
    "restore_faces",
    "face_restoration_model",
    "sd_model_name",
    "sd_model_hash",
    "sd_vae_name",
    "sd_vae_hash",
    "seed_resize_from_w",
    "seed_resize_from_h",
    "denoising_strength",
    "extra_generation_params",
    "index_of_first_image",
    "infotexts",
    "styles",
    "job_timestamp",
    "clip_skip",
    "is_using_inpainting_conditioning",
    "version",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sdapi")


@pytest.fixture(scope="module")
def running(place: Path, _same_environment: None) -> Iterator[Running]:
    with service(place, "--set", "sdapi_cfg=distilled") as running:
        yield running.ready()


def draw(running: Running, **fields: Any) -> Answer:
    return running.post(f"{V1}/txt2img", {**SMALL, **fields})


def translated(config: EngineConfig | None = None, options: Options | None = None, **fields: Any) -> Translation:
    model = ImageToImageRequest if "init_images" in fields else TextToImageRequest
    return translate(model.read(fields), fields, options or Options(), CATALOGUE, config or EngineConfig())


def test_info_has_all_keys(running: Running) -> None:
    answer = draw(running, n_iter=2).json
    assert set(answer) == {"images", "parameters", "info", "warnings"}
    info = json.loads(answer["info"])
    assert set(info) == INFO
    assert (info["all_seeds"], info["width"], info["steps"]) == ([7, 8], 64, 1)
    assert Image.open(io.BytesIO(base64.b64decode(answer["images"][1], validate=True))).size == (64, 64)
    assert answer["parameters"]["steps"] == 1 and answer["parameters"]["n_iter"] == 2


def test_pictures_that_a_request_brings_are_not_sent_back_unasked(running: Running) -> None:
    begin = draw(running).json["images"][0]
    body = {**SMALL, "init_images": [begin], "mask": begin}
    assert running.post(f"{V1}/img2img", body).json["parameters"]["init_images"] is None
    told = running.post(f"{V1}/img2img", {**body, "include_init_images": True}).json["parameters"]
    assert told["init_images"] == [begin] and told["mask"] == begin


@pytest.mark.parametrize(
    ("fields", "sampler", "scheduler"),
    [
        ({"sampler_name": "Euler", "scheduler": "automatic"}, "Euler", "Simple"),
        ({"sampler_name": "DPM++ 2M", "scheduler": None}, "DPM++ 2M", "Karras"),
        ({"sampler_name": "k_euler_a"}, "Euler a", "Simple"),
        ({"sampler_name": "dpm++ 2m karras"}, "DPM++ 2M", "Karras"),
        ({"sampler_index": "Heun", "scheduler": "sgm_uniform"}, "Heun", "SGM Uniform"),
        ({"sampler_name": "", "sampler_index": "", "scheduler": ""}, "Euler", "Simple"),
        (
            {"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 1, "hr_sampler_name": "", "hr_scheduler": ""},
            "Euler",
            "Simple",
        ),
    ],
)
def test_names_of_samplers(running: Running, fields: dict[str, Any], sampler: str, scheduler: str) -> None:
    info = json.loads(draw(running, **fields).json["info"])
    assert info["sampler_name"] == sampler and f"Schedule type: {scheduler}," in info["infotexts"][0]


def test_a_size_that_is_no_multiple_of_8(running: Running) -> None:
    answer = draw(running, width=71).json
    assert json.loads(answer["info"])["width"] == 64
    assert any("64x64" in warning for warning in answer["warnings"])


@pytest.mark.parametrize(
    ("policy", "fields", "cfg", "distilled"),
    [
        ("literal", {}, 7.0, 3.5),
        ("distilled", {}, 1.0, 3.5),
        ("distilled", {"cfg_scale": 4}, 1.0, 3.5),
        ("distilled", {"negative_prompt": "blurry"}, 7.0, 3.5),
        ("distilled", {"distilled_cfg_scale": 2.5}, 7.0, 2.5),
        ("distilled", {"cfg_scale": 1}, 1.0, 3.5),
    ],
)
def test_a_cfg_scale_sent_by_habit(policy: Any, fields: dict[str, Any], cfg: float, distilled: float) -> None:
    made = translated(EngineConfig(sdapi_cfg=policy), **fields)
    assert (made.request.cfg_scale, made.request.distilled_cfg_scale) == (cfg, distilled)
    changed = policy == "distilled" and cfg != fields.get("cfg_scale", 7.0)
    assert bool(made.told) == changed
    assert any("cfg_scale" in each for each in made.warnings) == (
        fields.get("cfg_scale") != 1 and "negative_prompt" not in fields
    )


def test_the_policy_is_told(running: Running) -> None:
    answer = draw(running, cfg_scale=7).json
    info = json.loads(answer["info"])
    assert info["cfg_scale"] == 1 and "cfg_scale 7" in info["extra_generation_params"]["Guidance policy"]
    assert any("sdapi_cfg" in warning for warning in answer["warnings"])


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"width": 0}, 422, "width"),
        ({"width": -512}, 422, "width"),
        ({"width": 512.5}, 422, "width"),
        ({"width": 100_000, "height": 100_000}, 422, "width"),
        ({"steps": 0}, 422, "steps"),
        ({"batch_size": 0}, 422, "batch_size"),
        ({"batch_size": 1000}, 422, "batch_size"),
        ({"n_iter": 0}, 422, "n_iter"),
        ({"n_iter": 1000}, 422, "n_iter"),
        ({"n_iter": 10**12}, 422, "n_iter"),
        ({"n_iter": 60, "steps": 900, "width": 2048, "height": 2048}, 413, "steps"),
        ({"seed": 2**64}, 422, "seed"),
        ({"seed": 1.5}, 422, "seed"),
        ({"seed": -5}, 422, "seed"),
        ({"prompt": "a\0b"}, 422, "prompt"),
        ({"cfg_scale": -1}, 422, "cfg_scale"),
        ({"distilled_cfg_scale": -1}, 422, "distilled_cfg_scale"),
        ({"denoising_strength": 1.1}, 422, "denoising_strength"),
        ({"enable_hr": True, "hr_scale": 100}, 422, "hr_scale"),
        ({"enable_hr": True, "hr_resize_x": 1}, 422, "hr_resize_x"),
        ({"enable_hr": True, "hr_second_pass_steps": -1}, 422, "hr_second_pass_steps"),
        ({"enable_hr": True, "hr_checkpoint_name": "other"}, 422, "hr_checkpoint_name"),
        ({"enable_hr": True, "hr_additional_modules": ["ae"]}, 422, "hr_additional_modules"),
        ({"enable_hr": True, "hr_sampler_name": "Foo"}, 400, "hr_sampler_name"),
        ({"enable_hr": True, "hr_scheduler": "Foo"}, 422, "hr_scheduler"),
        ({"sampler_name": "Foo"}, 400, "sampler_name"),
        ({"scheduler": "Foo"}, 422, "scheduler"),
        ({"script_name": "X/Y/Z plot"}, 422, "script_name"),
        ({"alwayson_scripts": {"Foo": {"args": []}}}, 422, "alwayson_scripts.Foo"),
        ({"alwayson_scripts": {"ADetailer": {"args": 5}}}, 422, "alwayson_scripts.ADetailer.args"),
        (
            {"alwayson_scripts": {"ADetailer": {"args": [True, {"ad_foo": 1}]}}},
            422,
            "alwayson_scripts.ADetailer.args[1].ad_foo",
        ),
        ({"alwayson_scripts": {"adetailer": {"args": [{"ad_model": "x.pt"}]}}}, 404, None),
        *(
            ({"alwayson_scripts": {"ADetailer": {"args": [True, {"ad_model": "face_tiny"}, fault]}}}, status, param)
            for fault, status, param in (
                ({"ad_model": "x.pt"}, 404, "alwayson_scripts.ADetailer.args[2].ad_model"),
                ({"ad_model": ""}, 422, "alwayson_scripts.ADetailer.args[2].ad_model"),
                ({"ad_model": "face_tiny", "ad_steps": 0}, 422, "alwayson_scripts.ADetailer.args[2].ad_steps"),
                (
                    {"ad_model": "face_tiny", "ad_restore_face": True},
                    422,
                    "alwayson_scripts.ADetailer.args[2].ad_restore_face",
                ),
                *(
                    (
                        {"ad_model": "face_tiny", "ad_confidence": 1, "ad_use_sampler": True, name: value},
                        status,
                        f"alwayson_scripts.ADetailer.args[2].{name}",
                    )
                    for name, value, status in (
                        ("ad_sampler", "Foo", 422),
                        ("ad_scheduler", "Foo", 422),
                        ("ad_prompt", "a face<lora:there-is-none:1>", 404),
                    )
                ),
            )
        ),
        ({"alwayson_scripts": {"adetailer": [{"ad_model": "x.pt"}]}}, 404, "alwayson_scripts.adetailer[0].ad_model"),
        ({"override_settings": {"samples_format": "gif"}}, 422, "override_settings.samples_format"),
        ({"firstpass_image": "abc"}, 422, "firstpass_image"),
        ({"prompt": "<lora:there-is-none:1>"}, 404, None),
        ({"alwayson_scripts": []}, 422, "alwayson_scripts"),
        ({"sampler_index": "Foo"}, 400, "sampler_index"),
        ({"sampler_name": "", "sampler_index": "Karras"}, 400, "sampler_index"),
        ({"batch_size": 65}, 422, "batch_size"),
        ({"override_settings": {"s_churn": -1}}, 422, "override_settings.s_churn"),
        ({"override_settings": {"s_churn": 1}, "s_churn": -1}, 422, "s_churn"),
        ({"enable_hr": True, "firstphase_width": 9000, "width": 64}, 422, "firstphase_width"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_bad_input(running: Running, fields: dict[str, Any], status: int, param: str | None) -> None:
    answer = draw(running, **fields)
    assert answer.status == status, answer.body
    assert param is None or answer.error["param"] == param
    assert answer.error["message"].startswith(f"{param}: " if param and "[" in param else "")


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 422),
        ({"init_images": []}, 422),
        ({"init_images": [""]}, 422),
        ({"init_images": [None]}, 422),
        ({"init_images": [PNG, None]}, 422),
        ({"init_images": ["!!!"]}, 422),
        ({"init_images": [base64.b64encode(b"plain text " * 20).decode()]}, 422),
        ({"init_images": ["http://127.0.0.1/x.png"]}, 403),
        ({"denoising_strength": None}, 422),
        ({"resize_mode": 4}, 422),
    ],
)
def test_bad_pictures(running: Running, fields: dict[str, Any], status: int) -> None:
    answer = running.post(f"{V1}/img2img", {**SMALL, **fields})
    assert answer.status == status, answer.body
    assert answer.error["message"]


@pytest.mark.parametrize(
    "fields", [{"steps": SECRET}, {"override_settings": {"s_churn": SECRET}}, {"init_images": SECRET}]
)
def test_addresses_are_not_repeated(running: Running, fields: dict[str, Any]) -> None:
    answer = running.post(f"{V1}/img2img", {**SMALL, "init_images": [PNG], **fields})
    assert answer.status == 422 and b"sparrow" not in answer.body


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("img2img", {"init_images": [PNG], "mask": PNG, "mask_blur": -1}, "mask_blur"),
        ("img2img", {"init_images": [PNG], "mask": PNG, "mask_blur_y": -1}, "mask_blur_y"),
        ("img2img", {"init_images": ["!!!"]}, "init_images[0]"),
        ("img2img", {"init_images": [None]}, "init_images[0]"),
        ("img2img", {"init_images": [5]}, "init_images[0]"),
        ("img2img", {"init_images": [PNG, ""]}, "init_images[1]"),
        ("img2img", {"init_images": [DAMAGED]}, "init_images[0]"),
        ("extra-single-image", {"image": DAMAGED}, "image"),
        ("png-info", {"image": DAMAGED}, "image"),
        ("img2img", {"init_images": [PNG, "!!!"], "n_iter": 2}, "init_images[1]"),
        ("extra-single-image", {"image": "!!!"}, "image"),
        ("extra-batch-images", {"imageList": [{"data": "!!!", "name": ""}]}, "imageList[0].data"),
        ("extra-batch-images", {"imageList": [{"data": PNG, "name": ""}, {"name": ""}]}, "imageList[1].data"),
        ("extra-batch-images", {"imageList": []}, "imageList"),
    ],
)
def test_the_field_at_fault_has_the_name_that_was_sent(
    running: Running, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = running.post(f"{V1}/{path}", {**(SMALL if path == "img2img" else {}), **fields})
    assert (answer.status, answer.error["param"]) == (422, param), answer.body
    assert answer.error["message"].startswith(f"{param}: ") and "_y" not in answer.error["message"].removeprefix(param)


def test_what_has_no_effect_is_told(running: Running) -> None:
    extra = {"foo": 1, "restore_faces": True, "tiling": True, "styles": ["a"], "script_args": [1]}
    extra["override_settings_restore_afterwards"] = False
    overrides = {"CLIP_stop_at_last_layers": 2, "no_such_option": 1, "eta_noise_seed_delta": 31337}
    answer = draw(running, **extra, override_settings=overrides, sampler_name="Euler a").json
    told = " ".join(answer["warnings"])
    assert all(name in told for name in (*extra, "no_such_option", "CLIP_stop"))
    assert json.loads(answer["info"])["extra_generation_params"]["ENSD"] == "31337"


FORM: dict[str, Any] = {  # what clients send that send every field
    "txt2img": {
        "enable_hr": False,
        "hr_scale": 2,
        "hr_upscaler": "Latent",
        "hr_second_pass_steps": 0,
        "hr_resize_x": 0,
    },
    "img2img": {"init_images": [PNG], "mask_blur": 4, "inpainting_fill": 0, "inpaint_full_res": True},
}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hr_scale": 2}, "hr_scale had no effect without enable_hr"),
        (
            {"sampler_name": "Euler", "sampler_index": "Heun"},
            "sampler_index had no effect beside sampler_name, which is 'Euler'",
        ),
        ({"hr_second_pass_steps": 5, "enable_hr": False}, "hr_second_pass_steps had no effect without enable_hr"),
        ({**FORM["txt2img"], "hr_scale": 1.5}, "hr_scale had no effect without enable_hr"),
        ({"hr_sampler_name": "Euler", "firstphase_width": 64}, "hr_sampler_name, firstphase_width had no effect"),
        ({"init_images": [PNG], "inpaint_full_res": True}, "inpaint_full_res had no effect without mask"),
        ({**FORM["img2img"], "mask_blur": 9}, "mask_blur had no effect without mask"),
        ({"init_images": [PNG, PNG], "batch_size": 4}, "batch_size 4 draws no more pictures: there are 2 init_images"),
        (
            {"infotext": "a\nSteps: 3, Smapler: Euler, Seed: 1"},
            "infotext: keys that do not exist had no effect: Smapler",
        ),
        (
            {"alwayson_scripts": {"ADetailer": {"args": [False], "arg": 1}}},
            "alwayson_scripts.ADetailer: arg had no effect",
        ),
    ],
)
def test_fields_of_what_is_not_asked_for(fields: dict[str, Any], told: str) -> None:
    (sentence,) = translated(**{"cfg_scale": 1, **fields}).warnings
    assert sentence.startswith(told)


@pytest.mark.parametrize(
    "fields",
    [
        *FORM.values(),
        {"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 1.5},
        {"init_images": [PNG, PNG], "batch_size": 2},
        {"sampler_name": "Heun", "sampler_index": "heun"},
        {"sampler_name": "Heun", "sampler_index": "Euler"},
        {"init_images": [PNG], "mask": PNG, "mask_blur": 9, "inpaint_full_res": True},
    ],
)
def test_whole_forms_and_what_acts_are_not_told(fields: dict[str, Any]) -> None:
    assert translated(**{"cfg_scale": 1, **fields}).warnings == []


def test_a_picture_of_ours_has_no_unknown_keys(running: Running) -> None:
    info = json.loads(
        draw(running, enable_hr=True, hr_scale=2, denoising_strength=0.5, hr_second_pass_steps=1).json["info"]
    )
    assert unknown_keys(info["infotexts"][0]) == []


def test_what_the_engine_finds_idle_is_told_of_fields_that_were_sent(running: Running) -> None:
    told = draw(running, eta=0.5, subseed=5, denoising_strength=0.5).json["warnings"]
    for name in ("eta", "subseed", "denoising_strength"):
        assert any(each.startswith(f"{name} had no effect with") for each in told), told
    assert not any("had no effect" in each for each in draw(running, eta=None, subseed=-1).json["warnings"])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"rho": 5}, "override_settings.rho had no effect with the scheduler Simple"),
        ({"eta_ancestral": 0.5}, "override_settings.eta_ancestral had no effect with the sampler Euler"),
        (
            {"use_old_karras_scheduler_sigmas": True, "beta_dist_alpha": 0.5},
            "override_settings.beta_dist_alpha, override_settings.use_old_karras_scheduler_sigmas had no effect with",
        ),
        (
            {"img2img_color_correction": True, "img2img_fix_steps": True, "img2img_background_color": "#000000"},
            "override_settings.img2img_color_correction, override_settings.img2img_fix_steps, "
            "override_settings.img2img_background_color had no effect without image",
        ),
        ({"upscaler_for_img2img": "Lanczos"}, "override_settings.upscaler_for_img2img had no effect without image"),
        ({"no_such_option": 1}, "override_settings: options that do not exist here had no effect: no_such_option"),
    ],
)
def test_options_that_do_nothing_are_told_by_their_names(
    running: Running, overrides: dict[str, Any], told: str
) -> None:
    warnings = draw(running, override_settings=overrides).json["warnings"]
    (sentence,) = [each for each in warnings if "had no effect" in each]
    assert sentence.startswith(told)


def test_options_that_act_or_ask_for_nothing_are_not_told(running: Running) -> None:
    usual = Options().model_dump(exclude={"sd_model_checkpoint", "upscaler_for_img2img"})
    acts: dict[str, Any] = {"eta_ancestral": 0.5, "rho": 5}
    sampled = {"sampler_name": "Euler a", "scheduler": "Karras"}
    for answer in (draw(running, override_settings=usual), draw(running, override_settings=acts, **sampled)):
        assert not [each for each in answer.json["warnings"] if "had no effect" in each]


@pytest.mark.parametrize("rival", [{"eta": 0.25}, {"infotext": "a\nSteps: 1, Eta: 0.25, Size: 64x64"}])
def test_an_option_beside_a_field_that_says_something_else(rival: dict[str, Any]) -> None:
    asked = {"sampler_name": "Euler a", "cfg_scale": 1, "override_settings": {"eta_ancestral": 0.5}}
    (sentence,) = translated(**asked, **rival).warnings
    assert sentence.startswith("override_settings: eta_ancestral had no effect: a field of the request says")
    assert translated(**asked, eta=0.5).warnings == []


def test_a_slip_in_the_arguments_of_a_script(running: Running) -> None:
    answer = draw(running, alwayson_scripts={"ADetailer": {"arg": [{"ad_model": "face_tiny"}]}})
    assert (answer.status, answer.error["param"]) == (422, "alwayson_scripts.ADetailer")
    assert answer.error["message"] == "alwayson_scripts.ADetailer: there is no 'arg'; did you mean 'args'?"


def test_no_field_is_forgotten() -> None:
    """Each is a row of a table, or used by name where bodies are read."""
    folder = PROJECT / "lightweight_engine" / "apps" / "server" / "sdapi"
    used = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py") if path.name != "models.py")
    for model in (TextToImageRequest, ImageToImageRequest, ExtraSingleRequest):
        idle = {"show_extras_results", "codeformer_weight", "upscale_first"}  # of faces, which nobody paints there
        assert [name for name in model.model_fields if not re.search(rf"\b{name}\b", used)] == sorted(
            idle & set(model.model_fields), key=list(model.model_fields).index
        )


def test_null_is_as_configured() -> None:
    made = translated(EngineConfig(steps=12), steps=None, cfg_scale=None, width=None, prompt=None, seed=None)
    assert (made.request.steps, made.request.cfg_scale, made.request.width) == (12, 1.0, None)
    assert (made.request.prompt, made.request.seed) == ("", -1)


def test_null_of_a_second_pass_is_as_in_forge() -> None:
    made = translated(enable_hr=True, hr_scale=None, hr_upscaler=None, hr_cfg=None, denoising_strength=None).request
    assert (made.hr_scale, made.hr_upscaler, made.hr_cfg, made.denoising_strength) == (2.0, "Latent", 1.0, None)


def test_options_for_pictures_are_none_of_txt2img() -> None:
    options = Options(upscaler_for_img2img="Lanczos", img2img_color_correction=True)
    assert translated(options=options).request.img2img_upscaler == "None"
    drawn = translated(options=options, init_images=[PNG]).request
    assert drawn.img2img_upscaler == "Lanczos" and drawn.color_correction


def test_null_leaves_it_to_the_options() -> None:
    options = Options(s_churn=3.0, eta_ancestral=0.5)
    made = translated(options=options, s_churn=None, eta=None).request
    assert (made.s_churn, made.eta) == (3.0, 0.5)
    assert translated(options=options, s_churn=0, eta=1).request.s_churn == 0


def test_what_is_left_out_is_as_in_forge() -> None:
    made = translated().request
    assert (made.width, made.height, made.steps, made.sampler, made.enable_hr) == (512, 512, 50, "Euler", False)


def test_an_infotext_fills_what_is_left_out() -> None:
    text = "a hat\nNegative prompt: dull\nSteps: 9, Sampler: Heun, CFG scale: 2.0, Seed: 5, Size: 96x64"
    made = translated(infotext=text, steps=3).request
    assert (made.prompt, made.negative_prompt, made.seed, made.sampler) == ("a hat", "dull", 5, "Heun")
    assert (made.steps, made.width, made.height) == (3, 96, 64)


def test_an_infotext_does_not_fill_what_was_sent() -> None:
    text = "a hat\nSteps: 9, Sampler: Heun, Seed: 5, Hires upscale: 3, Hires upscaler: Latent, Hires steps: 4"
    made = translated(infotext=text, hr_scale=2, hr_second_pass_steps=1).request
    assert (made.enable_hr, made.hr_scale, made.hr_steps) == (True, 2, 1)
    assert translated(infotext=text, enable_hr=False).request.enable_hr is False


@pytest.mark.parametrize(
    ("key", "status", "param"),
    [
        ("Sampler: Foo", 400, "infotext.Sampler"),
        ("Schedule type: Foo", 422, "infotext.Schedule type"),
        ("CFG scale: 5000", 422, "infotext.CFG scale"),
        ("Size: 8x64", 422, "infotext.Size"),
        ("Size: 64x8", 422, "infotext.Size"),
        ("CFG scale: x", 422, "infotext"),
    ],
)
def test_a_fault_in_an_infotext(running: Running, key: str, status: int, param: str) -> None:
    body = {"infotext": f"a hat\nSteps: 1, Seed: 1, Version: 1, {key}"}
    answer = running.post(f"{V1}/txt2img", body)
    assert (answer.status, answer.error["param"]) == (status, param) and answer.error["message"].startswith(
        f"{param}: "
    )


def test_a_first_phase_of_another_size() -> None:
    fields = {"enable_hr": True, "firstphase_width": 64, "firstphase_height": 96, "width": 128, "height": 192}
    made = translated(**fields).request
    assert (made.width, made.height, made.hr_resize_x, made.hr_resize_y) == (64, 96, 128, 192)


def test_several_start_pictures() -> None:
    made = translated(init_images=["a", "b", "c"], n_iter=2).request
    assert made.num_outputs == 6 and made.image == ["a", "b", "c"] * 2
    made = translated(init_images=["a", "b"], n_iter=10**12).request
    assert made.num_outputs == 2 * 10**12 and len(made.image) == 128, "a list of as many would take all memory"


@pytest.mark.parametrize(
    ("args", "passes", "skip"),
    [
        ([True, False, {"ad_model": "a"}, {"ad_model": "b"}], 2, False),
        ([True, {"ad_model": "a", "ad_mask_k_largest": 2}], 1, False),
        ([{"ad_model": "a"}], 1, False),
        ([True, True, {"ad_model": "a"}], 1, True),
        ([False, {"ad_model": "a"}], 0, False),
        ([True], 0, False),
        ([True, {"ad_model": "None"}], 0, False),
    ],
)
def test_forms_of_adetailers_arguments(args: list[Any], passes: int, skip: bool) -> None:
    told = translated(init_images=["x"], alwayson_scripts={"aDetailer": {"args": args}})
    made = told.request
    assert (len(made.adetailer_passes), made.skip_img2img) == (passes, skip)
    assert (f"ADetailer: {NONE_RUNS}" in told.warnings) == (passes == 0 and args[0] is not False)
    assert all("ad_mask_k_largest" not in each for each in made.adetailer_passes)


@pytest.mark.parametrize(
    ("args", "lost"),
    [
        ([False, {"ad_model": "a"}], "the pass that is given"),
        ([False, False, {"ad_model": "a"}, {"ad_model": "None"}, {"ad_model": "b"}], "the 2 passes that are given"),
        ([False, False, {"ad_model": "None"}, {"ad_model": "a", "ad_tab_enable": False}], None),
        ([False, {}], None),
        ([False, False], None),
        ([True, False, {"ad_model": "a"}], None),
    ],
)
def test_passes_that_are_given_and_switched_off_are_told(args: list[Any], lost: str | None) -> None:
    for script, place in (({"args": args}, "adetailer.args"), (args, "adetailer")):
        told = [text for text in translated(alwayson_scripts={"adetailer": script}).warnings if "it is false" in text]
        assert bool(told) == (lost is not None)
        assert all(text.startswith(f"alwayson_scripts.{place}[0]: ") and str(lost) in text for text in told)


def test_disabled_networks_are_left_out() -> None:
    made = translated(prompt="a <lora:hat:1> woman", disable_extra_networks=True)
    assert "lora" not in made.request.prompt and any("extra networks" in each for each in made.warnings)


def test_names_of_latent_modes_are_those_of_the_hires_pass() -> None:
    from lightweight_engine.extensions.hires_fix import LATENT_MODES
    from lightweight_engine.labels import LATENT_UPSCALERS

    assert tuple(LATENT_MODES) == LATENT_UPSCALERS


def test_what_is_told_of_the_detailer(running: Running) -> None:
    assert running.get("/adetailer/v1/version").json == {"version": "25.3.0"}
    assert "ad_mask_k" in running.get("/adetailer/v1/schema").json["properties"]
    assert {"face_tiny.safetensors", "hand_tiny.safetensors"} <= set(
        running.get("/adetailer/v1/ad_model").json["ad_model"]
    )


def test_internal(running: Running) -> None:
    assert running.get("/internal/ping").json == {}
    assert running.get("/internal/pending-tasks").json == {"size": 0, "tasks": []}
    assert running.get("/internal/sysinfo").json["Version"].startswith("lightweight-engine")
    told = running.post("/internal/progress", {"id_task": "task(none)"}).json
    assert not (told["active"] or told["queued"] or told["completed"])


def test_tasks_by_name(running: Running) -> None:
    long = {**SMALL, "width": 192, "height": 192, "steps": 1000, "force_task_id": "task(first)"}
    connections = [running.connect() for _ in range(2)]
    for connection, name in zip(connections, ("first", "second"), strict=True):
        body = json.dumps({**long, "force_task_id": f"task({name})"})
        connection.request("POST", f"{V1}/txt2img", body, {"Content-Type": "application/json"})
        wait(lambda name=name: task(running, f"task({name})")["active" if name == "first" else "queued"])
    assert running.get("/internal/pending-tasks").json == {"size": 1, "tasks": ["task(second)"]}
    told = wait(lambda: (seen := task(running, "task(first)"))["live_preview"] and seen)
    assert told["live_preview"].startswith("data:image/jpeg;base64,") and 0 < told["progress"] < 1
    assert running.get(f"{V1}/progress?skip_current_image=true").json["current_image"] is None
    for connection in connections:
        connection.close()  # which cancels
    running.idle()
    assert task(running, "task(first)")["completed"]


def test_a_key_of_what_was_not_kept_does_not_stand_for_what_is_to_be(running: Running) -> None:
    """The earlier job would be the answer, and no file come of it."""
    for save, status in ((False, 200), (False, 200), (True, 409)):
        answer = running.post(f"{V1}/txt2img", {**SMALL, "save_images": save}, Idempotency_Key="kept")
        assert answer.status == status, answer.body


def test_metrics_tell_addresses_whole(running: Running) -> None:
    """Those of two interfaces that end alike are two."""
    running.get(f"{V1}/progress"), running.post("/internal/progress", {}), running.get("/adetailer/v1/version")
    text = running.get("/metrics").body.decode()
    for route in (f"{V1}/progress", "/internal/progress", "/adetailer/v1/version"):
        assert f'route="{route}",status="200"' in text
    assert 'route="/progress"' not in text


def test_native_jobs_are_no_tasks(running: Running) -> None:
    """They take their turn in the same queue, and are neither shown nor ended."""
    job = running.job({**SMALL, "width": 256, "height": 256, "steps": 1000})
    running.until(job, "running")
    told = running.get(f"{V1}/progress").json
    assert told["progress"] == 0 and told["state"]["job_count"] == 0
    for path in ("interrupt", "skip"):
        assert running.post(f"{V1}/{path}", None).status == 200
    time.sleep(0.3)
    assert running.get(f"/jobs/{job}").json["state"] == "running"
    running.ask("DELETE", f"/jobs/{job}")
    running.idle()


def task(running: Running, name: str) -> dict[str, Any]:
    return running.post("/internal/progress", {"id_task": name}).json


@pytest.mark.parametrize("path", ["server-kill", "server-restart", "server-stop"])
def test_a_caller_cannot_end_the_service(running: Running, path: str) -> None:
    assert running.post(f"{V1}/{path}", {}).status == 404


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"image": ""}, 422, None),
        ({"upscaling_resize": 0}, 422, "upscaling_resize"),
        ({"upscaling_resize": 99}, 422, "upscaling_resize"),
        ({"resize_mode": 2}, 422, "resize_mode"),
        ({"resize_mode": 1, "upscaling_resize_w": 0}, 422, "upscaling_resize_w"),
        ({"upscaler_1": "Foo"}, 404, "upscaler_1"),
        ({"upscaler_1": "../../etc/passwd"}, 404, None),
        ({"upscaler_2": "Lanczos", "extras_upscaler_2_visibility": 2}, 422, "extras_upscaler_2_visibility"),
    ],
)
def test_bad_enlarging(running: Running, fields: dict[str, Any], status: int, param: str | None) -> None:
    answer = running.post(f"{V1}/extra-single-image", {"image": PNG, "upscaler_1": "Lanczos", **fields})
    assert answer.status == status, answer.body
    assert param is None or answer.error["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/sdapi/v1/extra-single-image", {}, "image: there is no picture; send one in base64"),
        ("/sdapi/v1/extra-batch-images", {}, "imageList: it is missing; give it"),
        ("/sdapi/v1/png-info", {}, "image: it is missing; give it"),
        (
            "/sdapi/v1/txt2img",
            {"override_settings": 5},
            "override_settings: give an object of names and values (got 5)",
        ),
        ("/sdapi/v1/txt2img", {"styles": 5}, "styles: give a list (got 5)"),
        ("/sdapi/v1/txt2img", {"steps": "many"}, "steps: 'many' is no whole number; give 1 to 1,000"),
        ("/sdapi/v1/txt2img", {"steps": 0}, "steps: 0 is too small; give 1 to 1,000"),
        (
            "/sdapi/v1/txt2img",
            {"hr_second_pass_steps": "many"},
            "hr_second_pass_steps: 'many' is no whole number; give 0 to 1,000",
        ),
        (
            "/sdapi/v1/txt2img",
            {"override_settings": {"eta_ancestral": "much"}},
            "override_settings.eta_ancestral: 'much' is no number; give 0 to 10",
        ),
        ("/sdapi/v1/extra-single-image", {"resize_mode": 2}, "resize_mode: 2 is no choice; give 0 or 1"),
        ("/upscale", {"images": ["a"], "by": 99}, "by: 99 is too large; give more than 0, up to 16"),
        (
            "/sdapi/v1/txt2img",
            {"seed": "9" * 5000},
            f"seed: {'9' * 78}… is too large; give -1 to 9,223,372,036,854,775,807",
        ),
        (
            "/generate",
            {"seed": "9" * 5000},
            f"seed: {'9' * 78}… is too large; give -1 to 9,223,372,036,854,775,807",
        ),
        ("/upscale", {"images": []}, "images: give at least 1 (got 0)"),
        ("/upscale", {}, "images: it is missing; give it"),
        ("/generate", {"checkpoint": ""}, "checkpoint: it is empty; give a text, or leave it out"),
        ("/generate", {"hr_sampler": ""}, "hr_sampler: it is empty; give a text, or leave it out"),
        ("/generate", {"loras": ["a"] * 20}, "loras: give at most 16 (got 20)"),
        ("/generate", {"adetailer_passes": 5}, "adetailer_passes: give a list (got 5)"),
    ],
)
def test_faults_are_told_in_our_words(running: Running, path: str, body: dict[str, Any], message: str) -> None:
    answer = running.post(path, body)
    assert (answer.status, answer.error["message"]) == (422, message)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"upscaler_2": "Lanczos"}, ["upscaler_2 had no effect: extras_upscaler_2_visibility is 0"]),
        ({"extras_upscaler_2_visibility": 0.5}, ["extras_upscaler_2_visibility had no effect without upscaler_2"]),
        (
            {"upscaling_resize_w": 40, "upscaling_crop": False},
            ["upscaling_resize_w, upscaling_crop had no effect with"],
        ),
        ({"resize_mode": 1, "upscaling_resize": 3, "upscaling_resize_w": 40}, ["upscaling_resize had no effect with"]),
        ({"upscaling_resize_w": 512, "upscaling_resize_h": 512, "upscaler_2": "None", "upscaling_crop": True}, []),
        ({"upscaler_2": "Lanczos", "extras_upscaler_2_visibility": 0.5, "upscaling_resize": 3}, []),
    ],
)
def test_what_enlarging_does_not_look_at_is_told(running: Running, fields: dict[str, Any], told: list[str]) -> None:
    answer = running.post(f"{V1}/extra-single-image", {"image": PNG, "upscaler_1": "Nearest", **fields})
    assert answer.status == 200, answer.body
    warnings = answer.json["warnings"]
    assert len(warnings) == len(told) and all(map(str.startswith, warnings, told)), warnings


def test_faces_of_enlarged_pictures_are_left(running: Running) -> None:
    answer = running.post(f"{V1}/extra-single-image", {"image": PNG, "gfpgan_visibility": 1, "upscaler_1": "Nearest"})
    assert answer.status == 200 and "gfpgan_visibility had no effect" in answer.json["html_info"]


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_an_enlarged_picture_keeps_its_text(running: Running, kind: str) -> None:
    text = f"a smiling woman\nSteps: 1, Seed: 7, Size: 32x32, Note: {'…' * (40_000 if kind == 'jpg' else 1)}"
    drawn = base64.b64encode(encode(Image.new("RGB", (32, 32), "teal"), kind, text).data).decode()
    asked = {"upscaler_1": "Nearest", "upscaler_2": "Lanczos", "extras_upscaler_2_visibility": 0.5}
    single = running.post(f"{V1}/extra-single-image", {**asked, "image": drawn}).json
    told = running.post(f"{V1}/png-info", {"image": single["image"]}).json
    assert told["info"] == text and told["parameters"]["Seed"] == "7"
    line = "Postprocess upscale by: 2, Postprocess upscaler: Nearest, Postprocess upscaler 2: Lanczos"
    assert single["html_info"] == f"<p>{line}</p>" and single["warnings"] == []
    pictures = [{"data": each, "name": ""} for each in (PNG, drawn)]
    sized = {"resize_mode": 1, "upscaling_resize_w": 40, "upscaling_resize_h": 24, "upscaler_1": "Nearest"}
    batch = running.post(f"{V1}/extra-batch-images", {**sized, "imageList": pictures}).json
    assert batch["html_info"] == "<p>Postprocess upscale to: 40x24, Postprocess upscaler: Nearest</p>"
    texts = [running.post(f"{V1}/png-info", {"image": each}).json["info"] for each in batch["images"]]
    assert texts == ["", text]


def test_parameters_of_a_query_are_told(running: Running) -> None:
    told = "parameters of the query had no effect: steps, x"
    enlarged = running.post(f"{V1}/extra-single-image?steps=2&x=1", {"image": PNG, "upscaler_1": "Nearest"})
    assert enlarged.status == 200 and told in enlarged.json["html_info"]
    assert told in running.post(f"{V1}/txt2img?steps=2&x=1", SMALL).json["warnings"]
    assert running.get(f"{V1}/progress?skip_current_image=true&x=1").status == 200


HERE = Path("models").absolute()


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ({"sd_model_checkpoint": "b"}, {"checkpoint": "Stable-diffusion/sub/b.gguf"}),
        ({"sd_model_checkpoint": "a.safetensors [0123456789]"}, {"checkpoint": "Stable-diffusion/a.safetensors"}),
        ({"sd_model_checkpoint": "ab" * 32}, {"checkpoint": "Stable-diffusion/sub/b.gguf"}),
        ({"sd_vae": "Automatic"}, {}),
        ({"sd_vae": "ae"}, {"vae": "VAE/ae.safetensors"}),
        (
            {"forge_additional_modules": ["ae.safetensors", str(HERE / "text_encoder" / "t5.safetensors")]},
            {"vae": "VAE/ae.safetensors", "t5": "text_encoder/t5.safetensors"},
        ),
        ({"forge_unet_storage_dtype": "Automatic"}, {}),
        ({"forge_unet_storage_dtype": "bnb-nf4"}, {"storage_dtype": "nf4"}),
        ({"forge_preset": "flux", "sd_model_checkpoint": None}, {}),
    ],
)
def test_models_that_a_request_names(overrides: dict[str, Any], fields: dict[str, str]) -> None:
    made = translated(override_settings=overrides)
    told = {name: getattr(made.request, name) for name in ("checkpoint", "vae", "t5", "clip", "storage_dtype")}
    assert {name: value for name, value in told.items() if value is not None} == fields
    assert not [each for each in made.warnings if "override_settings" in each]


@pytest.mark.parametrize(
    ("overrides", "status"),
    [
        ({"sd_model_checkpoint": "fluxx"}, 404),
        ({"sd_model_checkpoint": "../../etc/passwd"}, 404),
        ({"sd_model_checkpoint": "/etc/passwd"}, 403),
        ({"sd_vae": "a\0b"}, 422),
        ({"forge_additional_modules": ["none-such"]}, 404),
        ({"forge_additional_modules": [str(HERE / ".." / "x.safetensors")]}, 403),
        ({"forge_additional_modules": "ae"}, 422),
        ({"forge_unet_storage_dtype": "fp3"}, 422),
    ],
)
def test_models_that_are_not_there(running: Running, overrides: dict[str, Any], status: int) -> None:
    answer = draw(running, override_settings=overrides)
    assert answer.status == status, answer.body
    assert answer.error["param"] == f"override_settings.{next(iter(overrides))}"


def test_options_hold_until_they_are_changed(running: Running) -> None:
    draw(running)  # from which time on the title has the hash
    before = running.get(f"{V1}/options").json
    assert running.post(f"{V1}/options", {"samples_format": "webp", "eta_noise_seed_delta": 5}).body == b"null"
    image = base64.b64decode(draw(running).json["images"][0])
    assert Image.open(io.BytesIO(image)).format == "WEBP"
    other = base64.b64decode(draw(running, override_settings={"samples_format": "png"}).json["images"][0])
    assert Image.open(io.BytesIO(other)).format == "PNG"
    assert running.get(f"{V1}/options").json == {**before, "samples_format": "webp", "eta_noise_seed_delta": 5}
    assert running.post(f"{V1}/options", before).status == 200
    assert running.get(f"{V1}/options").json == before


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"samples_format": "gif"}, 422),
        ({"sd_model_checkpoint": "none-such"}, 404),
        ({"upscaler_for_img2img": "none-such"}, 404),
        ({"forge_preset": "sd"}, 422),
        *(
            ({name: value}, 422)
            for name, values in {
                "img2img_background_color": ["foo"],
                "forge_unet_storage_dtype": ["int3", "Q4_K"],
                "eta_ancestral": [-1, 100],
                "beta_dist_alpha": [0],
                "s_churn": [-1, 1e9],
                "s_noise": [-1],
                "skip_early_cond": [2],
                "sigma_min": [-1],
                "rho": [-1],
                "img2img_extra_noise": [-1],
                "initial_noise_multiplier": [-1, 1e9],
            }.items()
            for value in values
        ),
    ],
)
def test_options_that_cannot_be(running: Running, values: dict[str, Any], status: int) -> None:
    before = running.get(f"{V1}/options").json
    answer = running.post(f"{V1}/options", {**values, "eta_noise_seed_delta": 9})
    assert answer.status == status and answer.error["param"] == next(iter(values))
    assert running.get(f"{V1}/options").json == before


# What these clients send, as their sources have it: when they connect, and for a picture.


def test_c30_sillytavern(running: Running) -> None:
    assert running.get(f"{V1}/options", Authorization="").status == 200
    for path, key in [
        ("upscalers", "name"),
        ("latent-upscale-modes", "name"),
        ("samplers", "name"),
        ("schedulers", "name"),
    ]:
        assert all(row[key] for row in running.get(f"{V1}/{path}").json)
    models = [row["title"] for row in running.get(f"{V1}/sd-models").json]
    assert all(isinstance(running.get(f"{V1}/{path}").json, list) for path in ("sd-vae", "sd-modules"))
    assert running.post(f"{V1}/options", {"sd_model_checkpoint": models[0]}).status == 200
    wait(lambda: running.get(f"{V1}/progress").json["state"]["job_count"] == 0)
    options = running.get(f"{V1}/options").json
    assert options["sd_model_checkpoint"] == models[0] and "forge_preset" in options  # by which it knows Forge
    body = {
        **SMALL,
        "negative_prompt": "",
        "sampler_name": "Euler",
        "scheduler": "Simple",
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "Latent",
        "hr_scale": 2,
        "hr_second_pass_steps": 0,
        "denoising_strength": 0.7,
        "override_settings": {"CLIP_stop_at_last_layers": 1, "forge_additional_modules": []},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": False,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    assert len(running.post(f"{V1}/txt2img", body).json["images"]) == 1
    assert running.post(f"{V1}/interrupt", {}).json == {}


def test_c31_open_webui(running: Running) -> None:
    headers = {"Authorization": ""}
    options = running.get(f"{V1}/options", **headers).json
    model = next(row for row in running.get(f"{V1}/sd-models", **headers).json if row["title"] and row["model_name"])
    assert running.post(f"{V1}/options", {**options, "sd_model_checkpoint": model["title"]}, **headers).status == 200
    assert running.get(f"{V1}/options").json == {**options, "sd_model_checkpoint": model["title"]}
    body = {"prompt": "a hat", "batch_size": 1, "width": 64, "height": 64, "steps": 2}
    answer = running.post(f"{V1}/txt2img", body, **headers).json
    assert base64.b64decode(answer["images"][0], validate=True) and json.loads(answer["info"])["all_seeds"]


def test_c32_photoshop(running: Running) -> None:
    models, samplers, options = (running.get(f"{V1}/{path}").json for path in ("sd-models", "samplers", "options"))
    assert models and any(row["name"] == "Euler a" for row in samplers) and options["sd_model_checkpoint"]
    assert running.post(f"{V1}/options", {"sd_model_checkpoint": models[0]["title"]}).json is None
    assert running.get("/config").status == 200
    told = running.get(f"{V1}/progress?skip_current_image=false").json
    assert {"progress", "eta_relative", "state", "current_image"} <= set(told)
    body = {
        **SMALL,
        "init_images": [PNG],
        "mask": PNG,
        "inpaint_full_res": 0,
        "mask_blur": 4,
        "sampler_index": "Euler a",
    }
    assert len(running.post(f"{V1}/img2img", body).json["images"]) == 1
    assert running.post(f"{V1}/interrupt", {}).json == {}


def test_the_description_knows_all_that_it_refers_to(running: Running) -> None:
    text = running.get("/openapi.json").body.decode()
    schemas = json.loads(text)["components"]["schemas"]
    assert {"TextToImageRequest", "ImageToImageRequest", "ExtraBatchRequest"} <= set(schemas)
    assert set(re.findall(r'"\$ref": ?"([^"]+)"', text)) <= {f"#/components/schemas/{name}" for name in schemas}


PAGE = (PROJECT / "docs" / "forge-api.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_run(running: Running, tmp_path: Path) -> None:
    for language, command in (("sh", ["bash", "-ec"]), ("python", [sys.executable, "-c"])):
        for example in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL):
            code = example.replace("7860", str(running.port))
            done = subprocess.run([*command, code], capture_output=True, text=True, cwd=tmp_path, check=False)
            assert done.returncode == 0, done.stderr
            assert Image.open(tmp_path / "woman.png").size == (64, 64)
            (tmp_path / "woman.png").unlink()


def test_the_page_names_all_that_there_is(running: Running) -> None:
    paths = running.get("/openapi.json").json["paths"]
    own = [path for path in paths if path.startswith(("/sdapi", "/internal", "/adetailer"))]
    assert len(own) > 35
    assert [path for path in own if f"`{path.rpartition('/')[2]}`" not in PAGE and path not in PAGE] == []
    assert [name for name in Options.model_fields if f"`{name}`" not in PAGE] == []
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| ", PAGE.partition("## Settings")[2].partition("## Conf")[0], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} <= set(EngineConfig.model_fields)
    tests = "".join((PROJECT / "tests" / "api" / name).read_text() for name in ("test_webuiapi.py", "test_sdapi.py"))
    listed = re.findall(r"^\| C(\d+) \|", PAGE, re.MULTILINE)
    assert listed == [str(n) for n in range(1, 33)] and all(f"def test_c{n}_" in tests for n in listed)
