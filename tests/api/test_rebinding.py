"""48 over HTTP: a name that is public when it is checked, and of this machine when it is asked for again.

The service runs with a resolver of the test's own, put under Python's by a ``sitecustomize``: for one name it answers a
public address once, and from then on the loopback address of a server that holds a secret. Connections are made as
ever, but for the public address, which nobody may reach from a test: that one is written down and refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Site, serving
from running_service import PROJECT, SMALL, Running, service

NAME, PUBLIC = "rebinding.example", "93.184.216.34"
SITECUSTOMIZE = f"""
import pathlib, socket

here = pathlib.Path(__file__).parent
usual_lookup, usual_connection = socket.getaddrinfo, socket.create_connection


def note(name, text):
    with (here / name).open("a") as file:
        file.write(text + "\\n")


def lookup(host, port, *rest, **options):
    if host != {NAME!r}:
        return usual_lookup(host, port, *rest, **options)
    first = not (here / "looked-up").exists()
    note("looked-up", host)
    return usual_lookup({PUBLIC!r} if first else "127.0.0.1", port, *rest, **options)


def connection(address, *rest, **options):
    note("connected", address[0])
    if address[0] == {PUBLIC!r}:
        raise ConnectionRefusedError(111, "Connection refused")
    return usual_connection(address, *rest, **options)


socket.getaddrinfo, socket.create_connection = lookup, connection
"""
FIELDS = {
    "a LoRA": lambda url: {"lora_urls": [url]},
    "a LoRA by object": lambda url: {"loras": [{"url": url, "scale": 1}]},
    "a start picture": lambda url: {"image": url},
}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving() as running:
        running.files["secret.safetensors"] = (PROJECT / "lightweight_engine/tiny/Lora/hat.safetensors").read_bytes()
        yield running


@pytest.fixture(scope="module")
def resolver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resolver")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, resolver: Path, _same_environment: None) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("rebinding")
    with service(folder, "--set", "fetch_pictures=true", PYTHONPATH=str(resolver)) as made:
        yield made.ready()


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize("what", FIELDS)
def test_the_checked_address_is_the_one_that_is_connected_to(
    running: Running, resolver: Path, site: Site, what: str
) -> None:
    for name in ("looked-up", "connected"):
        (resolver / name).unlink(missing_ok=True)
    fields = FIELDS[what](f"https://{NAME}/secret.safetensors?token=s3cret")
    pinned = running.generate(**fields)
    assert pinned.status == 424 and NAME in pinned.error["message"], pinned.body
    assert set(lines(resolver / "connected")) == {PUBLIC}, "the name was looked up once more to connect"
    rebound = running.generate(**fields)
    assert rebound.status == 403 and rebound.error["type"] == "BlockedURLError"
    assert set(lines(resolver / "connected")) == {PUBLIC} and len(lines(resolver / "looked-up")) >= 2
    assert site.asked == [] and b"s3cret" not in pinned.body + rebound.body
    assert running.post("/generate", SMALL).status == 200
