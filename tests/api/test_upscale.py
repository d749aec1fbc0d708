"""Pictures enlarged over HTTP."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from running_service import LONG, SMALL, Running, service

from lightweight_engine.request import UpscaleRequest


def encoded(side: int = 24) -> str:
    file = io.BytesIO()
    Image.effect_noise((side, side), 60).convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_pictures_are_enlarged(server: Running) -> None:
    told = server.post("/upscale", {"images": [encoded(), encoded(30)], "by": 2, "upscaler": "4x_tiny"}).json
    assert told["sizes"] == [[48, 48], [60, 60]] and told["upscalers"] == ["4x_tiny"] and told["format"] == "png"
    assert [opened(base64.b64decode(image)).size for image in told["images"]] == [(48, 48), (60, 60)]
    assert told["timings"]["upscale"] > 0 and not told["interrupted"] and told["warnings"] == []
    job = server.get(f"/jobs/{told['id']}").json
    assert (
        job["state"] == "succeeded" and job["result"]["upscalers"] == ["4x_tiny"] and len(job["result"]["images"]) == 2
    )
    assert opened(server.get(f"/jobs/{told['id']}/images/1").body).size == (60, 60)


def test_one_as_it_is_to_a_size(server: Running) -> None:
    size = {"width": 40, "height": 30, "crop": True}
    two = {"upscaler": "Lanczos", "upscaler_2": "Nearest", "upscaler_2_visibility": 0.5}
    answer = server.post("/upscale", {"images": encoded(), **size, **two}, Accept="image/webp")
    assert answer.status == 200 and opened(answer.body).size == (40, 30) and opened(answer.body).format == "WEBP"
    assert "x-seed" not in answer.headers


@pytest.mark.parametrize(
    ("changed", "status", "said"),
    [
        ({"images": []}, 422, "images"),
        ({"images": ["no picture"]}, 422, "images[0]: the text given is no picture"),
        ({"images": ["/etc/hostname"]}, 422, "images[0]: the text given is no picture"),
        ({"images": ["http://localhost/a.png"]}, 403, "images[0]: URLs are not fetched here"),
        ({"images": [encoded(8)] * 65}, 422, "max_outputs"),
        ({"by": 17}, 422, "by:"),
        ({"by": 2, "height": 3}, 422, "give by, or width and height"),
        ({"width": 10**7}, 422, "max_side"),
        ({"width": 400}, 422, "width:"),
        ({"upscaler": "/etc/hostname"}, 403, "upscaler: files are named"),
        ({"upscaler": "../x"}, 404, "upscaler: there is no file"),
        ({"upscaler": "Lanczo"}, 404, "did you mean 'Lanczos'"),
        ({"scale": 2}, 422, "no such field"),
    ],
)
def test_what_cannot_be(server: Running, changed: dict[str, Any], status: int, said: str) -> None:
    answer = server.post("/upscale", {"images": [encoded()], "upscaler": "Lanczos", **changed})
    assert (answer.status, said in answer.error["message"]) == (status, True), answer.error["message"]


def test_a_format_that_cannot_hold_the_picture(tmp_path: Path) -> None:
    """A fault of the request: 507 is for a disk."""
    with service(tmp_path, "--set", "max_side=16384") as running:
        running.ready()
        buffer = io.BytesIO()
        Image.new("L", (1024, 1)).save(buffer, "PNG")
        wide = {"images": base64.b64encode(buffer.getvalue()).decode(), "upscaler": "Nearest"}
        asked: list[tuple[str, dict[str, Any]]] = [
            ("/upscale", {**wide, "by": 16}),
            ("/upscale", {**wide, "width": 16384}),
            ("/generate", {**SMALL, "width": 16384}),
            ("/generate", {**SMALL, "enable_hr": True, "hr_resize_x": 16384, "hr_resize_y": 64, "hr_upscaler": "None"}),
        ]
        for path, fields in asked:
            answer = running.post(path, {**fields, "output_format": "webp"})
            assert (answer.status, answer.error["type"], answer.error["param"]) == (
                422,
                "RequestError",
                "output_format",
            )
            told = (
                r"output_format: a webp file holds at most 16383 pixels a side, the picture has 16384x\d+; choose png"
            )
            assert re.fullmatch(told, answer.error["message"])
        larger = running.post("/upscale", {**wide, "by": 16, "output_format": "png"}, Accept="image/png")
        assert larger.status == 200 and opened(larger.body).size == (16384, 16)


def test_a_key_stands_for_one_kind_of_task(server: Running) -> None:
    body = {"images": [encoded()], "upscaler": "Lanczos"}
    first, again = (server.post("/upscale", body, Idempotency_Key="larger").json for _ in range(2))
    assert first == again
    assert server.post("/upscale", {**body, "by": 3}, Idempotency_Key="larger").status == 409
    assert server.post("/generate", {"prompt": ""}, Idempotency_Key="larger").status == 409


def test_it_waits_its_turn(server: Running) -> None:
    running = server.job(LONG)
    server.until(running, "running")
    late = server.post("/upscale", {"images": [encoded()]}, X_Request_Timeout="0.3")
    assert late.status == 504
    assert server.ask("DELETE", f"/jobs/{running}").status == 200
    server.idle()


def test_the_description_tells_of_it(server: Running) -> None:
    told = server.get("/openapi.json").json
    body = told["paths"]["/upscale"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["$ref"].endswith("/UpscaleRequest") and UpscaleRequest(**body["example"])
    assert set(told["components"]["schemas"]["UpscaleRequest"]["properties"]) == set(UpscaleRequest.model_fields)
    assert server.post("/upscale", body["example"]).json["sizes"] == [[2, 2]]
