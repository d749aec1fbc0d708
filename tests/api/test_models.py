"""Models that requests name, over HTTP: drawn with, told, kept, and given up for the configured one again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from running_service import LONG, PROJECT, SMALL, Running, service, wait
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.apps.server.facts import MAX_TOLD, Facts
from lightweight_engine.apps.server.schemas import UPSCALE_EXAMPLE
from lightweight_engine.core import models as library

TINY = PROJECT / "lightweight_engine" / "tiny"
OTHER = "people/other.safetensors"
QUEUE = 2
PICTURE = UPSCALE_EXAMPLE["images"][0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with `tiny` and another checkpoint, whose transformer draws otherwise."""
    folder = tmp_path_factory.mktemp("two") / "models"
    shutil.copytree(TINY, folder)
    source, target = folder / "Stable-diffusion" / "tiny.safetensors", folder / "Stable-diffusion" / OTHER
    target.parent.mkdir()
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor * 0.9 for name, tensor in load_file(source).items()}, target, metadata)
    return folder


@pytest.fixture(scope="module")
def two(models: Path, _same_environment: None) -> Iterator[Running]:
    options = ("--models-dir", str(models), "--checkpoint", "tiny", "--set", f"queue_max={QUEUE}")
    with service(models.parent, *options, XDG_CACHE_HOME=str(models.parent / "cache")) as running:
        yield running.ready()


@pytest.fixture
def full(two: Running) -> Iterator[Running]:
    """It draws, and no more jobs may wait."""
    jobs = [two.job(LONG)]
    two.until(jobs[0], "running")
    jobs += [two.job(SMALL) for _ in range(QUEUE)]
    yield two
    for job in reversed(jobs):
        two.ask("DELETE", f"/jobs/{job}")
    two.idle()


def drawn(running: Running, **fields: Any) -> tuple[str, str]:
    """The name of the checkpoint, and the picture without its text, which names it too."""
    answer = running.generate(output_format="jpg", **fields)
    assert answer.status == 200, answer.body
    name = next(row["name"] for row in answer.json["models"] if row["role"] == "transformer")
    return name, answer.json["images"][0][-2000:]


def test_a_request_names_its_model_and_the_next_gets_the_configured_one(two: Running, models: Path) -> None:
    first = drawn(two)
    other = drawn(two, checkpoint="other")
    assert first[0] == "tiny" and other[0] == "other" and first[1] != other[1]
    path = models / "Stable-diffusion" / OTHER
    for name in (OTHER, "other.safetensors [0123456789]", f"Stable-diffusion/{OTHER}", str(path)):
        assert drawn(two, checkpoint=name) == other
    assert two.get("/models/status").json["model"] == "other"
    assert drawn(two) == first
    assert drawn(two, vae="ae", storage_dtype="Automatic") == first
    assert two.get("/models/status").json["model"] == "tiny"


def test_a_model_that_is_not_there_leaves_the_one_in_use(two: Running) -> None:
    first = drawn(two, checkpoint="other")
    answer = two.generate(checkpoint="othr")
    assert answer.status == 404 and answer.error["param"] == "checkpoint"
    assert "did you mean 'other'" in answer.error["message"]
    held = two.get("/models/status").json["memory"]["device_bytes"]
    assert held > 0 and two.get("/models/status").json["model"] == "other"
    assert drawn(two, checkpoint="other") == first


def test_a_key_stands_for_a_request_with_its_model(two: Running) -> None:
    asked = {**SMALL, "checkpoint": "other"}
    first = two.post("/generate", asked, Idempotency_Key="m").json
    assert two.post("/generate", asked, Idempotency_Key="m").json["id"] == first["id"]
    assert two.post("/generate", SMALL, Idempotency_Key="m").status == 409
    assert two.post("/generate", {**SMALL, "checkpoint": "tiny"}, Idempotency_Key="m").status == 409


def test_what_can_be_named_is_told(two: Running) -> None:
    drawn(two, checkpoint="other")
    told, able = two.get("/models").json, two.get("/capabilities").json
    title = next(row["title"] for row in told["checkpoints"] if row["model_name"] == "other")
    assert title.startswith("other.safetensors [") and title in able["checkpoint"], "the job has hashed it"
    assert able["vae"] == ["VAE/ae.safetensors"] and "nf4" in able["storage_dtypes"]
    assert {row["field"] for row in told["modules"]} == {"t5", "clip", "vae"}
    assert {"hat"} <= {row["name"] for row in told["loras"]} and {"4x_tiny"} <= {r["name"] for r in told["upscalers"]}
    for name in able["checkpoint"]:
        assert drawn(two, checkpoint=name, vae=able["vae"][0])


