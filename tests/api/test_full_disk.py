"""59 over HTTP: no room for what is fetched. 507, nothing half written stays, and the next job is right."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Site, safetensors, serving
from running_service import PROJECT, SMALL, Running, service

TINY_LORA = PROJECT / "lightweight_engine" / "tiny" / "Lora" / "hat.safetensors"
ROOM = 800 << 10  # bytes: enough for a LoRA of the embedded model, and not for two
MOUNT = ["unshare", "-Urm", "sh", "-c", f'mount -t tmpfs -o size={ROOM} none "$0" && exec "$@"']


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving() as running:
        running.files["large.safetensors"] = safetensors(2 * ROOM)
        running.files["hat.safetensors"] = TINY_LORA.read_bytes()
        yield running


def fetched(running: Running, site: Site, name: str) -> tuple[int, str]:
    answer = running.generate(lora_urls=[site.url(name)])
    told = answer.json["loras"][0]["sha256"] if answer.status == 200 else answer.error["type"]
    return answer.status, told


def left_in(cache: Path) -> list[str]:
    """Files of downloads: whole ones and parts."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 4096)


@pytest.mark.parametrize("lengths", [True, False], ids=["its size is told", "its size is not told"])
def test_a_small_file_system(tmp_path: Path, site: Site, lengths: bool) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    if subprocess.run([*MOUNT, str(cache), "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be made here")
    site.lengths = lengths
    options = ("--set", f"allow_hosts={site.name}", "--set", f"cache_dir={cache}")
    with service(tmp_path, *options, within=[*MOUNT, str(cache)]) as running:
        running.ready()
        seen = Path(f"/proc/{running.process.pid}/root") / cache.relative_to("/")
        before = running.generate(subseed=0).json["images"]
        assert fetched(running, site, "large.safetensors") == (507, "CacheStorageError")
        assert left_in(seen) == [] and running.get("/readyz").status == 200
        assert fetched(running, site, "hat.safetensors")[0] == 200  # it fits, now that nothing is in its way
        fill(seen / "of-another-program")
        assert fetched(running, site, "large.safetensors") == (507, "CacheStorageError")
        assert running.generate(subseed=0, prompt="words that were not seen before").status == 200
        assert running.generate(subseed=0).json["images"] == before
        assert running.get("/models/status").json["restarts"] == 0
        assert running.stop() == 0


def test_a_limit_on_what_the_worker_may_write(tmp_path: Path, site: Site) -> None:
    """What a quota does: the disk has room, and a write fails all the same."""
    site.lengths = True
    options = ("--set", f"allow_hosts={site.name}", "--set", f"cache_dir={tmp_path / 'cache'}")
    with service(tmp_path, *options) as running:
        running.ready()
        before = running.generate(subseed=0).json["images"]
        usual = resource.prlimit(running.worker, resource.RLIMIT_FSIZE, (100_000, -1))
        answer = running.generate(lora_urls=[site.url("hat.safetensors")])
        assert answer.status == 507 and "free space for cache_dir" in answer.error["message"]
        assert left_in(tmp_path / "cache") == []
        resource.prlimit(running.worker, resource.RLIMIT_FSIZE, usual)
        assert fetched(running, site, "hat.safetensors")[0] == 200
        assert running.generate(subseed=0).json["images"] == before
        assert running.stop() == 0


def test_a_folder_of_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    """507 before anything is drawn; what asks for no file is drawn all the same."""
    (tmp_path / "file").write_bytes(b"")
    with service(tmp_path, "--set", f"output_dir={tmp_path / 'file' / 'pictures'}") as running:
        running.ready()
        assert any("save_images will be refused" in line for line in running.lines)
        answer = running.post("/sdapi/v1/txt2img", {**SMALL, "save_images": True})
        assert answer.status == 507 and answer.json["error"]["type"] == "OutputError", answer.body
        assert answer.error["param"] == "save_images" and answer.error["message"].startswith(
            "save_images: cannot write"
        )
        assert str(tmp_path) not in answer.body.decode()
        assert running.post("/sdapi/v1/txt2img", SMALL).status == 200


def test_pictures_that_cannot_be_kept_are_answered_with_a_warning(tmp_path: Path) -> None:
    with service(tmp_path) as running:
        running.ready()
        usual = resource.prlimit(running.worker, resource.RLIMIT_FSIZE, (100, -1))
        answer = running.post("/sdapi/v1/txt2img", {**SMALL, "save_images": True})
        assert answer.status == 200 and len(answer.json["images"]) == 1, answer.body
        assert answer.json["saved"] == [] and "not all were saved" in str(answer.json["warnings"])
        resource.prlimit(running.worker, resource.RLIMIT_FSIZE, usual)
        assert len(running.post("/sdapi/v1/txt2img", {**SMALL, "save_images": True}).json["saved"]) == 1


def fill(path: Path) -> None:
    """Take all the room that is left."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(os.urandom(4096))
        except OSError:
            pass
