"""The networks of one model on a device, placed as a plan says: loaded when first used, kept or released after.

What is kept through a stage is the plan's to say: ``enter`` releases the rest.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from ..backend.ahead import Ahead
from ..backend.devices import (
    give_back_cached,
    keep_freed_memory,
    release_cached,
    return_freed_memory,
    trim_heap,
)
from ..backend.early_fetch import early_fetch
from ..backend.linear import PackedLinear
from ..backend.lora_layers import Cost, build_programs
from ..backend.memory_manager import PRESETS, MemoryManager, Residency
from ..backend.packed import Packed
from ..backend.pages import PageStream, release_files, release_pages
from ..backend.staging import Staging
from ..backend.streaming import Place, Ring, Unit, to_device
from ..backend.together import Neighbours
from ..flux.footprint import inventory
from ..flux.keymaps import Part, Role
from ..flux.load import WORKERS, Storage, empty_network, load_part, moved, read_params, stored_as
from ..flux.lora_set import NO_LORAS, LoraSet
from ..flux.params import AutoencoderParams, FluxParams
from ..flux.preview import Preview
from ..flux.recorded import Recorded
from ..flux.text_encoders import TextEncoders
from ..flux.tokenizers import CLIPTokens, T5Tokens
from ..flux.units import Kind, UnitName, in_order, unit_of
from .adapters import FLOAT, Adapter, adapter_cost, at_hand
from .models import ModelSet
from .plan import AtHand, Network, Plan, Stage, StageName
from .precision import Precision

log = logging.getLogger(__name__)

HOST = torch.device("cpu")
KEPT_COSTS = 256


@dataclass(eq=False)
class _Loaded:
    """A network and what brings its streamed units.

    ``version`` counts what changes the network itself: weights at other places, other LoRAs.
    """

    module: nn.Module
    units: dict[UnitName, Unit]
    placed: Residency
    streams: list[Ring | PageStream | Ahead]
    adapter: Adapter
    recorded: Recorded | None = None
    version: int = 0


class Networks:
    """The four networks and two tokenizers of a model.

    Args:
        tokenizers: reads the CLIP and the T5 tokenizer; called once.
        merge_loras: LoRAs change plain weights themselves, instead of acting beside them.
    """

    def __init__(
        self,
        models: ModelSet,
        device: torch.device,
        precision: Precision,
        manager: MemoryManager,
        *,
        tokenizers: Callable[[], tuple[CLIPTokens, T5Tokens]],
        merge_loras: bool = False,
    ) -> None:
        self.models = models
        self.device = device
        self.precision = precision
        self.manager = manager
        self.params: FluxParams = read_params(models.parts["transformer"])
        autoencoder: AutoencoderParams = read_params(models.parts["autoencoder"])
        self.autoencoder_factor = autoencoder.factor
        self._read_tokenizers = tokenizers
        self._merge_loras = merge_loras
        self._loras = NO_LORAS
        self._loaded: OrderedDict[Role, _Loaded] = OrderedDict()
        self._placements: dict[Role, Residency] = {}
        self._empty: dict[Role, nn.Module] = {}  # built for their sizes, and filled by the first load
        self._preview: Preview | None = None
        self._costs: dict[Hashable, Cost] = {}
        self._rested_with: dict[Role, tuple[int, int]] = {}
        self.unsettled: list[tuple[Role, Tensor]] = []
        """Whether numbers of a network are finite, where nobody has seen yet what was found (``finite``)."""
        (return_freed_memory if device.type == "cpu" else keep_freed_memory)()

    @cached_property
    def known(self) -> dict[Role, Network]:
        """Sizes, storage and bytes of each network, from the headers."""
        made: dict[Role, Network] = {}
        for role, part in self.models.parts.items():
            storage, self._empty[role] = self.storage(role), empty_network(part)
            weights = inventory(part, storage, self._empty[role])
            made[role] = Network(read_params(part), storage, weights, stored_as(part, storage))
        return made

    def storage(self, role: Role) -> Storage:
        return getattr(self.precision, role)

    @property
    def held(self) -> int:
        """Bytes on the device."""
        recorded = sum(loaded.recorded.nbytes for loaded in self._loaded.values() if loaded.recorded)
        return sum(loaded.placed.nbytes for loaded in self._loaded.values()) + recorded

    @property
    def spare(self) -> int:
        """Bytes of the device that may be taken now beside what is held."""
        return self.manager.budget(self.held).total - self.held

    @cached_property
    def tokenizers(self) -> tuple[CLIPTokens, T5Tokens]:
        """The CLIP and the T5 tokenizer."""
        return self._read_tokenizers()

    def follow(self, plan: Plan) -> None:
        """From now on place networks as ``plan`` says; those that are placed otherwise are moved when next used."""
        self._placements = {role: placed for stage in plan.stages for role, placed in stage.networks.items()}

    def adapt(self, loras: LoraSet) -> None:
        """From now on let these LoRAs act; a network that others act on is changed when it is next used."""
        self._loras = loras

    def with_loras(self, sets: Collection[LoraSet]) -> dict[Role, Network]:
        """What is known of each network, with what the LoRAs of any of these sets take at most."""
        made: dict[Role, Network] = {}
        for role, known in self.known.items():
            made[role] = replace(known, adapters=self._most(role, sets))
        if self.manager.fast:
            made["transformer"] = replace(made["transformer"], at_hand=self._at_hand(sets))
        return made

    def _most(self, role: Role, sets: Collection[LoraSet]) -> Cost:
        costs = [self._cost_of(role, each) for each in sets]
        return Cost(max((each.held for each in costs), default=0), max((each.room for each in costs), default=0))

    def _cost_of(self, role: Role, loras: LoraSet) -> Cost:
        """What LoRAs take beside a network; counted once, as every plan of a job asks."""
        key = role, loras.key(role)
        if key not in self._costs:
            if len(self._costs) >= KEPT_COSTS:
                self._costs.clear()
            part, storage, on_host = self.models.parts[role], self.storage(role), self.device == HOST
            self._costs[key] = adapter_cost(loras, part, storage, merge=self._merge_loras, on_host=on_host)
        return self._costs[key]

    def _at_hand(self, sets: Collection[LoraSet]) -> AtHand:
        """What the transformer's weights take as numbers, and the LoRAs of any of these sets beside them at most."""
        part, storage, on_host = self.models.parts["transformer"], self.storage("transformer"), self.device == HOST
        ways = []
        for each in sets or (NO_LORAS,):
            names = at_hand(each, part, storage)
            beside = adapter_cost(each, part, storage, merge=self._merge_loras, on_host=on_host, without=names)
            ways.append((sum(names.values()), beside, max((part.sources[n].elements for n in names), default=0)))
        held, room = max(beside.held for _, beside, _ in ways), max(beside.room for _, beside, _ in ways)
        largest = max(largest for _, _, largest in ways)
        return AtHand(max(nbytes for nbytes, _, _ in ways), Cost(held, max(room, 3 * FLOAT * largest)))

    def load_all(self, plan: Plan) -> None:
        """Load every network that the plan keeps through all stages."""
        self.follow(plan)
        for role in self.models.parts:
            if all(role in stage.networks or role in stage.kept for stage in plan.stages):
                self.load(role)
        _ = self.tokenizers

    def enter(self, name: StageName, plan: Plan) -> None:
        """A stage begins: release what the plan does not keep through it, and place what it keeps as it says."""
        stage = plan.stage(name)
        self.release_all({*stage.networks, *stage.kept})
        for role in self._loaded:
            self.replace(role)
        self._keep_recorded(stage)
        if self.device.type == "cpu":
            trim_heap()

    def _keep_recorded(self, stage: Stage) -> None:
        """Recorded steps stay through stages that have room for them; in that of sampling they are part of its room."""
        for loaded in self._loaded.values():
            if loaded.recorded and stage.name != "sample" and loaded.recorded.nbytes > stage.replay:
                loaded.recorded.close()

    @contextmanager
    def text_encoders(self) -> Iterator[TextEncoders]:
        """Both text encoders with their tokenizers, usable inside the block."""
        clip_tokenizer, t5_tokenizer = self.tokenizers
        yield TextEncoders(self.load("clip"), clip_tokenizer, self.load("t5"), t5_tokenizer)

    def preview(self) -> Preview:
        """The preview of this model's autoencoder, fitted when first asked for."""
        if self._preview is None:
            self._preview = Preview.fit(self.load("autoencoder"))
        return self._preview

    def build_programs(self) -> None:
        """Run the programs that LoRAs will need on the transformer, where it is loaded."""
        loaded = self._loaded.get("transformer")
        if loaded is not None and self.device.type == "cuda":
            build_programs(loaded.module, self.device, self.storage("transformer").compute)

    def release(self, *roles: Role) -> None:
        """Drop the networks of these roles and give their memory back."""
        held: list[ReferenceType[Tensor]] = []
        for role in roles:
            if role in self._loaded:
                held += self._drop(role)
        if held:
            is_held = any(tensor() is not None for tensor in held)  # in a circle: a pass over all of Python's objects
            (release_cached if is_held else give_back_cached)(self.device)

    def _drop(self, role: Role) -> list[ReferenceType[Tensor]]:
        """Let go of a network; tells of its tensors, for as long as somebody else holds them."""
        loaded = self._loaded.pop(role)
        _close(loaded)
        loaded.recorded = None  # it asks for the network's version: a circle
        tensors = (*loaded.module.parameters(), *loaded.module.buffers())
        for tensor in tensors:
            release_pages(self.models.parts[role].checkpoint, tensor)  # the file stays mapped for the next load
        return [ref(tensor) for tensor in tensors]

    @property
    def keeps(self) -> bool:
        """Whether the VRAM state keeps networks from one job to the next."""
        return PRESETS[self.manager.state].keep

    def rest(self) -> None:
        """A job is over: keep networks for the next one, where the VRAM state says so, and nothing else on the host.

        Beside a GPU, a job for which nothing was loaded or moved leaves next to nothing there, and is over sooner.
        """
        if not self.keeps:
            self.release_all()
        there: dict[Role, tuple[int, int]] = {role: (id(each), each.version) for role, each in self._loaded.items()}
        if self.device.type == "cpu" or not self.keeps or there != self._rested_with:
            trim_heap()
        self._rested_with = there

    def release_all(self, keep: Collection[Role] = ()) -> None:
        """Drop every network but those to keep."""
        gone: list[Role] = [role for role in self._loaded if role not in keep]
        self.release(*gone)

    def load(self, role: Role) -> Any:
        """The network of a role, ready to run: on the device whole, or unit by unit as it runs, as the plan says."""
        if role not in self._loaded:
            self._loaded[role] = self._read(role, self._wanted(role))
        self.replace(role)
        self._adapt(role)
        self._loaded.move_to_end(role)
        return self._loaded[role].module

    def replace(self, role: Role) -> None:
        """Move a network that is loaded to where the plan has it."""
        loaded = self._loaded.get(role)
        if loaded is not None and loaded.placed != self._wanted(role):
            with torch.inference_mode(False):
                if loaded.placed.at_hand and not self._wanted(role).at_hand:
                    loaded.adapter.leave()
                _close(loaded)
                self._place(role, loaded, self._wanted(role))

    def recorded(self, tokens: int, evaluations: int | None) -> Recorded:
        """The transformer's evaluations for a pass, which follow what becomes of it; it is loaded.

        Args:
            tokens, evaluations: see ``Recorded.begin``.
        """
        loaded = self._loaded["transformer"]
        if loaded.recorded is None:

            def standing() -> int | None:  # None: the plan has none recorded
                return loaded.version if loaded.placed.recorded else None

            loaded.recorded = Recorded(loaded.module, standing)  # type: ignore[arg-type]
        loaded.recorded.begin(tokens, evaluations)
        return loaded.recorded

    def _adapt(self, role: Role) -> None:
        """Let the LoRAs that are wanted act on a network that is loaded."""
        loaded = self._loaded[role]
        names: Collection[str] = ()
        if loaded.placed.at_hand:
            names = at_hand(self._loras, self.models.parts[role], self.storage(role))
        if loaded.adapter.key == (self._loras.key(role), frozenset(names)):
            return
        with torch.inference_mode(False), torch.no_grad():
            if self._merge_loras:  # weights are written where streams would have to see them
                _close(loaded)
            _close_recorded(loaded)
            loaded.adapter.follow(self._loras, names)
            if self._merge_loras:
                self._place(role, loaded, loaded.placed)

    def _wanted(self, role: Role) -> Residency:
        return self._placements.get(role) or _whole(self.known[role])

    def _read(self, role: Role, wanted: Residency) -> _Loaded:
        part = self.models.parts[role]
        on_host = self._streamed(role, wanted)
        staging = Staging(self.device, pinned=self.manager.pinned, checkpoint=part.checkpoint, early=early_fetch())
        neighbours = self._neighbours(part)

        def home(name: str, value: Tensor | Packed) -> Tensor | Packed:
            if on_host and unit_of(role, name) in on_host:
                return value.to(HOST)
            if isinstance(value, Packed):
                return moved(value, staging.bring)
            return staging.bring(value, neighbours.place(name))

        with torch.inference_mode(False):
            threads = 0 if staging.fetches and not on_host else WORKERS
            module = load_part(
                part, self.storage(role), device=self.device, home=home, bring=staging.bring, threads=threads,
                module=self._empty.pop(role, None),
            )  # fmt: skip
            adapter = Adapter(part, module, self.device, self.storage(role).compute, self._merge_loras)
            loaded = _Loaded(module, units_of(role, module), wanted, [], adapter)
            self._place(role, loaded, wanted)
        if on_host and self.device != HOST:  # what passes through was copied into the ring's own buffer
            release_files(part.checkpoint)
        log.info("loaded %s from %s", role, part.checkpoint.path.name)
        return loaded

    def _neighbours(self, part: Part) -> Neighbours:
        """Places on a GPU for weights that one product reads."""
        if self.device == HOST:
            return Neighbours((), {}, {}, HOST)
        groups, storage = self.known[part.role].inventory.together, self.storage(part.role)
        kept = {
            name: format
            for group in groups
            for name in group
            if isinstance(format := storage.kept_as(part.sources[name], True), torch.dtype)
        }
        return Neighbours(groups, kept, part.shapes, self.device)

    def _streamed(self, role: Role, wanted: Residency) -> set[UnitName]:
        """The units that pass through."""
        known = self.known[role].inventory
        names = {known.blocks[i][0] for i in wanted.streamed}
        return names | {name for name, _ in known.conditioning} if wanted.dropped else names

    def _place(self, role: Role, loaded: _Loaded, wanted: Residency) -> None:
        """Bring units to where the plan has them."""
        streamed = self._streamed(role, wanted)
        loaded.placed = wanted
        for name, unit in loaded.units.items():
            if name not in streamed:
                to_device(unit, self.device)
        kinds: tuple[Kind, ...] = ("block", "conditioning")
        for kind in kinds:
            units = [loaded.units[name] for name in in_order(streamed, kind)]
            if units:
                loaded.streams.append(self._stream(self.models.parts[role], units))
        if wanted.ahead:
            linears = [
                module
                for path, module in loaded.module.named_modules()
                if isinstance(module, PackedLinear)
                and not module.multiplies_as_stored
                and unit_of(role, f"{path}.weight").kind == "block"
            ]
            loaded.streams.append(Ahead(linears, self.storage(role).compute))

    def _stream(self, part: Part, units: list[Unit]) -> Ring | PageStream:
        if self.device.type == "cpu":
            return PageStream(units, part.checkpoint)
        return Ring(units, self.device, pinned=self.manager.pinned, overlap=self.manager.overlap)


def _whole(network: Network) -> Residency:
    """All of a network on the device."""
    known = network.inventory
    return Residency(known.fixed, known.nbytes - known.fixed)


def _close(loaded: _Loaded) -> None:
    _close_recorded(loaded)
    for stream in loaded.streams:
        stream.close()
    loaded.streams.clear()


def _close_recorded(loaded: _Loaded) -> None:
    """What was recorded holds no longer."""
    loaded.version += 1
    if loaded.recorded:
        loaded.recorded.close()


def units_of(role: Role, module: nn.Module) -> dict[UnitName, Unit]:
    """The units of a loaded network."""
    places: dict[UnitName, list[Place]] = {}
    for path, each in module.named_modules():
        for holder in (each._parameters, each._buffers):
            for leaf, tensor in holder.items():
                if tensor is not None:
                    name = unit_of(role, f"{path}.{leaf}" if path else leaf)
                    places.setdefault(name, []).append(Place(holder, leaf))
    return {
        name: Unit(name.path, module.get_submodule(name.path), tuple(found))
        for name, found in places.items()
        if name.kind != "fixed"
    }
