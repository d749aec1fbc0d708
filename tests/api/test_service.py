"""The native API against the real service: what it answers, keeps and forgets."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from running_service import LONG, SMALL, Running, service, wait

from lightweight_engine.apps.server.native import MAX_WARNINGS_TEXT, as_header
from lightweight_engine.config import EngineConfig
from lightweight_engine.core.images import encode, read_infotext
from lightweight_engine.request import GenerationRequest


def picture(answer: dict[str, Any], n: int = 0) -> bytes:
    return base64.b64decode(answer["images"][n])


def events(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in body.decode().strip().split("\n\n")]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


def test_the_picture_is_the_engines(server: Running, small_jobs: None) -> None:
    from lightweight_engine import LightweightEngine

    answer = server.generate(num_outputs=2, subseed=3)
    assert answer.status == 200, answer.body
    told = answer.json
    assert (told["seeds"], told["sizes"], told["format"]) == ([1, 2], [[64, 64]] * 2, "png")
    engine = LightweightEngine(EngineConfig(threads=1))
    result = engine.run(GenerationRequest(**SMALL, num_outputs=2, subseed=3))
    engine.close()
    files = [encode(image, "png", text).data for image, text in zip(result.images, result.infotexts, strict=True)]
    assert [picture(told, n) for n in range(2)] == files
    assert told["infotexts"] == list(result.infotexts)
    assert [row["role"] for row in told["models"]] == ["transformer", "t5", "clip", "autoencoder"]
    assert "path" not in told["models"][0] and told["peak_memory"] > 0
    assert any("tiny" in warning for warning in told["warnings"])


@pytest.mark.parametrize(
    ("accept", "kind"), [("image/png", "PNG"), ("image/webp, */*;q=0.1", "WEBP"), ("image/*", "PNG")]
)
def test_one_picture_as_it_is(server: Running, accept: str, kind: str) -> None:
    answer = server.post("/generate", SMALL, Accept=accept)
    assert (answer.status, answer.headers["content-type"]) == (200, f"image/{kind.lower()}")
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-seed"] == "1"
    assert Image.open(io.BytesIO(answer.body)).format == kind
    warnings = json.loads(answer.headers["x-warnings-text"])
    assert answer.headers["x-warnings"] == str(len(warnings)) and any("'tiny' is used" in text for text in warnings)
    assert server.get(f"/jobs/{answer.headers['x-job-id']}").json["result"]["warnings"] == warnings
    assert "a smiling woman" in (read_infotext(answer.body) or "")


@pytest.mark.parametrize(
    ("texts", "kept"),
    [
        (["plain", "a ✓\nb"], 2),
        (["x" * 3000] * 3, 1),
        (["é" * 9000, "next"], 2),
        ([f"{n} ✓" * 99 for n in range(20)], 5),
    ],
)
def test_warnings_fit_into_a_header(texts: list[str], kept: int) -> None:
    header = as_header(texts)
    told = json.loads(header)
    assert header.isascii() and header.isprintable() and len(header) <= MAX_WARNINGS_TEXT
    assert (
        len(told) == kept
        and told[0][:9] == texts[0][:9]
        and all(a == b for a, b in zip(texts[1:], told[1:], strict=False))
    )


@pytest.mark.parametrize(
    ("accept", "fields"),
    [("image/png", {"num_outputs": 2}), ("image/svg+xml", {}), ("image/png", {"output_format": "jpg"})],
)
def test_what_cannot_be_accepted(server: Running, accept: str, fields: dict[str, Any]) -> None:
    answer = server.post("/generate", {**SMALL, **fields}, Accept=accept)
    assert answer.status == 406 and answer.error["type"] == "NotAcceptableError"


@pytest.mark.parametrize(
    ("accept", "fields", "kind"),
    [
        ("application/json;q=0.5, image/png", {"num_outputs": 2}, "application/json"),
        ("image/png, */*;q=0.1", {"output_format": "webp"}, "application/json"),
        ("image/png, image/webp;q=0.5", {"output_format": "webp"}, "image/webp"),
        ("image/webp;q=0.5, application/json;q=0.6", {}, "application/json"),
    ],
)
def test_the_most_wanted_form_that_can_be_given(
    server: Running, accept: str, fields: dict[str, Any], kind: str
) -> None:
    answer = server.post("/generate", {**SMALL, **fields}, Accept=accept)
    assert (answer.status, answer.headers["content-type"]) == (200, kind)
    if kind == "application/json":
        assert answer.json["format"] == fields.get("output_format", "png")


def test_an_answer_names_its_job(server: Running) -> None:
    drawn = server.generate()
    enlarged = server.post("/upscale", {"images": drawn.json["images"], "by": 2, "upscaler": "Lanczos"})
    assert [answer.headers["x-job-id"] for answer in (drawn, enlarged)] == [drawn.json["id"], enlarged.json["id"]]


def test_a_job_and_its_events(server: Running) -> None:
    created = server.post("/jobs?preview_every=2", {**SMALL, "steps": 4})
    assert created.status == 202 and created.headers["location"] == f"/jobs/{created.json['id']}"
    where = created.headers["location"]
    told = events(server.get(f"{where}/events").body)
    steps = [row["step"] for name, row in told if row.get("stage") == "sample"]
    assert steps == sorted(steps)
    name, last = told[-1]
    assert name == "result" and last["state"] == "succeeded" and last["result"]["images"] == [f"{where}/images/0"]
    assert server.get(where).json == last
    image = server.get(f"{where}/images/0")
    assert (image.status, image.headers["content-type"]) == (200, "image/png")
    assert image.body == picture(server.generate(steps=4, subseed=last["result"]["subseeds"][0]).json)
    assert "has 1 picture, counted" in server.get(f"{where}/images/1").error["message"]


def test_the_list_of_jobs(server: Running) -> None:
    running, waiting = server.job(LONG), server.post("/jobs", SMALL, X_Request_ID="mine-2").json["id"]
    server.until(running, "running")
    rows = server.get("/jobs?limit=2").json["jobs"]
    assert [(row["id"], row["state"], row["position"]) for row in rows] == [
        (waiting, "queued", 1),
        (running, "running", None),
    ]
    assert rows[0]["request_id"] == "mine-2" and rows[0]["accepted"] >= rows[1]["accepted"] and rows[1]["started"]
    for job in (running, waiting):
        server.ask("DELETE", f"/jobs/{job}")
    server.idle()
    rows = server.get("/jobs").json["jobs"]
    assert {row["id"]: row["state"] for row in rows}[waiting] == "cancelled" and rows[0]["finished"]
    assert [server.get(f"/jobs?limit={limit}").status for limit in ("0", "1001", "x", "1")] == [422, 422, 422, 200]
    refused = server.ask("DELETE", "/jobs")
    assert (refused.status, refused.headers["allow"]) == (405, "GET, POST")
    assert refused.error["message"] == "this address takes GET, POST alone"


def test_a_key_sees_its_own_jobs(tmp_path: Path) -> None:
    with service(tmp_path, LWE_API_KEYS="a-first-key,a-second-key") as running:
        first, second = {"X_API_Key": "a-first-key"}, {"X_API_Key": "a-second-key"}
        wait(lambda: running.get("/readyz").status == 200)
        job = running.post("/jobs", SMALL, **first).json["id"]
        asked = [running.get("/jobs", **{"X-API-Key": each["X_API_Key"]}).json["jobs"] for each in (first, second)]
        assert [[row["id"] for row in rows] for rows in asked] == [[job], []]
        assert running.get("/jobs").status == 401


def test_a_job_of_another_key_is_unknown(tmp_path: Path) -> None:
    whole = [("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("POST", "/interrupt"), ("POST", "/skip")]
    with service(tmp_path, LWE_API_KEYS="a-first-key,a-second-key") as running:
        running.ready()
        job = running.post("/jobs", LONG, X_API_Key="a-first-key").json["id"]
        for method, path in (*whole, ("DELETE", "")):
            answer = running.ask(method, f"/jobs/{job}{path}", headers={"X-API-Key": "a-second-key"})
            assert answer.status == 404 and answer.error["type"] == "UnknownJobError", path
        mine = {"X-API-Key": "a-first-key"}
        assert running.get(f"/jobs/{job}", **mine).json["state"] in ("queued", "running")
        assert running.ask("DELETE", f"/jobs/{job}", headers=mine).status == 200


def test_previews(server: Running) -> None:
    job = server.post("/jobs?preview_every=1", {**LONG, "width": 64, "height": 64, "steps": 12}).json["id"]
    told = events(server.get(f"/jobs/{job}/events").body)
    previews = [row["preview"] for _, row in told if row.get("preview")]
    assert previews and Image.open(io.BytesIO(base64.b64decode(previews[0]))).format == "JPEG"
    assert any(row.get("eta_seconds") for _, row in told)


def half_a_picture() -> str:
    """Whose head is whole, so that only the worker finds out."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()[:900]).decode()


