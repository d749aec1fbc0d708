"""LoRA files by URL, from servers that misbehave: whole, checked and once, or a typed error and nothing."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fresh import FOLDER, PROJECT
from loopback import MEMBER, Site, safetensors, serving, tar_of

from lightweight_engine.backend.net import Access, Limits
from lightweight_engine.config import Config
from lightweight_engine.core.download import Downloads
from lightweight_engine.core.file_cache import FileCache
from lightweight_engine.core.lora_sources import lora_source
from lightweight_engine.errors import (
    BlockedURLError,
    CacheStorageError,
    DownloadBrokenError,
    DownloadError,
    DownloadTimeoutError,
    DownloadTooLargeError,
    InvalidURLError,
    RequestError,
    UnsupportedURLError,
    WrongContentError,
)

BODY = safetensors(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as made:
        made.files["night.safetensors"] = BODY
        yield made


def downloads(folder: Path, site: Site, *, limit: int = 10 << 20, token: str = "", **limits: Any) -> Downloads:
    bounds = Limits(**{"max_bytes": 1 << 20, "timeout": 5.0, "max_seconds": 20.0, **limits})
    return Downloads(FileCache(folder, limit), bounds, Access([site.name], {site.name: token} if token else {}))


def stored(folder: Path) -> list[str]:
    """Files of a cache but for locks and its key."""
    return sorted(
        path.name for path in folder.rglob("*") if path.is_file() and path.parent.name in ("content", "parts")
    )


class TestSources:
    @pytest.mark.parametrize(
        ("url", "name", "member"),
        [
            ("https://replicate.delivery/yhqm/abc/trained_model.tar", "trained_model", MEMBER),
            ("https://replicate.delivery/x/flux-lora.tar", "flux-lora", "flux-lora/flux-lora.safetensors"),
            ("https://civitai.com/api/download/models/12?type=Model&format=SafeTensor&size=full", "civitai-12", None),
            ("https://huggingface.co/a/b/resolve/main/Night%20sky.safetensors?download=true", "Night_sky", None),
            ("https://example.com/a.SafeTensors", "a", None),
        ],
    )
    def test_known(self, url: str, name: str, member: str | None) -> None:
        source = lora_source(url)
        assert (source.name, source.member, source.token) == (name, member, None)

    @pytest.mark.parametrize(
        "url",
        [
            *(f"https://example.com/a.{kind}" for kind in ("ckpt", "pt", "zip", "tar", "bin", "safetensors.zip", "")),
            "https://replicate.delivery/x/other.tar",
            "https://example.com/trained_model.tar",
            "https://replicate.delivery.evil.com/trained_model.tar",
            "https://evilcivitai.com/api/download/models/12",
            "https://civitai.com/api/download/models/12/x",
            "https://civitai.com/models/12",
            "https://civitai.com/api/download/models/12?format=PickleTensor",
            "https://example.com/?x=a.safetensors",
        ],
    )
    def test_unknown(self, url: str) -> None:
        with pytest.raises(UnsupportedURLError) as caught:
            lora_source(url)
        assert caught.value.http_status == 415

    def test_the_callers_token_leaves_the_url(self) -> None:
        source = lora_source("https://civitai.com/api/download/models/12?type=Model&token=abc&format=SafeTensor")
        assert source.url == "https://civitai.com/api/download/models/12?type=Model&format=SafeTensor"
        assert source.token == "abc" and "abc" not in repr(source)
        with pytest.raises(InvalidURLError):
            lora_source("https://civitai.com/api/download/models/12?token=a%0ab")


def test_a_file_is_fetched_once(site: Site, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    with downloads(tmp_path, site).lora(site.url("night.safetensors"), progress=lambda *p: told.append(p)) as held:
        assert held.path.read_bytes() == BODY
        assert (held.sha256, held.size, held.name) == (SHA256, len(BODY), "night")
    assert told[-1] == (len(BODY), len(BODY))
    again = downloads(tmp_path, site)  # as after a restart
    with again.lora(site.url("night.safetensors")) as held:
        assert held.sha256 == SHA256
    with again.lora(site.url("elsewhere.safetensors"), sha256=SHA256.upper()) as held:
        assert held.name == "elsewhere"
    assert len(site.asked) == 1
    again.offline = True
    with pytest.raises(DownloadError, match="offline"):
        again.lora(site.url("other.safetensors"))


def test_offline_a_file_of_the_cache_may_be_of_any_host(site: Site, tmp_path: Path) -> None:
    site.files["trained_model.tar"] = tar_of((MEMBER, BODY))
    urls = [site.url("night.safetensors"), site.url("trained_model.tar")]
    for url in urls:
        downloads(tmp_path / "a", site).lora(url).close()
    strict = Downloads(FileCache(tmp_path / "a", 10 << 20), Limits(1 << 20, 5.0, 20.0, 0.0), offline=True)
    for url, name in zip(urls, ("night", "trained_model"), strict=True):
        with strict.lora(url) as held:
            assert (held.sha256, held.name) == (SHA256, name)
    with strict.lora("http://10.0.0.1/elsewhere.safetensors", sha256=SHA256) as held:
        assert (held.sha256, held.name) == (SHA256, "elsewhere")
    for url in (site.url("other.safetensors"), "https://10.0.0.1/a.safetensors"):
        with pytest.raises(BlockedURLError, match="allow_hosts"):
            strict.lora(url)
    with pytest.raises(UnsupportedURLError):
        strict.lora(site.url("a.zip"))
    strict.offline = False
    with pytest.raises(BlockedURLError, match="allow_hosts"):
        strict.lora(urls[0])
    nowhere = Downloads(FileCache(tmp_path / "b", 10 << 20), strict.limits, offline=True)
    with pytest.raises(BlockedURLError, match="allow_hosts"):
        nowhere.lora(urls[0])
    assert len(site.asked) == 2 and not nowhere.cache.folder.exists()


@pytest.mark.parametrize(
    ("path", "kind", "status", "words"),
    [
        ("missing.safetensors", DownloadError, 424, "404"),  # 52
        ("status/401/a.safetensors", DownloadError, 424, "tokens"),
        ("status/403/a.safetensors", DownloadError, 424, "tokens"),
        ("status/500/a.safetensors", DownloadError, 424, "500"),
        ("page/a.safetensors", WrongContentError, 422, "not a safetensors file; it may want a login"),  # 53
        ("page/plain/a.safetensors", WrongContentError, 422, "web page"),
        ("pointer.safetensors", WrongContentError, 422, "LFS"),
        ("pickle.safetensors", WrongContentError, 422, "not a safetensors file"),
        ("twice.safetensors", WrongContentError, 422, "twice"),
        ("to/a.safetensors?http://127.0.0.1/x", BlockedURLError, 403, "allow_hosts"),  # 54
        ("to/a.safetensors?https://127.0.0.1/x", BlockedURLError, 403, "private network"),
        ("to/a.safetensors?https://[64:ff9b::7f00:1]/x", BlockedURLError, 403, "private network"),
        ("to/a.safetensors?https://169.254.169.254/x", BlockedURLError, 403, "private network"),
        ("to/a.safetensors?file:///etc/passwd", InvalidURLError, 422, "not a URL"),
        ("huge/a.safetensors", DownloadTooLargeError, 413, "10,737,418,240"),  # 55
        ("endless/a.safetensors", DownloadTooLargeError, 413, "1,048,576"),
        ("a.zip", UnsupportedURLError, 415, "safetensors"),  # 63
    ],
)
def test_what_is_refused_leaves_nothing(
    site: Site, tmp_path: Path, path: str, kind: type[DownloadError], status: int, words: str
) -> None:
    site.files["pointer.safetensors"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    site.files["pickle.safetensors"] = b"PK\x03\x04" + bytes(4000)
    double = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    )
    site.files["twice.safetensors"] = len(double).to_bytes(8, "little") + double + b"x"
    with pytest.raises(kind, match=words) as caught:
        downloads(tmp_path, site).lora(site.url(path))
    assert caught.value.http_status == status
    assert stored(tmp_path) == []


def test_tls_that_is_none(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="could not be fetched"):
        downloads(tmp_path, site).lora(f"https://{site.name}/night.safetensors")


def test_a_trickle(site: Site, tmp_path: Path) -> None:
    """56: one byte a second, in small."""
    site.pause, site.piece = 0.02, 1
    for limits in ({"max_seconds": 0.3}, {"timeout": 0.2, "min_speed": 1000.0}):
        with pytest.raises(DownloadTimeoutError) as caught:
            downloads(tmp_path, site, **limits).lora(site.url("night.safetensors"))
        assert caught.value.http_status == 504


@pytest.mark.parametrize("lengths", [True, False])
def test_not_what_is_expected(site: Site, tmp_path: Path, lengths: bool) -> None:
    """57."""
    site.lengths = lengths
    with pytest.raises(WrongContentError, match="expected"):
        downloads(tmp_path, site).lora(site.url("night.safetensors"), sha256="0" * 64)
    assert stored(tmp_path) == []
    with pytest.raises(RequestError, match="sha256"):
        downloads(tmp_path, site).lora(site.url("night.safetensors"), sha256="abc")


class TestResume:
    def test_a_lost_connection_is_taken_up(self, site: Site, tmp_path: Path) -> None:
        site.cut = [100_000, 100_000]
        with downloads(tmp_path, site).lora(site.url("night.safetensors")) as held:
            assert held.sha256 == SHA256
        assert [headers.get("Range") for _, headers in site.asked] == [None, "bytes=100000-", "bytes=200000-"]

    @pytest.mark.parametrize(("ranges", "etag"), [(False, True), (True, False)])
    def test_started_anew_where_it_cannot_be(self, site: Site, tmp_path: Path, ranges: bool, etag: bool) -> None:
        """58: a server without ranges, or without a mark that tells its file from another."""
        site.cut, site.ranges, site.etag = [100_000], ranges, etag
        with downloads(tmp_path, site).lora(site.url("night.safetensors")) as held:
            assert held.sha256 == SHA256
        assert len(site.asked) == 2

    def test_a_hash_is_as_good_as_a_mark(self, site: Site, tmp_path: Path) -> None:
        site.cut, site.etag = [100_000], False
        with downloads(tmp_path, site).lora(site.url("night.safetensors"), sha256=SHA256) as held:
            assert held.sha256 == SHA256
        assert site.asked[1][1]["Range"] == "bytes=100000-"

    def test_another_file_meanwhile(self, site: Site, tmp_path: Path) -> None:
        site.cut = [100_000, 0, 0, 0, 0]
        with pytest.raises(DownloadBrokenError, match="100,000 of"):
            downloads(tmp_path, site).lora(site.url("night.safetensors"))
        assert len(stored(tmp_path)) == 2  # what has come, and its mark
        site.cut, site.files["night.safetensors"] = [], safetensors(300_000, seed=1)
        with downloads(tmp_path, site).lora(site.url("night.safetensors")) as held:
            assert held.path.read_bytes() == site.files["night.safetensors"]

    def test_a_killed_fetch_is_resumed(self, site: Site, tmp_path: Path) -> None:
        site.pause, site.piece = 0.01, 4096
        code = (
            f"import sys; sys.path[:0] = {[str(PROJECT), str(FOLDER)]!r}\n"
            "from pathlib import Path; from loopback import Site; from test_lora_download import downloads\n"
            f"site = Site(); site.name = {site.name!r}\n"
            f"downloads(Path({str(tmp_path)!r}), site).lora(site.url('night.safetensors'))"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        part = waited(lambda: next((p for p in tmp_path.glob("parts/*.part") if p.stat().st_size > 20_000), None))
        process.send_signal(signal.SIGKILL)
        process.wait()
        have = part.stat().st_size
        assert 0 < have < len(BODY)
        site.pause = 0
        with downloads(tmp_path, site).lora(site.url("night.safetensors")) as held:
            assert held.sha256 == SHA256
        assert site.asked[-1][1]["Range"] == f"bytes={have}-"
        assert stored(tmp_path) == [f"{SHA256}.safetensors"]

    def test_the_callers_stop_is_heard(self, site: Site, tmp_path: Path) -> None:
        def stop(received: int, size: int | None) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            downloads(tmp_path, site).lora(site.url("night.safetensors"), progress=stop)
        with downloads(tmp_path, site).lora(site.url("night.safetensors")) as held:
            assert held.sha256 == SHA256


def waited(look: Any, seconds: float = 10.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


class TestTogether:
    def test_twenty_requests_make_one_fetch(self, site: Site, tmp_path: Path) -> None:
        """64."""
        site.pause, site.piece = 0.02, 30_000
        barrier = threading.Barrier(20)

        def ask(_: int) -> str:
            barrier.wait()
            with downloads(tmp_path, site).lora(site.url("night.safetensors")) as held:
                return held.sha256

        with ThreadPoolExecutor(20) as pool:
            assert set(pool.map(ask, range(20))) == {SHA256}
        assert len(site.asked) == 1

    def test_who_waits_for_a_failure_shares_it(self, site: Site, tmp_path: Path) -> None:
        site.pause, site.piece = 0.05, 1
        barrier = threading.Barrier(8)

        def ask(_: int) -> type[BaseException]:
            barrier.wait()
            with pytest.raises(DownloadError) as caught:
                downloads(tmp_path, site, max_seconds=0.6).lora(site.url("night.safetensors"))
            return caught.type

        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(8))) == {DownloadTimeoutError}
        assert time.monotonic() - began < 3
        assert len(site.asked) == 1
        site.pause, site.piece = 0, 1 << 16
        downloads(tmp_path, site).lora(site.url("night.safetensors")).close()


class TestArchives:
    def fetch(self, site: Site, folder: Path, archive: bytes) -> bytes:
        site.files["x/trained_model.tar"] = archive
        with downloads(folder / "cache", site).lora(site.url("x/trained_model.tar")) as held:
            assert held.name == "trained_model"
            return held.path.read_bytes()

    @pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    @pytest.mark.parametrize("prefix", ["", "./"])
    def test_one_member_is_taken(self, site: Site, tmp_path: Path, format: int, prefix: str) -> None:
        entries = [(prefix + "output/config.yaml", b"x" * 700), (prefix + MEMBER, BODY)]
        if format != tarfile.USTAR_FORMAT:
            entries.insert(0, ("a" * 200 + "ä", b"long"))
        assert self.fetch(site, tmp_path, tar_of(*entries, format=format)) == BODY
        assert stored(tmp_path / "cache") == [f"{SHA256}.safetensors"]

    @staticmethod
    def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[str, tarfile.TarInfo]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return name, info

    def test_what_is_refused(self, site: Site, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(BODY)
        good = (MEMBER, BODY)
        archives: dict[str, bytes] = {
            "no file": tar_of(("output/other.safetensors", BODY)),
            "leads out": tar_of(("../../evil", b"x"), good),
            "leads out of": tar_of((f"../{MEMBER}", BODY)),
            "out of the archive": tar_of(("/etc/evil", b"x"), good),
            "a link": tar_of(self.link(MEMBER, str(secret))),
            "link or device": tar_of(self.link("output", "/tmp"), good),
            "a link or": tar_of(self.link(MEMBER, str(secret), tarfile.LNKTYPE)),
            "device, which": tar_of(self.link(MEMBER, "", tarfile.FIFOTYPE)),
            "two files": tar_of(good, good),
            "incomplete": tar_of(good)[:100_000],
            "no plain tar": b"\x1f\x8b" + bytes(range(256)) * 10,
            "damaged": b"x" * 4096,
            "not a safetensors": tar_of((MEMBER, b"PK\x03\x04" + bytes(3000))),
        }
        for words, archive in archives.items():
            with pytest.raises(WrongContentError, match=words):
                self.fetch(site, tmp_path, archive)
            assert stored(tmp_path / "cache") == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "secret"]

    def test_caps(self, site: Site, tmp_path: Path) -> None:
        with pytest.raises(DownloadTooLargeError):
            self.fetch(site, tmp_path, tar_of((MEMBER, bytes(2 << 20))))
        with pytest.raises(WrongContentError, match="more than 10,000 entries"):
            many = tarfile.TarInfo("x").tobuf() * 10_001
            site.files["x/trained_model.tar"] = many
            downloads(tmp_path, site, max_bytes=1 << 24).lora(site.url("x/trained_model.tar"))


class TestFullDisk:
    """59."""

    def test_a_cache_that_is_too_small(self, site: Site, tmp_path: Path) -> None:
        for site.lengths in (True, False):
            with pytest.raises(CacheStorageError, match="download_cache_gib") as caught:
                downloads(tmp_path, site, limit=100_000).lora(site.url("night.safetensors"))
            assert caught.value.http_status == 507
            assert stored(tmp_path) == []

    @pytest.mark.parametrize("lengths", [True, False])
    def test_a_disk_that_is_full(self, site: Site, tmp_path: Path, lengths: bool) -> None:
        """On a real file system of its own: nothing partial is left, and the next file that fits is fetched."""
        site.lengths, site.files["small.safetensors"] = lengths, safetensors(20_000)
        code = (
            f"import sys; sys.path[:0] = {[str(PROJECT), str(FOLDER)]!r}\n"
            "import test_lora_download as t; from pathlib import Path\n"
            f"site = t.Site(); site.name = {site.name!r}; made = t.downloads(Path({str(tmp_path)!r}), site)\n"
            "try: made.lora(site.url('night.safetensors'))\n"
            "except t.CacheStorageError as error: print(error)\n"
            f"print(t.stored(Path({str(tmp_path)!r})), made.lora(site.url('small.safetensors')).size)"
        )
        mount = f'mount -t tmpfs -o size=160k none "{tmp_path}" && exec "$0" -c "$1"'
        done = subprocess.run(
            ["unshare", "-Urm", "sh", "-c", mount, sys.executable, code], capture_output=True, text=True, check=False
        )
        if "unshare" in done.stderr or "mount" in done.stderr:
            pytest.skip(f"no file system can be made here: {done.stderr.strip()}")
        said, left = done.stdout.splitlines()
        assert "free space" in said
        assert left.startswith("[] 20")


def test_no_trace_of_a_token(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """67: in a header to its own host; not in a log, an error, or anything that is written."""
    caplog.set_level(logging.DEBUG)
    secret, own = os.urandom(12).hex(), os.urandom(12).hex()
    site.files["api/download/models/7"] = BODY
    made = downloads(tmp_path, site, token=own)
    with made.lora(site.url(f"api/download/models/7?type=Model&format=SafeTensor&token={secret}")) as held:
        assert held.name == "civitai-7"
    assert site.asked[-1][1]["Authorization"] == f"Bearer {secret}"
    assert secret not in site.asked[-1][0]
    made.lora(site.url(f"night.safetensors?token={secret}")).close()
    assert site.asked[-1][1]["Authorization"] == f"Bearer {own}"
    told = ""
    for path in (f"x.safetensors?token={secret}", f"status/403/{secret}.safetensors", f"{secret}.zip"):
        with pytest.raises(DownloadError) as caught:
            made.lora(site.url(path))
        told += "".join(traceback.format_exception(caught.value)) + repr(made.__dict__)
    for path in tmp_path.rglob("*"):
        told += str(path) + (path.read_bytes().decode("latin-1") if path.is_file() else "")
    assert not any(text in told + caplog.text for text in (secret, own))


def test_as_configured(site: Site, tmp_path: Path) -> None:
    config = Config(cache_dir=tmp_path, allow_hosts=(site.name,), tokens={site.name: "abc"}, download_max_gib=0.5)
    made = Downloads.of(config)
    made.lora(site.url("night.safetensors")).close()
    assert site.asked[0][1]["Authorization"] == "Bearer abc"
    assert (made.limits.max_bytes, made.cache.folder) == (1 << 29, tmp_path / "downloads")
