"""``predict()`` without Cog's server: its table of inputs, what they become, its files and its postback."""

from __future__ import annotations

import ctypes
import http.server
import json
import socket
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import safetensors, serving
from PIL import Image

from lightweight_engine.apps.predictor.inputs import ASPECT_RATIOS, INPUTS, read_inputs
from lightweight_engine.apps.predictor.outputs import OutputFolder
from lightweight_engine.apps.predictor.postback import Postback
from lightweight_engine.apps.predictor.predictor import PredictionError, Predictor
from lightweight_engine.apps.predictor.requests import model_of, names_of, request_of, size_of, without_effect
from lightweight_engine.backend.net import Limits, post
from lightweight_engine.config import EngineConfig
from lightweight_engine.core.models import TINY
from lightweight_engine.core.pictures import PictureReader
from lightweight_engine.errors import BlockedURLError, InvalidURLError, ModelNotFoundError, RequestError
from lightweight_engine.request import GenerationRequest, profile_defaults
from lightweight_engine.results import GenerationResult, Progress

PROJECT = Path(__file__).resolve().parents[2]
READER = PictureReader(None, False)

# predict.md, table of inputs: bounds and defaults of the service of old.
FACTS: dict[str, tuple[Any, ...]] = {
    "prompt": (None, None),
    "width": (0, (0, 1280)),
    "height": (0, (0, 1280)),
    "num_outputs": (1, (1, 4)),
    "sampler": ("Euler", None),
    "scheduler": ("Simple", None),
    "num_inference_steps": (8, (1, 200)),
    "guidance_scale": (1.0, (1, 50)),
    "distilled_guidance_scale": (3.5, (0, 30)),
    "seed": (-1, None),
    "enable_hr": (True, None),
    "hr_upscaler": ("4x-UltraSharp", None),
    "hr_steps": (8, (0, 100)),
    "hr_scale": (1.3, (1, 4)),
    "denoising_strength": (0.3, (0, 1)),
    "debug_flux_checkpoint_url": ("", None),
    "enable_clip_l": (False, None),
    "enable_t5xxl_fp16": (False, None),
    "enable_ae": (False, None),
    "force_model_reload": (False, None),
    "forge_unet_storage_dtype": ("Automatic (fp16 LoRA)", None),
    "image": ("", None),
    "prompt_strength": (0.8, (0, 1)),
    "aspect_ratio": ("9:16", None),
    "output_format": ("webp", None),
    "lora_urls": ((), None),
    "lora_scales": ((1.0,), None),
    "ad_prompt": ("", None),
    "ad_hands_prompt": ("", None),
    "postback_url": ("", None),
    "adetailer": (False, None),
    "adetailer_args": ("{}", None),
    "adetailer_args_hands": ("{}", None),
}


def asked(**values: Any) -> dict[str, Any]:
    return read_inputs({"prompt": "a smiling woman", **values})


def request(**values: Any) -> GenerationRequest:
    return request_of(asked(**values), READER)


def test_inputs_are_those_of_the_service_of_old() -> None:
    assert [(name, row.default, row.bounds) for name, row in INPUTS.items()] == [
        (name, *facts) for name, facts in FACTS.items()
    ]
    counts = {name: len(row.choices) for name, row in INPUTS.items() if row.choices}
    assert counts == {
        **{"sampler": 12, "scheduler": 15, "hr_upscaler": 17, "forge_unet_storage_dtype": 14},
        **{"aspect_ratio": 11, "output_format": 3},
    }


def test_defaults_are_those_of_the_profile() -> None:
    profile = profile_defaults("cog")
    rows = {name: row for name, row in INPUTS.items() if row.field and row.default is not None}
    assert {name: row.default for name, row in rows.items()} == {name: profile[row.field] for name, row in rows.items()}


