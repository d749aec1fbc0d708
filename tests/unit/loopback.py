"""Servers on the loopback interface that behave and misbehave as those of LoRA files do."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MEMBER = "output/flux_train_replicate/lora.safetensors"


def safetensors(size: int = 4096, seed: int = 0) -> bytes:
    """A file of one tensor with ``size`` bytes of numbers."""
    header = json.dumps({f"t{seed}": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + hashlib.shake_128(str(seed).encode()).digest(size)


def tar_of(*entries: tuple[str, bytes | tarfile.TarInfo], **options: Any) -> bytes:
    """An archive of files, or of what an entry says in full."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", **options) as archive:
        for name, body in entries:
            info = body if isinstance(body, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(body, bytes):
                info.size = len(body)
            archive.addfile(info, io.BytesIO(body) if isinstance(body, bytes) else None)
    return made.getvalue()


class Site:
    """What a server has, how it behaves, and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.name = ""
        self.ranges = True
        self.etag = True
        self.cut: list[int] = []  # bytes after which each of the next answers breaks off
        self.pause = 0.0  # seconds before each piece
        self.piece = 1 << 16
        self.lengths = True

    def url(self, path: str) -> str:
        return f"http://{self.name}/{path}"

    def count(self, path: str) -> int:
        return sum(asked.partition("?")[0] == f"/{path}" for asked, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        self.close_connection = True
        self.site.asked.append((self.path, dict(self.headers.items())))
        path = self.path.partition("?")[0].strip("/")
        if path in self.site.files:
            self._file(self.site.files[path])
        else:
            getattr(self, f"do_{path.split('/')[0]}", self.do_missing)(path)

    def _file(self, body: bytes) -> None:
        mark = f'"{hashlib.sha256(body).hexdigest()[:8]}"'
        asked = self.headers.get("Range", "bytes=0-")
        start = int(asked[6:-1]) if self.site.ranges and self.headers.get("If-Range") in (mark, None) else 0
        self.send_response(206 if start else 200)
        if self.site.etag:
            self.send_header("ETag", mark)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if self.site.lengths:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = start + self.site.cut.pop(0) if self.site.cut else len(body)
        self._send(body[start : min(end, len(body))])

    def _send(self, body: bytes) -> None:
        try:
            for at in range(0, len(body), self.site.piece):
                time.sleep(self.site.pause)
                self.wfile.write(body[at : at + self.site.piece])
                self.wfile.flush()
        except OSError:
            pass

    def do_missing(self, path: str) -> None:
        self.send_error(404)

    def do_status(self, path: str) -> None:
        self.send_error(int(path.split("/")[1]))

    def do_page(self, path: str) -> None:
        self.send_response(200)
        if not path.startswith("page/plain"):
            self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self._send(b"<!DOCTYPE html><title>Log in</title>" * 200)

    def do_to(self, path: str) -> None:
        self.send_response(302)
        self.send_header("Location", self.path.partition("?")[2])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_endless(self, path: str) -> None:
        self.send_response(200)
        self.end_headers()
        body = safetensors(1 << 16)
        try:
            while True:
                self.wfile.write(body)
        except OSError:
            pass

    def do_huge(self, path: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(10 << 30))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Site]:
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"site": site}))
    server.daemon_threads = True
    server.request_queue_size = 64
    server.handle_error = lambda *_: None  # clients that leave early are what is tested here
    site.name = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
