"""A predictor as this machine is configured. Loads torch only once the model's files are being read."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ...backend.processes import collector_paused
from ...backend.torch_import import import_torch
from ...config import EngineConfig
from ...core import head_start

if TYPE_CHECKING:
    from .predictor import Predictor


def start() -> Predictor:
    """A predictor that is ready, with its log on stderr as lines of JSON without secrets.

    Raises:
        EngineError: a setting is wrong, or a model file is missing.
    """
    config = EngineConfig.load()
    head_start.begin(config)
    with collector_paused(keep=True):
        import_torch()
        from ..server.logs import set_up_logs
        from .predictor import Predictor, secrets_of

    set_up_logs(secrets_of(config), logging.WARNING)
    predictor = Predictor(config)
    predictor.setup()
    return predictor
