"""Who watches jobs: told the latest, at a bounded cost, and gone without a trace."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from running_service import LONG, Running, service, wait

from lightweight_engine.apps.server import events
from lightweight_engine.apps.server.events import Events
from lightweight_engine.apps.server.faults import Fault
from lightweight_engine.apps.server.jobs import Job
from lightweight_engine.apps.server.messages import Moved
from lightweight_engine.apps.server.service import Service

FREE = 500  # descriptors that are left to everything else


def streams() -> Events:
    return Events(cast(Service, SimpleNamespace(position=lambda job: None)))


def job() -> Job:
    made = Job("a", None, "", deadline=0.0, cost=1.0)
    made.start()
    return made


async def rest(stream: AsyncIterator[str]) -> list[str]:
    return [text async for text in stream]


def test_watchers_share_what_they_are_told_and_the_end_comes_at_once() -> None:
    async def watch() -> None:
        watched, told = job(), streams()
        several = [told.of(watched) for _ in range(3)]
        first = [await anext(stream) for stream in several]
        assert first[0] is first[2] and '"state": "running"' in first[0] and told.watching == 3
        told.watching = 10**6  # whose turn comes seldom
        begin = time.monotonic()
        later = [asyncio.create_task(rest(stream)) for stream in several]
        await asyncio.sleep(0.05)
        watched.move(Moved("a", {"step": 1}))
        watched.fail(Fault.unexpected())
        texts = await asyncio.gather(*later)
        assert [[text.partition("\n")[0] for text in row] for row in texts] == [["event: error"]] * 3
        assert time.monotonic() - begin < 5 and told.watching == 10**6 - 3

    asyncio.run(watch())


def test_events_are_fewer_where_many_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "EVENTS_PER_SECOND", 100.0)

    async def watch() -> int:
        watched, told = job(), streams()
        rows = [asyncio.create_task(rest(told.of(watched))) for _ in range(20)]
        for step in range(100):
            await asyncio.sleep(0.01)
            watched.move(Moved("a", {"step": step}))
        watched.fail(Fault.unexpected())
        return sum(map(len, await asyncio.gather(*rows)))

    assert asyncio.run(watch()) < 20 * (2 + 100 * 1.5 / 20)


def test_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "HEARTBEAT_SECONDS", 0.01)

    async def watch() -> list[str]:
        stream = streams().of(job())
        return [await anext(stream), await anext(stream)]

    assert asyncio.run(watch())[1].startswith(":")


async def open_and_drop(running: Running, job: str, count: int) -> None:
    """``count`` watchers at once, each told of progress, who then hang up without a word."""
    writers: list[asyncio.StreamWriter] = []

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writers.append(writer)
        writer.write(f"GET /jobs/{job}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert b" 200 " in await reader.readline()
        await reader.readuntil(b"event: progress")

    for start in range(0, count, 100):
        await asyncio.gather(*(one() for _ in range(min(100, count - start))))
    for writer in writers:
        writer.transport.abort()


def usage(running: Running) -> dict[str, Any]:
    """Resident bytes and descriptors of front and worker."""
    pids = {"front": running.process.pid, "worker": running.worker}
    files = {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()}
    return {"bytes": {name: resident(pid) for name, pid in pids.items()}, "files": files}


def resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def wave(running: Running, count: int) -> None:
    """Watchers of a running job come and go, and the job is cancelled."""
    watched = running.job(LONG)
    running.until(watched, "running")
    asyncio.run(open_and_drop(running, watched, count))
    assert running.get("/readyz").status == 200
    assert running.ask("DELETE", f"/jobs/{watched}").status == 200
    running.idle()


@pytest.mark.parametrize("total", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_watchers_that_hang_up_leave_nothing(tmp_path: Path, total: int) -> None:
    at_once = min(total, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FREE)
    with service(tmp_path) as running:
        running.ready()
        drawn = running.generate(subseed=0).json["images"]
        for _ in range(2):  # memory that a wave needs is kept for the next one
            wave(running, at_once)
        before = usage(running)
        for start in range(0, total, at_once):
            wave(running, min(at_once, total - start))
        assert running.generate(subseed=0).json["images"] == drawn
        wait(lambda: all(count <= before["files"][name] for name, count in usage(running)["files"].items()))
        after = usage(running)
        print(f"{total} watchers, {at_once} at once: before {before}, after {after}")
        for name, size in before["bytes"].items():
            assert after["bytes"][name] < 1.02 * size, name
        assert running.stop() == 0
