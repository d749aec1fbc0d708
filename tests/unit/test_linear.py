"""Linears as products that are taken apart: the same numbers as the module gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightweight_engine.backend.linear import CastLinear, PackedLinear, as_numbers, is_product
from lightweight_engine.backend.lora import Change
from lightweight_engine.backend.lora_algorithms import LowRank
from lightweight_engine.backend.lora_layers import attach
from lightweight_engine.backend.quantize import quantize


def linear(kind: str) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(64, 96).requires_grad_(False)
    if kind == "packed":
        return PackedLinear(quantize(plain.weight, "nf4"), plain.bias)
    if kind == "cast":
        plain.weight.data = plain.weight.bfloat16()
        plain.__class__ = CastLinear
    return plain


@pytest.mark.parametrize("kind", ["plain", "cast", "packed"])
def test_parts_are_those_of_the_whole(kind: str) -> None:
    module, x = linear(kind), torch.randn(2, 3, 64)
    whole, product = module(x), as_numbers(module, x)
    torch.testing.assert_close(torch.cat((product.rows(0, 32)(x), product.rows(32, None)(x)), dim=-1), whole)
    torch.testing.assert_close(product.beside(x[..., :40], x[..., 40:]), whole)

    torch.testing.assert_close(product.gelu(x), nn.functional.gelu(whole, approximate="tanh"))


def test_a_linear_with_a_branch_is_no_product() -> None:
    network = nn.Sequential(linear("plain"))
    change = Change(LowRank(torch.randn(2, 64), torch.randn(96, 2), 1.0))
    one = torch.ones(64)
    bare = network(one)
    for at_hand in ((), ("0.weight",)):
        attached = attach(
            network,
            {"0.weight": [(change, 1.0)]},
            device=torch.device("cpu"),
            dtype=torch.float32,
            at_hand=at_hand,
        )
        assert is_product(network[0]) == bool(at_hand)
        if at_hand:
            torch.testing.assert_close(as_numbers(network[0], one)(one), network(one))
        attached.close()
    assert is_product(network[0])
    torch.testing.assert_close(network(one), bare)
