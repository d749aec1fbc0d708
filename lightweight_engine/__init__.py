"""A Flux.1 image engine: text-to-image from the model files that people already have.

    from lightweight_engine import Config, LightweightEngine

    engine = LightweightEngine(Config())
    engine.setup()
    images = engine.generate(prompt="a smiling woman with red hair", seed=1)

Names are imported when they are first used, so that importing the package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "LightweightEngine": "core.engine",
    "Config": "config",
    "EngineConfig": "config",
    "GenerationRequest": "request",
    "GenerationResult": "results",
    "UpscaleRequest": "request",
    "UpscaleResult": "results",
    "Interrupt": "core.progress",
    "LoraSpec": "lora_spec",
    "Progress": "results",
    "EngineError": "errors",
}

__all__ = [
    "Config",
    "EngineConfig",
    "EngineError",
    "GenerationRequest",
    "GenerationResult",
    "Interrupt",
    "LightweightEngine",
    "LoraSpec",
    "Progress",
    "UpscaleRequest",
    "UpscaleResult",
    "__version__",
]

if TYPE_CHECKING:
    from .config import Config, EngineConfig
    from .core.engine import LightweightEngine
    from .core.progress import Interrupt
    from .errors import EngineError
    from .lora_spec import LoraSpec
    from .request import GenerationRequest, UpscaleRequest
    from .results import GenerationResult, Progress, UpscaleResult


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .backend.processes import collector_paused

    with collector_paused():
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
