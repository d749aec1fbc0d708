"""What an engine does first in a process of its own, where torch has its own number of threads."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def threads_after(work: str, folder: str) -> tuple[int, int]:
    """The threads that are set, one more than torch takes by itself; and those that it has after some work."""
    import torch

    from lightweight_engine import Config, LightweightEngine

    places = {"models_dir": Path(folder), "cache_dir": Path(folder) / "cache"}
    config = Config(**places, device="cpu", offline=True, threads=torch.get_num_threads() + 1)
    engine, picture = LightweightEngine(config), Image.new("RGB", (64, 64))
    if work == "upscale":
        engine.upscale(picture, 2.0, "Lanczos")
    elif work == "find":
        engine.find(picture, engine.request(prompt="a", adetailer=True))
    return config.threads, torch.get_num_threads()
