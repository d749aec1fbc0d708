"""The page about the service: its examples run, and its tables name what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from running_service import PROJECT, Running

from lightweight_engine.apps.server.faults import Refusal
from lightweight_engine.config import EngineConfig, default_cache_dir
from lightweight_engine.errors import ConfigError, EngineError, ModelNotFoundError, UnsupportedCheckpointError

PAGE = (PROJECT / "docs" / "service.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples are written with curl")
def test_the_examples_run(server: Running, tmp_path: Path) -> None:
    script = "set -e\n" + "\n".join(EXAMPLES).replace("localhost:7860", f"localhost:{server.port}")
    script = script.replace("curl -s ", "curl -s -S -w '\\n%{http_code}\\n' ")
    script = script.replace(" > job.json", " | head -1 > job.json")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=99, check=False)
    assert done.returncode == 0, done.stderr
    statuses = re.findall(r"^(\d{3})$", done.stdout, re.MULTILINE)
    assert len(statuses) == len(re.findall(r"^curl", "\n".join(EXAMPLES), re.MULTILINE)) - 1  # one goes into a file
    assert set(statuses) == {"200", "409"} and statuses.count("409") == 3  # the job is over by then
    assert (tmp_path / "woman.webp").read_bytes()[8:12] == b"WEBP"
    assert (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG"


def test_settings_and_metrics_are_those_that_there_are(server: Running) -> None:
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| ", PAGE.partition("## Operate")[2], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named <= set(EngineConfig.model_fields) and len(named) >= 9
    told = server.get("/metrics").body.decode()
    assert {f"# HELP {name} " for name in re.findall(r"`(lwe_\w+)`", PAGE)} <= set(re.findall(r"# HELP \w+ ", told))


def test_every_status_is_in_the_table(server: Running) -> None:
    rows = re.findall(r"^\| ([\d, ]+) \|", PAGE, re.MULTILINE)
    told = {int(status) for row in rows for status in row.split(",")}
    errors = [EngineError, Refusal]
    for error in errors:
        errors += error.__subclasses__()
    described = [
        route["responses"] for path in server.get("/openapi.json").json["paths"].values() for route in path.values()
    ]
    known = {int(status) for responses in described for status in responses if status >= "400"}
    assert told >= {error.http_status for error in errors} | known | {405, 500}
    refused = server.ask("PATCH", "/generate")
    assert (refused.status, refused.headers["allow"]) == (405, "POST")


def test_where_the_api_is_described(server: Running) -> None:
    """The log of the start and the README name an address that there is."""
    started = next(json.loads(line) for line in server.lines if '"listening"' in line)
    told = re.findall(r"http://127\.0\.0\.1:7860, (/\S+)", (PROJECT / "README.md").read_text(encoding="utf-8"))
    assert [f"{started['url']}{path}" for path in told] == [started["api"]]
    assert server.get(told[0]).json["info"]["title"] == "lightweight-engine"


def test_the_unit_of_systemd_ends_and_restarts_as_the_page_says() -> None:
    unit = re.findall(r"```ini\n(.*?)```", PAGE, re.DOTALL)[0]
    rows = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    assert float(rows["TimeoutStopSec"]) == EngineConfig().drain_seconds + 15, "killed before it has drained"
    hopeless = {ConfigError.exit_code, ModelNotFoundError.exit_code, UnsupportedCheckpointError.exit_code}
    assert {int(code) for code in rows["RestartPreventExitStatus"].split()} == hopeless
    assert rows["Environment"] == "XDG_CACHE_HOME=/var/cache"
    assert default_cache_dir().name == rows["CacheDirectory"]
    assert rows["DynamicUser"] == "yes" and "WantedBy" in rows, "not as root; and it can be enabled"