def test_a_job_that_fails(server: Running) -> None:
    told = server.until(server.job({**SMALL, "image": half_a_picture()}), "failed")
    job = told["id"]
    assert (told["error"]["type"], told["error"]["param"]) == ("RequestError", "image") and told["result"] is None
    assert events(server.get(f"/jobs/{job}/events").body)[-1][0] == "error"
    assert server.get(f"/jobs/{job}/images/0").error["message"] == f"job {job} has failed and has no pictures"


def test_too_much_work_is_no_job(server: Running) -> None:
    refused = server.post("/jobs", {**SMALL, "width": 4096, "height": 4096, "steps": 300})
    assert (refused.status, refused.error["type"], refused.error["param"]) == (413, "TooCostlyError", "steps")


def test_cancel(server: Running) -> None:
    running, waiting = server.job(LONG), server.job(SMALL)
    server.until(running, "running")
    assert server.get(f"/jobs/{waiting}").json["position"] == 1
    assert server.ask("DELETE", f"/jobs/{waiting}").json["state"] == "cancelled"
    begin = time.monotonic()
    assert server.get(f"/jobs/{running}").json["cancelling"] is False
    told = server.ask("DELETE", f"/jobs/{running}").json
    assert told["cancelling"] is (told["state"] == "running")
    ended = server.until(running, "cancelled")
    assert (ended["error"]["type"], ended["cancelling"]) == ("GenerationCancelled", False)
    assert time.monotonic() - begin < 5
    assert server.ask("DELETE", f"/jobs/{running}").status == 200  # once more changes nothing
    for late in ("interrupt", "skip"):
        refused = server.post(f"/jobs/{running}/{late}", None)
        assert refused.status == 409 and refused.error["message"] == f"job {running} was cancelled already"
    assert server.get(f"/jobs/{running}/images/0").error["message"].endswith("was cancelled and has no pictures")
    assert server.generate().status == 200


