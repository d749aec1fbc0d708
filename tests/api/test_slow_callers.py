"""Callers that send slowly, nothing, or no HTTP at all: each is broken off in time, and nobody else waits for them."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_service import SMALL, Answer, Running, read, service, wait

HEAD = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CROWD = 100


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, _same_environment: None) -> Iterator[Running]:
    times = ("--set", "header_seconds=1", "--set", "body_seconds=1")
    with service(tmp_path_factory.mktemp("slow"), *times) as made:
        yield made.ready()
        assert made.generate().status == 200
        assert not [line for line in made.lines if '"level": "error"' in line]


def dial(running: Running) -> http.client.HTTPConnection:
    connection = running.connect(10)
    connection.connect()
    return connection


def answer(connection: http.client.HTTPConnection) -> Answer:
    """The answer to what was sent by hand."""
    connection._HTTPConnection__state = "Request-sent"  # type: ignore[attr-defined]
    return read(connection)


def ended(connection: http.client.HTTPConnection, data: bytes = b"") -> bool:
    """Send, if that is possible still; whether the other side has hung up."""
    try:
        connection.sock.sendall(data)
        connection.sock.settimeout(0)
        return connection.sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_crowd_that_sends_a_byte_now_and_then(running: Running) -> None:
    crowd = [dial(running) for _ in range(CROWD)]
    begin, looks = time.monotonic(), []
    for byte in HEAD[:12]:
        for connection in crowd:
            ended(connection, bytes([byte]))
        look = time.monotonic()
        assert running.get("/livez").status == 200
        looks.append(time.monotonic() - look)
        time.sleep(0.05)
    for connection in crowd:
        connection.sock.settimeout(10)
    late = [answer(connection) for connection in crowd]
    assert {each.status for each in late} == {408} and late[0].error["type"] == "HeadTimeoutError"
    assert "header_seconds" in late[0].error["message"] and late[0].headers["connection"] == "close"
    assert 0.9 < time.monotonic() - begin < 6
    assert sorted(looks)[len(looks) // 2] < 0.5
    assert running.generate().status == 200


def test_who_says_nothing_is_hung_up_on(running: Running) -> None:
    connection = dial(running)
    connection.sock.settimeout(5)
    assert connection.sock.recv(1) == b""


def test_a_body_that_trickles(running: Running) -> None:
    connection = dial(running)
    connection.sock.sendall(POST + b"Content-Length: 1000\r\n\r\n")
    begin = time.monotonic()
    while not select(connection, 0.1):
        connection.sock.sendall(b" ")
    late = answer(connection)
    assert late.status == 408 and late.error["type"] == "BodyTimeoutError", late.body
    assert "body_seconds" in late.error["message"] and 0.9 < time.monotonic() - begin < 4


def test_bodies_share_the_room_that_there_is(tmp_path: Path) -> None:
    mib, half = 1 << 20, 1 << 19
    with service(tmp_path, "--set", "queue_max=1", "--set", "max_body_mib=1") as running:
        running.ready()
        crowd = [dial(running) for _ in range(4)]
        for connection in crowd:  # each says that it sends as much as it may, and holds the last byte back
            connection.sock.sendall(POST + f"Content-Length: {mib}\r\n\r\n".encode() + b" " * (mib - 1))
        full = [connection for connection in crowd if select(connection, 2)]
        assert len(full) == 1, "there is room for three"
        refused = answer(full[0])
        assert refused.status == 503 and int(refused.headers["retry-after"]) > 0
        assert running.get("/livez").status == 200
        for connection in crowd:
            connection.close()
        assert wait(lambda: running.generate().status == 200)
        large = {**SMALL, "negative_prompt": "", "image": "data:image/png;base64," + "A" * half}
        assert running.post("/generate", large).status == 422  # read to its end


@pytest.mark.parametrize("path", ["/nothing", "/livez"])
def test_a_body_that_nobody_reads(running: Running, path: str) -> None:
    connection = dial(running)
    connection.sock.sendall(POST.replace(b"/generate", path.encode()) + b"Content-Length: 1000\r\n\r\n")
    assert answer(connection).status in (404, 405)
    begin = time.monotonic()
    while not ended(connection, b" "):
        assert time.monotonic() - begin < 5
        time.sleep(0.1)


def test_the_second_request_of_a_connection(running: Running) -> None:
    connection = dial(running)
    for _ in range(2):
        connection.request("GET", "/livez")
        assert read(connection).status == 200
        time.sleep(1.2)  # between requests a connection may rest longer than a head may take
    connection.sock.sendall(HEAD)
    assert answer(connection).status == 408


def test_slow_is_not_late(running: Running) -> None:
    connection, body = dial(running), json.dumps(SMALL).encode()
    head = POST + f"Content-Length: {len(body)}\r\n\r\n".encode()
    for piece in (head[:50], head[50:], body[:20], body[20:]):
        connection.sock.sendall(piece)
        time.sleep(0.35)
    assert answer(connection).status == 200


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x00\xa5\x01\x00\x00", b"HELLO\r\n\r\n", HEAD + b"X: " + b"a" * 100_000, HEAD + b"Host: b\r\n\r\n"],
    ids=["TLS", "another language", "a long head", "two hosts"],
)
def test_what_is_no_http(running: Running, sent: bytes) -> None:
    connection = dial(running)
    connection.sock.sendall(sent + b"\r\n")
    refused = answer(connection)
    assert refused.status == 400 and refused.error["type"] == "MalformedHeadError"
    assert refused.headers["x-content-type-options"] == "nosniff"


def test_a_body_that_is_no_chunk(running: Running) -> None:
    connection = dial(running)
    connection.sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    assert answer(connection).status == 400


def select(connection: http.client.HTTPConnection, seconds: float) -> bool:
    """Whether something came within a time."""
    connection.sock.settimeout(seconds)
    try:
        return bool(connection.sock.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        connection.sock.settimeout(10)
