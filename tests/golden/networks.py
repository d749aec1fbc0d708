"""The golden networks, loaded by our own loader with the sizes that ``models.json`` adds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from goldens import model_config, model_path

from lightweight_engine.backend.checkpoint import open_checkpoint
from lightweight_engine.flux.keymaps import find_parts
from lightweight_engine.flux.load import Storage, load_part


@cache
def network(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A golden network on the CPU; a case whose model is not in this copy of the goldens is skipped."""
    path = model_path(name)
    if not path.exists():
        pytest.skip(f"{path.name} is not in this copy of the goldens")
    (part,) = find_parts(open_checkpoint(path)).values()
    return load_part(replace(part, given=model_config(name)), Storage("auto", dtype), device=torch.device("cpu"))
