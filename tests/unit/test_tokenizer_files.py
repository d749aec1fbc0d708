"""Fetching into a cache: the right file whole, or an error and nothing."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from factories import save_family

from lightweight_engine import Config
from lightweight_engine.core.assembly import read_tokenizers
from lightweight_engine.core.models import ModelLibrary
from lightweight_engine.core.tokenizer_files import TOKENIZERS, PinnedFile, fetch, tokenizer_folder
from lightweight_engine.errors import DownloadError, ModelNotFoundError
from lightweight_engine.flux.tokenizers import CLIPTokenizer

BODY = b"a file" * 5000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """``host:port`` of a server, and the folder that it serves."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "file").write_bytes(BODY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def test_a_file_is_fetched_once(site: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = site
    target = tmp_path / "cache" / "deep" / "file"
    assert fetch(f"http://{name}/file", target, sha256=SHA256, size=len(BODY), allow=[name]) == target
    assert target.read_bytes() == BODY
    (folder / "file").unlink()
    fetch(f"http://{name}/file", target, sha256=SHA256, size=len(BODY), allow=[name])
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_spoilt_copy_is_fetched_anew(site: tuple[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"b" + BODY[1:])
    fetch(f"http://{site[0]}/file", target, sha256=SHA256, size=len(BODY), allow=[site[0]])
    assert target.read_bytes() == BODY


@pytest.mark.parametrize(
    ("path", "sha256", "size", "words"),
    [
        ("file", "0" * 64, len(BODY), "not the pinned file"),
        ("file", SHA256, len(BODY) - 1, "more than"),
        ("file", SHA256, len(BODY) + 1, "not the pinned file"),
        ("missing", SHA256, len(BODY), "404"),
    ],
)
def test_what_does_not_fit_leaves_nothing(
    site: tuple[str, Path], tmp_path: Path, path: str, sha256: str, size: int, words: str
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DownloadError, match=words):
        fetch(f"http://{site[0]}/{path}", cache / "file", sha256=sha256, size=size, allow=[site[0]])
    assert list(cache.iterdir()) == []


def test_an_older_file_survives_a_failure(site: tuple[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"older")
    with pytest.raises(DownloadError):
        fetch(f"http://{site[0]}/file", target, sha256="0" * 64, size=len(BODY), allow=[site[0]])
    assert target.read_bytes() == b"older"


def test_a_place_that_cannot_be_written(site: tuple[str, Path], tmp_path: Path) -> None:
    (tmp_path / "wall").write_text("not a folder")
    with pytest.raises(DownloadError, match="cannot be written"):
        fetch(f"http://{site[0]}/file", tmp_path / "wall" / "file", sha256=SHA256, size=len(BODY), allow=[site[0]])


VOCAB = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
FILES = {"vocab.json": json.dumps(VOCAB).encode(), "merges.txt": b"#version: 0.2\n"}


def pinned(name: str, site: str, *paths: str) -> PinnedFile:
    body = FILES[name]
    urls = tuple(f"http://{site}/{path}" for path in paths)
    return PinnedFile(name, hashlib.sha256(body).hexdigest(), len(body), urls)


class TestTokenizerFolder:
    def test_fetched_from_the_first_place_that_has_it(
        self, site: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name, folder = site
        for file, body in FILES.items():
            (folder / file).write_bytes(body)
        files = (pinned("vocab.json", name, "gone", "vocab.json"), pinned("merges.txt", name, "merges.txt"))
        monkeypatch.setitem(TOKENIZERS, "clip", files)
        models, cache = tmp_path / "models", tmp_path / "cache"
        models.mkdir()
        found = tokenizer_folder("clip", [models], cache, allow=[name])
        assert found == cache / "tokenizers" / "clip_l"
        assert CLIPTokenizer.load(found).encode("a") == [2]
        assert list(models.iterdir()) == []  # a models folder is the user's
        assert tokenizer_folder("clip", [models], cache, offline=True) == found

    def test_the_users_own_comes_first(self, tmp_path: Path) -> None:
        own = tmp_path / "models" / "tokenizers" / "clip_l"
        own.mkdir(parents=True)
        for file, body in FILES.items():
            (own / file).write_bytes(body)
        assert tokenizer_folder("clip", [tmp_path / "models"], tmp_path / "cache", offline=True) == own

    @pytest.mark.parametrize(("kind", "names"), [("clip", ("vocab.json", "merges.txt")), ("t5", ("tokenizer.json",))])
    def test_offline_says_where_to_put_it(self, tmp_path: Path, kind: str, names: tuple[str, ...]) -> None:
        with pytest.raises(ModelNotFoundError, match="offline") as caught:
            tokenizer_folder(kind, [tmp_path / "models"], tmp_path / "cache", offline=True)
        assert str(tmp_path / "models" / "tokenizers") in str(caught.value)
        assert all(name in str(caught.value) for name in names)

    def test_a_failed_fetch_says_so_too(
        self, site: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As an engine reads them, from private hosts where its settings allow them."""
        monkeypatch.setitem(TOKENIZERS, "clip", (pinned("vocab.json", site[0], "gone"),))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        models = ModelLibrary([save_family(tmp_path)]).choose()
        for allow, told in (((site[0],), r"404.*put vocab\.json"), ((), r"add it to allow_hosts.*put vocab\.json")):
            config = Config(models_dir=tmp_path, cache_dir=tmp_path / "cache", allow_hosts=allow)
            with pytest.raises(DownloadError, match=told):
                read_tokenizers(config, models)


def test_the_pins_are_well_formed() -> None:
    for files in TOKENIZERS.values():
        for file in files:
            assert len(bytes.fromhex(file.sha256)) == 32
            assert file.urls
            assert all(url.startswith("https://") and url.endswith(file.name) for url in file.urls)
