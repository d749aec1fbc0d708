"""How a network is cut into units that can come and go: told by parameter names alone. Loads no torch.

``block`` units run in order, once a pass; ``conditioning`` ones (modulation and the embedders before it) run once
a job, after which sampling needs them no more. What belongs to no unit is always on the device.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from .keymaps import Role

Kind = Literal["block", "conditioning", "fixed"]


class UnitName(NamedTuple):
    """A unit by kind and by the path of the module whose call needs it; the path of what is fixed is empty."""

    kind: Kind
    path: str


# role -> (kind, pattern whose group 1 is the path of the module); the first that matches holds.
_RULES: dict[Role, tuple[tuple[Kind, re.Pattern[str]], ...]] = {
    "transformer": (
        (
            "conditioning",
            re.compile(
                r"(double_blocks\.\d+\.(?:img|txt)_mod|single_blocks\.\d+\.modulation|(?:time|vector|guidance)_in"
                r"|final_layer\.adaLN_modulation)\."
            ),
        ),
        ("block", re.compile(r"((?:double|single)_blocks\.\d+)\.")),
    ),
    "t5": (
        ("fixed", re.compile(r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.relative_attention_bias()\.")),
        ("block", re.compile(r"(encoder\.block\.\d+)\.")),
    ),
    "clip": (),
    "autoencoder": (),
}


def unit_of(role: Role, parameter: str) -> UnitName:
    """The unit that a parameter belongs to."""
    for kind, pattern in _RULES[role]:
        match = pattern.match(parameter)
        if match:
            return UnitName(kind, match.group(1) if kind != "fixed" else "")
    return UnitName("fixed", "")


def in_order(names: set[UnitName], kind: Kind) -> list[UnitName]:
    """The units of a kind in the order in which they run: double blocks before single ones, each by number."""

    def place(name: UnitName) -> tuple[bool, str, list[int]]:
        numbers = [int(number) for number in re.findall(r"\.(\d+)", name.path)]
        stem = re.sub(r"\d+", "", name.path)
        return (not numbers, stem.split(".")[0], numbers)

    return sorted((name for name in names if name.kind == kind), key=place)
