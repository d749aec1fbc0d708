"""When memory runs out although the plan said that it would not: another program took some, or a library needed more.

Once a job, unused memory is given back, less is kept on the device, and the same piece of work is done again: a stage,
or in sampling one evaluation of the network, which its latent and sigma determine. A second time ends the job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..backend.devices import available_memory, is_out_of_memory, release_cached, what_ran_out
from ..backend.host_memory import GIB
from ..errors import MemoryBudgetError
from .networks import Networks
from .plan import Plan, StageName, lowered

log = logging.getLogger(__name__)

T = TypeVar("T")


class Recovery:
    """Does pieces of a job's work.

    Attributes:
        plan: the one that is followed now.
    """

    def __init__(self, networks: Networks, plan: Plan, warnings: list[str]) -> None:
        self.plan = plan
        self._networks = networks
        self._warnings = warnings
        self._spent = False

    def __call__(self, stage: StageName, work: Callable[..., T], *args: Any) -> T:
        """What ``work(*args)`` returns.

        Raises:
            MemoryBudgetError: memory ran out a second time; the plan is shown.
        """
        while True:
            try:
                return work(*args)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = what_ran_out(error)
            # Not handled above: an error that is being handled remembers the frames of the work, and their tensors.
            self._lower(stage, reason)

    def _lower(self, stage: StageName, reason: str) -> None:
        device = self._networks.device
        release_cached(device)
        if self._spent:
            raise MemoryBudgetError(
                f"{device} ran out of memory twice, last in the stage {stage!r} ({reason}; "
                f"{available_memory(device) / GIB:.2f} GiB are free now); ask for a smaller picture or fewer at once, "
                f"or set vram_limit below {self.plan.budget.total / GIB:.1f}",
                plan=self.plan.table(),
            )
        self._spent = True
        self.plan = lowered(self.plan, self._networks.known, stage)
        self._networks.follow(self.plan)
        self._networks.enter(stage, self.plan)
        for role in self.plan.stage(stage).networks:
            self._networks.replace(role)
        sentence = f"memory ran out in the stage {stage!r}; it was done again with less on the device"
        log.warning("%s: %s", sentence, reason)
        self._warnings.append(sentence)


def within_memory(device: torch.device, work: Callable[[], T]) -> T:
    """What ``work`` returns.

    Raises:
        MemoryBudgetError: it ran out of memory; unused blocks have been given back by then.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = what_ran_out(error)
    # Not raised above: an error that remembers the failed job's frames would keep its tensors.
    release_cached(device)
    raise MemoryBudgetError(
        f"{device} ran out of memory ({reason}; {available_memory(device) >> 20:,} MiB are free now); "
        "ask for a smaller picture or fewer at once"
    )