def test_the_signature_is_the_table() -> None:
    pytest.importorskip("cog")
    from tools.cog_schema import PLACE, as_text, schema

    assert (PROJECT / PLACE).read_text(encoding="utf-8") == as_text(), "run tools/cog_schema.py"
    made = schema()["components"]["schemas"]
    properties = made["Input"]["properties"]
    assert list(properties) == list(INPUTS) and made["Input"]["required"] == ["prompt"]
    kinds = {str: "string", int: "integer", float: "number", bool: "boolean"}
    for name, row in INPUTS.items():
        told = properties[name]
        default = list(row.default) if isinstance(row.default, tuple) else row.default
        assert told.get("default") == default, name
        assert row.bounds is None or (told["minimum"], told["maximum"]) == row.bounds, name
        assert ("allOf" in told) == bool(row.choices) and told["description"], name
        if row.choices:
            assert tuple(made[name]["enum"]) == row.choices, name
        elif row.type in kinds:
            assert told["type"] == kinds[row.type], name


@pytest.mark.parametrize(
    ("values", "field", "said"),
    [
        ({"width": 1281}, "width", "0 to 1280"),
        ({"width": True}, "width", "whole number"),
        ({"width": 64.5}, "width", "whole number"),
        ({"num_outputs": 5}, "num_outputs", "1 to 4"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "finite"),
        ({"guidance_scale": 0.5}, "guidance_scale", "1 to 50"),
        ({"prompt": None}, "prompt", "text"),
        ({"sampler": "Foo"}, "sampler", "Euler, DEIS"),
        ({"output_format": "gif"}, "output_format", "webp, jpg, png"),
        ({"lora_urls": ["a", 1]}, "lora_urls", "list of texts"),
        ({"lora_scales": [0.5]}, "lora_scales", "1 scales for 0"),
        ({"lora_urls": ["a", "b"], "lora_scales": [1, 1, 1]}, "lora_scales", "3 scales for 2"),
        ({"lora_urls": ["a", "b"], "lora_scales": [0.5]}, "lora_scales", "1 scales for 2"),
        ({"promt": "a"}, "promt", "did you mean 'prompt'"),
    ],
)
def test_bad_values_are_refused_whatever_cog_lets_through(values: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        asked(**values)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "values",
    [
        *({"sampler": name} for name in ("[Forge] Flux Realistic",)),
        *({"scheduler": f"SGM {name}"} for name in ("Karras", "Exponential")),
        *({"scheduler": f"Align Your Steps{tail}"} for tail in ("", " 11", " 32", " GITS")),
        {"scheduler": "Turbo"},
    ],
)
def test_choices_without_meaning_for_flux_list_the_valid_ones(values: dict[str, str]) -> None:
    with pytest.raises(RequestError, match=r"choose one of: .*(DEIS|Beta)") as caught:
        request(**values)
    (field,) = values
    assert caught.value.field == field
    listed = str(caught.value).partition("choose one of: ")[2].split(", ")
    assert set(listed) < set(INPUTS[field].choices or ()) and values[field] not in listed
    for name in listed:
        request(**{field: name})


def test_plain_inputs_become_the_profile() -> None:
    made = request(width=64, height=96, seed=7, num_inference_steps=3, guidance_scale=2, distilled_guidance_scale=3.7)
    told = made.model_dump(exclude_defaults=True)
    assert (made.width, made.height, made.seed, made.steps) == (64, 96, 7, 3)
    assert (made.cfg_scale, made.distilled_cfg_scale, made.hr_distilled_cfg, made.hr_cfg) == (2.0, 3.7, 3.5, 1.0)
    assert made.hires and made.hr_scale == 1.3 and made.denoising_strength == 0.3 and "resize_mode" not in told


def test_one_scale_stands_for_all_only_as_the_default() -> None:
    urls = ["https://a.example/a.safetensors", "https://a.example/b.safetensors"]
    assert request(lora_urls=urls).lora_scales == (1.0,)
    assert request(lora_urls=urls, lora_scales=[1, 0.5]).lora_scales == (1.0, 0.5)


@pytest.mark.parametrize(("name", "size"), ASPECT_RATIOS.items())
def test_aspect_ratios(name: str, size: tuple[int, int]) -> None:
    assert size_of(asked(aspect_ratio=name), None) == size
    across, down = map(int, name.split(":"))
    assert abs(size[0] / size[1] / (across / down) - 1) < 0.06


