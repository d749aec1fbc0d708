"""The memory plan of a job: what is on the device in each stage, what passes through, and the most that it will take.

Written before anything is loaded, from headers and sizes alone. ``networks`` follows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch

from ..backend import kernels
from ..backend.devices import Card
from ..backend.host_memory import GIB, MIB
from ..backend.lora_layers import NO_COST, Cost
from ..backend.memory_manager import BOUNDS, SLOTS, Budget, MemoryManager, Residency, place
from ..backend.quantize import ROWS
from ..errors import MemoryBudgetError
from ..flux.footprint import (
    LIBRARIES,
    PLAIN_CONVOLUTION,
    Inventory,
    Library,
    clip_room,
    decode_room,
    encode_room,
    modulation_table,
    step_flops,
    step_room,
    t5_room,
)
from ..flux.keymaps import Role
from ..flux.latents import token_count
from ..flux.load import Storage
from ..flux.params import AutoencoderParams, CLIPParams, FluxParams, T5Params

StageName = Literal["encode", "upscale", "sample", "decode"]
ORDER: tuple[StageName, ...] = get_args(StageName)  # in which those of a pass run
HIRES = "hires"  # the pass of that name

ADDS_NOTHING = "fast, which adds nothing where no LoRA acts and weights are numbers as they are stored"
IN_EFFECT = ("stored", "fast", ADDS_NOTHING)
"""What a plan says of the setting ``residency`` where it is as was asked."""

TILE = 512  # pixels a side of the tiles that a large picture is decoded in
T5_LENGTH = 256
RECORDED = 40 * MIB  # a workspace of cuBLAS (32 on Hopper) for the stream that records, and a step's inputs
EIGHT_BIT_RATE = 2.0  # of products, times that of 16 bits, on all cards that have them
MOST_TILES = 8  # that an upscaler does at once; a GPU is busy with fewer
# Stage -> the setting that says what its weights are kept as.
STORED_BY: dict[StageName, str] = {"encode": "text_storage_dtype", "sample": "storage_dtype"}


@dataclass(frozen=True)
class AtHand:
    """Weights that are kept as numbers beside what is stored.

    Attributes:
        nbytes: of them, changes by LoRAs in them.
        adapters: what LoRAs take beside them.
    """

    nbytes: int
    adapters: Cost = NO_COST


@dataclass(frozen=True)
class Network:
    """What is known of one network beforehand: sizes, storage, bytes.

    Attributes:
        stored_as: the format of most of its weights once loaded, for people.
        adapters: what LoRAs take beside it.
        at_hand: its weights as numbers, where keeping those is wanted.
    """

    params: Any
    storage: Storage
    inventory: Inventory
    stored_as: str | None = None
    adapters: Cost = NO_COST
    at_hand: AtHand | None = None


@dataclass(frozen=True)
class Upscaling:
    """What enlarges pictures before a pass.

    Attributes:
        nbytes: of its network.
        tile: bytes that one tile takes.
        pictures: bytes of the pictures before and after.
    """

    nbytes: int
    tile: int
    pictures: int


@dataclass(frozen=True)
class Shape:
    """What a pass asks of the networks.

    Attributes:
        size: (height, width) in pixels.
        batch: pictures drawn at once.
        conditionings: evaluated for each of them in a step: 2 where a negative prompt takes part.
        calls: evaluations of the transformer for each picture.
        rows: sigmas times conditionings that modulation is computed for beforehand.
        text: tokens of the longest text.
        picture: whether a start picture is encoded.
        upscaling: what makes it, by a network.
    """

    size: tuple[int, int]
    batch: int = 1
    conditionings: int = 1
    calls: int = 1
    rows: int = 1
    text: int = T5_LENGTH
    picture: bool = False
    upscaling: Upscaling | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of a job, all in bytes.

    Attributes:
        networks: the networks at work and how they are placed.
        kept: networks that stay meanwhile, as they are.
        room: what the stage works in, or its networks are converted in while they are loaded.
        flops: of one pass.
        rate: times the card's in 16 bits at which they are computed.
        passes: how often the blocks run.
        adapters: of LoRAs, beside networks at work or kept.
        tiles: of ``room``, what an upscaler's tiles may take.
        replay: of steps that were recorded, which stay for the passes that follow.
    """

    name: StageName
    networks: Mapping[Role, Residency]
    room: int
    base: int
    flops: float = 0.0
    rate: float = 1.0
    passes: int = 1
    kept: Mapping[Role, Residency] = field(default_factory=dict)
    tiled: bool = False
    adapters: Mapping[Role, int] = field(default_factory=dict)
    tiles: int = 0
    replay: int = 0

    @property
    def weights(self) -> int:
        return sum(placed.nbytes for placed in self.networks.values())

    @property
    def moved(self) -> int:
        """Bytes that one pass copies to the device."""
        return sum(placed.moved for placed in self.networks.values())

    @property
    def peak(self) -> int:
        return self.weights + self.kept_bytes + sum(self.adapters.values()) + self.room + self.base

    @property
    def kept_bytes(self) -> int:
        return sum(placed.nbytes for placed in self.kept.values()) + self.replay

    def floor(self, card: Card) -> float | None:
        """Seconds that one pass takes at least: computing or copying, whichever is longer; None where not known."""
        times = [self.flops / (card.flops * self.rate)] if card.flops and self.flops else []
        times += [self.moved / card.link] if card.link and self.moved else []
        return max(times, default=None)


