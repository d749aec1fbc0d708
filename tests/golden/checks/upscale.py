"""Upscalers: their networks, one tiled pass, passes until a size is reached, and resizing by them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from goldens import Case, golden_dir
from PIL import Image

from lightweight_engine.upscalers.networks import NetworkUpscaler, Tiling, open_network
from lightweight_engine.upscalers.resampling import to_image, to_levels
from lightweight_engine.upscalers.resizing import resize
from lightweight_engine.upscalers.upscaler import NONE, PLAIN, Upscaler

pytest.importorskip("spandrel")

WITHOUT_NETWORK = {plain.name: plain for plain in PLAIN}


@cache
def network(name: str) -> Any:
    return open_network(Path(golden_dir() / "pipelines" / "models" / f"{name}.pth"))


def upscaler(case: Case) -> Upscaler | None:
    """As the reference chooses: the name None resizes plainly, one that is unknown is the upscaler None."""
    name = case["model"]
    if name in WITHOUT_NETWORK:
        return None if name == "None" and case["kind"] == "resize_image_mode0" else WITHOUT_NETWORK[name]
    if not (golden_dir() / "pipelines" / "models" / f"{name}.pth").exists():
        return NONE
    return NetworkUpscaler(name, network(name), Tiling(case["tile"], case["overlap"]))


def check(case: Case) -> None:
    if case["kind"] == "spandrel_forward":
        check_forward(case)
        return
    chosen = upscaler(case)
    number = case.id.removeprefix("pil_")
    source = Image.fromarray(case.array(f"pil_in_{number}"))
    if case["kind"] == "do_upscale":
        assert isinstance(chosen, NetworkUpscaler)
        made = to_image(chosen.once(to_levels(source)))
    elif case["kind"] == "upscale":
        assert chosen is not None
        made = to_image(chosen.upscale(to_levels(source), case["scale"]))
    else:
        made = resize(source, tuple(case["to"]), upscaler=chosen)
    assert list(made.size) == case["out"]
    golden = case.array(f"pil_out_{number}")
    assert np.abs(np.array(made).astype(int) - golden).max() <= 1


@torch.inference_mode()
def check_forward(case: Case) -> None:
    odd = case.id.startswith("raw_odd_")
    name = case.get("model") or case.id.removeprefix("raw_odd_")
    found = network(name)
    assert case.get("arch", found.architecture.name) == found.architecture.name
    assert case.get("scale", found.scale) == found.scale
    made = found(torch.from_numpy(case.array("raw_odd_in" if odd else "raw_in")))
    golden = torch.from_numpy(case.array(case.id))
    torch.testing.assert_close(made, golden, rtol=0, atol=1e-4)