def test_who_hangs_up_cancels(server: Running) -> None:
    connection = server.connect()
    connection.request("POST", "/generate", json.dumps(LONG), {"Content-Type": "application/json"})
    wait(lambda: server.get("/health").json["running"])
    connection.close()
    server.idle()


def jobs_by_state(server: Running) -> dict[str, float]:
    """What the metrics count, for the states that there were."""
    lines = (line.rsplit(" ", 1) for line in server.get("/metrics").body.decode().splitlines())
    counted = {name.split('"')[1]: float(value) for name, value in lines if name.startswith("lwe_jobs_total{")}
    return {state: count for state, count in counted.items() if count}


def test_a_deadline_while_running(server: Running) -> None:
    before = jobs_by_state(server)
    answer = server.post("/generate", LONG, X_Request_Timeout="0.5")
    assert answer.status == 504 and answer.error["type"] == "DeadlineError"
    assert answer.error["message"].endswith("took longer than it was given: the header X-Request-Timeout has 0.5 s")
    assert jobs_by_state(server) == {**before, "timed_out": before.get("timed_out", 0) + 1}
    server.idle()


def test_a_deadline_while_waiting(server: Running) -> None:
    running = server.job(LONG)
    answer = server.post("/generate", SMALL, X_Request_Timeout="0.3")
    assert answer.status == 504 and "waited" in answer.error["message"]
    server.ask("DELETE", f"/jobs/{running}")
    server.idle()