def test_memory_is_given_back_and_taken_again(two: Running) -> None:
    first = drawn(two)
    held = two.get("/models/status").json["memory"]["device_bytes"]
    assert two.post("/models/unload", None).json["memory"]["device_bytes"] == 0
    assert two.post("/models/load", None).json["memory"]["device_bytes"] == held > 0
    two.post("/models/unload", None)
    assert drawn(two) == first


def test_a_model_that_was_unloaded_is_told_so_until_the_next_job_loads_it(two: Running) -> None:
    def told() -> tuple[str, bool, str]:
        health = two.get("/health").json
        return two.get("/models/status").json["state"], health["loaded"], health["status"]

    first = drawn(two)
    assert told() == ("ready", True, "ready")
    assert two.post("/models/unload", None).json["state"] == "unloaded"
    assert told() == ("unloaded", False, "ready"), "a job would be accepted"
    assert two.get("/readyz").status == 200 and two.get("/models/status").json["model"] == "tiny"
    assert two.post("/upscale", UPSCALE_EXAMPLE).status == 200
    assert told()[0] == "unloaded", "nothing was drawn"
    job = two.job(LONG)
    two.until(job, "running")
    assert told() == ("ready", True, "ready"), "it is brought back by the job that runs"
    wait(lambda: two.get(f"/jobs/{job}").json["progress"].get("step"))
    two.ask("DELETE", f"/jobs/{job}")
    two.idle()
    assert told() == ("ready", True, "ready") and two.get("/models/status").json["memory"]["device_bytes"] > 0
    two.post("/sdapi/v1/unload-checkpoint", None)
    assert told()[0] == "unloaded" and two.post("/models/load", None).json["state"] == "ready"
    two.post("/models/unload", None)
    assert drawn(two) == first and told() == ("ready", True, "ready")


def test_a_model_that_is_not_kept_is_told_as_unloaded(tmp_path: Path) -> None:
    with service(tmp_path, "--set", "vram_state=NO_VRAM") as running:
        assert running.ready().generate().status == 200
        told = running.get("/models/status").json
        assert (told["state"], told["memory"]["device_bytes"]) == ("unloaded", 0)


def test_what_is_to_be_done_waits_for_the_job_that_runs(two: Running) -> None:
    job = two.job(LONG)
    two.until(job, "running")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(two.post, "/models/unload", None)
        time.sleep(0.3)
        assert not waiting.done() and two.get("/livez").status == 200
        two.ask("DELETE", f"/jobs/{job}")
        assert waiting.result().json["memory"]["device_bytes"] == 0


def test_a_file_that_is_put_there_can_be_named_at_once(two: Running, models: Path) -> None:
    added = models / "VAE" / "added.safetensors"
    shutil.copyfile(models / "VAE" / "ae.safetensors", added)
    try:
        assert drawn(two, vae="added") == drawn(two)
    finally:
        added.unlink()
    assert two.generate(vae="added").status == 404
    two.post("/models/refresh", None)
    assert not [row for row in two.get("/models").json["modules"] if "added" in row["filename"]]
    shutil.copyfile(models / "VAE" / "ae.safetensors", added)
    assert two.post("/models/refresh", None).status == 200
    assert [row for row in two.get("/models").json["modules"] if "added" in row["filename"]]
    added.unlink()
    two.post("/models/refresh", None)


def test_upscalers_and_detectors_are_checked_before_a_job_waits(two: Running) -> None:
    job = two.job(LONG)
    two.until(job, "running")
    refused = {
        "hr_upscaler": {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "4x_tinny"},
        "ad_model": {"adetailer_passes": [{"ad_model": "face_tinny"}]},
        "ad_confidense": {"adetailer_passes": [{"ad_model": "face_tiny", "ad_confidense": 1}]},
    }
    for word, fields in refused.items():
        answer = two.post("/jobs", {**SMALL, **fields})
        assert answer.status == (422 if word == "ad_confidense" else 404)
        assert word in answer.error["message"] and "did you mean" in answer.error["message"]
        param = word if word == "hr_upscaler" else f"adetailer_passes[0].{word}"
        assert answer.error["param"] == param and answer.error["message"].startswith(f"{param}: ")
    answer = two.post("/upscale", {"images": ["the picture is read later"], "upscaler": "Lanczoz"})
    assert answer.status == 404 and answer.error["param"] == "upscaler"
    assert two.ask("DELETE", f"/jobs/{job}").status == 200
    two.idle()


