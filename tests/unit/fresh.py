"""Functions of tests that are called in a process of their own, where memory is not that of the tests before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parents[1]


def called_fresh(function: Callable[..., Any], *args: Any) -> Any:
    """What ``function(*args)`` returns in a fresh process; it is of a module, and all of it is JSON."""
    code = (
        f"import json, sys; sys.path[:0] = {[str(PROJECT), str(FOLDER)]!r}\n"
        f"from {function.__module__} import {function.__name__} as called\n"
        f"print('RETURNED', json.dumps(called(*json.loads(sys.argv[1]))))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(args)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RETURNED ")[2])


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process that are in memory; fields as in /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
