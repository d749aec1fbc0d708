"""Wrong, hostile and odd requests to the real service, by the numbers of the acceptance list, and what it answers.

Every answer that is no success has the one form, and holds no traceback, folder or secret; after all of them the
service draws the same picture as before.
"""

from __future__ import annotations

import base64
import ctypes
import io
import json
import os
import pickle
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import Site, serving
from PIL import Image
from running_service import PROJECT, SMALL, Answer, Running, service, wait
from safetensors.torch import load_file, save_file

from lightweight_engine.apps.server.faults import Fault
from lightweight_engine.errors import RequestError

TINY_LORA = PROJECT / "lightweight_engine" / "tiny" / "Lora" / "hat.safetensors"
SECRET = "s3cr3t-t0ken"
LEAKS = re.compile(rf"Traceback|File \\?\"|{SECRET}|/tmp/|/usr/|site-packages|lightweight_engine/")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, site: Site, _same_environment: None) -> Iterator[Running]:
    """A service with tight limits, hostile files in its folders, and one server that it may ask."""
    folder = tmp_path_factory.mktemp("strict")
    models = folder / "models"
    fill(models, folder)
    site.files |= {path.name: path.read_bytes() for path in (models / "Lora").glob("*.safetensors")}
    site.files["hat.zip"] = b"PK\x03\x04"
    limits = {
        "fetch_pictures": "true",
        "allow_hosts": site.name,
        "max_body_mib": 2,
        "download_max_gib": 0.005,
        "download_seconds": 3,
    }
    options = [part for name, value in limits.items() for part in ("--set", f"{name}={value}")]
    with service(folder, "--models-dir", str(models), *options, XDG_CACHE_HOME=str(folder / "cache")) as running:
        running.ready()
        before = running.generate(subseed=0).json["images"]
        yield running
        assert running.generate(subseed=0).json["images"] == before, "a bad request changed what a good one draws"
        assert running.get("/models/status").json["restarts"] == 0
        assert not [line for line in running.lines if "Traceback" in line or SECRET in line]


def fill(models: Path, outside: Path) -> None:
    lora, detectors = models / "Lora", models / "adetailer"
    for each in (lora, detectors):
        each.mkdir(parents=True)
    (models / "Stable-diffusion").mkdir()
    (outside / "secret.txt").write_text(SECRET * 1000)
    (models / "Stable-diffusion" / "linked.safetensors").symlink_to(outside / "secret.txt")
    (outside / "stray.safetensors").write_bytes(TINY_LORA.read_bytes())  # in the service's working folder
    good = load_file(TINY_LORA)
    first = next(name for name in good if name.endswith("lora_A.weight"))
    save_file(good, outside / "out.safetensors")
    (lora / "linked.safetensors").symlink_to(outside / "out.safetensors")
    save_file({**good, first: torch.full_like(good[first], torch.nan)}, lora / "nan.safetensors")
    save_file({**good, first: torch.full_like(good[first], torch.inf)}, lora / "inf.safetensors")
    save_file({**good, first: good[first][:, :-1].contiguous()}, lora / "narrow.safetensors")
    save_file({**good, first: good[first][:0].contiguous()}, lora / "empty.safetensors")
    second = first.replace("lora_A", "lora_B")
    thick = {first: torch.ones(4096, good[first].shape[1]).half(), second: torch.ones(len(good[second]), 4096).half()}
    save_file(thick, lora / "thick.safetensors")
    foreign = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_{}.weight"
    sd15 = {foreign.format("down"): torch.ones(4, 320), foreign.format("up"): torch.ones(320, 4)}
    save_file(sd15, lora / "sd15.safetensors")
    twice = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (lora / "twice.safetensors").write_bytes(struct.pack("<Q", len(twice)) + twice + b"x")
    with zipfile.ZipFile(detectors / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"model": Evil()}, protocol=2))
        archive.writestr("evil/version", "3")


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit",))


def refused(answer: Answer, status: int, *words: str) -> dict[str, Any]:
    """The error of an answer, which is as it should be."""
    assert answer.status == status, answer.body[:500]
    error = answer.error
    assert not LEAKS.search(answer.body.decode()), error
    for word in words:
        assert word.lower() in error["message"].lower(), error
    return error


# --- numbers --------------------------------------------------------------------------------------------------------

