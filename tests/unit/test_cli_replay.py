"""``replay`` on the command line: LoRAs from the cache, and pictures without a sidecar. On the demonstration model."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from command_line import Cli, Done, command_line
from loopback import Site, serving
from lora_models import random_lora
from safetensors.torch import save

from lightweight_engine.core.models import TINY, ModelLibrary

pytestmark = pytest.mark.usefixtures("small_jobs")

SAME = "identical: every pixel is the same"
SMALL = ("--width", 64, "--height", 64, "--steps", 2, "--seed", 5, "--device", "cpu")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return command_line(capsys, tmp_path, monkeypatch)


def style() -> bytes:
    shapes = {role: part.shapes for role, part in ModelLibrary([TINY]).choose().parts.items()}
    return save(random_lora(shapes, seed=3))


def again(cli: Cli, path: object, *more: object) -> Done:
    return cli("replay", path, "--device", "cpu", *more)


class TestAddresses:
    @pytest.fixture
    def drawn(self, cli: Cli, tmp_path: Path) -> tuple[Site, str, tuple[object, ...]]:
        """A picture with a LoRA of a server that is gone by now, and the cache that has its file."""
        cache = ("--set", f"cache_dir={tmp_path / 'cache'}")
        with serving() as site:
            site.files["style.safetensors"] = style()
            address = f"{site.url('style.safetensors?token=SECRET')}:0.5"
            done = cli("generate", "a cat", *SMALL, "--lora", address, "--set", f"allow_hosts={site.name}", *cache)
        assert done.code == 0, done.err
        return site, done.out.strip(), cache

    def test_offline_the_cache_needs_no_leave_to_ask_a_host(
        self, cli: Cli, drawn: tuple[Site, str, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site, path, cache = drawn
        refused = again(cli, path, *cache)
        assert (refused.code, "add it to allow_hosts" in refused.err) == (6, True), refused.err
        monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("something was fetched"))
        done = again(cli, path, "--offline", *cache)
        assert (done.code, done.out.strip()) == (0, SAME), done.err
        assert len(site.asked) == 1

    def test_offline_what_the_cache_lacks_is_refused_as_before(
        self, cli: Cli, drawn: tuple[Site, str, tuple[object, ...]], tmp_path: Path
    ) -> None:
        _, path, cache = drawn
        (file,) = (tmp_path / "cache").rglob("content/*.safetensors")
        file.unlink()
        done = again(cli, path, "--offline", *cache)
        assert (done.code, "add it to allow_hosts" in done.err, "loading" in done.err) == (6, True, False), done.err
