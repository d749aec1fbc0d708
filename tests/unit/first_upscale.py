"""The first jobs of a process of their own, where spandrel is not imported yet."""

from __future__ import annotations

import sys
from pathlib import Path

from lightweight_engine import Config, LightweightEngine


def what_is_imported(models_dir: str) -> dict[str, bool]:
    """Whether spandrel is, after each kind of job."""
    folder = Path(models_dir)
    config = Config(models_dir=folder, cache_dir=folder / "cache", device="cpu", offline=True, hr_upscaler="4x-Small")
    engine, found = LightweightEngine(config), {}
    engine.setup()
    found["an engine"] = "spandrel" in sys.modules
    small = {"prompt": "a", "width": 64, "height": 64, "steps": 1, "hr_steps": 1, "seed": 3}
    engine.run(engine.request(**small))
    found["a plain job"] = "spandrel" in sys.modules
    for name in ("Latent", "Lanczos", "4x-Small"):
        engine.run(engine.request(**small, hr_scale=1.5, hr_upscaler=name))
        found[name] = "spandrel" in sys.modules
    return found