def test_a_side_that_is_left_out_follows() -> None:
    assert size_of(asked(width=512, aspect_ratio="1:1"), None) == (512, 512)
    assert size_of(asked(height=512, aspect_ratio="16:9"), None) == (896, 512)
    picture = Image.new("RGB", (300, 100))
    assert size_of(asked(width=384), picture) == (384, 128)
    width, height = size_of(asked(aspect_ratio="1:1"), picture)
    assert abs(width / height - 3) < 0.1 and abs(width * height / 1024**2 - 1) < 0.05
    assert size_of(asked(width=64, height=64), picture) == (64, 64)


def test_a_picture_makes_it_image_to_image(tmp_path: Path) -> None:
    import base64

    path = tmp_path / "a.png"
    Image.effect_noise((48, 64), 80).save(path)
    text = base64.b64encode(path.read_bytes()).decode()
    for given in (text, f"data:image/png;base64,{text}"):
        made = request(image=given, prompt_strength=0.4, width=64)
        assert (made.denoising_strength, made.resize_mode, made.hires) == (0.4, 1, False)
        assert (made.width, made.height) == (64, 80)
    assert request(image="runpod").image is None and request(image="").image is None
    with pytest.raises(RequestError, match="no picture"):  # not that of this machine
        request(image=str(path))


@pytest.mark.parametrize("given", ["file:///etc/passwd", "file:/etc/passwd", "FTP://a.example/a.png", "gopher:x"])
def test_other_addresses_are_unsupported(given: str) -> None:
    with pytest.raises(RequestError, match="unsupported input") as caught:
        request(image=given)
    assert "passwd" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, []),
        ({"prompt_strength": 0.8, "aspect_ratio": "9:16", "width": 64, "height": 64}, []),
        ({"prompt_strength": 0.5}, ["prompt_strength had no effect without image"]),
        ({"prompt_strength": 0.5, "image": "runpod"}, ["prompt_strength had no effect without image"]),
        ({"prompt_strength": 0.5, "image": "x"}, []),
        ({"aspect_ratio": "1:1", "width": 64}, []),
        ({"aspect_ratio": "1:1", "image": "x"}, []),
        ({"aspect_ratio": "1:1", "width": 64, "height": 64}, ["aspect_ratio had no effect beside width and height"]),
        ({"aspect_ratio": "1:1", "width": 64, "image": "x"}, ["aspect_ratio had no effect beside image and a side"]),
    ],
)
def test_inputs_without_effect(values: dict[str, Any], told: list[str]) -> None:
    assert without_effect(asked(**values)) == told


def test_the_model_that_is_asked_for(tmp_path: Path) -> None:
    config = EngineConfig(models_dir=tmp_path)
    assert model_of(asked(), config, None) == {}
    assert model_of(asked(forge_unet_storage_dtype="Automatic"), config, None) == {}
    assert model_of(asked(forge_unet_storage_dtype="bnb-nf4 (fp16 LoRA)"), config, None) == {"storage_dtype": "nf4"}
    chosen = model_of(asked(enable_clip_l=True, enable_ae=True), config, None)  # of tiny, as there is no other
    assert set(chosen) == {"clip", "vae"} and all(Path(path).is_file() for path in chosen.values())
    (tmp_path / "Stable-diffusion").mkdir()
    (tmp_path / "Stable-diffusion" / "own.safetensors").symlink_to(TINY / "Stable-diffusion" / "tiny.safetensors")
    for folder in ("text_encoder", "VAE"):
        (tmp_path / folder).symlink_to(TINY / folder)
    chosen = model_of(asked(enable_ae=True), config, None)
    assert Path(chosen["checkpoint"]).name == "own.safetensors" and set(chosen) == {"vae", "checkpoint"}
    assert model_of(asked(), config, tmp_path / "a.safetensors")["checkpoint"] == str(tmp_path / "a.safetensors")


def test_a_module_without_a_file_of_its_own(tmp_path: Path) -> None:
    from lightweight_engine.apps.predictor.requests import _own_file
    from lightweight_engine.core.models import ModelLibrary

    def put() -> str:
        with pytest.raises(
            ModelNotFoundError, match=f"^enable_ae: .* in {tmp_path}; put ae.safetensors into "
        ) as raised:
            _own_file(ModelLibrary([tmp_path]), "enable_ae", "autoencoder", "ae", None)
        return str(raised.value).partition("into ")[2]

    assert put() == "VAE/ there"
    (tmp_path / "models" / "vae").mkdir(parents=True)
    assert put() == "models/vae/ there", "where ComfyUI reads it too"


