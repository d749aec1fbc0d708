"""The client `webuiapi`, as it comes from PyPI, against the real service: the conformance list C1 to C29.

C30 to C32, other clients' sequences, are in test_sdapi.py. webuiapi keeps scripts in a default argument from call to
call, so that calls which name scripts that are refused get a dictionary of their own.
"""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops
from running_service import Running, service, wait

from lightweight_engine.core.images import read_sidecar
from lightweight_engine.core.infotext_parse import parse_infotext
from lightweight_engine.core.models import TINY

webuiapi = pytest.importorskip("webuiapi")

SMALL: dict[str, Any] = {"prompt": "a smiling woman", "width": 64, "height": 64, "steps": 2, "seed": 7, "cfg_scale": 1}
FACE = "face_tiny.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder whose models are those of `tiny`, with its checkpoint under two names."""
    folder = tmp_path_factory.mktemp("webuiapi")
    shutil.copytree(TINY, folder / "models")
    checkpoints = folder / "models" / "Stable-diffusion"
    shutil.copyfile(checkpoints / "tiny.safetensors", checkpoints / "flux-people.safetensors")
    return folder


@pytest.fixture(scope="module")
def running(place: Path, _same_environment: None) -> Iterator[Running]:
    with service(place, "--set", "queue_max=16") as running:
        yield running.ready()


@pytest.fixture(scope="module")
def api(running: Running) -> Any:
    return webuiapi.WebUIApi(port=running.port, steps=2)


