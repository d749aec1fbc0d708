"""Weights that lie one behind another are one matrix, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from factories import T5, network
from torch import nn

from lightweight_engine.backend.streaming import Place, Unit, views
from lightweight_engine.backend.together import Neighbours, joint_weight, read_together
from lightweight_engine.flux.t5 import T5Encoder

CPU = torch.device("cpu")
NAMES = ("q", "k", "v")
ROWS = (64, 32, 64)
WIDTH = 16


def linears(dtype: torch.dtype = torch.float32) -> dict[str, nn.Linear]:
    """Three linears whose weights were placed by ``Neighbours``."""
    shapes = {name: (rows, WIDTH) for name, rows in zip(NAMES, ROWS, strict=True)}
    places = Neighbours([NAMES], dict.fromkeys(NAMES, dtype), shapes, CPU)
    made = {}
    for name in reversed(NAMES):  # in whatever order they are asked for
        place = places.place(name)
        assert place is not None and place.dtype == dtype
        linear = nn.Linear(WIDTH, shapes[name][0], bias=False)
        place.copy_(linear.weight.detach())
        linear.weight = nn.Parameter(place, requires_grad=False)
        made[name] = linear
    return {name: made[name] for name in NAMES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_are_one_matrix(dtype: torch.dtype) -> None:
    made = linears(dtype)
    joint = joint_weight(list(made.values()))
    assert joint is not None and joint.shape == (sum(ROWS), WIDTH)
    assert torch.equal(joint, torch.cat([linear.weight for linear in made.values()]))
    assert joint.data_ptr() == made["q"].weight.data_ptr()  # no copy
    x = torch.randn(3, WIDTH, dtype=dtype)
    parts = F.linear(x, joint).split(list(ROWS), dim=-1)
    for part, linear in zip(parts, made.values(), strict=True):
        torch.testing.assert_close(part, linear(x))


def moved(made: dict[str, nn.Linear]) -> None:
    made["k"].weight.data = made["k"].weight.detach().clone()


def swapped(made: dict[str, nn.Linear]) -> None:
    made["q"].weight.data, made["k"].weight.data = made["k"].weight.data, made["q"].weight.data


def other_dtype(made: dict[str, nn.Linear]) -> None:
    made["v"].weight.data = made["v"].weight.data.bfloat16()


def adapted(made: dict[str, nn.Linear]) -> None:
    made["v"].forward = lambda x: x  # type: ignore[method-assign]


def with_bias(made: dict[str, nn.Linear]) -> None:
    made["q"].bias = nn.Parameter(torch.zeros(ROWS[0]))


def of_another_kind(made: dict[str, nn.Linear]) -> None:
    made["q"].__class__ = type("Other", (nn.Linear,), {})


@pytest.mark.parametrize("change", [moved, swapped, other_dtype, adapted, with_bias, of_another_kind])
def test_what_is_not_one_matrix(change: Callable[[dict[str, nn.Linear]], None]) -> None:
    made = linears()
    change(made)
    assert joint_weight(list(made.values())) is None


@pytest.mark.parametrize(
    ("kept", "shapes"),
    [
        ({"q": torch.float32, "k": torch.float32}, {}),  # v is packed
        ({"q": torch.float32, "k": torch.bfloat16, "v": torch.float32}, {}),
        (dict.fromkeys(NAMES, torch.float32), {"v": (64, 8)}),
        (dict.fromkeys(NAMES, torch.float32), {"k": (1, WIDTH)}),  # in a slot the next one would begin later
    ],
)
def test_weights_that_lie_by_themselves(kept: dict[str, torch.dtype], shapes: dict[str, tuple[int, int]]) -> None:
    places = Neighbours([NAMES], kept, {**dict.fromkeys(NAMES, (64, WIDTH)), **shapes}, CPU)
    assert [places.place(name) for name in (*NAMES, "o")] == [None] * 4


def test_in_a_slot_they_are_neighbours_too() -> None:
    """As a ring and ``to_device`` lay a unit's tensors."""
    module = nn.ModuleDict(linears() | {"o": nn.Linear(WIDTH, WIDTH)})
    places = [Place(each._parameters, "weight") for each in module.values()]
    unit = Unit("unit", module, tuple(places))
    buffer = torch.empty(unit.slot_bytes, dtype=torch.uint8)
    for place, home in zip(places, views(buffer, [p.tensor for p in places]), strict=True):
        place.put(home)
    assert joint_weight([module[name] for name in NAMES]) is not None


def test_what_t5_reads_together() -> None:
    groups = read_together(network(T5Encoder, T5))
    assert len(groups) == 2 * T5.num_layers
    assert groups[0] == tuple(f"encoder.block.0.layer.0.SelfAttention.{name}.weight" for name in NAMES)
    assert groups[1] == tuple(f"encoder.block.0.layer.1.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1"))
