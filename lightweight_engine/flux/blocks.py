"""Blocks that are alike, built once: the others are copies of the first, as long as it has no numbers yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import nn

Block = TypeVar("Block", bound=nn.Module)


def repeated(count: int, make: Callable[[], Block]) -> Iterator[Block]:
    """``count`` modules as ``make`` builds them, each with parameters of its own.

    On the meta device, where a model is built before it is loaded, all but the first are copied from that: to build the
    57 blocks of the transformer takes three times as long. With numbers each is made anew, as each draws its own.
    """
    if count > 0:
        first = make()
        yield first
        has_numbers = any(not tensor.is_meta for tensor in (*first.parameters(), *first.buffers()))
        for _ in range(count - 1):
            yield make() if has_numbers else _copied(first)


def _copied(module: Block) -> Block:
    """A module with the same settings, and with modules and tensors of its own."""
    made = module.__class__.__new__(module.__class__)
    state = made.__dict__
    for name, value in module.__dict__.items():
        state[name] = value.copy() if isinstance(value, (dict, set, list)) else value
    for name, parameter in made._parameters.items():
        if parameter is not None:
            made._parameters[name] = nn.Parameter(parameter.data, parameter.requires_grad)
    for name, buffer in made._buffers.items():
        if buffer is not None:
            made._buffers[name] = buffer.clone()
    for name, child in made._modules.items():
        if child is not None:
            made._modules[name] = _copied(child)
    return made
