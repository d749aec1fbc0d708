"""The real server of Cog with ``predict.py`` and `tiny`: what callers of the service of old do, and what they get."""

from __future__ import annotations

import base64
import io
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import Site, safetensors, serving
from PIL import Image
from running_service import PROJECT, Answer, Running, wait

pytest.importorskip("cog")

from running_cog import LONG, SMALL, Listener, cog

from lightweight_engine.backend.processes import resident_bytes

PAGE = (PROJECT / "docs" / "cog.md").read_text(encoding="utf-8")
TINY = PROJECT / "lightweight_engine" / "tiny"
SECRET = "s3cr3t-t0ken"
LEAKS = re.compile(rf"Traceback|{SECRET}|root:x:|site-packages|\w/lightweight_engine/")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


@pytest.fixture(scope="module")
def hole() -> Iterator[str]:
    """Takes connections, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cog")


@pytest.fixture(scope="module")
def service(folder: Path, site: Site, listener: Listener, hole: str, _same_environment: None) -> Iterator[Running]:
    site.files["hat.safetensors"] = (TINY / "Lora" / "hat.safetensors").read_bytes()
    site.files["other.safetensors"] = safetensors()
    site.files["hat.zip"] = b"PK\x03\x04"
    site.files["page.safetensors"] = b"<!DOCTYPE html><html>login</html>"
    checkpoint = next((TINY / "Stable-diffusion").glob("*.safetensors"))
    site.files["checkpoint.safetensors"] = checkpoint.read_bytes()
    picture = io.BytesIO()
    Image.effect_noise((96, 64), 90).convert("RGB").save(picture, "PNG")
    site.files["picture.png"] = picture.getvalue()
    with cog(folder, LWE_ALLOW_HOSTS=f"{site.name},{listener.name},{hole}") as running:
        yield running


def free(service: Running, seconds: float = 20) -> None:
    """Wait until the one slot of the server is free, which it is a little later than the last answer."""
    wait(lambda: service.get("/health-check").json["status"] == "READY", seconds)


def post(service: Running, **values: Any) -> Answer:
    """A prediction that finds the server free."""
    free(service)
    return service.post("/predictions", {"input": {**SMALL, **values}})


def ask(service: Running, **values: Any) -> Any:
    answer = post(service, **values)
    assert answer.status == 200, answer.body
    return answer.json


def drawn(service: Running, **values: Any) -> list[bytes]:
    told = ask(service, **values)
    assert told["status"] == "succeeded", told
    return [base64.b64decode(text.partition(",")[2]) for text in told["output"]]


def failed(service: Running, **values: Any) -> str:
    """The error of inputs that are wrong, whether Cog refuses them by the schema or we do."""
    answer = post(service, **values)
    told = answer.json
    assert not LEAKS.search(answer.body.decode())
    if answer.status == 422:
        return str(told["detail"])
    assert told["status"] == "failed", told
    return told["error"]


NATIVE = {"prompt": "a smiling woman", "width": 64, "height": 64, "steps": 1, "seed": 1, "enable_hr": False}
HIRES = {"enable_hr": True, "hr_steps": 2, "hr_scale": 1.5, "hr_upscaler": "Latent"}


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({}, {}),
        (
            {"num_outputs": 2, "num_inference_steps": 3, "distilled_guidance_scale": 3.7, "sampler": "DPM++ 2M"},
            {"num_outputs": 2, "steps": 3, "distilled_cfg_scale": 3.7, "sampler": "DPM++ 2M"},
        ),
        ({"guidance_scale": 2, "sampler": "DPM++ 2M SDE Karras"}, {"cfg_scale": 2, "sampler": "DPM++ 2M SDE Karras"}),
        (
            {**HIRES, "denoising_strength": 0.5},
            {**HIRES, "denoising_strength": 0.5, "hr_cfg": 1.0, "hr_distilled_cfg": 3.5},
        ),
        (
            {"adetailer": True, "adetailer_args": '{"ad_steps": 2}', "adetailer_args_hands": '{"ad_disable": true}'},
            {"adetailer": True, "adetailer_args": '{"ad_steps": 2}', "adetailer_args_hands": '{"ad_disable": true}'},
        ),
    ],
    ids=["plain", "two", "cfg", "hires", "adetailer"],
)
def test_pictures_are_those_of_the_native_service(
    service: Running, server: Running, values: dict[str, Any], fields: dict[str, Any]
) -> None:
    told = server.post("/generate", {**NATIVE, "distilled_cfg_scale": 3.5, **fields})
    assert told.status == 200, told.body
    assert drawn(service, **values) == [base64.b64decode(text) for text in told.json["images"]]


@pytest.mark.parametrize("kind", ["webp", "jpg"])
def test_other_formats_have_quality_100(service: Running, kind: str) -> None:
    plain = Image.open(io.BytesIO(drawn(service)[0]))
    wanted = io.BytesIO()
    plain.save(wanted, {"webp": "WEBP", "jpg": "JPEG"}[kind], quality=100)
    made = Image.open(io.BytesIO(drawn(service, output_format=kind)[0]))
    assert made.tobytes() == Image.open(wanted).tobytes()


def test_a_picture_sets_the_aspect(service: Running, site: Site) -> None:
    text = base64.b64encode(site.files["picture.png"]).decode()
    by_text = drawn(service, image=f"data:image/png;base64,{text}", width=96, height=0, num_inference_steps=2)
    assert Image.open(io.BytesIO(by_text[0])).size == (96, 64)
    assert drawn(service, image=site.url("picture.png"), width=96, height=0, num_inference_steps=2) == by_text
    assert drawn(service, image="runpod") == drawn(service)


def test_loras_by_url_change_the_picture_and_scales_pair_with_them(service: Running, site: Site) -> None:
    url = site.url(f"hat.safetensors?token={SECRET}")
    plain = drawn(service)
    with_hat = drawn(service, lora_urls=[url])
    assert with_hat != plain and SECRET.encode() not in with_hat[0]
    assert drawn(service, lora_urls=[url], lora_scales=[0.5]) not in (plain, with_hat)
    assert "3 scales for 1" in failed(service, lora_urls=[url], lora_scales=[1, 1, 1])


def test_a_checkpoint_by_url_is_for_its_job_alone(service: Running, site: Site) -> None:
    plain = drawn(service)
    url = site.url("checkpoint.safetensors")
    modules = {"enable_clip_l": True, "enable_t5xxl_fp16": True, "enable_ae": True}
    told = ask(service, debug_flux_checkpoint_url=url, **modules)
    assert told["status"] == "succeeded", told
    assert ask(service, debug_flux_checkpoint_url=url, **modules)["status"] == "succeeded"
    assert site.count("checkpoint.safetensors") == 1
    assert drawn(service) == plain and drawn(service, force_model_reload=True) == plain
    assert "PredictionError" in failed(service, debug_flux_checkpoint_url=site.url("hat.safetensors"))


def test_progress_is_in_the_log_of_the_prediction(service: Running) -> None:
    told = ask(service, num_inference_steps=3)
    assert "sample 3/3" in told["logs"] and "100% done" in told["logs"] and "seeds: 1" in told["logs"]


def test_a_cancelled_prediction_is_told_to_its_webhook(service: Running, listener: Listener) -> None:
    listener.bodies.clear()
    free(service)
    hook, told = f"http://{listener.name}/", f"http://{listener.name}/told"
    body = {"input": {**LONG, "postback_url": told}, "id": "stopped", "webhook": hook}
    assert service.post("/predictions", body, Prefer="respond-async").status == 202
    wait(lambda: any("stage" in each for each in listener.bodies))  # it is drawing
    assert service.post("/predictions/stopped/cancel", None).status == 200
    ends = wait(lambda: len(found := [each for each in listener.bodies if each["status"] == "canceled"]) == 2 and found)
    assert {each.get("id") for each in ends} == {"stopped", None}  # Cog's, and ours


def test_webhooks_of_a_prediction_that_is_not_waited_for(service: Running, listener: Listener) -> None:
    listener.bodies.clear()
    free(service)
    body = {"input": SMALL, "id": "hooked", "webhook": f"http://{listener.name}/hook"}
    answer = service.post("/predictions", body, Prefer="respond-async")
    assert answer.status == 202
    last = wait(lambda: next((told for told in listener.bodies if told["status"] == "succeeded"), None))
    assert last["id"] == "hooked" and last["output"][0].startswith("data:image/png;base64,")


def test_postbacks(service: Running, listener: Listener) -> None:
    listener.bodies.clear()
    drawn(service, num_inference_steps=3, postback_url=f"http://{listener.name}/told?token={SECRET}")
    last = wait(lambda: next((told for told in listener.bodies if told["status"] == "succeeded"), None))
    assert last["progress"] == 1 and last["preview"].startswith("data:image/jpeg;base64,")


def test_a_postback_into_a_black_hole_holds_up_an_answer_by_less_than_a_second(service: Running, hole: str) -> None:
    took = []
    for url in ("", f"http://{hole}/"):
        free(service)
        begin = time.monotonic()
        drawn(service, postback_url=url)
        took.append(time.monotonic() - begin)
    assert took[1] < took[0] + 1.2


def test_callers_that_never_listen_leave_memory_as_it_was(service: Running, hole: str) -> None:
    """Postbacks of two dozen predictions go into a black hole; afterwards all that was held for them is gone."""

    def predict(times: int, **values: Any) -> None:
        for _ in range(times):
            free(service)
            drawn(service, num_inference_steps=2, **values)

    def kept() -> int:
        """The lowest of some figures: an allocator holds a little more after one prediction than after the next."""
        figures = []
        for _ in range(8):
            predict(1)
            figures.append(tree_bytes(service.process.pid))
        return min(figures)

    hears_nothing = f"http://{hole}/"
    predict(24, postback_url=hears_nothing)  # after so many, a process does not grow any more
    before = kept()
    predict(24, postback_url=hears_nothing)
    time.sleep(11)  # as long as a postback may take
    after = kept()
    print(f"{before >> 20} MiB, {100 * (after / before - 1):+.2f} %")
    assert after < before * 1.02


def tree_bytes(root: int) -> int:
    """Memory of a process and all below it."""
    parents = {int(path.name): int(stat_of(path).split()[1]) for path in Path("/proc").glob("[0-9]*") if stat_of(path)}
    tree = {root}
    while grown := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= grown
    return sum(map(resident_bytes, tree))


def stat_of(path: Path) -> str:
    """State and parent of a process; nothing of one that has just ended."""
    try:
        return (path / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
    except OSError:
        return ""


def test_put_is_idempotent_and_cancel_ends_within_a_step(service: Running) -> None:
    free(service)
    begin = time.monotonic()
    body = {"input": LONG}
    first = service.ask("PUT", "/predictions/long", body, {"Prefer": "respond-async"})
    again = service.ask("PUT", "/predictions/long", body, {"Prefer": "respond-async"})
    assert (first.status, again.status) == (202, 202) and again.json["id"] == "long"
    assert service.post("/predictions", {"input": SMALL}).status == 409  # busy, and there is no queue
    assert service.get("/predictions/long").status == 405  # the page says how to look
    assert service.get("/health-check").json["status"] == "BUSY"
    assert service.post("/predictions/long/cancel", None).status == 200
    free(service, 10)
    assert time.monotonic() - begin < 10
    assert service.post("/predictions/none/cancel", None).status == 404
    assert len(drawn(service)) == 1


# Number of http.md 7.4, inputs, and what the answer says.
BAD = [
    (2, {"width": -512}, "width|minimum"),
    (4, {"width": 100000}, "maximum"),
    (6, {"width": 512.5}, "integer"),
    (8, {"num_inference_steps": 0}, "minimum"),
    (9, {"num_inference_steps": 201}, "maximum"),
    (10, {"num_outputs": 1000}, "maximum"),
    (12, {"seed": -2}, "seed"),
    (12, {"seed": 2**63}, "seed"),
    (13, {"guidance_scale": 1e9}, "maximum"),
    (14, {"distilled_guidance_scale": -1}, "minimum"),
    (15, {"denoising_strength": 1.1}, "maximum"),
    (17, {"hr_scale": 100}, "maximum"),
    (19, {"sampler": "Foo"}, "sampler"),
    (20, {"scheduler": "Foo"}, "scheduler"),
    (20, {"scheduler": "Turbo"}, "choose one of.*Beta"),
    (22, {"prompt": "a <lora:../../etc/passwd:1>"}, "ModelNotFoundError|AdapterError|RequestError"),
    (27, {"adetailer": True, "adetailer_args": '{"ad_model": "x.pt"}'}, r"x\.pt"),
    (29, {"adetailer": True, "adetailer_args": '{"ad_stps": 1}'}, "did you mean 'ad_steps'"),
    (29, {"adetailer": True, "adetailer_args": "["}, "JSON"),
    (33, {"image": "!" * 99}, "image"),
    (34, {"image": base64.b64encode(b"%PDF-1.7" * 20).decode()}, "image"),
    (45, {"image": "https://127.0.0.1/a.png"}, "private network"),
    (45, {"image": "https://2130706433/a.png"}, "private network"),
    (46, {"image": "https://169.254.169.254/a.png"}, "private network"),
    (49, {"image": "http://good.com\\@127.0.0.1/"}, "not a URL"),
    (50, {"image": "ftp://a.example/a.png"}, "unsupported input"),
    (51, {"image": "file:///etc/passwd"}, "unsupported input"),
    (54, {"lora_urls": ["https://10.0.0.1/a.safetensors"]}, "private network"),
    (63, {"lora_urls": ["https://a.example/a.ckpt"]}, "not one of a LoRA"),
    (63, {"lora_urls": ["foo", "https://a.example/a.safetensors"]}, r"lora_urls\[0\]: not a URL"),
    (63, {"debug_flux_checkpoint_url": "https://a.example/a.ckpt"}, "not one of a checkpoint that is read; give one"),
    (65, {"lora_urls": ["https://a.example/a.safetensors"] * 100}, "lora_urls"),
    (66, {"lora_urls": ["https://a.example/a.safetensors"], "lora_scales": [1e6]}, "lora_scales"),
    (69, {"prompt": "a" * 1_000_000}, "prompt.*limit"),
    (0, {"prompt": None}, "prompt|null|string"),
    (0, {"postback_url": "http://127.0.0.1:1/"}, "BlockedURLError: postback_url: .*https"),
    (0, {"postback_url": "nowhere"}, "InvalidURLError: postback_url: not a URL"),
    (0, {"hr_upscaler": "LDSR", "enable_hr": True}, "LDSR"),
    (0, {"debug_flux_checkpoint_url": "file:///etc/passwd"}, "InvalidURLError: debug_flux_checkpoint_url: not a URL"),
]


@pytest.mark.parametrize(
    ("number", "values", "said"), BAD, ids=lambda value: None if isinstance(value, dict) else value
)
def test_bad_inputs(service: Running, number: int, values: dict[str, Any], said: str) -> None:
    assert re.search(said, failed(service, **values), re.DOTALL)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing.safetensors", "404"),
        ("page.safetensors", "safetensors"),
        ("other.safetensors", "LoRA|Flux"),
        ("hat.zip", "not one of a LoRA"),
    ],
)
def test_bad_loras(service: Running, site: Site, path: str, said: str) -> None:
    """Numbers 52, 53, 60, 63, 67: whatever is wrong, the token is not told."""
    assert re.search(said, failed(service, lora_urls=[site.url(f"{path}?token={SECRET}")]))


def test_inputs_without_effect_are_told(service: Running) -> None:
    told = ask(service, prompt_strength=0.5, aspect_ratio="1:1")["logs"]
    assert "warning: prompt_strength had no effect without image" in told and "warning: aspect_ratio had no" in told


def test_a_module_of_the_demonstration_model_is_no_choice_of_it(service: Running) -> None:
    assert "'tiny' is used, which draws cartoon people only" in ask(service, enable_clip_l=True)["logs"]


@pytest.mark.parametrize("prompt", ["", "😀 مرحبا é", "(" * 3000, "a\0b"])
def test_odd_prompts(service: Running, prompt: str) -> None:
    """Numbers 68, 70, 71: drawn or refused, and never an error that should not have happened."""
    answer = post(service, prompt=prompt)
    assert answer.json["status"] == "succeeded" or "should not have happened" not in answer.json["error"]


def test_what_is_no_request(service: Running) -> None:
    assert service.post("/predictions", b"{").status == 400
    assert service.post("/predictions", {"input": {}}).status == 422


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples are written with curl")
def test_the_examples_of_the_page_run(service: Running, tmp_path: Path) -> None:
    free(service)
    examples = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    script = "set -e\n" + "\n".join(examples).replace("localhost:5000", f"localhost:{service.port}")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=99, check=False)
    assert done.returncode == 0, done.stderr
    assert '"status":"succeeded"' in done.stdout and "failed" not in done.stdout
    assert (tmp_path / "woman.webp").read_bytes()[8:12] == b"WEBP"


def test_the_page_names_every_input() -> None:
    from lightweight_engine.apps.predictor.inputs import INPUTS
    from lightweight_engine.config import EngineConfig

    rows = re.findall(r"^\| (`[a-z0-9_`, ]+`) \| ", PAGE, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(INPUTS)
    variables = {name.lower() for name in re.findall(r"`LWE_(\w+)`", PAGE)}
    assert variables <= set(EngineConfig.model_fields) and len(variables) >= 6


def test_nothing_secret_was_logged_and_no_file_is_left(service: Running, folder: Path) -> None:
    """Last, after all that the others did."""
    assert len(drawn(service)) == 1
    log = (folder / "cog.log").read_text(encoding="utf-8")
    assert SECRET not in log and "root:x:" not in log
    assert len(list(folder.glob("predict-*"))) <= 1
