"""Blocks that are copied are what they would be, had each been built."""

from __future__ import annotations

import torch
from torch import nn

from lightweight_engine.flux.blocks import repeated
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.transformer import DoubleBlock


class Settled(nn.Module):
    """Has all that a module can: settings, parameters with and without gradients, buffers, and modules below it."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 3
        self.names = ["a"]
        self.inner = nn.Sequential(nn.Linear(3, 2), nn.GELU())
        self.fixed = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.nothing = None
        self.register_parameter("missing", None)
        self.register_buffer("table", torch.zeros(4), persistent=False)


def facts(module: nn.Module) -> list[tuple[object, ...]]:
    return [
        (path, type(each), each.training, repr(each), list(each._parameters), list(each._buffers), vars(each).keys())
        for path, each in module.named_modules()
    ]


def test_copies_are_like_the_first_and_share_nothing() -> None:
    with torch.device("meta"):
        first, second, third = repeated(3, Settled)
    assert facts(first) == facts(second) == facts(third)
    assert list(first.state_dict()) == list(second.state_dict())
    modules = [each for made in (first, second, third) for each in made.modules()]
    parameters = [each for made in (first, second, third) for each in (*made.parameters(), *made.buffers())]
    assert len(set(map(id, modules))) == len(modules) and len(set(map(id, parameters))) == len(parameters)
    assert [each.requires_grad for each in second.parameters()] == [each.requires_grad for each in first.parameters()]
    assert second.inner[0] is second._modules["inner"]._modules["0"]  # type: ignore[union-attr,index]

    second.inner[0].weight = nn.Parameter(torch.ones(2, 3))
    second.names.append("b")
    second.register_forward_pre_hook(lambda *_: None)
    second.register_buffer("kept", torch.zeros(1))
    second.eval()
    for other in (first, third):
        assert other.inner[0].weight.is_meta and other.names == ["a"] and other.training
        assert not other._forward_pre_hooks and "kept" not in dict(other.named_buffers())


def test_a_copied_block_computes_as_a_built_one() -> None:
    params = FluxParams(
        vec_in_dim=8, context_in_dim=8, hidden_size=16, mlp_hidden=32, num_heads=2, depth=2, depth_single_blocks=1,
        axes_dim=(2, 2, 4),
    )  # fmt: skip
    built = DoubleBlock(params)
    with torch.device("meta"):
        _, copied = repeated(2, lambda: DoubleBlock(params))
    copied.load_state_dict(built.state_dict(), assign=True)
    x = torch.randn(1, 3, 16)
    assert torch.equal(copied.img_mlp(x), built.img_mlp(x)) and repr(copied) == repr(built)


def test_with_numbers_each_draws_its_own() -> None:
    first, second = repeated(2, lambda: nn.Linear(4, 4))
    assert not torch.equal(first.weight, second.weight)
    assert not list(repeated(0, lambda: nn.Linear(4, 4))) and not list(repeated(-1, lambda: nn.Linear(4, 4)))
