"""The guarded GET, against a real server on the loopback interface that only the allow-list opens."""

from __future__ import annotations

import secrets
import socket
import threading
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lightweight_engine.backend import net
from lightweight_engine.backend.addresses import is_public
from lightweight_engine.backend.net import Access, Limits, Resume, get
from lightweight_engine.backend.urls import check_url
from lightweight_engine.errors import (
    BlockedURLError,
    DownloadBrokenError,
    DownloadError,
    DownloadTimeoutError,
    DownloadTooLargeError,
    InvalidURLError,
    WrongContentError,
)

BODY = bytes(range(256)) * 1000


class Handler(BaseHTTPRequestHandler):
    """One behaviour per path."""

    protocol_version = "HTTP/1.1"
    seen: list[str]
    sent: list[str | None]

    def do_GET(self) -> None:
        type(self).seen.append(self.path)
        type(self).sent.append(self.headers.get("Authorization"))
        getattr(self, "do_" + self.path.strip("/").split("/")[0].split("?")[0])()

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers and "Transfer_Encoding" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_file(self) -> None:
        self._send(200, BODY)

    def do_ranged(self) -> None:
        """Ranges of BODY, for those who know its mark."""
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        mark = '"other"' if self.path.endswith("changed") else '"mark"'
        if start >= len(BODY):
            self._send(416)
        elif start and self.headers.get("If-Range") in (mark, None):
            self._send(206, BODY[start:], ETag=mark, Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        else:
            self._send(200, BODY, ETag=mark)

    def do_echo(self) -> None:
        """Repeats what it was sent wherever a server can."""
        secret = f"{self.headers.get('Authorization')} {self.path}"
        self.send_response(403, f"no, {secret}")
        self.send_header("WWW-Authenticate", secret)
        self.end_headers()

    def do_garbage(self) -> None:
        self.wfile.write(f"{self.headers.get('Authorization')} is no answer\r\n\r\n".encode())
        self.close_connection = True

    def do_chunked(self) -> None:
        self._send(200, b"5\r\nhello\r\n0\r\n\r\n", Transfer_Encoding="chunked")

    def do_short(self) -> None:
        self._send(200, b"half", Content_Length="8")
        self.close_connection = True

    def do_endless(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            pass

    def do_drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        try:
            for _ in range(1000):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    def do_dripheaders(self) -> None:
        self.close_connection = True
        try:
            for letter in b"HTTP/1.1 200 OK\r\n" * 100:
                self.wfile.write(bytes([letter]))
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    def do_gzip(self) -> None:
        self._send(200, b"x", Content_Encoding="gzip")

    def do_unasked(self) -> None:
        self._send(206, b"x", Content_Range="bytes 5-5/10")

    def do_gone(self) -> None:
        self._send(404, b"no")

    def do_hop(self) -> None:
        count = int(self.path.rsplit("/", 1)[1])
        self._send(302, Location=f"/hop/{count - 1}" if count else "/file")

    def do_to(self) -> None:
        self._send(302, Location=self.path.split("?", 1)[1])

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[tuple[str, type[Handler]]]:
    handler = type("Fresh", (Handler,), {"seen": [], "sent": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients that leave early are what is tested here
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server() -> Iterator[str]:
    with serving() as (name, _):
        yield name


def read(
    url: str,
    allow: Collection[str] = (),
    tokens: Mapping[str, str] | None = None,
    token: str | None = None,
    **limits: Any,
) -> bytes:
    with get(url, bounds(**limits), Access(allow, tokens or {}), token=token) as response:
        return b"".join(response.chunks())


def bounds(**limits: Any) -> Limits:
    return Limits(**{"max_bytes": 1 << 20, "timeout": 5.0, **limits})


def test_a_file_comes_whole(server: str) -> None:
    assert read(f"http://{server}/file", allow=[server]) == BODY
    with get(f"http://{server}/file", Limits(len(BODY)), Access([server])) as response:
        assert response.size == len(BODY)


def test_a_chunked_body_is_read(server: str) -> None:
    assert read(f"http://{server}/chunked", allow=[server]) == b"hello"


def test_redirects_are_followed_five_times(server: str) -> None:
    assert read(f"http://{server}/hop/4", allow=[server]) == BODY
    with pytest.raises(DownloadError, match="more than 5 times"):
        read(f"http://{server}/hop/5", allow=[server])


def test_the_loopback_is_refused_without_an_entry(server: str) -> None:
    port = server.split(":")[1]
    for url in (f"http://{server}/file", f"http://localhost:{port}/file", f"https://localhost:{port}/file"):
        with pytest.raises(BlockedURLError, match="allow_hosts"):
            read(url)
    hosts = ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "0", "127.1", "2130706433", "0x7f000001", "017700000001")
    for host in (*hosts, "[::ffff:127.0.0.1]", "169.254.169.254", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "localhost."):
        with pytest.raises(DownloadError, match="private network|cannot be found"):
            read(f"https://{host}/file")


def test_a_neighbouring_port_stays_refused(server: str) -> None:
    with serving() as (other, handler):
        for url in (f"http://{other}/file", *(f"http://{server}/to?{s}://{other}/file" for s in ("http", "https"))):
            with pytest.raises(BlockedURLError, match="allow_hosts"):
                read(url, allow=[server])
        with pytest.raises(BlockedURLError, match="private network"):
            read(f"http://{server}/to?https://127.0.0.1/file", allow=[server])
        assert handler.seen == []
        assert read(f"http://{server}/to?http://{other}/file", allow=[server, other]) == BODY


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x", "//"])
def test_a_redirect_to_another_scheme_is_refused(server: str, target: str) -> None:
    with pytest.raises(DownloadError):
        read(f"http://{server}/to?{target}", allow=[server])


@pytest.mark.parametrize(
    ("path", "words", "kind"),
    [
        ("gone", "404 Not Found; check", DownloadError),
        ("short", "4 of 8", DownloadBrokenError),
        ("gzip", "encoding", WrongContentError),
        ("garbage", "BadStatusLine", DownloadError),
    ],
)
def test_bad_answers(server: str, path: str, words: str, kind: type[DownloadError]) -> None:
    with pytest.raises(DownloadError, match=words) as caught:
        read(f"http://{server}/{path}", allow=[server])
    assert type(caught.value) is kind


def test_the_byte_cap(server: str) -> None:
    with pytest.raises(DownloadTooLargeError, match="more than the 10"):
        read(f"http://{server}/file", allow=[server], max_bytes=10)
    with pytest.raises(DownloadTooLargeError, match="more than the 100,000"):
        read(f"http://{server}/endless", allow=[server], max_bytes=100_000)


def test_a_trickle_is_too_slow(server: str) -> None:
    with pytest.raises(DownloadTimeoutError, match="less than 1,000 bytes a second"):
        read(f"http://{server}/drip", allow=[server], timeout=0.2, min_speed=1000)
    assert read(f"http://{server}/file", allow=[server], timeout=0.2, min_speed=1000) == BODY


class TestResume:
    def parts(self, server: str, resume: Resume, path: str = "ranged") -> tuple[int, bytes]:
        with get(f"http://{server}/{path}", bounds(), Access([server]), resume=resume) as response:
            assert response.size == len(BODY)
            return response.start, b"".join(response.chunks())

    def test_the_rest_comes(self, server: str) -> None:
        for resume in (Resume(1000, len(BODY), '"mark"'), Resume(1000, None, '"mark"'), Resume(1000, len(BODY))):
            assert self.parts(server, resume) == (1000, BODY[1000:])

    @pytest.mark.parametrize(
        ("resume", "path"),
        [
            (Resume(1000, len(BODY), '"mark"'), "ranged/changed"),  # another file now
            (Resume(1000, len(BODY) + 1), "ranged"),  # of another size
            (Resume(len(BODY) + 5, None, '"mark"'), "ranged"),  # shorter than what is here
            (Resume(1000, len(BODY), '"mark"'), "file"),  # no ranges
        ],
    )
    def test_the_whole_comes_where_the_rest_would_not_fit(self, server: str, resume: Resume, path: str) -> None:
        assert self.parts(server, resume, path) == (0, BODY)

    def test_a_range_that_nobody_asked_for_is_refused(self, server: str) -> None:
        with pytest.raises(DownloadError, match="206"):
            read(f"http://{server}/unasked", allow=[server])


class TestTokens:
    def test_a_token_goes_to_its_own_host(self) -> None:
        with serving() as (name, handler), serving() as (other, second):
            tokens = {name: "canary"}
            read(f"http://{name}/file", allow=[name, other], tokens=tokens)
            read(f"http://{other}/file", allow=[name, other], tokens=tokens)
            read(f"http://{name}/hop/0", allow=[name, other], tokens=tokens)
            read(f"http://{name}/to?http://{other}/file", allow=[name, other], tokens=tokens | {other: "second"})
            read(f"http://{other}/to?http://{name}/file", allow=[name, other], tokens=tokens)
            read(f"http://{name}/to?http://{other}/file", allow=[name, other], token="own")
            assert handler.sent == [*["Bearer canary"] * 4, None, "Bearer own"]
            assert second.sent == [None] * 4

    def test_no_message_tells_it(self, server: str, caplog: pytest.LogCaptureFixture) -> None:
        secret = secrets.token_hex()
        for path in ("echo", "garbage", "gone", "short", "endless"):
            with pytest.raises(DownloadError) as caught:
                read(f"http://{server}/{path}?q={secret}", allow=[server], tokens={server: secret})
            assert secret not in "".join(traceback.format_exception(caught.value)) + caplog.text
        assert secret not in repr(Access(tokens={"a": secret})) + repr(check_url(f"https://a/{secret}"))


@pytest.mark.parametrize("path", ["drip", "dripheaders"])
def test_the_time_cap_holds_against_a_trickle(server: str, path: str) -> None:
    began = time.monotonic()
    with pytest.raises(DownloadTimeoutError, match=r"longer than 0\.4 s"):
        read(f"http://{server}/{path}", allow=[server], max_seconds=0.4)
    assert time.monotonic() - began < 3


def test_the_timeout_of_one_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        name = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DownloadTimeoutError, match="timed out"):
            read(f"http://{name}/", allow=[name], timeout=0.2)


def test_no_one_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        name = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(DownloadError, match="could not be fetched"):
        read(f"http://{name}/", allow=[name])


def test_errors_of_the_reader_pass_through(server: str) -> None:
    with pytest.raises(OSError, match="disk full"), get(f"http://{server}/file", bounds(), Access([server])):
        raise OSError("disk full")


def test_the_address_that_was_checked_is_the_one_connected_to(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that answers with a public and a private address is never followed to the private one."""
    tried: list[str] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        tried.append(address[0])
        raise ConnectionRefusedError("not in a test")

    rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 443)) for host in ("10.0.0.1", "93.184.215.14")]
    monkeypatch.setattr(net.socket, "getaddrinfo", lambda *_, **__: rows)
    monkeypatch.setattr(net.socket, "create_connection", connect)
    with pytest.raises(DownloadError, match="not in a test"):
        read("https://example.com/x")
    assert tried == ["93.184.215.14"]


def test_tls_is_verified_against_the_name() -> None:
    """A server without TLS behind an https address fails in the handshake, not in plain text."""
    with serving() as (name, handler):
        with pytest.raises(DownloadError, match="could not be fetched"):
            read(f"https://{name}/file", allow=[name])
        assert handler.seen == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "http://example.com/",
        "https://",
        "https://a b/",
        "https://user:pw@example.com/",
        "https://x:99999/",
        "https://[::1/",
        "https://x/\n",
        "https://good.com\\@127.0.0.1/",
        "https://good.com\\x",
        "https://127.0.0.1%00.com/",
        "https://x/\ud800",
        "https://x:1:2/",
        "file:///etc/passwd",
        "ftp://x/",
        "gopher://x/",
        "data:text/plain,x",
        "https://x/" + "y" * 10_000,
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(BlockedURLError if url == "http://example.com/" else InvalidURLError):
        check_url(url, ["127.0.0.1:443"])


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:10.0.0.1]"])
def test_an_address_of_a_private_network_is_refused_before_anything_is_looked_up(host: str) -> None:
    with pytest.raises(BlockedURLError, match="private network, which is refused; add .*:443 to allow_hosts"):
        check_url(f"https://{host}/")
    assert check_url(f"https://{host}/", [f"{host}:443"]).allowed
    for public in ("https://8.8.8.8/", "https://example.com/", "https://localhost/"):
        assert not check_url(public).allowed


@pytest.mark.parametrize("port", [0, 22, 80, 8443])
def test_only_the_port_of_https_is_open(port: int) -> None:
    with pytest.raises(BlockedURLError, match="allow_hosts"):
        check_url(f"https://example.com:{port}/")
    assert check_url("https://example.com:443/").port == 443


def test_messages_keep_the_query_to_themselves(server: str) -> None:
    for url in (
        f"http://{server}/gone?token=secret",
        "http://example.com/?token=secret",
        "https://x:0:0/?token=secret",
    ):
        with pytest.raises(DownloadError) as caught:
            read(url, allow=[server])
        assert "secret" not in str(caught.value)


def test_a_path_is_quoted() -> None:
    assert check_url("https://example.com/ä?q=1%20b").path == "/%C3%A4?q=1%20b"
    assert check_url("https://example.com").path == "/"
    assert check_url("https://example.com/a?q").shown == "https://example.com"
    assert check_url("https://a:8443/x", ["a:8443"]).shown == "https://a:8443"


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:4700::1111", "64:ff9b::5db8:d70e"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"]
    + ["255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "::ffff:10.0.0.1"]
    + ["2002:7f00:1::", "64:ff9b::a00:1", "64:ff9b::7f00:1", "64:ff9b:1::1", "::7f00:1", "::ffff:0:7f00:1"]
    + ["2001:0:7f00:1::1", "2606:4700::5efe:a00:1", "3fff::1", "2001:db8::1", "168.63.129.16", "192.88.99.1"]
    + ["100.100.100.200", "192.0.0.192", "fd00:ec2::254", "198.18.0.1", "240.0.0.1"],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