NUMBERS: dict[str, tuple[dict[str, Any], int, str]] = {
    "1 no width": ({"width": 0}, 422, "width"),
    "2 negative width": ({"width": -512}, 422, "width"),
    "4 far too large": ({"width": 100_000, "height": 100_000}, 422, "width"),
    "6 half a pixel": ({"width": 512.5}, 422, "width"),
    "8 no steps": ({"steps": 0}, 422, "steps"),
    "8 steps that are a switch": ({"steps": True}, 422, "steps: true and false are no numbers; give 1 to 1,000"),
    "9 too many steps": ({"steps": 5000}, 422, "steps: 5000 is too large; give 1 to 1,000"),
    "10 an empty batch": ({"batch_size": 0}, 422, "batch_size"),
    "10 a huge batch": ({"batch_size": 1000}, 422, "64"),
    "11 too much work": ({"width": 4096, "height": 4096, "steps": 300}, 413, "megapixel-steps"),
    "12 a seed beyond 63 bits": ({"seed": 2**64}, 422, "seed"),
    "12 seed -2": ({"seed": -2}, 422, "seed"),
    "12 half a seed": ({"seed": 1.5}, 422, "seed"),
    "12 a number of 5000 digits": ({"seed": "9" * 5000}, 422, "seed"),
    "13 negative guidance": ({"cfg_scale": -1}, 422, "cfg_scale"),
    "13 too much guidance": ({"cfg_scale": 1e9}, 422, "cfg_scale"),
    "14 negative distilled guidance": ({"distilled_cfg_scale": -1}, 422, "distilled_cfg_scale"),
    "15 strength below 0": ({"denoising_strength": -0.1}, 422, "denoising_strength"),
    "15 strength above 1": ({"denoising_strength": 1.1}, 422, "denoising_strength"),
    "17 hires scale 0": ({"hr_scale": 0}, 422, "hr_scale"),
    "17 hires scale 100": ({"hr_scale": 100}, 422, "hr_scale"),
    "18 a hires pass of one pixel": ({"enable_hr": True, "hr_resize_x": 1}, 422, "hr_resize_x"),
    "65 a hundred LoRAs": ({"loras": ["hat"] * 100}, 422, "16"),
    "66 a LoRA at a million": ({"loras": [{"name": "hat", "scale": 1e6}]}, 422, "100"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers(strict: Running, case: str) -> None:
    fields, status, word = NUMBERS[case]
    error = refused(strict.generate(**fields), status, word)
    assert error["param"]


@pytest.mark.parametrize("literal", ["1e999", "Infinity", "-Infinity", "NaN"])
def test_7_numbers_that_are_not_finite(strict: Running, literal: str) -> None:
    for field in ("width", "cfg_scale", "adetailer_args"):  # 13, 66
        error = refused(strict.post("/generate", f'{{"prompt": "", "{field}": {literal}}}'.encode()), 422, "finite")
        assert error["param"] == field and error["message"].startswith(f"{field}: {literal} is not finite")
    inner = f'{{"prompt": "", "loras": ["a", {{"name": "b", "scale": {literal}}}]}}'
    assert refused(strict.post("/generate", inner.encode()), 422, "finite")["param"] == "loras[1].scale"
    deep = f'{{"prompt": {"[" * 900}{literal}{"]" * 900}}}'
    assert refused(strict.post("/generate", deep.encode()), 422, "finite")["param"] is None


def test_numbers_that_are_accepted(strict: Running) -> None:
    odd = strict.generate(width=511, height=64)  # 3
    assert odd.json["sizes"] == [[504, 64]] and any("504" in warning for warning in odd.json["warnings"])
    assert strict.generate(width="64").json["sizes"] == [[64, 64]]  # 5: numbers as text, as A1111 has it
    same = strict.generate(image=as_png(), denoising_strength=0)  # 16
    assert same.status == 200
    enlarged = strict.generate(enable_hr=True, hr_scale=2, hr_upscaler="Lanczos", denoising_strength=0)
    assert enlarged.json["sizes"] == [[128, 128]]


# --- names ----------------------------------------------------------------------------------------------------------

NAMES: dict[str, tuple[dict[str, Any], int, str]] = {
    "19 a sampler": ({"sampler": "Foo"}, 422, "Euler"),
    "20 a scheduler": ({"scheduler": "Foo"}, 422, "Simple"),
    "21 a field for checkpoints": ({"sd_model_checkpoint": "flux"}, 422, "no such field"),
    "21 a checkpoint that is nearly there": ({"checkpoint": "tinny"}, 404, "did you mean 'tiny'"),
    "21 an autoencoder": ({"vae": "flux_vae"}, 404, "vae: no model file"),
    "21 a checkpoint as a text encoder": ({"t5": "tiny"}, 422, "not a T5 text encoder"),
    "21 a storage format": ({"storage_dtype": "int3"}, 422, "fp8_e4m3"),
    "21 a LoRA that is nearly there": ({"loras": ["hatt"]}, 404, "did you mean 'hat'"),
    "22 an upscaler that is nearly there": (
        {"enable_hr": True, "hr_upscaler": "4x_tinny"},
        404,
        "did you mean '4x_tiny'",
    ),
    "22 a LoRA outside": ({"loras": ["../../etc/passwd"]}, 404, "loras"),
    "22 a checkpoint outside": ({"checkpoint": "../../etc/passwd"}, 404, "checkpoint"),
    "22 a text encoder outside": ({"t5": "text_encoder/../../../etc/passwd"}, 404, "t5"),
    "22 an autoencoder outside": ({"vae": "..\\..\\etc\\passwd"}, 404, "vae"),
    "22 a file of the working folder": ({"checkpoint": "stray.safetensors"}, 404, "no model file"),
    "22 in the prompt": ({"prompt": "<lora:../../etc/passwd:1>"}, 404, "no LoRA"),
    "22 an upscaler outside": ({"enable_hr": True, "hr_upscaler": "..\\..\\etc\\passwd"}, 404, "hr_upscaler"),
    "23 an absolute path": ({"loras": ["/etc/passwd"]}, 403, "paths"),
    "23 a checkpoint by an absolute path": ({"checkpoint": "/etc/passwd"}, 403, "paths"),
    "23 an autoencoder of another system": ({"vae": "C:\\ae.safetensors"}, 403, "paths"),
    "23 of another system": ({"hr_upscaler": "C:\\x.pth"}, 403, "paths"),
    "24 a NUL": ({"loras": ["hat\0.safetensors"]}, 422, "NUL"),
    "24 a NUL in a checkpoint": ({"checkpoint": "tiny\0"}, 422, "NUL"),
    "25 a checkpoint that is a link to a text": ({"checkpoint": "linked"}, 422, "linked.safetensors"),
    "25 a link that leads outside": ({"loras": ["linked"]}, 422, "link"),
    "26 look-alike letters": ({"loras": ["hаt"]}, 404, "no LoRA"),
    "26 a checkpoint in look-alike letters": ({"checkpoint": "tіny"}, 404, "no model file"),
    "26 a very long checkpoint": ({"checkpoint": "a" * 4096}, 404, "no model file"),
    "26 a longer checkpoint": ({"checkpoint": "a" * 4097}, 422, "4,096"),
    "26 a very long name": ({"loras": ["a" * 4096]}, 404, "no LoRA"),
    "26 a longer one": ({"loras": ["a" * 4097]}, 422, "4,096"),
    "27 a detector with a program in it": (
        {"adetailer_passes": [{"ad_model": "evil.pt"}]},
        422,
        "exec",
    ),
    "28 a script": ({"alwayson_scripts": {"X": {"args": []}}}, 422, "alwayson_scripts"),
    "29 arguments that are no object": ({"adetailer": True, "adetailer_args": "[1]"}, 422, "adetailer_args"),
    "29 arguments that nothing reads": ({"adetailer_args": "x"}, 422, "adetailer_args: it is no JSON"),
    "29 an unknown key": ({"adetailer_passes": [{"ad_model": "face_tiny", "ad_modell": "x"}]}, 422, "ad_modell"),
    "19 a sampler of a pass": (
        {"adetailer_passes": [{"ad_model": "face_tiny", "ad_use_sampler": True, "ad_sampler": "Foo"}]},
        422,
        "adetailer_passes[0].ad_sampler: 'Foo'",
    ),
    "30 a script's name": ({"script_name": "X/Y/Z plot"}, 422, "script_name"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names(strict: Running, case: str) -> None:
    fields, status, word = NAMES[case]
    refused(strict.generate(**fields), status, word)


def test_22_a_name_that_leads_outside_opens_nothing(strict: Running) -> None:
    place = Path(f"/proc/{strict.process.pid}/cwd").resolve()
    names = ["../../secret.txt", "../secret", str(place / "stray.safetensors"), "..\\..\\stray.safetensors"]
    fields = ("checkpoint", "vae", "t5", "clip", "hr_upscaler", "img2img_upscaler")
    with opened(place / "secret.txt", place / "stray.safetensors") as seen:
        for name in names:
            for asked in (*({field: name} for field in fields), {"loras": [name]}, {"prompt": f"<lora:{name}:1>"}):
                answer = strict.generate(**{"enable_hr": True, "hr_scale": 2, **asked})
                refused(answer, answer.status)
                assert answer.status in (403, 404), (asked, answer.body)
            refused(strict.generate(adetailer_passes=[{"ad_model": name}]), 404)
        assert seen() == 0


@contextmanager
def opened(*paths: Path) -> Iterator[Callable[[], int]]:
    """How often files are opened meanwhile, by whichever process: the system itself is asked to tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "inotify_init1"):
        pytest.skip("the system does not tell which files are opened")
    queue = libc.inotify_init1(os.O_NONBLOCK)
    for path in paths:
        assert libc.inotify_add_watch(queue, str(path).encode(), 0x20) >= 0  # IN_OPEN

    def count() -> int:
        try:
            return len(os.read(queue, 1 << 16)) // 16  # struct inotify_event, without a name
        except BlockingIOError:
            return 0

    try:
        paths[0].read_bytes()
        assert count() == 1, "what is opened here is not told"
        yield count
    finally:
        os.close(queue)


def test_23_paths_of_the_models_folder(strict: Running) -> None:
    models = Path(f"/proc/{strict.process.pid}/cwd").resolve() / "models"
    refused(strict.generate(checkpoint=f"{models}/../../../etc/passwd"), 403, "paths")
    refused(strict.generate(checkpoint=f"{models}x/tiny.safetensors"), 403, "paths")
    refused(strict.generate(checkpoint=f"{models}/Stable-diffusion/absent.safetensors"), 404, "no model file")


# --- pictures -------------------------------------------------------------------------------------------------------


def as_png(image: Image.Image | None = None, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    (image or Image.new("RGB", (64, 64), "teal")).save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of(width: int, height: int, *chunks: bytes) -> str:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")).decode()


def coded(content: bytes) -> str:
    return base64.b64encode(content + b" " * 100).decode()


PICTURES: dict[str, tuple[Any, int, str]] = {
    "31 none": ([], 422, "empty"),
    "32 an empty text": ("", 422, "picture"),
    "33 no base64": ("%" * 200, 422, "picture"),
    "34 a text": (coded(b"hello"), 422, "picture"),
    "34 a PDF": (coded(b"%PDF-1.7"), 422, "picture"),
    "34 an SVG": (coded(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 422, "picture"),
    "34 a GIF": (as_png(kind="GIF"), 422, "picture"),
    "34 an EPS": (coded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), 422, "picture"),
    "36 a header that claims much": (png_of(30_000, 30_000), 413, "pixels"),
    "37 compressed text that never ends": (
        png_of(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 80_000_000, 9))),
        422,
        "image",
    ),
    "38 half a JPEG": (as_png(Image.effect_noise((64, 64), 90), "JPEG")[:1200], 422, "image"),
    "a number": (7, 422, "picture"),
    "a path": ("/etc/passwd", 422, "picture"),
    "49 two hosts in one": ("http://good.example\\@127.0.0.1/x.png", 422, ""),
    "49 a user": ("http://me:pass@good.example/x.png", 422, ""),
    "49 a NUL": ("http://good.example/%00\0.png", 422, ""),
    "49 a tab": ("http://good\t.example/x.png", 422, ""),
    "50 51 a file": ("file:///etc/passwd", 422, "file"),
    "50 ftp": ("ftp://good.example/x.png", 422, "ftp"),
    "50 gopher": ("gopher://good.example/x", 422, "gopher"),
    "50 text as data": ("data:text/html,<script>", 422, "data"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_pictures(strict: Running, case: str) -> None:
    given, status, word = PICTURES[case]
    answer = strict.generate(image=given)
    if case == "49 two hosts in one":
        assert answer.status in (403, 422)
    error = refused(answer, answer.status if case == "49 two hosts in one" else status, word)
    assert "pass@" not in error["message"]


LOCAL = (
    *("http://127.0.0.1/x", "http://[::1]/x", "http://0/x", "http://127.1/x", "http://2130706433/x"),  # 45
    *("http://0x7f000001/x", "http://017700000001/x"),
    *("http://169.254.169.254/x", "https://[::ffff:169.254.169.254]/x", "https://[64:ff9b::a9fe:a9fe]/x"),  # 46
    "https://[2002:a9fe:a9fe::]/x",
)


@pytest.mark.parametrize("url", LOCAL)
def test_45_46_addresses_of_this_machine(strict: Running, url: str) -> None:
    answer = strict.generate(image=url)
    refused(answer, 403)


def test_no_message_advises_what_is_refused(server: Running) -> None:
    """Callers may name no file here, and without fetch_pictures no URL."""
    for asked in ({"image": "/etc/passwd"}, {"image": "%" * 200}, {"image": 7}, {"image": "data:text/plain,x"}):
        message = refused(server.generate(**asked), 422, "base64 or a data URL")["message"]
        assert "path" not in message and "http" not in message, message
    assert "got" not in refused(server.post("/sdapi/v1/png-info", {}), 422, "image")["message"]


OPERATOR = "(as the operator of this service can)"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("use https, or add it to allow_hosts", f"use https, or add it to allow_hosts {OPERATOR}"),
        ("add a:1 to allow_hosts if it is meant", f"add a:1 to allow_hosts if it is meant {OPERATOR}"),
        ("it needs x: pip install 'x[y]', or choose z", f"it needs x: pip install 'x[y]' {OPERATOR}, or choose z"),
        ("offline is on; switch it off or give a file", f"offline is on; switch it off {OPERATOR} or give a file"),
        ("put the file into …/L by `lora add FILE`, or give it", f"put the file into …/L {OPERATOR}, or give it"),
        ("check the file with `models verify …/x`; if", f"check the file with `models verify …/x` {OPERATOR}; if"),
        ("free space, or set cache_dir to a folder", f"free space {OPERATOR}, or set cache_dir to a folder"),
        ("set one for this host in `tokens`", f"set one for this host in `tokens` {OPERATOR}"),
        ("x: over 64 (setting max_outputs); ask for less", None),
        ("a job takes too much; use a smaller storage_dtype, or set width", None),
        ("no upscaler 'a'; choose one of: Latent, 4x_tiny", None),
        ("steps: 0 is too small; give 1 to 1,000", None),
        ("no such field; `generate --help` or /openapi.json lists them", "no such field; /openapi.json lists them"),
    ],
)  # fmt: skip
def test_advice_that_a_caller_cannot_follow_says_who_can(message: str, told: str | None) -> None:
    body = Fault.of(RequestError(message)).body("an id")
    assert body["error"]["message"] == body["detail"] == (told or message)


def test_who_can_is_told_by_every_api(strict: Running) -> None:
    url = "https://127.0.0.1/a.safetensors"
    answers = [strict.generate(lora_urls=[url]), strict.generate(loras=["nothing"]), strict.generate(image=url)]
    answers.append(strict.post("/sdapi/v1/txt2img", {**SMALL, "prompt": "<lora:nothing:1>"}))
    answers.append(strict.ask("GET", "/config", headers={"Host": "other.example"}))
    assert [answer.error["message"].count(OPERATOR) for answer in answers] == [1] * 5


def test_44_urls_are_off_at_first(server: Running) -> None:
    refused(server.generate(image="https://example.com/x.png"), 403, "not fetched")


def test_47_a_redirect_to_this_machine(strict: Running, site: Site) -> None:
    refused(strict.generate(image=site.url("to/x.png?http://127.0.0.1:1/x.png")), 403)


def test_pictures_that_are_accepted(strict: Running, site: Site) -> None:
    teal = Image.new("RGB", (64, 64), "teal")
    site.files["x.png"] = base64.b64decode(as_png())
    wrong_mime = f"data:image/jpeg;base64,{as_png()}"  # 35
    turned = Image.Exif()
    turned[0x0112] = 6
    given = [
        wrong_mime,
        site.url("x.png"),
        as_png(teal.convert("CMYK"), "JPEG"),  # 39
        as_png(Image.fromarray(np.full((64, 64), 40_000, np.uint16))),
        as_png(teal.convert("P")),
        as_png(teal.convert("RGBA")),
        as_png(Image.new("RGB", (64, 128), "teal"), "JPEG", exif=turned),
    ]
    for image in given:
        assert strict.generate(image=image, denoising_strength=0.5).status == 200


def test_masks(strict: Running) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    small = strict.generate(image=as_png(noise), mask=as_png(Image.new("L", (32, 32), 255)), denoising_strength=0.5)
    assert small.status == 200 and any("resized" in warning for warning in small.json["warnings"])  # 40
    blank = strict.generate(image=as_png(noise), mask=as_png(Image.new("L", (64, 64), 0)), denoising_strength=0.5)
    drawn = Image.open(io.BytesIO(base64.b64decode(blank.json["images"][0])))
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(noise)).max() <= 1  # 41


def test_42_a_body_of_two_gigabytes(strict: Running) -> None:
    connection = strict.connect(10)
    connection.putrequest("POST", "/generate")
    for name, value in (("Content-Type", "application/json"), ("Content-Length", str(2 << 30))):
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()  # nothing of the body was sent
    assert response.status == 413 and b"max_body_mib" in response.read()


def test_43_a_body_without_a_length(strict: Running) -> None:
    connection = strict.connect(10)
    connection.putrequest("POST", "/generate")
    for name, value in (("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")):
        connection.putheader(name, value)
    connection.endheaders()
    try:
        for _ in range(64):
            connection.send(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
    except OSError:
        pass  # hung up on
    assert connection.getresponse().status == 413


# --- LoRAs ----------------------------------------------------------------------------------------------------------

LORAS: dict[str, tuple[str, int, str]] = {
    "52 not there": ("missing.safetensors", 424, "404"),
    "52 not allowed": ("status/401/a.safetensors", 424, "401"),
    "52 forbidden": ("status/403/a.safetensors", 424, "403"),
    "52 broken": ("status/500/a.safetensors", 424, "500"),
    "53 a page": ("page/a.safetensors", 422, "login"),
    "54 a redirect to this machine": ("to/a.safetensors?http://127.0.0.1:1/x", 403, ""),
    "55 ten gigabytes": ("huge/a.safetensors", 413, ""),
    "55 an endless one": ("endless/a.safetensors", 413, ""),
    "60 of another model": ("sd15.safetensors", 422, "flux"),
    "61 of no numbers": ("nan.safetensors", 422, "finite"),
    "61 a key twice": ("twice.safetensors", 422, "twice"),
    "61 infinite": ("inf.safetensors", 422, "finite"),
    "61 of no size": ("empty.safetensors", 422, ""),
    "62 of other shapes": ("narrow.safetensors", 422, ""),
    "62 of the rank 4096": ("thick.safetensors", 422, "4,096"),
    "63 an archive": ("hat.zip", 415, "safetensors"),
}


@pytest.mark.parametrize("case", LORAS)
def test_loras(strict: Running, site: Site, case: str) -> None:
    path, status, word = LORAS[case]
    joint = "&" if "?" in path else "?"
    refused(strict.generate(lora_urls=[site.url(f"{path}{joint}token={SECRET}")]), status, word)  # 67


@pytest.mark.parametrize("name", ["sd15", "nan", "inf", "narrow", "empty", "thick", "twice"])
def test_loras_of_the_folder(strict: Running, name: str) -> None:
    refused(strict.generate(loras=[name]), 422, "")


def test_52_a_server_that_speaks_no_tls(strict: Running, site: Site) -> None:
    refused(strict.generate(lora_urls=[f"https://{site.name}/hat.safetensors"]), 424)


def test_52_the_log_has_what_failed(strict: Running, site: Site) -> None:
    """With the address, as far as that is no secret."""
    path = f"status/500/a.safetensors?token={SECRET}"
    asked = refused(strict.generate(lora_urls=[site.url(path)]), 424, "500")["request_id"]

    def told() -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in list(strict.lines) if asked in line]
        return [row for row in rows if row["message"] in ("finished", "answered")]

    for line in wait(lambda: len(rows := told()) == 2 and rows):
        assert (line["status"], line["error"], line["client"]) == (424, "DownloadError", "127.0.0.1")
        assert "500" in line["reason"] and site.name in line["reason"] and SECRET not in line["reason"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"checkpoint": "../x"}, "checkpoint"),
        ({"checkpoint": "ae"}, "checkpoint"),
        ({"vae": "nothing"}, "vae"),
        ({"lora_urls": ["night"]}, "lora_urls[0]"),
        ({"lora_urls": ["https://127.0.0.1/a.safetensors"]}, "lora_urls[0]"),
        ({"lora_urls": ["https://example.org/a.safetensors"], "lora_scales": [1, 2]}, "lora_scales"),
        ({"lora_urls": ["https://example.org/a.safetensors", "night"]}, "lora_urls[1]"),
        ({"loras": ["nothing"]}, "loras[0]"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"loras": ["hat", {"name": "\udfff"}]}, "loras[1].name"),
        ({"": 1}, "''"),
        ({"loras": ["hat:abc"]}, "loras[0]"),
        ({"loras": ["hat", "nothing"]}, "loras[1]"),
        ({"loras": ["hat", "nan"]}, "loras[1]"),
        ({"loras": ["nan"]}, "loras[0]"),
        ({"loras": [{"name": "hat", "strength": 1}]}, "loras[0]"),
        ({"sigma_min": 2, "sigma_max": 1}, "sigma_min"),
        ({"prompt": "<lora:nothing:1>"}, "prompt"),
        ({"prompt": "<lora:hat:much>"}, "prompt"),
        ({"hr_scale": 1.5, "hr_upscaler": "Latent", "hr_prompt": "<lora:hat:much>"}, "hr_prompt"),
        ({"hr_scale": 1.5, "hr_upscaler": "Latent", "hr_prompt": "<lora:nothing:1>"}, "hr_prompt"),
        ({"image": "https://127.0.0.1/a.png"}, "image"),
    ],
    ids=str,
)
def test_the_field_at_fault_is_named(strict: Running, fields: dict[str, Any], param: str) -> None:
    answer = strict.generate(**fields)
    assert answer.error["param"] == param and answer.error["message"].startswith(param), answer.body


def test_56_a_trickle(strict: Running, site: Site) -> None:
    site.files["slow.safetensors"] = TINY_LORA.read_bytes()
    site.pause, site.piece = 0.05, 1
    try:
        refused(strict.generate(lora_urls=[site.url("slow.safetensors")]), 504)
    finally:
        site.pause, site.piece = 0.0, 1 << 16


def test_57_not_the_file_that_was_meant(strict: Running, site: Site) -> None:
    site.files["pinned.safetensors"] = TINY_LORA.read_bytes()
    refused(strict.generate(loras=[{"url": site.url("pinned.safetensors"), "sha256": "0" * 64}]), 422, "expected")


def test_58_64_67_a_lora_that_is_fetched(strict: Running, site: Site) -> None:
    site.files["good.safetensors"] = TINY_LORA.read_bytes()
    site.cut, site.ranges = [1000], False
    answers: list[Answer] = []
    fields = {**SMALL, "lora_urls": [site.url(f"good.safetensors?token={SECRET}")]}
    threads = [threading.Thread(target=lambda: answers.append(strict.post("/generate", fields))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    site.cut, site.ranges = [], True
    assert [answer.status for answer in answers] == [200, 200], answers[0].body[:300]
    assert site.count("good.safetensors") == 2  # the broken one and the whole one
    named = strict.generate(loras=["hat"], subseed=0).json
    assert answers[0].json["loras"][0]["sha256"] == named["loras"][0]["sha256"]
    told = answers[0].body.decode() + strict.get("/metrics").body.decode() + "".join(strict.lines)
    assert SECRET not in told and SECRET.encode() not in base64.b64decode(answers[0].json["images"][0])


# --- prompts --------------------------------------------------------------------------------------------------------

PROMPTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "68 none": ("", (200,)),
    "69 a megabyte": ("a" * 1_000_000, (422,)),
    "70 marks of all kinds": ("🎨 مرحبا é́́ 中文 \u202e", (200,)),
    "70 half a character": ("\ud800", (422,)),
    "70 a NUL": ("a\0b", (422,)),
    "70 lines and tabs": ("a\tsmiling\r\nwoman", (200,)),
    "71 brackets": ("(" * 10_000, (422,)),
    "71 brackets around words": ("(a" * 2_000 + ")" * 2_000, (422,)),
    "71 parts without end": ("BREAK " * 3_000, (422,)),
    "71 parts joined by AND": ("a AND " * 1_000 + "b", (422,)),
    "71 a tag without end": ("<lora:x:", (200, 422)),
    "72 a LoRA twice": ("<lora:hat:1><lora:hat:1>", (200,)),
    "72 at another strength": ("<lora:hat:1><lora:hat:0.5>", (200,)),
    "66 a strength that is no number": ("<lora:hat:much>", (422,)),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(strict: Running, case: str) -> None:
    prompt, statuses = PROMPTS[case]
    answer = strict.generate(prompt=prompt)
    assert answer.status in statuses, answer.body[:300]
    if answer.status != 200:
        error = refused(answer, answer.status)
        assert not case.startswith("71 b") or "max_prompt_tokens" in error["message"]
    elif case.startswith("70"):
        assert answer.json["infotexts"][0].startswith(prompt)


# --- protocol -------------------------------------------------------------------------------------------------------

BODIES: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "the body is empty"),
    "half": (b'{"prompt": ', 400, "not valid JSON"),
    "a list": (b"[]", 400, "the body is a list,"),
    "a text": (b'"a"', 400, "the body is a text,"),
    "null": (b"null", 400, "the body is null,"),
    "a key twice": (b'{"steps": 1, "steps": 2}', 400, "the key 'steps' is there twice"),
    "deep": (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, "nested too deeply"),
    "another encoding": ('{"prompt": "é"}'.encode("latin-1"), 400, "not valid JSON"),
    "an endless integer": (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
    "of another type": (b'{"prompt": {"a": 1}}', 422, "prompt: "),
}


@pytest.mark.parametrize("case", BODIES)
def test_73_bodies(strict: Running, case: str) -> None:
    body, status, words = BODIES[case]
    for path in ("/generate", "/jobs"):
        refused(strict.post(path, body), status, words)


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""]
)
def test_73_other_types(strict: Running, kind: str) -> None:
    refused(strict.post("/generate", json.dumps(SMALL).encode(), Content_Type=kind), 415, "application/json")


@pytest.mark.parametrize(
    "path", [*(f"/models/{does}" for does in ("load", "unload", "refresh")), "/jobs/{}/interrupt", "/jobs/{}"]
)
def test_fields_where_none_are_taken(strict: Running, path: str) -> None:
    method, path = "DELETE" if path == "/jobs/{}" else "POST", path.format(strict.job(SMALL))
    error = refused(strict.ask(method, path, {"checkpoint": "tiny"}), 422, "named in the request that draws")
    assert error["param"] == "checkpoint"
    assert refused(strict.ask(method, path, {"wait": True}), 422, "takes no fields")["param"] == "wait"
    refused(strict.ask(method, path, b"now"), 422, "takes no body")
    refused(strict.ask(method, path, headers={"Content-Length": str(3 << 20)}), 413, "takes no body")
    for nothing in (None, b"", {}, b"null"):
        assert strict.ask(method, path, nothing).status in (200, 409)


def test_addresses(strict: Running) -> None:
    refused(strict.get("/nothing"), 404)
    refused(strict.get("/generate"), 405)
    refused(strict.get("/jobs/..%2f..%2fetc%2fpasswd/images/0"), 404)
    refused(strict.get("/jobs/none/images/x"), 422)
    refused(strict.post("/jobs?preview_every=-1", SMALL), 422, "preview_every: -1 is too small; give 0 to 1,000")
    refused(strict.post("/jobs?preview_every=x", SMALL), 422, "preview_every: 'x' is no whole number; give 0 to 1,000")
    refused(strict.post("/jobs", SMALL, Idempotency_Key="k" * 300), 400)


def test_77_cancelling(strict: Running) -> None:
    refused(strict.ask("DELETE", "/jobs/unknown"), 404)
    job = strict.job(SMALL)
    strict.until(job, "succeeded")
    refused(strict.ask("DELETE", f"/jobs/{job}"), 409)