def test_a_deadline_says_which_bound_it_was(tmp_path: Path) -> None:
    """A header asks for no more than the setting gives, and the answer says so."""
    with service(tmp_path, "--set", "job_seconds=0.5") as running:
        running.ready()
        plain, more, less = (
            running.post("/generate", LONG, **({"X_Request_Timeout": text} if text else {}))
            for text in ("", "900", "0.2")
        )
        assert {plain.status, more.status, less.status} == {504}
        assert plain.error["message"].endswith("given: the setting job_seconds is 0.5 s")
        assert "job_seconds is 0.5 s; the header X-Request-Timeout asked for 900 s" in more.error["message"]
        assert less.error["message"].endswith("given: the header X-Request-Timeout has 0.2 s")
        assert jobs_by_state(running) == {"failed": 2, "timed_out": 1}


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan", "inf"])
def test_a_deadline_that_is_none(server: Running, seconds: str) -> None:
    assert server.post("/generate", SMALL, X_Request_Timeout=seconds).status == 422


def test_a_full_queue(server: Running) -> None:
    running = server.job(LONG)
    server.until(running, "running")
    waiting = [server.job(SMALL) for _ in range(3)]
    answer = server.generate()
    assert answer.status == 429 and answer.error["type"] == "QueueFullError"
    assert int(answer.headers["retry-after"]) >= 1
    assert server.get("/readyz").status == 503
    for job in (*waiting, running):
        server.ask("DELETE", f"/jobs/{job}")
    server.idle()


def test_one_job_that_waits_is_told_as_one(tmp_path: Path) -> None:
    with service(tmp_path, "--set", "queue_max=1") as running:
        first = running.ready().job(LONG)
        running.until(first, "running")
        running.job(SMALL)
        refused = running.generate().error["message"]
        assert refused.startswith("1 job waits already (setting queue_max); try again in about"), refused


def test_many_at_once_never_overfill_the_queue(server: Running) -> None:
    running = server.job(LONG)
    server.until(running, "running")
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(server.post("/jobs", SMALL))) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status for answer in answers) == [202] * 3 + [429] * 37
    server.ask("DELETE", f"/jobs/{running}")
    accepted = [answer.json["id"] for answer in answers if answer.status == 202]
    done = [server.until(job, "succeeded")["id"] for job in accepted]
    files = {server.get(f"/jobs/{job}/images/0").status for job in done}
    assert files == {200}


def test_an_idempotency_key(server: Running) -> None:
    first, again = (server.post("/generate", {**SMALL, "seed": -1}, Idempotency_Key="k1").json for _ in range(2))
    assert first == again and first["seeds"][0] >= 0
    assert server.post("/jobs", {**SMALL, "seed": -1}, Idempotency_Key="k1").json["id"] == first["id"]
    other = server.post("/generate", SMALL, Idempotency_Key="k1")
    assert other.status == 409 and other.error["type"] == "ConflictError"


def test_a_failed_job_is_done_anew_for_its_key(server: Running) -> None:
    late = server.post("/generate", {**LONG, "steps": 999}, Idempotency_Key="k2", X_Request_Timeout="0.2")
    assert late.status == 504
    again = server.post("/jobs", {**LONG, "steps": 999}, Idempotency_Key="k2").json
    assert again["state"] in ("queued", "running")
    server.ask("DELETE", f"/jobs/{again['id']}")
    server.idle()


def test_a_job_that_is_being_cancelled_is_done_anew_for_its_key(server: Running) -> None:
    """Another that waits for it would be told that it was cancelled by its caller, who cancelled nothing."""
    first = server.post("/jobs", {**LONG, "steps": 999}, Idempotency_Key="k3").json["id"]
    server.until(first, "running")
    server.ask("DELETE", f"/jobs/{first}")
    again = server.post("/jobs", SMALL, Idempotency_Key="k3")
    assert again.status == 202 and again.json["id"] != first
    server.until(again.json["id"], "succeeded")
    server.idle()


def test_a_job_whose_pictures_are_gone_is_done_anew_for_its_key(tmp_path: Path) -> None:
    with service(tmp_path, "--set", "keep_results_seconds=1") as running:
        asked = running.ready().post("/generate", SMALL, Idempotency_Key="gone")
        wait(lambda: running.get(f"/jobs/{asked.headers['x-job-id']}/images/0").status == 410)
        again = running.post("/generate", SMALL, Idempotency_Key="gone")
        assert again.status == 200 and again.json["images"] == asked.json["images"]
        assert again.headers["x-job-id"] != asked.headers["x-job-id"]


