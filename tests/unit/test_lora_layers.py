"""LoRAs attached to layers: what a changed layer computes, on every storage format, and that nothing is left after."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from lora_models import numbers
from torch import Tensor, nn

from lightweight_engine.backend.linear import PackedLinear, cast_at_use, is_product, passing_numbers
from lightweight_engine.backend.linear import numbers as numbers_of
from lightweight_engine.backend.lora import Change, Delta, merged
from lightweight_engine.backend.lora_algorithms import (
    Dora,
    Full,
    Generalised,
    Hadamard,
    Kronecker,
    LowRank,
    Orthogonal,
    Replacement,
    Swapped,
)
from lightweight_engine.backend.lora_layers import RANKS, attach, build_programs, cost
from lightweight_engine.backend.nf4 import FourBit
from lightweight_engine.backend.packed import Spec
from lightweight_engine.backend.quantize import quantize

CPU = torch.device("cpu")
OUT, IN = 96, 64
STORAGES = ["fp32", "bf16", "nf4", "fp4", "fp8_e4m3", "fp8_e5m2", "gguf:Q8_0", "gguf:Q4_0"]
LOW = LowRank(numbers(4, IN), numbers(OUT, 4) * 0.05, 0.5)

DELTAS: dict[str, Delta] = {
    "lora": LOW,
    "loha": Hadamard(tuple((numbers(OUT, 2, seed=n) * 0.1, numbers(2, IN, seed=n)) for n in (1, 2))),  # type: ignore[arg-type]
    "lokr": Kronecker((numbers(8, 8) * 0.1,), (numbers(12, 2), numbers(2, 8)), 0.5),
    "glora": Generalised((numbers(IN, 3) * 0.05, numbers(3, IN) * 0.05), (numbers(OUT, 3) * 0.05, numbers(3, IN))),
    "oft": Orthogonal(numbers(12, 8, 8) * 0.05, IN),
    "boft": Orthogonal(numbers(2, 12, 8, 8) * 0.05, IN),
    "dora by rows": Dora(LOW, numbers(OUT, 1).abs()),
    "dora by columns": Dora(LOW, numbers(1, IN).abs()),
    "exact dora": Dora(LOW, numbers(OUT, 1).abs(), exact=True),
    "difference": Full(numbers(OUT, IN) * 0.05),
    "replacement": Replacement(numbers(OUT, IN)),
    "swapped": Swapped(LOW),
}


class Net(nn.Module):
    """A linear and a norm, as networks have them."""

    def __init__(self, storage: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        plain = nn.Linear(IN, OUT)
        self.norm = nn.LayerNorm(OUT)
        self.linear: nn.Module = plain
        if storage == "bf16":
            plain.weight.data = plain.weight.data.bfloat16()
            cast_at_use(self, torch.float32)
        elif storage != "fp32":
            self.linear = PackedLinear(quantize(plain.weight.detach(), storage), plain.bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def weight(net: Net) -> Tensor:
    return numbers_of(net.linear, torch.float32, CPU)  # type: ignore[arg-type]


def bias(net: Net) -> Tensor:
    return net.linear.bias.detach()  # type: ignore[union-attr,return-value]


X = numbers(2, 5, IN)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", DELTAS)
def test_a_changed_linear_computes_with_the_merged_weight(name: str, storage: str) -> None:
    net = Net(storage)
    before = net(X)
    changes = [(Change(DELTAS[name]), 0.7)]
    expected = F.linear(X, merged(weight(net), changes), bias(net))
    attached = attach(net, {"linear.weight": changes}, device=CPU, dtype=torch.float32)
    torch.testing.assert_close(net.linear(X), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    attached.close()
    assert torch.equal(net(X), before)
    assert "forward" not in vars(net.linear)


@pytest.mark.parametrize("names", [("lora", "lokr"), ("lora", "glora", "lora"), ("lora", "dora by rows"),
                                   ("lokr", "replacement"), ("replacement", "lora"), ("loha", "lora")])  # fmt: skip
def test_several_act_in_their_order(names: tuple[str, ...]) -> None:
    net = Net("nf4")
    changes = [(Change(DELTAS[name]), strength) for name, strength in zip(names, (0.7, -0.4, 1.2), strict=False)]
    expected = F.linear(X, merged(weight(net), changes), bias(net))
    attach(net, {"linear.weight": changes}, device=CPU, dtype=torch.float32)
    torch.testing.assert_close(net.linear(X), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_parts_of_a_fused_weight_are_changed_alone() -> None:
    net = Net("gguf:Q8_0")
    part = LowRank(numbers(2, IN), numbers(32, 2))
    kronecker = Kronecker((numbers(4, 8),), (numbers(8, 8),))
    changes = [(Change(part, (32, 64)), 1.0), (Change(kronecker, (64, 96)), 0.5)]
    before = net.linear(X)
    expected = F.linear(X, merged(weight(net), changes), bias(net))
    attach(net, {"linear.weight": changes}, device=CPU, dtype=torch.float32)
    torch.testing.assert_close(net.linear(X), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(net.linear(X)[..., :32], before[..., :32])


def test_biases_and_scales_of_norms() -> None:
    net = Net("nf4")
    before = net(X)
    deltas = {
        "linear.bias": Full(numbers(OUT)),
        "norm.weight": Replacement(numbers(OUT)),
        "norm.bias": Full(numbers(OUT)),
    }
    changes = {name: [(Change(delta), 0.5)] for name, delta in deltas.items()}
    linear = net.linear(X) + 0.5 * numbers(OUT)
    expected = F.layer_norm(linear, (OUT,), numbers(OUT), 0.5 * numbers(OUT))
    attached = attach(net, changes, device=CPU, dtype=torch.float32)
    torch.testing.assert_close(net(X), expected)
    attached.close()
    assert torch.equal(net(X), before)


def test_a_bias_beside_dora() -> None:
    net = Net("fp32")
    changes = {
        "linear.weight": [(Change(DELTAS["dora by rows"]), 0.5)],
        "linear.bias": [(Change(Full(numbers(OUT))), 1.0)],
    }
    expected = F.linear(X, merged(weight(net), changes["linear.weight"]), bias(net) + numbers(OUT))
    attach(net, changes, device=CPU, dtype=torch.float32)
    torch.testing.assert_close(net.linear(X), expected, rtol=1e-4, atol=1e-4)


def test_a_norm_has_its_values_back_after_an_error() -> None:
    net = Net("fp32")
    held = net.norm.weight
    attach(net, {"norm.weight": [(Change(Full(numbers(OUT))), 1.0)]}, device=CPU, dtype=torch.float32)
    with pytest.raises(RuntimeError):
        net.norm(numbers(2, OUT + 1))
    assert net.norm.weight is held


def test_all_is_attached_or_nothing() -> None:
    net = Net("fp32")
    changes = {
        "linear.weight": [(Change(LOW), 1.0)],
        "norm.weight": [(Change(Full(numbers(OUT + 1))), 1.0)],
    }
    with pytest.raises(RuntimeError):
        attach(net, changes, device=CPU, dtype=torch.float32)
    assert "forward" not in vars(net.linear)


@pytest.mark.parametrize("name", DELTAS)
def test_what_is_held_is_what_was_reckoned(name: str) -> None:
    net = Net("nf4")
    changes = {"linear.weight": [(Change(DELTAS[name]), 1.0), (Change(LOW), 1.0)]}
    attach(net, changes, device=CPU, dtype=torch.float32)
    reckoned = cost(changes, {"linear.weight": (OUT, IN)}, itemsize=4)
    held = _tensors(vars(net.linear)["forward"])
    assert held <= reckoned.held <= 2.5 * held
    assert reckoned.room > 0


def _tensors(forward: object) -> int:
    """Bytes of the tensors that a layer's own ``forward`` holds, but for the biases."""
    if isinstance(forward, Tensor):
        return forward.nbytes
    if isinstance(forward, Delta):
        return forward.nbytes
    if isinstance(forward, Change):
        return _tensors(forward.delta)
    if isinstance(forward, tuple | list):
        return sum(map(_tensors, forward))
    fields = getattr(forward, "__dataclass_fields__", {})
    return sum(_tensors(getattr(forward, field)) for field in fields if field not in ("module", "bias", "forward"))


