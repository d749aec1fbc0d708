"""Jobs that are remembered: what is kept, how long, and for which key."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from lightweight_engine.apps.server import jobs
from lightweight_engine.apps.server.faults import (
    ConflictError,
    DeadlineError,
    Fault,
    GoneError,
    UnavailableError,
    UnknownJobError,
)
from lightweight_engine.apps.server.jobs import Job, JobStore
from lightweight_engine.apps.server.messages import Moved, Outcome
from lightweight_engine.errors import (
    DownloadError,
    DownloadTimeoutError,
    EngineError,
    GenerationCancelled,
    InvalidURLError,
    MemoryBudgetError,
    RequestError,
    WrongContentError,
)


def job(name: str, **fields: Any) -> Job:
    return Job(name, None, "", deadline=0.0, cost=1.0, **fields)


def done(name: str, size: int = 100) -> Job:
    made = job(name)
    made.succeed(Outcome("png", [bytes(size)], [], {}))
    return made


def test_pictures_are_kept_up_to_a_size_the_newest_in_any_case() -> None:
    store = JobStore(250, 60.0)
    for name in "abc":
        store.add(done(name))
    store.tidy()
    assert [each.gone for each in store] == [True, False, False] and store.kept_bytes == 200
    with pytest.raises(GoneError):
        store.get("a").result()
    store.add(done("d", 1000))
    store.tidy()
    assert [each.gone for each in store] == [True, True, True, False]


def test_the_newest_come_first() -> None:
    store = JobStore(250, 60.0)
    for name, caller in ("ax", "by", "cx", "dx"):
        store.add(job(name, caller=caller))
    assert [each.id for each in store.newest(2)] == ["d", "c"]
    assert [each.id for each in store.newest(9, "x")] == ["d", "c", "a"]


def test_a_job_is_known_to_its_caller() -> None:
    store = JobStore(250, 60.0)
    mine = job("a", caller="x")
    store.add(mine)
    assert store.get("a", "x") is mine and store.get("a") is mine
    with pytest.raises(UnknownJobError):
        store.get("a", "y")


@pytest.mark.parametrize(
    ("error", "hurried", "counted"),
    [
        (DeadlineError("late"), True, "timed_out"),
        (DeadlineError("late"), False, "failed"),
        (DownloadTimeoutError("slow"), True, "failed"),
        (UnavailableError("ending"), True, "failed"),
        (RequestError("wrong"), True, "refused"),
        (GenerationCancelled("enough"), True, "cancelled"),
    ],
)
def test_a_fault_is_counted_for_whose_it_is(error: EngineError, hurried: bool, counted: str) -> None:
    over = job("a", hurried=hurried)
    over.fail(Fault.of(error))
    assert over.counted_as == counted


def test_a_job_that_the_service_cancels_is_counted_so_with_its_reason() -> None:
    over = job("a")
    over.fail(Fault.of(UnavailableError("ending")), cancelled=True)
    assert (over.state, over.counted_as, over.to_repeat) == ("cancelled", "cancelled", True)
    assert over.fault is not None and over.fault.status == 503


def test_what_may_pass_frees_its_key() -> None:
    store = JobStore(1000, 60.0)
    for error, kept in (
        (DownloadError("the server of a LoRA is down"), False),
        (DownloadTimeoutError("it is slow"), False),
        (UnavailableError("ending"), False),
        (MemoryBudgetError("too much"), False),
        (RequestError("wrong"), True),
        (InvalidURLError("no address"), True),
        (WrongContentError("a web page"), True),
    ):
        failed = job(str(error))
        failed.fail(Fault.of(error))
        store.add(failed, failed.id, "digest")
        assert (store.of_key(failed.id, "digest") is failed) == kept, error


def test_a_corrected_request_may_have_the_key_of_one_that_failed() -> None:
    store = JobStore(1000, 60.0)
    failed, corrected = job("a"), job("b")
    store.add(failed, "key", "a web page")
    with pytest.raises(ConflictError):
        store.of_key("key", "a file")  # it is under way
    failed.fail(Fault.of(WrongContentError("a web page")))
    assert store.of_key("key", "a web page") is failed and store.of_key("key", "a file") is None
    store.add(corrected, "key", "a file")
    assert store.of_key("key", "a file") is corrected
    with pytest.raises(ConflictError):
        store.of_key("key", "a web page")


def test_a_sentence_says_what_a_job_is() -> None:
    told = job("a")
    sentences = [told.told]
    told.start()
    sentences.append(told.told)
    told.fail(Fault.unexpected())
    stopped = job("b")
    stopped.fail(Fault.of(GenerationCancelled("enough")))
    sentences += [told.told, stopped.told, done("c").told]
    assert sentences == [
        "job a waits",
        "job a is running",
        "job a has failed",
        "job b was cancelled",
        "job c has succeeded",
    ]


def test_pictures_are_kept_for_a_time() -> None:
    store = JobStore(1000, 60.0)
    old = done("a")
    store.add(old)
    old.finished = time.time() - 61
    store.tidy()
    assert old.gone and store.kept_bytes == 0


def test_a_job_whose_pictures_are_gone_is_done_anew_for_its_key() -> None:
    store = JobStore(150, 60.0)
    old, anew = done("a"), done("b")
    store.add(old, "key", "digest")
    store.add(done("c"))
    store.tidy()
    assert old.gone and store.of_key("key", "digest") is None
    with pytest.raises(ConflictError):
        store.of_key("key", "another")
    store.add(anew, "key", "digest")
    assert store.of_key("key", "digest") is anew


def test_old_jobs_are_forgotten_unless_a_key_stands_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_REMEMBERED", 3)
    store = JobStore(10_000, 60.0)
    store.add(done("keyed"), "key", "digest")
    for number in range(5):
        store.add(done(str(number)))
    store.add(job("waits"))
    store.tidy()
    assert [each.id for each in store] == ["keyed", "3", "4", "waits"]
    with pytest.raises(UnknownJobError):
        store.get("0")


def test_keys() -> None:
    store = JobStore(1000, 60.0)
    kept = done("a")
    store.add(kept, "key", "digest")
    assert store.of_key("key", "digest") is kept and store.of_key("other", "digest") is None
    with pytest.raises(ConflictError):
        store.of_key("key", "another")
    late = job("b")
    late.fail(Fault.of(DeadlineError("late")))
    store.add(late, "late", "digest")
    assert store.of_key("late", "digest") is None


def test_who_watches_is_told_the_latest() -> None:
    async def watch() -> list[int]:
        watched, seen = job("a"), []
        ended = asyncio.create_task(watched.ended())
        version = await asyncio.wait_for(watched.changed(-1), 1)
        for step in range(3):
            watched.move(Moved("a", {"step": step}))
        version = await asyncio.wait_for(watched.changed(version), 1)
        seen.append(watched.progress["step"])
        watched.fail(Fault.unexpected())
        await asyncio.wait_for(ended, 1)
        assert await watched.changed(version) > version
        return seen

    assert asyncio.run(watch()) == [2]
