"""Bodies that are short to send and long to read: each is refused in time that grows with its length alone, and
whatever takes long is done beside the loop that answers everybody.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request

from lightweight_engine import Config
from lightweight_engine.apps.server import bodies, service, tasks
from lightweight_engine.apps.server.asking import JobFailed
from lightweight_engine.apps.server.bodies import LONGEST_AT_ONCE, MOST_SEPARATORS, read_json
from lightweight_engine.apps.server.faults import LONGEST_MESSAGE, BodyTooLargeError, Fault, MalformedBodyError
from lightweight_engine.apps.server.sdapi import extras, generation, settings
from lightweight_engine.apps.server.sdapi.models import LONGEST_INFOTEXT
from lightweight_engine.apps.server.sdapi.session import Session
from lightweight_engine.apps.server.service import Service
from lightweight_engine.apps.server.sources import Sources
from lightweight_engine.apps.server.supervisor import Child
from lightweight_engine.errors import EngineError, RequestError
from lightweight_engine.request import GenerationRequest

ROOM = 64 << 20


def request(body: bytes) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", b"application/json")]}
    return Request(scope, receive)


def read(body: bytes) -> dict[str, Any]:
    return asyncio.run(read_json(request(body), ROOM))


def keys(count: int) -> bytes:
    """An object of so many keys, and the last of them once more."""
    return b"{%s}" % b",".join(b'"k%d":0' % n for n in [*range(count), count - 1])


def test_a_key_twice_among_many() -> None:
    """Were each compared with each other one, it would take minutes."""
    with pytest.raises(MalformedBodyError, match=f"the key 'k{MOST_SEPARATORS - 10}' is there twice") as caught:
        read(keys(MOST_SEPARATORS - 9))
    assert caught.value.param == f"k{MOST_SEPARATORS - 10}"


@pytest.mark.parametrize("body", [keys(200_000), b'{"a":[%s0]}' % (b"{}," * 100_000), b'{"a":%s0' % (b"[" * 200_000)])
def test_more_values_than_any_request_has(body: bytes) -> None:
    with pytest.raises(BodyTooLargeError, match=r"2\d\d,\d{3} commas and brackets, over the limit of 65,536"):
        read(body)


def test_the_longest_request_that_is_meant_is_read() -> None:
    config = Config()
    texts = dict.fromkeys(("prompt", "negative_prompt", "hr_prompt"), "a, " * (config.max_prompt_chars // 3))
    given = {**texts, "image": "data:image/png;base64," + "A" * (int(config.max_body_mib - 1) << 20)}
    assert read(json.dumps(given).encode()) == given


def test_long_integers() -> None:
    """Python reads those of 4,300 digits, in time that grows with their square."""
    assert read(b'{"seed": %s}' % (b"9" * 100))["seed"] == int("9" * 100)
    with pytest.raises(MalformedBodyError, match="a number of 4,000 digits"):
        read(b'{"seed": %s}' % (b"9" * 4000))


@pytest.mark.parametrize(("size", "beside"), [(100, False), (2 * LONGEST_AT_ONCE, True)])
def test_a_long_body_is_read_in_a_thread(monkeypatch: pytest.MonkeyPatch, size: int, beside: bool) -> None:
    threads: list[threading.Thread] = []
    whole = bodies._parsed

    def parsed(body: bytes) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return whole(body)

    monkeypatch.setattr(bodies, "_parsed", parsed)
    assert read(json.dumps({"image": "A" * size}).encode()) == {"image": "A" * size}
    assert [each is not threading.main_thread() for each in threads] == [beside]


class _Idle:
    """A process that there is none of."""

    pid = exitcode = None

    def join(self) -> None: ...

    kill = join


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, threading.Thread]]:
    """Which thread looked at what."""
    seen: dict[str, threading.Thread] = {}

    def noting(name: str) -> Any:
        def note(*args: Any, **options: Any) -> None:
            seen[name] = threading.current_thread()
            time.sleep(0.02)  # as slow folders take

        return note

    monkeypatch.setattr(tasks, "check_named", noting("names"))
    monkeypatch.setattr(Sources, "check", noting("sources"))
    monkeypatch.setattr(service, "check_folder", noting("folder"))
    yield seen


def test_folders_are_looked_at_in_threads(looked: dict[str, threading.Thread], tmp_path: Path) -> None:
    async def submit() -> None:
        ours, theirs = Pipe()
        front = Service(Config(output_dir=tmp_path), lambda: pytest.fail("no other"), Child(_Idle(), ours))  # type: ignore[arg-type]
        front.supervisor.facts, front.supervisor.state = {"demonstration": True}, "ready"
        job = await front.submit(GenerationRequest(), request_id="r", key="k", save=True)
        assert await front.submit(GenerationRequest(), request_id="r", key="k", save=True) is job
        theirs.close()
        await front.drain()

    asyncio.run(submit())
    assert looked.keys() == {"names", "sources", "folder"}
    assert threading.main_thread() not in looked.values()


def post(router: APIRouter, path: str, body: dict[str, Any]) -> Any:
    routes = [each for each in router.routes if isinstance(each, APIRoute) and "POST" in each.methods]
    (route,) = (each for each in routes if each.path == f"/sdapi/v1/{path}")
    return route.endpoint(request(json.dumps(body).encode()))


def session_of(config: Config) -> Session:
    front = SimpleNamespace(config=config, max_body=ROOM, supervisor=SimpleNamespace(facts={"demonstration": True}))
    return Session(front)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "name", "path"),
    [(generation, "translate", "txt2img"), (extras, "upscale_request", "extra-single-image")],
)
def test_long_requests_are_translated_in_threads(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, path: str
) -> None:
    threads: list[threading.Thread] = []

    def translated(*args: Any) -> None:
        threads.append(threading.current_thread())
        raise RequestError("as far as here", field=None)

    monkeypatch.setattr(module, name, translated)
    routes = {generation: generation.generation_routes, extras: extras.extras_routes}[module]
    with pytest.raises(JobFailed, match="as far as here"):
        asyncio.run(post(routes(session_of(Config())), path, {"image": "A"}))
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


def test_options_are_tried_in_threads_and_none_is_lost(looked: dict[str, threading.Thread]) -> None:
    """Each caller's are added to those of the one before."""

    async def change() -> Session:
        session = session_of(Config())
        router = settings.settings_routes(session)
        given: list[dict[str, Any]] = [{"eta_ancestral": 0.5}, {"s_noise": 0.5}, {"s_churn": 0.5}]
        await asyncio.gather(*(post(router, "options", each) for each in given))
        return session

    options = asyncio.run(change()).options
    assert (options.eta_ancestral, options.s_noise, options.s_churn) == (0.5, 0.5, 0.5)
    assert looked["names"] is not threading.main_thread()


