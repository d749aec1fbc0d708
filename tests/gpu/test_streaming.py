"""Blocks that pass through a ring of slots compute what resident ones do, bit for bit, whatever the timing.

Races are made to show: slots begin as NaN, and either the copies or the blocks are held up on the device, so that a
missing wait between the two streams reads what is not there yet, or overwrites what is still in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.fullsize import Sizes, write_model
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.backend.streaming import Ring, Unit, to_device
from lightweight_engine.core.networks import units_of
from lightweight_engine.flux.conditioning import Conditioning
from lightweight_engine.flux.keymaps import Part, Role, find_parts
from lightweight_engine.flux.load import Storage, load_part
from lightweight_engine.flux.params import FluxParams, T5Params
from lightweight_engine.flux.units import Kind, in_order
from lightweight_engine.flux.velocity import Velocity

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")

# Blocks enough that every slot is used many times, of two sizes, as those of the real model.
SIZES = Sizes(
    FluxParams(
        vec_in_dim=64, context_in_dim=128, hidden_size=256, mlp_hidden=1024, num_heads=4, depth=12,
        depth_single_blocks=24, axes_dim=(16, 24, 24),
    ),
    T5Params(vocab_size=128, hidden_size=128, num_layers=12, num_heads=4, head_dim=32, mlp_hidden=256),
)  # fmt: skip
STORAGES = ("bf16", "nf4", "fp8_e4m3", "gguf:Q8_0")
REPEATS = 20
HELD_UP = 4_000_000  # cycles of the device: about two milliseconds, more than the host takes for a block


@dataclass(frozen=True)
class Setting:
    slots: int = 2
    overlap: bool = True
    pinned: bool = True

    def __str__(self) -> str:
        return f"{self.slots} slots{', overlapping' * self.overlap}{', pinned' * self.pinned}"


SETTINGS = [
    Setting(),
    Setting(slots=3),
    Setting(slots=1),
    Setting(slots=100),
    Setting(pinned=False),
    Setting(overlap=False),
    Setting(slots=1, overlap=False, pinned=False),
]


@dataclass
class Streamed:
    """A loaded network with its units, what runs it, and what came out while all of it was resident."""

    module: nn.Module
    units: list[Unit]
    conditioning: list[Unit]
    run: Callable[[], Tensor]
    expected: Tensor

    @contextmanager
    def ring(self, setting: Setting, units: list[Unit] | None = None) -> Iterator[Ring]:
        """Some units in a ring whose slots are poisoned; resident again afterwards."""
        units = self.units if units is None else units
        ring = Ring(units, CUDA, slots=setting.slots, overlap=setting.overlap, pinned=setting.pinned)
        poison(ring)
        try:
            yield ring
        finally:
            ring.close()
            for unit in units:
                to_device(unit, CUDA)


def poison(ring: Ring) -> None:
    """Bytes that are NaN as bf16, fp16, fp8 and float32; only before anything was copied."""
    for slot in ring._slots:
        assert slot.owner is None
        slot.buffer.fill_(0xFF)
    torch.cuda.synchronize()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[Role, Part]:
    paths = write_model(Path(tmp_path_factory.mktemp("streaming")), SIZES, CUDA, ("transformer", "t5"))
    return {role: find_parts(open_model(path))[role] for role, path in paths.items()}


@pytest.fixture(scope="module")
def networks(parts: dict[Role, Part]) -> Callable[[Role, str], Streamed]:
    @cache
    def make(role: Role, storage: str) -> Streamed:
        with torch.inference_mode(False):
            compute = torch.bfloat16 if role == "transformer" else torch.float32
            module = load_part(parts[role], Storage(storage, compute), device=CUDA)
        units = units_of(role, module)
        kinds: tuple[Kind, ...] = ("block", "conditioning")
        blocks, conditioning = ([units[name] for name in in_order(set(units), kind)] for kind in kinds)
        run = RUNS[role](module)
        with torch.inference_mode():
            return Streamed(module, blocks, conditioning, run, run().clone())

    return make


def run_transformer(module: Any) -> Callable[[], Tensor]:
    """One evaluation whose modulation is computed anew, as its weights may be streamed too."""
    generator = torch.Generator("cuda").manual_seed(0)
    latent = torch.randn(1, 16, 24, 32, device=CUDA, generator=generator)
    context = torch.randn(40, SIZES.transformer.context_in_dim, device=CUDA, generator=generator)
    cond = Conditioning(context, torch.ones(SIZES.transformer.vec_in_dim, device=CUDA), 3.5)

    def run() -> Tensor:
        velocity = Velocity(module)
        velocity.precompute([0.7], [cond])
        return velocity(latent, 0.7, [cond])

    return run


def run_t5(module: Any) -> Callable[[], Tensor]:
    ids = torch.arange(96, device=CUDA)[None]
    return lambda: module(ids)


RUNS: dict[Role, Callable[[Any], Callable[[], Tensor]]] = {"transformer": run_transformer, "t5": run_t5}


def same(streamed: Streamed, repeats: int) -> None:
    """Each pass gives the numbers of the resident network; the first failure says which pass it was."""
    with torch.inference_mode():
        outs = [streamed.run() for _ in range(repeats)]  # no wait in between: passes follow one another on the device
    torch.cuda.synchronize()
    assert [i for i, out in enumerate(outs) if not torch.equal(out, streamed.expected)] == []


def test_the_networks_compute_numbers(networks: Callable[[Role, str], Streamed]) -> None:
    for role, storage in (("transformer", "bf16"), ("transformer", "nf4"), ("t5", "file")):
        expected = networks(role, storage).expected  # type: ignore[arg-type]
        assert torch.isfinite(expected).all() and expected.std() > 1e-3


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_the_transformer(networks: Callable[[Role, str], Streamed], storage: str, setting: Setting) -> None:
    streamed = networks("transformer", storage)
    with streamed.ring(setting):
        same(streamed, 3)
    same(streamed, 1)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_t5(networks: Callable[[Role, str], Streamed], setting: Setting) -> None:
    streamed = networks("t5", "file")
    with streamed.ring(setting):
        same(streamed, 3)
    same(streamed, 1)


@pytest.mark.parametrize("storage", ["nf4", "fp8_e4m3"])
def test_t5_in_other_formats(networks: Callable[[Role, str], Streamed], storage: str) -> None:
    streamed = networks("t5", storage)
    with streamed.ring(Setting()):
        same(streamed, 3)


@pytest.mark.parametrize("every", [2, 5])
def test_some_blocks_streamed_and_conditioning_too(networks: Callable[[Role, str], Streamed], every: int) -> None:
    """What a plan makes: every k-th block in one ring, the units that compute modulation in another."""
    streamed = networks("transformer", "nf4")
    with streamed.ring(Setting(), streamed.units[::every]), streamed.ring(Setting(), streamed.conditioning):
        same(streamed, 3)
    same(streamed, 1)


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_many_passes(networks: Callable[[Role, str], Streamed], storage: str) -> None:
    streamed = networks("transformer", storage)
    with streamed.ring(Setting()):
        same(streamed, REPEATS)


def test_many_rings(networks: Callable[[Role, str], Streamed]) -> None:
    """Slots in memory that the device may still be busy with, and buffers that are handed from ring to ring."""
    streamed = networks("transformer", "bf16")
    for _ in range(REPEATS):
        with streamed.ring(Setting()):
            same(streamed, 1)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("held_up", ["copies", "blocks"])
def test_races(networks: Callable[[Role, str], Streamed], held_up: str, slots: int) -> None:
    streamed, hooks = networks("transformer", "bf16"), []
    setting = Setting(slots=slots)
    rings: list[Ring] = []

    def delay_copies(*_: Any) -> None:
        with torch.cuda.stream(rings[0]._stream):
            torch.cuda._sleep(HELD_UP)

    def delay_blocks(*_: Any) -> None:
        torch.cuda._sleep(HELD_UP)

    try:
        if held_up == "copies":  # hooked before the ring's own hooks, which start the copies
            hooks = [unit.module.register_forward_pre_hook(delay_copies) for unit in streamed.units]
        with streamed.ring(setting) as ring:
            rings.append(ring)
            if held_up == "blocks":  # after them, so that the block has its views and does not run yet
                hooks = [unit.module.register_forward_pre_hook(delay_blocks) for unit in streamed.units]
            same(streamed, 5)
    finally:
        for hook in hooks:
            hook.remove()


def test_a_race_would_show(networks: Callable[[Role, str], Streamed], monkeypatch: pytest.MonkeyPatch) -> None:
    """The delays above are long enough: where no stream waits for the other, the numbers are wrong."""
    streamed = networks("transformer", "bf16")
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda *_: None)
    with streamed.ring(Setting()):
        hooks = [
            unit.module.register_forward_pre_hook(lambda *_: torch.cuda._sleep(HELD_UP)) for unit in streamed.units
        ]
        with torch.inference_mode():
            out = streamed.run()
        torch.cuda.synchronize()
        for hook in hooks:
            hook.remove()
    assert not torch.equal(out, streamed.expected)
    same(streamed, 1)


def test_nothing_is_left_on_the_device(networks: Callable[[Role, str], Streamed]) -> None:
    streamed = networks("transformer", "bf16")
    with streamed.ring(Setting(slots=3)) as ring:
        same(streamed, 1)
        within = torch.cuda.memory_allocated()
        slots = ring.slot_bytes
    resident = torch.cuda.memory_allocated()
    weights = sum(unit.nbytes for unit in streamed.units)
    for _ in range(3):
        with streamed.ring(Setting(slots=3)):
            same(streamed, 1)
            assert torch.cuda.memory_allocated() == within
        assert torch.cuda.memory_allocated() == resident
    assert abs((resident - within) - (weights - slots)) < 1 << 20