@dataclass(frozen=True)
class Plan:
    """The stages of a pass on a card, within a budget.

    Attributes:
        then: the plans of later passes of the same job, by name.
        stored: the same without weights at hand, where some are.
        fast: whether weights are kept at hand; None where that is not asked for.
    """

    card: Card
    budget: Budget
    state: str
    storages: Mapping[Role, str]
    stages: tuple[Stage, ...]
    then: Mapping[str, Plan] = field(default_factory=dict)
    stored: Plan | None = None
    fast: bool | None = None

    @property
    def residency(self) -> str:
        """What becomes of the setting of that name, in the words of its choices."""
        plans = (self, *self.then.values())
        acts = [plan.fast for plan in plans]
        if None in acts:
            return "stored"
        if all(acts):
            every = (placed for plan in plans for stage in plan.stages for placed in stage.networks.values())
            return "fast" if any(placed.at_hand for placed in every) else ADDS_NOTHING
        return "fast in some passes, as it does not fit in others" if any(acts) else "stored, as fast does not fit"

    @property
    def peak(self) -> int:
        return max([stage.peak for stage in self.stages] + [later.peak for later in self.then.values()])

    @property
    def fits(self) -> bool:
        return self.peak <= self.budget.total

    def stage(self, name: StageName) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def placed(self, role: Role) -> Residency:
        """How a network is placed while it works."""
        return next(stage.networks[role] for stage in self.stages if role in stage.networks)

    def check(self) -> None:
        """Raises MemoryBudgetError, with the plan, where the job does not fit."""
        if not self.fits:
            every = [*self.stages, *(stage for later in self.then.values() for stage in later.stages)]
            worst = max(every, key=lambda stage: stage.peak)
            raise MemoryBudgetError(
                f"the job needs {worst.peak / GIB:.2f} GiB in the stage {worst.name!r}, and "
                f"{self.budget.total / GIB:.2f} GiB may be taken; {self._advice(worst)}",
                plan=self.table(),
            )

    def _advice(self, stage: Stage) -> str:
        """What makes the stage smaller, by what takes the most of it, or the budget larger, by what bounds that."""
        if stage.room > stage.weights:  # pictures are decoded and enlarged one by one: fewer at once would not help
            return f"ask for a smaller picture{' or fewer at once' if stage.name == 'sample' else ''}"
        setting = STORED_BY.get(stage.name)
        smaller = f"use a smaller {setting}, or " if setting else ""
        return f"{smaller}{BOUNDS[self.budget.bound]}"

    def rows(self) -> list[dict[str, Any]]:
        """One row a stage in the order in which they run, for tables and JSON; bytes and seconds.

        The texts of the hires pass are encoded beside those of the first.
        """
        rows = [self._row(stage) for stage in sorted(self.stages, key=lambda stage: ORDER.index(stage.name))]
        for name, plan in self.then.items():
            later = [{**row, "stage": f"{name} {row['stage']}"} for row in plan.rows()]
            rows = [rows[0], later[0], *rows[1:], *later[1:]] if name == HIRES else [*rows, *later]
        return rows

    def _row(self, stage: Stage) -> dict[str, Any]:
        return {
            "stage": stage.name,
            "networks": list(stage.networks),
            "storage": {role: self.storages[role] for role in stage.networks},
            "resident": stage.weights - sum(placed.slots for placed in stage.networks.values()),
            "slots": sum(placed.slots for placed in stage.networks.values()),
            "streamed_per_pass": stage.moved,
            "kept": list(stage.kept),
            "kept_bytes": stage.kept_bytes,
            "lora_bytes": sum(stage.adapters.values()),
            "room": stage.room + stage.base,
            "tiled": stage.tiled,
            "peak": stage.peak,
            "passes": stage.passes,
            "tflop_per_pass": stage.flops / 1e12,
            "floor_seconds_per_pass": stage.floor(self.card),
        }

    def table(self) -> str:
        """The plan as lines of text."""
        head = ("stage", "resident", "slots", "streamed/pass", "kept", "room", "peak", "floor/pass", "")
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows():
            floor = row["floor_seconds_per_pass"]
            lines.append(
                (
                    row["stage"],
                    *(_size(row[k]) for k in ("resident", "slots", "streamed_per_pass", "kept_bytes", "room", "peak")),
                    f"{1000 * floor:.0f} ms" if floor else "",
                    "in tiles" if row["tiled"] else "",
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        total = f"{self.card.name}: {_size(self.budget.total)} may be taken, {_size(self.peak)} at most will be"
        asked = "" if self.fast is None else f", residency {self.residency}"
        return "\n".join([*text, f"{total} ({self.state}, transformer as {self.storages['transformer']}{asked})"])


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.0f} MiB"


def make_plan(networks: Mapping[Role, Network], shape: Shape, manager: MemoryManager, held: int = 0) -> Plan:
    """Plan a job.

    Args:
        held: bytes of the device that the engine holds already.
    """
    budget = manager.budget(held)
    storages: dict[Role, str] = {
        role: network.stored_as or network.storage.format for role, network in networks.items()
    }
    plan = partial(Plan, manager.card, budget, manager.state, storages)
    kind = manager.card.kind
    stored = plan(_stages({role: replace(n, at_hand=None) for role, n in networks.items()}, shape, budget, kind))
    if not any(network.at_hand for network in networks.values()):
        return stored
    fast = plan(_stages(networks, shape, budget, kind), stored=stored, fast=True)
    return fast if fast.fits and _nothing_lost(fast, stored) else replace(stored, fast=False)


def _stages(networks: Mapping[Role, Network], shape: Shape, budget: Budget, kind: str) -> tuple[Stage, ...]:
    stages = _alone(networks, shape, budget, kind)
    if budget.preset.keep:
        stages = [_with_kept(stage, stages, networks, budget) for stage in stages]
    return tuple(stages)


def _nothing_lost(fast: Plan, stored: Plan) -> bool:
    """Whether weights at hand neither stream the network, nor take the place of another."""
    return all(
        ours.kept.keys() == theirs.kept.keys()
        and all(ours.networks[role].streamed == theirs.networks[role].streamed for role in ours.networks)
        for ours, theirs in zip(fast.stages, stored.stages, strict=True)
    )


def lowered(plan: Plan, networks: Mapping[Role, Network], name: StageName) -> Plan:
    """The plan with less on the device in a stage: nothing else kept, and as little of its networks as can be.

    Pictures are decoded in tiles, which moves their pixels a little, only where what was kept was not worth dropping.
    """
    plan = replace(plan.stored, then=plan.then) if plan.stored else plan
    stages = []
    for stage in plan.stages:
        if stage.name == name:
            placed = {
                role: _place(networks[role], 0, plan.card.kind, drop=True, stream_all=True) for role in stage.networks
            }
            tiled = stage.tiled or (name == "decode" and stage.kept_bytes < stage.room / 2)
            adapters = {role: nbytes for role, nbytes in stage.adapters.items() if role in placed}
            stage = replace(stage, networks=placed, kept={}, tiled=tiled, adapters=adapters, replay=0)
        stages.append(stage)
    return replace(plan, stages=tuple(stages))


def _alone(networks: Mapping[Role, Network], shape: Shape, budget: Budget, kind: str) -> list[Stage]:
    """Each stage with nothing kept beside it."""
    stages = [make(networks, shape, budget, kind) for make in (_text_stage, _sample_stage, _picture_stage)]
    return stages if shape.upscaling is None else [*stages, _upscale_stage(shape.upscaling, budget, kind)]


def _text_stage(networks: Mapping[Role, Network], shape: Shape, budget: Budget, kind: str) -> Stage:
    clip, t5 = networks["clip"], networks["t5"]
    clip_params: CLIPParams = clip.params
    t5_params: T5Params = t5.params
    library = LIBRARIES[kind]
    room = max(
        clip_room(clip_params, clip.storage, clip.inventory.scratch, library),
        t5_room(t5_params, shape.text, t5.storage, t5.inventory.scratch, library),
    )
    base = library.base
    clip_placed = _place(clip, budget.total, kind)
    adapters = _adapters(networks, "clip", "t5")
    room = max(room + max(clip.adapters.room, t5.adapters.room), _converting(kind, clip, t5))
    left = min(budget.total - room - base, budget.weights) - clip_placed.nbytes - sum(adapters.values())
    t5_placed = _place(t5, left, kind, stream_all=budget.preset.stream_text and kind != "cpu")
    return Stage("encode", {"clip": clip_placed, "t5": t5_placed}, room, base, adapters=adapters)


def _sample_stage(networks: Mapping[Role, Network], shape: Shape, budget: Budget, kind: str) -> Stage:
    network = networks["transformer"]
    params: FluxParams = network.params
    cell = networks["autoencoder"].params.factor
    tokens = token_count(*(side // cell for side in shape.size))
    batch = shape.batch * shape.conditionings
    library, beside = _library(kind), network.at_hand is None and network.adapters.held > 0
    scratch = network.inventory.scratch
    room = step_room(params, batch, tokens, shape.text, network.storage, scratch, library, beside=beside)
    room += modulation_table(params, shape.rows, network.storage.compute)
    room = max(room + _beside(network).room, _converting(kind, network))
    base = library.base
    adapters = _adapters(networks, "transformer")
    at_hand = network.at_hand.nbytes if network.at_hand else 0
    left = min(budget.total - room - base, budget.weights) - sum(adapters.values()) - at_hand
    placed = _place(network, left, kind, drop=budget.preset.drop_modulation, stream_all=budget.preset.weights == 0)
    if not placed.streamed:
        spare = budget.total - room - base - sum(adapters.values()) - placed.nbytes
        one = network.inventory.unpacked if kind == "cuda" and budget.overlap and not at_hand else 0
        ahead = one if one <= spare else 0
        recorded = RECORDED if kind == "cuda" and budget.record and ahead + RECORDED <= spare else 0
        placed = replace(placed, at_hand=at_hand, ahead=ahead, recorded=recorded)
    flops = step_flops(params, batch, tokens, shape.text)
    rate = EIGHT_BIT_RATE if network.storage.format == ROWS else 1.0
    return Stage("sample", {"transformer": placed}, room, base, flops, rate, shape.calls, adapters=adapters)


def _library(kind: str) -> Library:
    """What libraries take on a card; a GPU at hand that runs no programs works as plain torch does."""
    plain = kind == "cuda" and torch.cuda.is_available() and not kernels.available()
    return replace(LIBRARIES[kind], in_place=False, convolution=PLAIN_CONVOLUTION) if plain else LIBRARIES[kind]


def _picture_stage(networks: Mapping[Role, Network], shape: Shape, budget: Budget, kind: str) -> Stage:
    """Decoding, and encoding of a start picture, which needs less; pictures are decoded one by one."""
    network = networks["autoencoder"]
    params: AutoencoderParams = network.params
    placed = _place(network, budget.total, kind)
    library, dtype = _library(kind), network.storage.compute
    base = library.base

    def room(height: int, width: int) -> int:
        encode = encode_room(params, height, width, dtype, library) if shape.picture else 0
        pictures = 3 * 4 * shape.batch * shape.size[0] * shape.size[1]
        return max(decode_room(params, height, width, dtype, library), encode) + pictures

    whole = room(*shape.size)
    tiled = placed.nbytes + whole + base > budget.total and max(shape.size) > TILE
    if tiled:
        whole = room(min(TILE, shape.size[0]), min(TILE, shape.size[1])) + 3 * 4 * 4 * shape.size[0] * shape.size[1]
    return Stage("decode", {"autoencoder": placed}, max(whole, _converting(kind, network)), base, tiled=tiled)


def _upscale_stage(upscaling: Upscaling, budget: Budget, kind: str) -> Stage:
    """Enlarging: as many tiles at once as fit, at least one."""
    base = LIBRARIES[kind].base
    fixed = upscaling.nbytes + upscaling.pictures
    fitting = (budget.total - base - fixed) // max(upscaling.tile, 1)
    tiles = (max(min(fitting, MOST_TILES), 1) if kind == "cuda" else 1) * upscaling.tile
    return Stage("upscale", {}, fixed + tiles, base, tiles=tiles)


def _place(network: Network, room: int, kind: str, *, drop: bool = False, stream_all: bool = False) -> Residency:
    """A network within ``room`` bytes: conditioning units pass through once where they are dropped, or do not fit."""
    inventory = network.inventory
    blocks = [nbytes for _, nbytes in inventory.blocks]
    conditioning = [nbytes for _, nbytes in inventory.conditioning]
    slots = SLOTS if kind == "cuda" else 1
    fixed = kind == "cpu" and not inventory.mapped  # on the host only the file's own bytes need not stay
    if fixed or (inventory.nbytes <= room and not (drop or stream_all)):
        return Residency(inventory.fixed, sum(blocks) + sum(conditioning))
    passing = min(slots, len(conditioning)) * max(conditioning, default=0)
    placed = place(blocks, inventory.fixed + passing, room, stream_all=stream_all, slots=slots)
    return replace(placed, fixed=inventory.fixed, slots=placed.slots + passing, dropped=bool(conditioning))


def _converting(kind: str, *networks: Network) -> int:
    """What lies on a GPU beside weights while networks are loaded, which is one after another and before they work."""
    return 0 if kind == "cpu" else max(network.inventory.converting for network in networks)


def _beside(network: Network) -> Cost:
    """What LoRAs take beside a network as it is kept."""
    return network.at_hand.adapters if network.at_hand else network.adapters


def _adapters(networks: Mapping[Role, Network], *roles: Role) -> dict[Role, int]:
    return {role: _beside(networks[role]).held for role in roles if _beside(networks[role]).held}


def _with_kept(stage: Stage, stages: Sequence[Stage], networks: Mapping[Role, Network], budget: Budget) -> Stage:
    """A stage with the networks of others that fit beside it, most recently used first."""
    start = stages.index(stage)
    before = [stages[(start - i) % len(stages)] for i in range(1, len(stages))]
    kept: dict[Role, Residency] = {}
    peak, weights = stage.peak, stage.weights
    for role, placed in (item for other in before for item in other.networks.items()):
        nbytes = placed.nbytes + _beside(networks[role]).held
        if peak + nbytes <= budget.total and weights + nbytes <= budget.weights:
            kept[role] = placed
            peak, weights = peak + nbytes, weights + nbytes
    adapters = {**stage.adapters, **_adapters(networks, *kept)}
    return replace(stage, kept=kept, adapters=adapters, replay=_replay(stages, kept, budget.total - peak))


def _replay(stages: Sequence[Stage], kept: Mapping[Role, Residency], spare: int) -> int:
    """Bytes of recorded steps that stay beside a stage: they work in the room of sampling, and hold that."""
    sample = next(stage for stage in stages if stage.name == "sample")
    transformer = kept.get("transformer")
    return sample.room if transformer and transformer.recorded and sample.room <= spare else 0