def picture(seed: int = 3, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB").rotate(seed)


def same(a: Image.Image, b: Image.Image) -> bool:
    return ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getbbox() is None


def test_c1_with_and_without_a_key(tmp_path: Path) -> None:
    with service(tmp_path, LWE_API_KEYS="open-sesame") as running:
        running.ready()
        known = webuiapi.WebUIApi(port=running.port, username="me", password="open-sesame", steps=1)
        assert known.has_adetailer
        assert len(known.txt2img(**SMALL).images) == 1
        unknown = webuiapi.WebUIApi(port=running.port, username="me", password="wrong")
        with pytest.raises(RuntimeError, match="401"):
            unknown.txt2img(**SMALL)


def test_c2_it_sees_adetailer(api: Any) -> None:
    assert api.has_adetailer and not api.has_controlnet


def test_c3_defaults_give_a_png_with_its_text(api: Any) -> None:
    result = api.txt2img(prompt="a hat", width=64, height=64)
    assert len(result.images) == 1 and result.image.format == "PNG"
    parsed = parse_infotext(result.image.info["parameters"], defaults=False)
    assert (parsed["Prompt"], parsed["Sampler"], parsed["CFG scale"]) == ("a hat", "Euler a", "7.0")
    assert parsed["Seed"] == str(result.info["seed"])
    assert any("cfg_scale" in warning for warning in result.json["warnings"])


def test_c4_batches(api: Any) -> None:
    result = api.txt2img(**SMALL, batch_size=2, n_iter=2)
    assert len(result.images) == 4 and result.info["index_of_first_image"] == 0
    assert result.info["all_seeds"] == [7, 8, 9, 10]
    assert len(result.info["infotexts"]) == len(result.info["all_prompts"]) == 4


def test_c5_a_drawn_seed_repeats(api: Any) -> None:
    first = api.txt2img(**{**SMALL, "seed": -1})
    assert first.info["seed"] >= 0
    again = api.txt2img(**{**SMALL, "seed": first.info["seed"], "subseed": first.info["subseed"]})
    assert same(first.image, again.image)


def test_c6_hires_doubles(api: Any) -> None:
    result = api.txt2img(**SMALL, enable_hr=True, hr_scale=2)
    assert result.image.size == (128, 128)
    assert (result.info["width"], result.info["extra_generation_params"]["Hires upscale"]) == (64, "2.0")


@pytest.mark.parametrize("upscaler", list(webuiapi.HiResUpscaler))
def test_c7_upscalers(api: Any, upscaler: Any) -> None:
    asked = {**SMALL, "steps": 1, "enable_hr": True, "hr_scale": 1.5, "hr_upscaler": upscaler}
    if upscaler.value.startswith(("Latent", "Lanczos", "Nearest", "None")):
        assert api.txt2img(**asked).image.size == (96, 96)
        return
    with pytest.raises(RuntimeError, match="choose one of: None, Lanczos") as refused:  # whose files are not there
        api.txt2img(**asked)
    assert refused.value.args[0] in (404, 422)


def test_c8_what_the_mask_leaves_stays(api: Any) -> None:
    begin, mask = picture(), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    result = api.img2img(images=[begin], mask_image=mask, inpaint_full_res=False, mask_blur=0, **SMALL)
    assert result.image.size == (64, 64)
    assert same(result.image.crop((40, 0, 64, 64)), begin.crop((40, 0, 64, 64)))
    assert not same(result.image.crop((0, 0, 32, 64)), begin.crop((0, 0, 32, 64)))


@pytest.mark.parametrize("fill", range(4))
@pytest.mark.parametrize(("full", "invert"), [(True, 0), (False, 1)])
def test_c9_ways_of_inpainting(api: Any, fill: int, full: bool, invert: int) -> None:
    mask = Image.new("L", (96, 64))
    mask.paste(255, (16, 16, 48, 48))
    asked = {"inpainting_fill": fill, "inpaint_full_res": full, "inpainting_mask_invert": invert}
    result = api.img2img(images=[picture(size=(96, 64))], mask_image=mask, **asked, **SMALL)
    told = result.info["extra_generation_params"]
    assert result.image.size == ((96, 64) if full else (64, 64))
    assert told.get("Mask mode") == ("Inpaint not masked" if invert else None)
    assert told.get("Masked content") == {0: "fill", 2: "latent noise", 3: "latent nothing"}.get(fill)


def test_c10_a_detailer_does_not_outlive_its_call(api: Any) -> None:
    asked = {**SMALL, "width": 192, "height": 192, "steps": 4, "subseed": 0}
    plain = api.txt2img(**asked)
    detailed = api.txt2img(**asked, adetailer=[webuiapi.ADetailer(ad_model=FACE, ad_mask_k_largest=1)])
    again = api.txt2img(**asked)
    told = detailed.info["extra_generation_params"]
    assert told["ADetailer model"] == FACE and told["ADetailer mask only top k"] == "1"
    assert not same(plain.image, detailed.image)
    assert same(plain.image, again.image)
    assert "ADetailer model" not in again.info["extra_generation_params"]


def test_c11_two_detailers(api: Any) -> None:
    units = [webuiapi.ADetailer(ad_model=FACE), webuiapi.ADetailer(ad_model="hand_tiny.safetensors")]
    told = api.txt2img(**SMALL, adetailer=units).info["extra_generation_params"]
    assert (told["ADetailer model"], told["ADetailer model 2nd"]) == (FACE, "hand_tiny.safetensors")


def test_c12_controlnet_is_refused(api: Any) -> None:
    unit = webuiapi.ControlNetUnit(image=picture())
    with pytest.raises(RuntimeError, match="ControlNet.*not found") as refused:
        api.txt2img(**SMALL, controlnet_units=[unit], alwayson_scripts={})
    assert refused.value.args[0] == 422


def test_c23_no_pictures_where_none_are_wanted(api: Any) -> None:
    result = api.txt2img(**SMALL, send_images=False)
    assert result.images == [] and result.info["all_seeds"] == [7]


def test_c25_eight_at_once(api: Any) -> None:
    async def draw() -> list[Any]:
        calls = (api.txt2img(**{**SMALL, "seed": seed, "steps": 1}, use_async=True) for seed in range(100, 108))
        return await asyncio.gather(*calls)

    results = asyncio.run(draw())
    assert [result.info["seed"] for result in results] == list(range(100, 108))
    alone = api.txt2img(**{**SMALL, "seed": 105, "steps": 1})
    assert same(alone.image, results[5].image)


@pytest.mark.parametrize(("name", "kind"), [("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_c27_formats(api: Any, name: str, kind: str) -> None:
    assert api.txt2img(**SMALL, override_settings={"samples_format": name}).image.format == kind


def test_c28_a_sampler_that_does_not_exist(api: Any) -> None:
    with pytest.raises(RuntimeError, match="Sampler not found.*Euler a, Euler") as refused:
        api.txt2img(**SMALL, sampler_name="Foo")
    assert refused.value.args[0] == 400


@pytest.mark.parametrize("prompt", ["žlutý kůň 🐎 مرحبا e\u0301", "(((( 🐎, <lora:", "日本語\nzweite Zeile"])
def test_c29_prompts_in_any_script(api: Any, prompt: str) -> None:
    result = api.txt2img(**{**SMALL, "prompt": prompt, "steps": 1})
    assert result.info["prompt"] == prompt and result.image.info["parameters"].startswith(prompt)


def test_c29_a_prompt_of_a_megabyte(api: Any) -> None:
    with pytest.raises(RuntimeError, match="max_prompt_chars") as refused:
        api.txt2img(**{**SMALL, "prompt": "horse " * 170_000})
    assert refused.value.args[0] == 422


def test_c21_what_a_picture_says_of_itself(api: Any) -> None:
    made = api.txt2img(**SMALL, negative_prompt="dull")
    told = api.png_info(made.image)
    assert told.info == made.info["infotexts"][0]
    parsed = told.parameters
    assert (parsed["Seed"], parsed["Steps"], parsed["Size-1"]) == ("7", "2", "64")
    assert (parsed["Prompt"], parsed["Negative prompt"]) == ("a smiling woman", "dull")
    assert api.png_info(picture()).info == ""


def test_c26_interrogate_is_refused_in_json(api: Any, running: Running) -> None:
    with pytest.raises(RuntimeError, match="not described here") as refused:
        api.interrogate(picture())
    assert refused.value.args[0] == 501
    for path in ("/controlnet/version", "/controlnet/model_list"):
        error = running.get(path).error
        assert running.get(path).status == 404 and error["type"] == "NotSupportedError"
        assert "ControlNet is not supported" in error["message"]


def background(call: Any, **asked: Any) -> tuple[threading.Thread, list[Any]]:
    """A call under way, and the list that its result will be in."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call(**asked)))
    thread.start()
    return thread, results


def until(api: Any, look: Any) -> dict[str, Any]:
    """The progress that ``look`` accepts."""
    return wait(lambda: (told := api.get_progress()) and look(told) and told)


SLOW: dict[str, Any] = {**SMALL, "width": 256, "height": 256, "steps": 400}
SHORT: dict[str, Any] = {**SMALL, "width": 192, "height": 192, "steps": 30}


def test_c13_interrupt(api: Any) -> None:
    thread, results = background(api.txt2img, **SLOW, n_iter=3)
    until(api, lambda told: told["state"]["sampling_step"] > 2)
    assert api.interrupt() == {}
    thread.join(60)
    assert len(results[0].images) == 1 and results[0].image.size == (256, 256)
    state = api.get_progress()["state"]
    assert state["interrupted"] and state["job_count"] == 0


def test_c14_skip(api: Any) -> None:
    thread, results = background(api.txt2img, **{**SLOW, "steps": 150}, n_iter=2)
    until(api, lambda told: told["state"]["sampling_step"] > 2)
    assert api.skip() is None
    until(api, lambda told: told["state"]["job_no"] == 1)
    api.interrupt()
    thread.join(60)
    assert len(results[0].images) == 2 and api.get_progress()["state"]["skipped"]


def test_c15_ready_when_idle(api: Any, capsys: pytest.CaptureFixture[str]) -> None:
    api.util_wait_for_ready(check_interval=0.01)
    assert "[WAIT]" not in capsys.readouterr().out
    thread, _ = background(api.txt2img, **SHORT)
    until(api, lambda told: told["progress"] > 0)
    api.util_wait_for_ready(check_interval=0.05)
    assert "job_count = 1" in capsys.readouterr().out
    thread.join(60)


def test_c16_progress_rises(api: Any) -> None:
    thread, _ = background(api.txt2img, **SHORT)
    until(api, lambda told: told["progress"] > 0)
    seen = []
    while (told := api.get_progress())["state"]["job_count"]:
        seen.append(told)
    thread.join(60)
    fractions = [told["progress"] for told in seen]
    assert fractions == sorted(fractions) and len(set(fractions)) > 5
    pictures = [told["current_image"] for told in seen if told["current_image"]]
    assert pictures and Image.open(io.BytesIO(base64.b64decode(pictures[-1]))).format == "JPEG"
    assert all(told["state"]["sampling_steps"] in (0, 30) for told in seen)


def test_c22_enlarging(api: Any) -> None:
    begin = picture(size=(64, 48))
    assert api.extra_single_image(begin, upscaling_resize=2, upscaler_1="Lanczos").image.size == (128, 96)
    cut = {"resize_mode": 1, "upscaling_resize_w": 777, "upscaling_resize_h": 333, "upscaling_crop": True}
    assert api.extra_single_image(begin, upscaler_1="Nearest", **cut).image.size == (777, 333)
    blend = {"upscaler_1": "Nearest", "upscaler_2": "Lanczos", "extras_upscaler_2_visibility": 0.5}
    results = api.extra_batch_images(
        [picture(5, (24, 16)), picture(5, (16, 16)), picture(9, (16, 16))], upscaling_resize=1.5, **blend
    ).images
    assert [result.size for result in results] == [(36, 24), (24, 24), (24, 24)]
    with pytest.raises(RuntimeError, match="upscaler_1.*choose one of: None, Lanczos"):
        api.extra_single_image(begin, upscaler_1="LDSR")


def test_c17_another_model(api: Any) -> None:
    before = api.util_get_current_model()
    assert before in api.util_get_model_names() and before.startswith("flux-people.safetensors")
    api.util_set_model("tiny")
    assert api.util_get_current_model().startswith("tiny.safetensors")
    assert api.txt2img(**SMALL).info["sd_model_name"] == "tiny"
    api.util_set_model(before, find_closest=False)
    assert api.util_get_current_model().startswith("flux-people.safetensors")
    assert api.txt2img(**SMALL).info["sd_model_name"] == "flux-people"


def test_c18_an_option_that_does_not_exist(api: Any, running: Running) -> None:
    before = api.get_options()
    assert api.set_options({"no_such_option": 1}) is None
    assert api.get_options() == before
    assert any("no_such_option" in line for line in running.lines)


GETTERS = [
    *("options", "cmd_flags", "progress", "samplers", "sd_vae", "upscalers", "latent_upscale_modes", "loras"),
    *("sd_models", "hypernetworks", "face_restorers", "realesrgan_models", "prompt_styles", "scripts", "embeddings"),
    *("memory", "schedulers"),
]
SHAPES: dict[str, set[str]] = {
    "samplers": {"name", "aliases", "options"},
    "schedulers": {"name", "label", "aliases", "default_rho", "need_inner_model"},
    "upscalers": {"name", "model_name", "model_path", "model_url", "scale"},
    "latent_upscale_modes": {"name"},
    "sd_models": {"title", "model_name", "hash", "sha256", "filename", "config"},
    "sd_vae": {"model_name", "filename"},
    "loras": {"name", "alias", "path", "metadata"},
}


@pytest.mark.parametrize("name", GETTERS)
def test_c19_lists(api: Any, name: str) -> None:
    told: Any = getattr(api, f"get_{name}")()
    assert isinstance(told, list | dict)
    if name in SHAPES:
        assert told and all(set(row) == SHAPES[name] for row in told)
    if name == "memory":
        assert {"free", "used", "total"} <= set(dict(told)["ram"]) and "cuda" in told


def test_c20_autoencoders(api: Any, running: Running) -> None:
    assert api.get_sd_vae() == [{"model_name": "ae.safetensors", "filename": "VAE/ae.safetensors"}]
    modules = {row["model_name"] for row in running.get("/sdapi/v1/sd-modules").json}
    assert modules == {"ae.safetensors", "clip_l.safetensors", "t5xxl.safetensors"}


def test_c24_pictures_are_saved_with_their_sidecars(api: Any, place: Path) -> None:
    result = api.txt2img(**SMALL, save_images=True, n_iter=2)
    names = result.json["saved"]
    assert len(names) == 2 and sorted(path.name for path in (place / "outputs").glob("*.png")) == sorted(names)
    kept = Image.open(place / "outputs" / names[0])
    assert same(kept, result.images[0]) and kept.info["parameters"] == result.info["infotexts"][0]
    told = read_sidecar(place / "outputs" / names[0])
    assert told is not None and (told["seed"], told["request"]["prompt"]) == (7, SMALL["prompt"])
    api.txt2img(**SMALL)
    assert len(list((place / "outputs").glob("*.png"))) == 2


def test_the_models_folder_is_listed_anew(api: Any, place: Path, running: Running) -> None:
    lora = place / "models" / "Lora" / "another.safetensors"
    shutil.copyfile(place / "models" / "Lora" / "hat.safetensors", lora)
    assert "another" not in [row["name"] for row in api.get_loras()]
    assert running.ask("POST", "/sdapi/v1/refresh-loras").body == b"null"
    assert "another" in [row["name"] for row in api.get_loras()]
    lora.unlink()
    assert api.refresh_checkpoints() is None
    assert "another" not in [row["name"] for row in api.get_loras()]


def test_the_model_can_be_unloaded(api: Any, running: Running) -> None:
    before = api.txt2img(**SMALL)
    held = running.get("/models/status").json["memory"]["device_bytes"]
    assert running.ask("POST", "/sdapi/v1/unload-checkpoint").json == {}
    assert running.get("/models/status").json["memory"]["device_bytes"] < held
    assert running.ask("POST", "/sdapi/v1/reload-checkpoint").json == {}
    assert same(api.txt2img(**SMALL, subseed=before.info["subseed"]).image, before.image)