def test_nothing_of_a_request_outlives_it(server: Running) -> None:
    plain = picture(server.generate(subseed=0).json)
    changed = server.generate(
        subseed=0,
        loras=["hat:1.5"],
        sampler="Heun",
        cfg_scale=2.0,
        negative_prompt="hat",
        adetailer=True,
        emphasis="None",
    )
    assert changed.status == 200, changed.body
    assert picture(changed.json) != plain
    assert picture(server.generate(subseed=0).json) == plain


def test_a_name_of_a_task_stands_for_one_at_a_time(server: Running) -> None:
    """Else its progress and its pictures were those of either."""
    body = {**LONG, "force_task_id": "task(mine)"}
    connection = server.connect()
    connection.request("POST", "/sdapi/v1/txt2img", json.dumps(body), {"Content-Type": "application/json"})
    asked = {"id_task": "task(mine)"}
    wait(lambda: server.post("/internal/progress", asked).json["active"])
    for headers in ({}, {"Idempotency_Key": "second"}):
        second = server.post("/sdapi/v1/txt2img", {**body, "steps": 1}, **headers)
        assert (second.status, second.error["param"]) == (409, "force_task_id"), second.body
    assert server.get("/health").json["waiting"] == 0 and server.post("/internal/progress", asked).json["active"]
    connection.close()
    server.idle()
    assert server.post("/sdapi/v1/txt2img", {**SMALL, "force_task_id": "task(mine)"}).status == 200


def test_the_front_answers_while_the_worker_computes(server: Running) -> None:
    job = server.job(LONG)
    server.until(job, "running")
    took = []
    for _ in range(50):
        begin = time.perf_counter()
        assert server.get("/livez").body == b"ok"
        took.append(time.perf_counter() - begin)
    server.ask("DELETE", f"/jobs/{job}")
    server.idle()
    assert sorted(took)[-3] < 0.5, "the machine of a test may be busy with others; the front alone takes 2 ms"


def test_a_connection_that_is_kept_answers_at_once(server: Running) -> None:
    connection, took = server.connect(), []
    for _ in range(40):
        begin = time.perf_counter()
        connection.request("GET", "/livez")
        assert connection.getresponse().read() == b"ok"
        took.append(time.perf_counter() - begin)
    connection.close()
    assert sorted(took)[10] < 0.03, "a piece of the answer waited for the receipt of another, which takes 40 ms"


def test_facts(server: Running) -> None:
    told = server.get("/capabilities").json
    assert "Euler" in told["samplers"] and "Simple" in told["schedulers"] and "hat" in told["loras"]
    assert {"4x_tiny"} <= set(told["upscalers"]) and told["limits"]["queue_max"] == 3
    assert told["request"]["properties"]["steps"]["maximum"] == 1000
    status = server.get("/models/status").json
    assert (status["state"], status["model"], status["demonstration"]) == ("ready", "tiny", True)
    assert status["memory"]["device_bytes"] > 0 and status["memory"]["host_bytes"] > 0
    settings = server.get("/config").json
    assert settings["memory"]["storage_dtype"] == "nf4" and settings["in_effect"]["storage_dtype"] == "fp32"
    assert settings["request"]["steps"] == 50 and settings["service"]["queue_max"] == 3
    assert "/" not in json.dumps(settings["files"])
    assert server.get("/").json["name"] == "lightweight-engine"


@pytest.mark.parametrize(("method", "path"), [("POST", "/generate/"), ("GET", "/jobs/"), ("GET", "/sdapi/v1/options/")])
def test_an_address_with_a_slash_too_many_is_none(server: Running, method: str, path: str) -> None:
    answer = server.ask(method, path, SMALL if method == "POST" else None)
    assert answer.status == 404 and "no such address" in answer.error["message"] and "location" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "name", "hint"),
    [
        ("POST", "/jobs?preview_evry=1", "preview_evry", "did you mean 'preview_every'?"),
        ("POST", "/jobs?preview_every=1&seed=2", "seed", "it takes preview_every"),
        ("POST", "/generate?steps=5", "steps", "it takes none; fields of a request go into its body"),
        ("POST", "/upscale?by=2", "by", "it takes none"),
        ("GET", "/jobs/x?wait=1", "wait", "it takes none"),
        ("GET", "/jobs?limit=many", "limit", "'many' is no whole number; give 1 to 1,000"),
        ("GET", "/jobs?limit=0", "limit", "0 is too small; give 1 to 1,000"),
        ("GET", "/jobs/x/images/first", "n", "'first' is no whole number; give one"),
        ("GET", "/models?kind=loras", "kind", "it takes none"),
    ],
)
def test_parameters_that_there_are_not(server: Running, method: str, path: str, name: str, hint: str) -> None:
    answer = server.ask(method, path, SMALL if method == "POST" else None)
    assert (answer.status, answer.error["param"]) == (422, name)
    assert answer.error["message"].startswith(f"{name}: ") and hint in answer.error["message"]
    assert server.get("/livez?probe=1").status == 200, "probes send what they like"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
