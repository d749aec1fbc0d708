"""From start to end of the service's process: socket, signals, drain, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from ...backend.net import listening
from ...config import EngineConfig
from ...errors import ConfigError
from .app import build_app
from .protocol import timed_protocol
from .service import Service
from .supervisor import Child

KEEP_ALIVE_SECONDS = 30
BACKLOG = 2048
CLOSE_SECONDS = 5  # that answers which are under way get when all jobs are over

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without its handling of signals, which stops to listen at once and ends with the signal's exit code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve_http(config: EngineConfig, start: Callable[[], Child], child: Child) -> int:
    """Serve until a signal or a fault ends it, and return the exit code.

    Args:
        child: a worker that was started already; ``start`` makes another.

    Raises:
        ConfigError: the address or the port cannot be had.
    """
    bound = _bound(config)  # before anything else is begun, that would have to be ended in words of its own
    with bound:
        return asyncio.run(_serve(config, start, child, bound))


async def _serve(config: EngineConfig, start: Callable[[], Child], child: Child, bound: Any) -> int:
    service = Service(config, start, child)
    try:
        server = _Server(_options(config, service))
        serving = asyncio.create_task(server.serve([bound]))
        _on_signals(service, server)
        url = f"http://{_shown(bound.getsockname())}"
        log.info("listening", extra={"url": url, "api": f"{url}/openapi.json"})
        ended = asyncio.create_task(service.ended.wait())
        await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
    finally:
        await service.drain()
        await service.supervisor.stop()
    return service.fatal or 0


def _options(config: EngineConfig, service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        build_app(service),
        host=config.host,
        port=config.port,
        http=timed_protocol(config, service.metrics),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )


def _bound(config: EngineConfig) -> Any:
    """A socket; who connects from now on waits until we are there."""
    try:
        return listening(config.host, config.port, BACKLOG)
    except OSError as error:
        setting = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"  # a name of nobody, not ours
        why = f"cannot be listened on ({error.strerror}); choose another --{setting}"
        raise ConfigError(f"{setting}: {config.host}:{config.port} {why}") from None


def _on_signals(service: Service, server: uvicorn.Server) -> None:
    loop = asyncio.get_running_loop()
    draining: list[asyncio.Task[None]] = []

    def stop() -> None:
        if draining:  # asked twice: what is under way is left
            service.ended.set()
            server.force_exit = True
        draining.append(asyncio.create_task(service.drain()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def _shown(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
