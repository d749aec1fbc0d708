"""The golden text encoders, in float32, for the checks that encode."""

from __future__ import annotations

from functools import cache

from networks import network
from recorded_tokenizers import golden_tokenizers

from lightweight_engine.flux.text_encoders import TextEncoders


@cache
def text_encoders() -> TextEncoders:
    """Both encoders, computing in float32."""
    tokenizers = golden_tokenizers()
    return TextEncoders(network("clip_l"), tokenizers.clip, network("t5xxl"), tokenizers.t5)