def test_a_monitor_may_ask_for_the_head_alone(server: Running, path: str) -> None:
    head, whole = server.ask("HEAD", path), server.get(path)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.body))


def test_metrics(server: Running) -> None:
    server.generate()
    server.generate(width=5)
    assert server.generate(image=half_a_picture()).status == 422
    text = server.get("/metrics").body.decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['lwe_jobs_total{state="succeeded"}']) >= 1
    assert float(lines['lwe_jobs_total{state="refused"}']) >= 1
    assert float(lines['lwe_errors_total{type="RequestError"}']) >= 1
    assert float(lines["lwe_ready"]) == 1 and float(lines["lwe_worker_resident_bytes"]) > 1e8
    assert any(line.startswith('lwe_stage_seconds_count{stage="sample"}') for line in lines)
    assert any('route="/generate",status="200"' in line for line in lines)


def test_the_description(server: Running) -> None:
    told = server.get("/openapi.json").json
    assert {"/generate", "/jobs", "/jobs/{job_id}", "/jobs/{job_id}/events", "/jobs/{job_id}/images/{n}"} <= set(
        told["paths"]
    )
    schemas = told["components"]["schemas"]
    request = schemas["GenerationRequest"]
    assert set(request["properties"]) == set(GenerationRequest.model_fields)
    named = {part.split('"')[0] for part in json.dumps(told).split("#/components/schemas/")[1:]}
    assert named <= set(schemas)
    body = told["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    assert GenerationRequest(**body["example"])
    assert all("422" in told["paths"][path]["post"]["responses"] for path in ("/generate", "/jobs"))
    headers = {row["name"] for row in told["paths"]["/generate"]["post"]["parameters"]}
    assert headers == {"X-Request-ID", "X-Request-Timeout", "Idempotency-Key"}
    answers = [told["paths"]["/generate"]["post"], told["paths"]["/jobs/{job_id}/images/{n}"]["get"]]
    sent = {"X-Job-ID", "X-Seed", "X-Warnings", "X-Warnings-Text"}
    assert all(set(each["responses"]["200"]["headers"]) == sent for each in answers)
    assert [row["name"] for row in told["paths"]["/livez"]["get"]["parameters"]] == ["X-Request-ID"]
    forges = [f"/sdapi/v1/{name}" for name in ("txt2img", "img2img", "extra-single-image", "extra-batch-images")]
    for path in ("/generate", "/upscale", *forges):
        assert {"424", "499", "500", "501", "503", "504"} <= set(told["paths"][path]["post"]["responses"]), path
    assert all("500" in each["responses"] for row in told["paths"].values() for each in row.values())
    assert "securitySchemes" not in told["components"], "no key is needed here"


def test_a_slow_body_does_not_hold_others(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        head = ("POST /generate HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 99")
        slow.sendall("\r\n".join((*head, "", "{")).encode())
        assert server.generate().status == 200


def test_logs_are_lines_of_json_with_the_ids(server: Running) -> None:
    answer = server.post("/generate", {**SMALL, "prompt": "a secret plan"}, X_Request_ID="mine-1")
    assert answer.headers["x-request-id"] == "mine-1"
    wait(lambda: any('"answered"' in line and '"mine-1"' in line for line in server.lines))
    rows = [json.loads(line) for line in server.lines]
    mine = [row for row in rows if row.get("request_id") == "mine-1"]
    assert {"accepted", "finished", "answered"} <= {row["message"] for row in mine}
    assert next(row for row in mine if row["message"] == "finished")["job"] == answer.json["id"]
    assert not any("a secret plan" in line for line in server.lines)