@pytest.mark.parametrize("kind", ["webp", "jpg", "png"])
def test_files_are_named_by_seed_and_live_until_the_next(kind: str) -> None:
    result = GenerationResult(
        images=(Image.new("RGB", (8, 8)),) * 2,
        **{"seeds": (5, 6), "subseeds": (0, 0), "infotexts": ("a", "b")},
        request=GenerationRequest(output_format=kind),
    )
    folder = OutputFolder()
    paths, _ = folder.write(result)
    assert [path.name.partition("-")[0] for path in paths] == ["5", "6"] and paths[0].suffix == f".{kind}"
    again, _ = folder.write(result)
    assert not any(path.exists() for path in paths) and all(path.exists() for path in again)
    folder.clear()
    assert not again[0].parent.exists()


class _Listener(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def listener() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Listener)
    server.bodies = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_postbacks_tell_the_latest_and_the_end(listener: Any) -> None:
    port = listener.server_port
    postback = Postback(f"http://127.0.0.1:{port}/told?token=x", [f"127.0.0.1:{port}"])
    for step in range(50):
        picture = Image.new("RGB", (8, 8)) if step == 49 else None
        postback.tell(Progress(stage="sample", step=step, steps=50, fraction=step / 50, preview=picture))
    postback.close("succeeded")
    told = listener.bodies
    assert 1 <= len(told) <= 3 and told[-1]["status"] == "succeeded" and told[-1]["progress"] == 1
    assert told[-1]["preview"].startswith("data:image/jpeg;base64,")


def test_a_postback_that_is_not_answered_holds_nothing_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:  # takes connections, and never says a word
        port = hole.getsockname()[1]
        postback = Postback(f"http://127.0.0.1:{port}/", [f"127.0.0.1:{port}"])
        begin = time.monotonic()
        for step in range(100):
            postback.tell(Progress(stage="sample", step=step))
        assert time.monotonic() - begin < 0.2
        postback.close("succeeded")
        assert time.monotonic() - begin < 1.2


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "file:///etc/passwd", "http://169.254.169.254/latest"])
def test_postbacks_go_nowhere_else(url: str) -> None:
    with pytest.raises((BlockedURLError, InvalidURLError)):
        Postback(url)


@pytest.mark.parametrize("host", ["127.0.0.1", "169.254.169.254", "2130706433", "[::ffff:10.0.0.1]"])
def test_nothing_is_sent_to_private_addresses(host: str) -> None:
    with pytest.raises(BlockedURLError, match="private network"):
        post(f"https://{host}/", b"{}", "application/json", Limits(0, 1, 1))