PIXELS_CLAIMED = "iVBORw0KGgoAAAANSUhEUgAAdTAAAHUwCAIAAADpRW/tAAAAC0lEQVR4nGNgwAcAAB4AAfb96ZYAAAAASUVORK5CYII="
"""A PNG whose head claims 30,000 x 30,000."""


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "said"),
    [
        ("/jobs", {"checkpoint": "othr"}, 404, "checkpoint", "did you mean 'other'"),
        ("/jobs", {"checkpoint": "other", "vae": "clip_l"}, 422, "vae", "belongs in the setting clip"),
        ("/jobs", {"loras": ["haat"]}, 404, "loras[0]", "did you mean 'hat'"),
        ("/jobs", {"prompt": "<lora:haat:1>"}, 404, "prompt", "did you mean 'hat'"),
        ("/jobs", {"lora_urls": ["https://example.org/a.zip"]}, 415, "lora_urls[0]", "not one of a LoRA"),
        ("/jobs", {"lora_urls": ["https://10.0.0.1/a.safetensors"]}, 403, "lora_urls[0]", "private network"),
        ("/jobs", {"loras": ["hat", "ftp://example.org/a.safetensors"]}, 422, "loras[1]", "ftp scheme"),
        ("/jobs", {"image": "%" * 200}, 422, "image", "no picture"),
        ("/jobs", {"image": PIXELS_CLAIMED}, 413, "image", "pixels"),
        ("/jobs", {"image": []}, 422, "image", "the list is empty"),
        ("/jobs", {"image": [PICTURE] * 2, "num_outputs": 3}, 422, "image", "2 pictures for 3 outputs"),
        ("/jobs", {"image": "https://example.org/a.png"}, 403, "image", "not fetched"),
        ("/jobs", {"image": PICTURE, "mask": "x"}, 422, "mask", "no picture"),
        ("/upscale", {"images": [PICTURE, "x"]}, 422, "images[1]", "no picture"),
        ("/sdapi/v1/txt2img", {"prompt": "<lora:haat:1>"}, 404, "prompt", "did you mean 'hat'"),
        ("/sdapi/v1/img2img", {"init_images": ["x"]}, 422, "init_images[0]", "no picture"),
    ],
    ids=str,
)
def test_what_a_request_names_is_looked_up_before_it_waits(
    full: Running, path: str, fields: dict[str, Any], status: int, param: str, said: str
) -> None:
    drawing = {} if path == "/upscale" else SMALL
    answer = full.post(path, {**drawing, **fields})
    assert (answer.status, answer.error["param"]) == (status, param), answer.body
    assert said in answer.error["message"]


def test_what_is_there_waits_for_room(full: Running) -> None:
    answer = full.post("/jobs", {**SMALL, "checkpoint": "other", "loras": ["hat"], "image": PICTURE})
    assert answer.status == 429


def test_the_front_loads_no_torch(full: Running) -> None:
    maps = Path(f"/proc/{full.process.pid}/maps")
    if not maps.exists():
        pytest.skip("the system does not tell what a process has loaded")
    assert "libtorch" not in maps.read_text() and "libtorch" in Path(f"/proc/{full.worker}/maps").read_text()


def test_a_key_finds_its_job_when_the_file_is_gone(two: Running, models: Path) -> None:
    added = models / "VAE" / "passing.safetensors"
    shutil.copyfile(models / "VAE" / "ae.safetensors", added)
    asked = {**SMALL, "vae": "passing"}
    try:
        first = two.post("/generate", asked, Idempotency_Key="gone")
    finally:
        added.unlink()
    assert first.status == 200 and two.post("/generate", asked, Idempotency_Key="gone").json == first.json
    assert two.post("/generate", asked).status == 404


def test_a_service_without_its_model_says_so(tmp_path: Path) -> None:
    """At start in the log, in health and in a metric; a checkpoint that cannot be read is named, with the reason."""
    folder = tmp_path / "models" / "Stable-diffusion"
    folder.mkdir(parents=True)
    (folder / "half.safetensors").write_bytes(b"<html>")
    with service(
        tmp_path, "--models-dir", str(tmp_path / "models"), "--set", "speed=fp8", "--device", "cpu"
    ) as running:
        running.ready()
        told = running.get("/health").json
        assert (told["model"], told["demonstration"]) == ("tiny", True)
        assert any("(1 file unusable): 'tiny' is used" in note for note in told["notes"])
        assert str(tmp_path) not in str(told)
        assert 'lwe_model_info{demonstration="true",name="tiny"} 1' in running.get("/metrics").body.decode()
        rows = [json.loads(line) for line in running.lines]
        errors = [row for row in rows if row["level"] == "error"]
        assert [row["file"] for row in errors] == ["Stable-diffusion/half.safetensors"]
        assert "half.safetensors" in errors[0]["message"]
        warned = [row["message"] for row in rows if row["level"] == "warning"]
        assert len([text for text in warned if "'tiny' is used" in text]) == 1
        assert len([text for text in warned if "speed = fp8" in text and "no effect" in text]) == 1
        for path in ("/health", "/models/status"):
            notes = running.get(path).json["notes"]
            assert len(notes) == len(warned) + len(errors)
            assert any(note.startswith("Stable-diffusion/half.safetensors cannot be used: ") for note in notes)


