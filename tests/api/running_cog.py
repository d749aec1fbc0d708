"""Cog's own HTTP server with ``predict.py`` in it, without Docker."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from running_service import PROJECT, Running, wait

SMALL = {
    **{"prompt": "a smiling woman", "width": 64, "height": 64, "num_inference_steps": 1, "seed": 1},
    **{"enable_hr": False, "output_format": "png"},
}
LONG = {**SMALL, "width": 256, "height": 256, "num_inference_steps": 200}
"""Takes longer than a test waits: it is cancelled."""


@contextmanager
def cog(folder: Path, **environ: str) -> Iterator[Running]:
    """The server, ready; its log is ``cog.log`` in the folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # it starts `python` by its name
        "PORT": str(port),
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "OMP_NUM_THREADS": "1",
        "LWE_THREADS": "1",
        "LWE_MODELS_DIR": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TMPDIR": str(folder),
        **environ,
    }
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
    log = (folder / "cog.log").open("w+", encoding="utf-8")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=PROJECT, env=environment)
    running = Running(process, port=port)
    try:
        wait(lambda: _status(running) == "READY")
        yield running
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _status(running: Running) -> str:
    assert running.process.poll() is None
    try:
        return running.get("/health-check").json["status"]
    except OSError:
        return ""


class Listener:
    """Takes what is POSTed to it."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        told = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.name = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