def test_what_is_raised_meanwhile_stops_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Cog cancels: an exception that is no Exception, in the thread of predict(), at any point."""

    class Cancelled(BaseException):
        pass

    predictor = Predictor(EngineConfig(models_dir=tmp_path, cache_dir=tmp_path / "cache", threads=1))
    predictor.setup()
    shown: list[str] = []

    def show(text: str, **_: Any) -> None:
        shown.append(text)
        if "sample 1/" in text or len(shown) > 2:
            raise Cancelled

    monkeypatch.setattr("builtins.print", show)
    values = {"prompt": "a", "width": 64, "height": 64, "num_inference_steps": 200, "enable_hr": False, "seed": 1}
    begin = time.monotonic()
    with pytest.raises(Cancelled):
        predictor.predict({**values, "width": 512, "height": 512})
    assert time.monotonic() - begin < 10
    monkeypatch.undo()
    assert len(predictor.predict({**values, "num_inference_steps": 1})) == 1
    with pytest.raises(PredictionError, match="RequestError: width"):
        predictor.predict({**values, "width": 8})


def test_a_job_may_be_stopped_at_any_moment(tmp_path: Path) -> None:
    """Also as it begins: none goes on behind the back of its caller, whom the next one would wait for."""

    class Cancelled(BaseException):
        pass

    predictor = Predictor(EngineConfig(models_dir=tmp_path, cache_dir=tmp_path / "cache", threads=1))
    predictor.setup()
    small = {"prompt": "a", "width": 64, "height": 64, "num_inference_steps": 1, "enable_hr": False, "seed": 1}
    ended: list[type[BaseException]] = []

    def predict(begun: list[int]) -> None:
        try:
            begun.append(threading.get_ident())
            predictor.predict({**small, "width": 512, "height": 512, "num_inference_steps": 200})
        except Cancelled:
            ended.append(Cancelled)

    for number in range(60):
        begun: list[int] = []
        caller = threading.Thread(target=predict, args=(begun,))
        caller.start()
        while not begun:
            time.sleep(0)
        time.sleep(number * 5e-5)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(begun[0]), ctypes.py_object(Cancelled))
        caller.join(20)
    assert ended == [Cancelled] * 60
    begin = time.monotonic()
    assert len(predictor.predict(small)) == 1 and time.monotonic() - begin < 5


def test_setup_fails_where_a_model_is_required(tmp_path: Path) -> None:
    config = EngineConfig(cache_dir=tmp_path, models_dir=tmp_path, device="cpu", require_model=True)
    with pytest.raises(ModelNotFoundError, match="no Flux checkpoint was found in .*require_model"):
        Predictor(config).setup()


def test_errors_name_the_input_and_not_the_field_that_it_became(tmp_path: Path) -> None:
    config = EngineConfig(cache_dir=tmp_path, models_dir=tmp_path, device="cpu", offline=True, max_megapixel_steps=0.01)
    values = {"prompt": "", "width": 64, "height": 64, "enable_hr": False}
    with pytest.raises(PredictionError, match=r"^TooCostlyError: num_inference_steps: 64x64 x 8 evaluations"):
        Predictor(config).predict(values)
    names = names_of(read_inputs({**values, "debug_flux_checkpoint_url": "https://a.example/b", "enable_ae": True}))
    assert (names["checkpoint"], names["vae"], names["cfg_scale"]) == (
        "debug_flux_checkpoint_url",
        "enable_ae",
        "guidance_scale",
    )
    assert "t5" not in names and "checkpoint" not in names_of(read_inputs(values)), "that is of the configuration"


def test_a_checkpoint_that_cannot_be_used_is_told_by_its_url(tmp_path: Path) -> None:
    with serving() as site:
        site.files["a.safetensors"] = safetensors()
        predictor = Predictor(EngineConfig(cache_dir=tmp_path, models_dir=tmp_path, allow_hosts=(site.name,)))
        url = site.url("a.safetensors")
        with pytest.raises(PredictionError) as refused:
            predictor.predict({"prompt": "a", "debug_flux_checkpoint_url": f"{url}?token=s3cr3t"})
    told = f"UnsupportedCheckpointError: debug_flux_checkpoint_url: {url} is no part of Flux.1 that this engine knows"
    assert str(refused.value).startswith(told)


def test_a_model_is_kept_until_another_is_asked_for(tmp_path: Path) -> None:
    predictor = Predictor(EngineConfig(models_dir=tmp_path, cache_dir=tmp_path / "cache", threads=1))
    values = {"prompt": "a", "width": 64, "height": 64, "num_inference_steps": 1, "enable_hr": False, "seed": 1}

    def networks_of(**more: Any) -> Any:
        predictor.predict({**values, **more})
        return predictor._engine.networks

    first = networks_of()
    assert networks_of() is first
    other = networks_of(forge_unet_storage_dtype="FP32")
    assert other is not first and networks_of(forge_unet_storage_dtype="FP32") is other
    assert first.held == 0 and other.held > 0
    anew = networks_of(forge_unet_storage_dtype="FP32", force_model_reload=True)
    assert anew is not other and anew.precision == other.precision
    assert networks_of().precision == first.precision


def test_versions_of_the_image_are_the_tested_ones() -> None:
    import yaml

    build = yaml.safe_load((PROJECT / "cog.yaml").read_text(encoding="utf-8"))["build"]
    pins = [row for row in build["python_packages"] if not row.startswith("torch==")]
    assert set(pins) <= set((PROJECT / "constraints.txt").read_text(encoding="utf-8").split("\n"))
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {row.partition(">")[0] for row in project["dependencies"]} | {"spandrel"}
    assert {row.partition("=")[0] for row in build["python_packages"]} == needed