def test_half_precision_on_the_way() -> None:
    net = Net("nf4")
    changes = [(Change(DELTAS["lora"]), 1.0)]
    base = net.linear(X.bfloat16()).float()
    wanted = F.linear(X, DELTAS["lora"].change(weight(net), 1.0))
    attach(net, {"linear.weight": changes}, device=CPU, dtype=torch.bfloat16)
    changed = net.linear(X.bfloat16())
    assert changed.dtype == torch.bfloat16
    torch.testing.assert_close(changed.float() - base, wanted, rtol=0, atol=0.03 * float(base.abs().max()))


# --- added to a weight as it becomes numbers ----------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit weights take what is added, as they do on a GPU; plain torch adds it here."""
    monkeypatch.setattr(FourBit, "takes_added", lambda self, device: True)
    monkeypatch.setattr(FourBit, "_changed", Spec._changed)


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("names", [("lora",), ("lora", "lora"), ("glora",)])
@pytest.mark.parametrize("storage", ["nf4", "fp4"])
def test_low_ranks_are_added_to_numbers(storage: str, names: tuple[str, ...]) -> None:
    net = Net(storage)
    x = X.bfloat16()
    before, stored = net.linear(x), weight(net)
    changes = [(Change(DELTAS[name]), strength) for name, strength in zip(names, (0.7, -0.4), strict=False)]
    expected = merged(stored, changes)
    attached = attach(net, {"linear.weight": changes}, device=CPU, dtype=torch.bfloat16)
    linear: Any = net.linear
    assert "forward" not in vars(linear) and is_product(linear)
    torch.testing.assert_close(passing_numbers(linear, x).float(), expected, rtol=0.01, atol=0.01)
    assert torch.equal(weight(net), stored)
    assert torch.equal(net.linear(x), F.linear(x, passing_numbers(linear, x), linear.bias.bfloat16()))
    assert not torch.equal(net.linear(x), before)
    attached.close()
    assert torch.equal(net.linear(x), before)
    assert linear.added is None and "added" not in vars(linear)


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize(
    ("storage", "names", "leaf", "dtype"),
    [
        ("nf4", ("lora",), "weight", torch.float32),
        ("fp8_e4m3", ("lora",), "weight", torch.bfloat16),
        ("bf16", ("lora",), "weight", torch.bfloat16),
        ("nf4", ("dora by rows",), "weight", torch.bfloat16),
        ("nf4", ("lora", "lokr"), "weight", torch.bfloat16),
        ("nf4", ("lora", "difference"), "weight", torch.bfloat16),
        ("nf4", ("lora",), "bias", torch.bfloat16),
    ],
)
def test_others_have_a_forward(storage: str, names: tuple[str, ...], leaf: str, dtype: torch.dtype) -> None:
    net = Net(storage)
    changes = {"linear.weight": [(Change(DELTAS[name]), 1.0) for name in names]}
    if leaf == "bias":
        changes["linear.bias"] = [(Change(Full(numbers(OUT))), 1.0)]
    attach(net, changes, device=CPU, dtype=dtype)
    assert "forward" in vars(net.linear) and "added" not in vars(net.linear)