def test_checkpoints_that_cannot_be_used_are_told(models: Path, tmp_path: Path) -> None:
    """Damaged ones beside one that draws, as they come and go; not all of very many, and no place of this machine."""
    folder = tmp_path / "models" / "Stable-diffusion"
    shutil.copytree(models, tmp_path / "models")
    (folder / "people" / "half.safetensors").write_bytes(b"<html>")
    (folder / "empty").mkdir()
    (folder / "empty" / "model_index.json").write_text("{")
    with service(tmp_path, "--models-dir", str(tmp_path / "models"), "--checkpoint", "tiny") as running:

        def told() -> list[str]:
            health, status = (running.get(path).json["notes"] for path in ("/health", "/models/status"))
            assert health == status and str(tmp_path) not in str(status)
            return [note for note in status if "cannot be used" in note]

        running.ready()
        assert [note.partition(" cannot")[0] for note in told()] == ["Stable-diffusion/people/half.safetensors"]
        assert "web page" in told()[0]
        for n in range(MAX_TOLD + 2):
            (folder / f"{n:02}.safetensors").write_bytes(b"")
        assert running.generate().status == 200
        assert len(told()) == MAX_TOLD + 1 and told()[-1].startswith("3 more checkpoints cannot be used")
        for file in (*folder.glob("[0-9]*"), folder / "people" / "half.safetensors"):
            file.unlink()
        running.post("/models/refresh", None)
        assert not told()


def test_headers_of_unusable_files_are_not_read_at_each_look(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models, tmp_path / "models")
    damaged = tmp_path / "models" / "Stable-diffusion" / "half.safetensors"
    damaged.write_bytes(b"<html>")
    reads: list[Path] = []

    def read(path: Path, *args: Any, **options: Any) -> Any:
        reads.append(path)
        return whole(path, *args, **options)

    whole = library.read_entry
    monkeypatch.setattr(library, "read_entry", read)
    engine = LightweightEngine(Config(models_dir=tmp_path / "models", checkpoint="tiny", threads=1, device="cpu"))
    facts = Facts(engine)
    assert any("half.safetensors cannot be used" in note for note in facts()["notes"]) and damaged in reads
    reads.clear()
    assert facts()["notes"] == facts()["notes"] and not reads
    damaged.write_bytes(b"")
    assert any("is empty" in note for note in facts()["notes"]) and set(reads) == {damaged}
    engine.close()


def test_names_of_files_are_not_told_without_a_key(tmp_path: Path) -> None:
    with service(tmp_path, LWE_API_KEYS="a-key-of-mine") as running:
        told = running.ready().get("/health").json
        assert (told["demonstration"], told["model"], told["notes"]) == (True, None, [])
        assert running.get("/health", **{"X-API-Key": "a-key-of-none"}).json == told
        for path in ("/health", "/models/status"):
            told = running.get(path, **{"X-API-Key": "a-key-of-mine"}).json
            assert told["model"] == "tiny" and told["notes"]
        assert running.get("/health", Authorization="Bearer a-key-of-mine").json["model"] == "tiny"
        assert running.ask("HEAD", "/health").status == 200


def test_a_service_that_requires_a_model_does_not_start_without(tmp_path: Path) -> None:
    """The log has the folder that was looked into, whole."""
    folder = tmp_path / "some" / "models"
    (folder / "Stable-diffusion").mkdir(parents=True)
    with service(tmp_path, "--set", "require_model=true", "--models-dir", str(folder)) as running:
        assert running.process.wait(60) == 3
        line = wait(lambda: next((line for line in running.lines if "the service ends: " in line), None))
        assert all(told in line for told in ("no Flux checkpoint was found", "require_model", str(folder)))


def test_the_log_has_why_a_damaged_file_cannot_draw(tmp_path: Path) -> None:
    """With its path, which a caller is not told."""
    shutil.copytree(TINY, tmp_path / "some" / "models")
    path = tmp_path / "some" / "models" / "Stable-diffusion" / "tiny.safetensors"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 100_000] = b"\xff" * 100_000
    path.write_bytes(content)
    with service(tmp_path, "--models-dir", "some/models", XDG_CACHE_HOME=str(tmp_path / "cache")) as running:
        answer = running.ready().post("/generate", SMALL, X_Request_ID="mine-2")
        assert answer.status == 500 and answer.error["type"] == "ModelError"
        told = "check the file with `models verify …/tiny.safetensors` (as the operator of this service can)"
        assert told in answer.error["message"]
        line = json.loads(wait(lambda: next((line for line in running.lines if "a job failed: " in line), None)))
        assert (line["level"], line["request_id"]) == ("error", "mine-2")
        assert "not finite" in line["message"] and str(path) in line["message"]
