"""A LoRA as a caller asks for it. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from .errors import RequestError
from .fields import SHA256, Frozen, no_switch

MAX_LORA_SCALE = 100.0

LoraScale = Annotated[
    float, Field(ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE, allow_inf_nan=False), BeforeValidator(no_switch)
]


class LoraSpec(Frozen):
    """A LoRA and how strongly it acts: a file of the models folder by ``name``, or one at a ``url``.

    Attributes:
        scale: strength on the transformer.
        text_scale: strength on the text encoders; left out, the same.
        sha256: of the file, in hex; another file is refused.
    """

    name: str | None = Field(default=None, min_length=1, max_length=4096)
    url: str | None = Field(default=None, max_length=8192, repr=False)
    scale: LoraScale = 1.0
    text_scale: LoraScale | None = None
    sha256: str | None = Field(default=None, pattern=SHA256)

    @model_validator(mode="after")
    def _one_source(self) -> LoraSpec:
        if (self.name is None) == (self.url is None):
            raise ValueError("a LoRA is given by its name or by its url, one of both")
        return self

    @classmethod
    def parse(cls, text: str) -> LoraSpec:
        """From ``NAME_OR_URL[:SCALE]``, as the command line has it.

        Raises:
            RequestError: the scale is out of bounds.
        """
        source, colon, tail = text.rpartition(":")
        scale = _number(tail) if colon else None
        source = text if scale is None else source
        scale = 1.0 if scale is None else scale
        return cls(url=source, scale=scale) if "://" in source else cls(name=source, scale=scale)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _spec_of(given: Any) -> Any:
    """A LoRA as text or as a mapping."""
    if not isinstance(given, str | Mapping | LoraSpec):
        raise ValueError("a LoRA is a name or an address, with :SCALE if that is not 1, or an object of its fields")
    try:
        if isinstance(given, str):
            return LoraSpec.parse(given)
        return given if isinstance(given, LoraSpec) else LoraSpec(**{str(name): given[name] for name in given})
    except RequestError as error:
        raise ValueError(str(error)) from None


SpelledLora = Annotated[LoraSpec, BeforeValidator(_spec_of)]
"""A LoRA of a request, in any of its spellings."""
