"""The cache of fetched files: by content, bounded, and safe with many at it."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import Cli, command_line
from fresh import FOLDER, PROJECT

from lightweight_engine.core.file_cache import FileCache, Held, PartState
from lightweight_engine.errors import CacheStorageError, DownloadTimeoutError


def put(cache: FileCache, url: str, body: bytes) -> Held:
    """Keep ``body`` as what a URL was fetched as."""
    key = cache.key(url)
    with cache.filling(key, 10.0, lambda: None):
        cache.reserve(key, PartState(len(body), reserved=len(body)))
        cache.part(key).write_bytes(body)
        return cache.adopt(key, cache.part(key), hashlib.sha256(body).hexdigest(), url)


def age(cache: FileCache, body: bytes, seconds: float) -> None:
    """Let a file have been used ``seconds`` ago."""
    path = cache.folder / "content" / f"{hashlib.sha256(body).hexdigest()}.safetensors"
    os.utime(path, (time.time() - seconds,) * 2)


def bodies(cache: FileCache) -> set[bytes]:
    return {path.read_bytes()[:1] for path in (cache.folder / "content").iterdir()}


A, B, C, D = (letter * 1000 for letter in (b"a", b"b", b"c", b"d"))


def test_by_content_and_by_name(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "deep" / "cache", 10_000)
    put(cache, "one", A).close()
    put(cache, "two", A).close()
    again = FileCache(cache.folder, 10_000)
    with again.find(again.key("two")) as held, again.find_content(held.sha256, "x") as same:
        assert held.path == same.path and held.path.read_bytes() == A
        assert (held.name, held.size, same.name) == ("two", 1000, "x")
    assert again.find(again.key("three")) is None
    [entry] = again.ls()
    assert (entry.names, entry.size, entry.in_use) == (("one", "two"), 1000, False)
    assert {path.stat().st_mode & 0o077 for path in cache.folder.rglob("*")} == {0}


def test_names_tell_nothing_of_urls(tmp_path: Path) -> None:
    first, second = FileCache(tmp_path / "a", 1000), FileCache(tmp_path / "b", 1000)
    assert first.key("u") == FileCache(tmp_path / "a", 1000).key("u") != first.key("v")
    assert first.key("u") != second.key("u")
    assert hashlib.sha256(b"u").hexdigest()[:40] != first.key("u")


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 3000)
    for url, body, seconds in (("a", A, 30), ("b", B, 20), ("c", C, 10)):
        put(cache, url, body).close()
        age(cache, body, seconds)
    cache.find(cache.key("a")).close()
    put(cache, "d", D).close()
    assert bodies(cache) == {b"a", b"c", b"d"}
    assert cache.find(cache.key("b")) is None


def test_a_file_in_use_stays(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 2000)
    first, second = put(cache, "a", A), put(cache, "b", B)
    with pytest.raises(CacheStorageError, match="in use"):
        put(cache, "c", C)
    assert [entry.in_use for entry in cache.ls()] == [True, True]
    second.close()
    put(cache, "c", C).close()
    assert bodies(cache) == {b"a", b"c"}
    assert cache.prune(0) == 1000
    first.close()
    first.close()
    assert cache.prune(0) == 1000 and cache.ls() == []


def test_nothing_goes_for_what_would_not_fit_anyway(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 3000)
    with put(cache, "a", A):
        put(cache, "b", B).close()
        for size in (2500, 3500):
            with pytest.raises(CacheStorageError, match="download_cache_gib"):
                cache.reserve(cache.key("c"), PartState(reserved=size))
    assert bodies(cache) == {b"a", b"b"}


def test_what_others_fetch_counts(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 2500)
    key = cache.key("a")
    with cache.filling(key, 1.0, lambda: None):
        cache.reserve(key, PartState(2000, reserved=2000))
        cache.part(key).write_bytes(A)
        with pytest.raises(CacheStorageError, match="no room"):
            put(cache, "b", B)
    put(cache, "b", B).close()  # nobody is at the other any more: its 1000 bytes stay, its claim is void
    assert cache.part(key).exists()
    put(cache, "c", C + C[:400]).close()
    assert not cache.part(key).exists()  # used longest ago


def test_only_one_fetches(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 1000)
    ticks: list[int] = []
    refused = pytest.raises(DownloadTimeoutError, match="another")
    with cache.filling("k", 1.0, lambda: None), refused, cache.filling("k", 0.1, lambda: ticks.append(1)):
        pass
    assert ticks
    with cache.filling("k", 1.0, lambda: None), cache.filling("l", 1.0, lambda: None):
        pass


def test_damage_costs_a_fetch_and_no_more(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10_000)
    put(cache, "a", A).close()
    key = cache.key("a")
    for text in ("", "[]", '{"sha256": "../../x"}', '{"sha256": 5}'):
        (tmp_path / "names" / f"{key}.json").write_text(text)
        assert cache.find(key) is None
    put(cache, "a", A).close()
    [content] = (tmp_path / "content").iterdir()
    content.write_bytes(A[:10])
    assert cache.find(key) is None
    put(cache, "a", A).close()
    assert content.read_bytes() == A
    for text in ("", '{"size": 1, "odd": 2}', "[]"):
        cache.part(key, "json").write_text(text)
        assert cache.state(key) == PartState()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "wall").write_text("no folder")
    with pytest.raises(CacheStorageError, match="cache_dir"):
        FileCache(tmp_path / "wall" / "cache", 1000).key("a")
    assert FileCache(tmp_path / "none", 1000).ls() == []
    assert FileCache(tmp_path / "none", 1000).prune() == 0


def test_prune(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10_000)
    for url, body, seconds in (("a", A, 30), ("b", B, 20), ("c", C, 10)):
        put(cache, url, body).close()
        age(cache, body, seconds)
    cache.part(cache.key("d")).write_bytes(D)
    assert cache.prune() == 1000
    assert bodies(cache) == {b"a", b"b", b"c"}
    assert cache.prune(unused_since=time.time() - 25) == 1000
    assert cache.prune(1000) == 1000
    assert bodies(cache) == {b"c"}
    assert len(list(tmp_path.glob("names/*"))) == 1
    assert [path.name for path in tmp_path.glob("locks/*")] == ["all"]


def test_no_handle_is_left(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 3000)
    put(cache, "a", A).close()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        put(cache, f"u{number}", bytes([number]) * 1000).close()
        cache.find(cache.key("a"))
        cache.ls()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def hammer(folder: Path, seed: int, seconds: float) -> None:
    """Use and add files at random in a cache that holds a third of them; those in hand must stay whole."""
    import random

    chance = random.Random(seed)
    cache = FileCache(folder, 40_000)
    made, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        number = chance.randrange(30)
        body = bytes([number]) * (3000 + number)
        key = cache.key(str(number))
        with cache.find(key) or put(cache, str(number), body) as held:
            made += 1
            time.sleep(0.002)
            assert held.path.read_bytes() == body
        room = sum(entry.size for entry in cache.ls() if entry.sha256)
        assert room <= 40_000, room
    assert made > 5, made


def test_two_processes_under_pressure(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(PROJECT), str(FOLDER)]!r}\n"
        "from pathlib import Path; from test_file_cache import hammer\n"
        f"hammer(Path({str(tmp_path)!r}), int(sys.argv[1]), 1.5)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(seed)], stderr=subprocess.PIPE, text=True) for seed in (1, 2)
    ]
    for process in running:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert list((tmp_path / "parts").iterdir()) == []


class TestCommands:
    @pytest.fixture
    def cli(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
        monkeypatch.setenv("LWE_CACHE_DIR", str(tmp_path))
        return command_line(capsys, tmp_path, monkeypatch)

    def test_ls_and_prune(self, cli: Cli, tmp_path: Path) -> None:
        assert cli("cache", "ls").code == 0
        cache = FileCache(tmp_path / "downloads", 10_000)
        held = put(cache, "night", A)
        put(cache, "hat", B).close()
        age(cache, B, 3 * 24 * 3600)
        lines = [line.split() for line in cli("cache", "ls").out.splitlines()]
        assert cli("cache", "ls").err.startswith("2.0 KiB of 20.0 GiB in "), "as the setting says it"
        assert lines[1][:4] == ["*", "night", "1000", "B"]
        assert lines[2][:6] == ["hat", "1000", "B", "3", "days", "ago"]
        data = json.loads(cli("cache", "ls", "--json").out)
        assert (data["bytes"], data["limit"], len(data["files"])) == (2000, 20 << 30, 2)
        assert cli("cache", "prune").out == "removed 0 B, 2.0 KiB left\n"
        assert json.loads(cli("cache", "prune", "--unused", 2, "--json").out) == {"removed": 1000, "bytes": 1000}
        assert cli("cache", "prune", "--all").out == "removed 0 B, 1000 B left\n"
        held.close()
        assert cli("cache", "prune", "--to", 0).out == "removed 1000 B, 0 B left\n"
        for option, given, told in (
            ("--to", -1, "-1 is too small; give 0 to 1,000,000,000; it is a number of GiB"),
            ("--to", "5GB", "'5GB' is no number; give 0 to 1,000,000,000; it is a number of GiB"),
            ("--unused", "inf", "inf is too large; give 0 to 1,000,000,000; it is a number of days"),
        ):
            done = cli("cache", "prune", option, given)
            assert (done.code, done.err) == (2, f"error: {option}: {told}\n")
