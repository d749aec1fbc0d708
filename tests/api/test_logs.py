"""What the log has of a request that failed: why, with which status, and where it came from; and never a prompt."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from running_service import LONG, SMALL, Running, wait

from lightweight_engine.apps.server.faults import Fault
from lightweight_engine.errors import AdapterError, EngineError, RequestError
from lightweight_engine.extensions.detailer_args import read_args
from lightweight_engine.request import GenerationRequest

SECRET = "a secret plan"


def row(running: Running, message: str, **of: Any) -> dict[str, Any]:
    """The line of the log with a message, and these values in it."""

    def look() -> dict[str, Any] | None:
        rows = (json.loads(line) for line in list(running.lines) if f'"{message}"' in line)
        return next((each for each in rows if of.items() <= each.items()), None)

    return wait(look)


def sent(running: Running, method: str, path: str, body: Any = None, **headers: str) -> tuple[Any, dict[str, Any]]:
    """An answer, and the line that the log has of it."""
    asked = secrets.token_hex(4)
    answer = running.ask(method, path, body, {**headers, "X-Request-ID": asked})
    return answer, row(running, "answered", request_id=asked)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers"),
    [
        ("POST", "/generate", {**SMALL, "steps": 0}, {}),
        ("POST", "/generate", {**SMALL, "loras": ["haat"]}, {}),
        ("POST", "/generate", {**SMALL, "lora_urls": ["https://10.0.0.1/a.safetensors"]}, {}),
        ("POST", "/jobs", b"{", {}),
        ("POST", "/jobs", SMALL, {"Content-Type": "text/plain"}),
        ("POST", "/sdapi/v1/txt2img", {"sampler_name": "Eulr"}, {}),
        ("GET", "/jobs?limit=0", None, {}),
        ("GET", "/jobs/none", None, {}),
        ("PATCH", "/generate", None, {}),
        ("GET", "/nowhere", None, {}),
        ("GET", "/config", None, {"Host": "evil.example"}),
        ("GET", "/health", None, {"Host": "evil.example"}),
        ("GET", "/config", None, {"Origin": "https://evil.example"}),
    ],
    ids=str,
)
def test_the_log_has_why_a_request_was_refused(
    server: Running, method: str, path: str, body: Any, headers: dict[str, str]
) -> None:
    answer, line = sent(server, method, path, body, **headers)
    told = answer.error
    assert 400 <= answer.status < 500 and (line["status"], line["error"]) == (answer.status, told["type"])
    assert line["reason"] and told["message"].startswith(line["reason"][:20]) and line["client"] == "127.0.0.1"


def test_the_client_is_who_connected_and_not_who_a_header_names(server: Running) -> None:
    answer, line = sent(
        server, "POST", "/generate", SMALL, **{"X-Forwarded-For": "9.9.9.9", "Forwarded": "for=9.9.9.9"}
    )
    assert (answer.status, line["status"], line["client"]) == (200, 200, "127.0.0.1")
    assert "reason" not in line and "error" not in line
    done = row(server, "finished", job=answer.json["id"])
    assert (done["state"], done["client"]) == ("succeeded", "127.0.0.1") and "reason" not in done
    assert not any("9.9.9.9" in text for text in server.lines)


def test_the_log_has_why_a_job_failed(server: Running) -> None:
    """Also of one that nobody waits for."""
    job = server.job({**LONG, "steps": 999}, X_Request_Timeout="0.2")
    told = server.until(job, "failed")["error"]
    line = row(server, "finished", job=job)
    assert (line["status"], line["error"], line["client"]) == (504, "DeadlineError", "127.0.0.1")
    assert line["reason"] == told["message"] and "X-Request-Timeout" in line["reason"]
    server.idle()


def test_the_log_has_why_what_is_no_request_was_refused(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as odd:
        odd.sendall(b"what is this\r\n\r\n")
        assert odd.recv(100).startswith(b"HTTP/1.1 400")
    line = row(server, "broken off", status=400)
    assert line["error"] == "MalformedHeadError" and "no HTTP" in line["reason"] and line["client"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        ("/generate", {"prompt": [SECRET]}, "prompt: …"),
        ("/generate", {"prompt": SECRET, "steps": 0}, "steps: 0 is too small; give 1 to 1,000"),
        ("/generate", {"steps": 0, "hr_prompt": {SECRET: 1}}, "steps: 0 is too small; give 1 to 1,000; hr_prompt: …"),
        ("/generate", {"prompt": f"<lora:{SECRET}:1>"}, "prompt: there is no LoRA called …"),
        ("/generate", {"prompt": f"<lora:{SECRET}:x>"}, "prompt: the tag …"),
        ("/generate", {"adetailer_passes": [{"ad_prompt": [SECRET]}]}, "adetailer_passes[0].ad_prompt: …"),
        ("/generate", {"adetailer_passes": [[SECRET]]}, "adetailer_passes…"),
        ("/sdapi/v1/txt2img", {"prompt": [SECRET]}, "prompt: …"),
        ("/sdapi/v1/txt2img", {"alwayson_scripts": {"ADetailer": {"args": [SECRET]}}}, "alwayson_scripts…"),
    ],
    ids=str,
)
def test_a_reason_has_nothing_of_a_prompt(server: Running, path: str, fields: dict[str, Any], reason: str) -> None:
    answer, line = sent(server, "POST", path, {**SMALL, **fields} if path == "/generate" else fields)
    assert 400 <= answer.status < 500, answer.body
    begin, dots, _ = reason.partition("…")
    assert line["reason"].startswith(begin) if dots else line["reason"] == reason
    assert not any(SECRET in text for text in server.lines)


@pytest.mark.parametrize("quote", ["", "'", '"', "'\""])
def test_whatever_a_prompt_is_quoted_by(quote: str) -> None:
    words = f"{quote}{SECRET}{quote} " * 20
    errors: list[EngineError] = []
    makers: tuple[Callable[[Any], object], ...] = (
        lambda wrong: GenerationRequest(negative_prompt=wrong),
        lambda wrong: GenerationRequest(adetailer_passes=wrong),
        lambda wrong: read_args({"ad_prompt": wrong}, "adetailer_args"),
    )
    for wrong, make in product(([words], {"a": words}, {words: 1}, [[words]], [1, words]), makers):
        try:
            make(wrong)
        except RequestError as error:
            errors.append(error)
    assert len(errors) > 8
    assert not [error for error in errors if SECRET in Fault.of(error).logged["reason"]]


def test_a_reason_is_short() -> None:
    """A caller may cause any number of lines."""
    assert len(Fault.of(AdapterError("it is too long " * 10_000)).logged["reason"]) == 1000