def test_texts_of_forges_api_are_bounded() -> None:
    with pytest.raises(JobFailed, match=f"infotext: give at most {LONGEST_INFOTEXT:,} characters"):
        router = generation.generation_routes(session_of(Config()))
        asyncio.run(post(router, "txt2img", {"infotext": "a" * (LONGEST_INFOTEXT + 1)}))
    with pytest.raises(JobFailed, match="prompt: .* characters are over the limit of 20,000"):
        body = {"prompt": "<lora:a:1>" * 2001, "disable_extra_networks": True}
        asyncio.run(post(router, "txt2img", body))


def test_thousands_of_wrong_values_are_told_as_some() -> None:
    with pytest.raises(EngineError, match=r"k19: there is no such field; .*; and 980 more$"):
        GenerationRequest(**{f"k{n}": 0 for n in range(1000)})


def test_a_long_name_is_not_told_whole() -> None:
    with pytest.raises(RequestError) as caught:
        GenerationRequest(**{"n" * 10**6: 0})
    fault = Fault.of(caught.value)
    assert fault.message.startswith("nnn") and len(fault.message) == LONGEST_MESSAGE
    assert fault.param == "n" * 255
    with pytest.raises(RequestError, match=r"^sampler: 'n{79} is not known; choose one of"):
        tasks.check(GenerationRequest(sampler="n" * 10**6), Config())


def test_a_long_text_in_the_place_of_a_name_is_compared_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("difflib.get_close_matches", lambda *args, **options: pytest.fail("it is compared"))
    with pytest.raises(EngineError, match="^sampler: "):
        tasks.check(GenerationRequest(sampler="Euler" * 1000), Config())