@pytest.mark.usefixtures("taken")
def test_at_hand_takes_the_place_of_what_was_added() -> None:
    net = Net("nf4")
    changes = {"linear.weight": [(Change(LOW), 1.0)]}
    attach(net, changes, device=CPU, dtype=torch.bfloat16).close()
    attach(net, changes, device=CPU, dtype=torch.bfloat16, at_hand=["linear.weight"])
    assert "forward" in vars(net.linear) and "added" not in vars(net.linear)


@pytest.mark.usefixtures("taken")
def test_what_was_unpacked_ahead_is_dropped_with_its_loras() -> None:
    net = Net("nf4")
    linear: Any = net.linear
    linear.ahead = mock.Mock(dtype=torch.bfloat16)
    attached = attach(net, {"linear.weight": [(Change(LOW), 1.0)]}, device=CPU, dtype=torch.bfloat16)
    assert linear.ahead.settle.call_count == 1
    attached.close()
    assert linear.ahead.settle.call_count == 2


@pytest.mark.usefixtures("taken")
def test_what_is_added_holds_what_was_reckoned() -> None:
    net = Net("nf4")
    changes = {"linear.weight": [(Change(LOW), 1.0), (Change(LOW), 0.5)]}
    attach(net, changes, device=CPU, dtype=torch.bfloat16)
    linear: Any = net.linear
    held, reckoned = sum(each.nbytes for each in linear.added), cost(changes, {"linear.weight": (OUT, IN)}, itemsize=2)
    assert held <= reckoned.held <= 1.5 * held


@pytest.mark.usefixtures("taken")
def test_a_warm_up_runs_the_programs_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each kind of weight, of the smallest one."""
    ran: list[tuple[int, ...]] = []
    monkeypatch.setattr(FourBit, "_changed", lambda self, parts, added, out: ran.append((*out.shape, *added[1].shape)))
    small, large = Net("nf4"), nn.Linear(IN, 2 * OUT, bias=False)
    large_packed = PackedLinear(quantize(large.weight.detach(), "nf4"), None)
    network = nn.ModuleList([small, large_packed, Net("fp8_e4m3")])
    build_programs(network, CPU, torch.float32)
    assert ran == []
    build_programs(network, CPU, torch.bfloat16)
    assert ran == [(OUT, IN, rank, IN) for rank in RANKS]
