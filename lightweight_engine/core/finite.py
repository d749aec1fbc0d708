"""Numbers that are not finite would become black pictures: the job ends instead, and names the file they came from.

Looked at once after each network, where it computed them, and never inside the loop of sampling, which the device would
then have to wait for. Nor does a device wait for the host to see what was found: that is settled when the network that
follows has been told what to do, and before a job ends. Texts that are remembered were looked at as they were encoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ModelError
from ..flux.keymaps import Role

if TYPE_CHECKING:
    from .networks import Networks


def check_finite(networks: Networks, role: Role, results: Iterable[Tensor], *, wait: bool = False) -> None:
    """Refuse what a network computed where a number of it is NaN or infinite, after what is not settled yet.

    Args:
        wait: for a device, as on a CPU.

    Raises:
        ModelError: names the network, its file, and what else can be the cause.
    """
    settle(networks)
    networks.unsettled.append((role, torch.stack([torch.isfinite(result).all() for result in results]).all()))
    if wait or networks.device.type == "cpu":
        settle(networks)


def settle(networks: Networks) -> None:
    """See what was found of all that networks have computed.

    Raises:
        ModelError: as ``check_finite``.
    """
    found = networks.unsettled[:]
    networks.unsettled.clear()
    for role, finite in found:
        if not finite:
            raise _error(networks, role)


def _error(networks: Networks, role: Role) -> ModelError:
    path = networks.models.own_parts[role].checkpoint.path
    half = networks.storage(role).compute == torch.float16
    others = "compute in bf16 or fp32 (float16 overflows), and " if half else ""
    return ModelError(
        f"{path.name}: the {role} computed numbers that are not finite, which would be a black picture; check the file "
        f"with `models verify {path}`; if it is whole, {others}leave out LoRAs and unusual sampler settings"
    )
