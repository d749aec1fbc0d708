"""What a request may ask for at most. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RequestError
from ..request import GenerationRequest

if TYPE_CHECKING:
    from ..config import EngineConfig


def check_limits(request: GenerationRequest, size: tuple[int, int], calls: int, config: EngineConfig) -> None:
    """Refuse a request that is larger than the configuration allows.

    Args:
        size: (height, width) in pixels.
        calls: evaluations of the network for one picture.

    Raises:
        RequestError: names the field, the limit, and the setting that holds it.
    """
    height, width = size
    for field, side in (("width", width), ("height", height)):
        if side > config.max_side:
            raise RequestError(
                f"{field}: {side} is over the limit of {config.max_side} pixels (max_side); ask for less", field=field
            )
    for field in ("prompt", "negative_prompt"):
        length = len(getattr(request, field))
        if length > config.max_prompt_chars:
            raise RequestError(
                f"{field}: {length:,} characters are over the limit of {config.max_prompt_chars:,} "
                "(max_prompt_chars); shorten it",
                field=field,
            )
    if request.num_outputs > config.max_outputs:
        raise RequestError(
            f"num_outputs: {request.num_outputs} is over the limit of {config.max_outputs} (max_outputs); ask for less",
            field="num_outputs",
        )
    cost = height * width / 1e6 * calls * request.num_outputs
    if cost > config.max_megapixel_steps:
        raise RequestError(
            f"steps: {width}x{height} x {calls} evaluations x {request.num_outputs} pictures is {cost:,.0f} "
            f"megapixel-steps, over the limit of {config.max_megapixel_steps:,.0f} (max_megapixel_steps); "
            "ask for fewer or smaller pictures",
            field="steps",
        )
