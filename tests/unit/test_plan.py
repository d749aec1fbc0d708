"""What a plan promises: for small models by its rules, and for the published sizes on the cards that people have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_files import Hole, write_safetensors

from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.backend.checkpoint import open_checkpoint
from lightweight_engine.backend.devices import RATES, Card, known_card
from lightweight_engine.backend.host_memory import GIB
from lightweight_engine.backend.memory_manager import PRESETS, SLOTS, MemoryManager
from lightweight_engine.backend.packed import GPU_PIECE, TEMPORARIES
from lightweight_engine.core.plan import AtHand, Network, Plan, Shape, StageName, lowered, make_plan
from lightweight_engine.errors import MemoryBudgetError
from lightweight_engine.flux.footprint import (
    EIGHT_BITS,
    LIBRARIES,
    Inventory,
    Library,
    inventory,
    step_flops,
    step_room,
)
from lightweight_engine.flux.keymaps import Role, find_parts
from lightweight_engine.flux.latents import pack
from lightweight_engine.flux.load import NETWORKS, Storage, _Uninitialised
from lightweight_engine.flux.params import AutoencoderParams, CLIPParams, FluxParams, T5Params
from lightweight_engine.flux.units import UnitName

BF16 = torch.bfloat16
MEGAPIXEL = Shape((1024, 1024), calls=20, rows=20)
SIZES: dict[Role, object] = {
    "transformer": FluxParams(),
    "t5": T5Params(),
    "clip": CLIPParams(),
    "autoencoder": AutoencoderParams(),
}
PLACES = {"transformer": "Stable-diffusion", "t5": "text_encoder", "clip": "text_encoder", "autoencoder": "VAE"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder of the published sizes in bf16: headers, and holes behind them."""
    root = tmp_path_factory.mktemp("published")
    for role, params in SIZES.items():
        with _Uninitialised():
            state = NETWORKS[role][1](params).state_dict()
        holes = {name: Hole("BF16", tuple(tensor.shape)) for name, tensor in state.items()}
        write_safetensors(root / PLACES[role] / f"{role}.safetensors", holes)
    return root


@cache
def known(root: Path, storage: str) -> Mapping[Role, Network]:
    """The four networks, the transformer kept in a storage format, the text encoders as their files have them."""
    found: dict[Role, Network] = {}
    for role, params in SIZES.items():
        part = find_parts(open_checkpoint(root / PLACES[role] / f"{role}.safetensors"))[role]
        kept = {"transformer": Storage(storage, BF16), "autoencoder": Storage("auto", BF16)}.get(
            role, Storage("file", torch.float32)
        )
        found[role] = Network(params, kept, inventory(part, kept))
    return found


def card(gib: float, name: str = "a card") -> Card:
    return Card(name, "cuda", int(gib * GIB), int(gib * GIB))


def planned(root: Path, storage: str, gib: float, state: str = "NORMAL_VRAM", shape: Shape = MEGAPIXEL) -> Plan:
    return make_plan(known(root, storage), shape, MemoryManager(card(gib), state))  # type: ignore[arg-type]


@pytest.mark.parametrize(("gib", "fits"), [(80, True), (48, True), (24, False)])
def test_weights_at_hand_take_no_place_from_others(published: Path, gib: int, fits: bool) -> None:
    networks = dict(known(published, "nf4"))
    numbers = networks["transformer"].inventory.blocks
    at_hand = AtHand(sum(nbytes for _, nbytes in numbers) * 3)
    fast = make_plan(
        {**networks, "transformer": replace(networks["transformer"], at_hand=at_hand)},
        MEGAPIXEL,
        MemoryManager(card(gib), "HIGH_VRAM", fast=True),
    )
    stored = planned(published, "nf4", gib, "HIGH_VRAM")
    assert fast.placed("transformer").at_hand == (at_hand.nbytes if fits else 0)
    said = "fast" if fits else "stored, as fast does not fit"
    assert fast.residency == said and fast.table().endswith(f"residency {said})")
    assert planned(published, "nf4", gib).residency == "stored"
    assert [stage.kept.keys() for stage in fast.stages] == [stage.kept.keys() for stage in stored.stages]
    lower = lowered(fast, networks, "sample")
    assert lower.placed("transformer").at_hand == 0 and lower.fits


@pytest.mark.parametrize(
    ("storage", "overlap", "ahead"),
    [("nf4", True, True), ("nf4", False, False), ("bf16", True, False), ("fp32", True, False)],
)
def test_numbers_of_one_weight_more_where_weights_are_unpacked(
    published: Path, storage: str, overlap: bool, ahead: bool
) -> None:
    networks = known(published, storage)
    plan = make_plan(networks, MEGAPIXEL, MemoryManager(card(80), "HIGH_VRAM", overlap=overlap))
    assert plan.placed("transformer").ahead == (networks["transformer"].inventory.unpacked if ahead else 0)


@pytest.mark.parametrize(
    ("state", "gib", "record", "recorded"),
    [("HIGH_VRAM", 80, True, True), ("HIGH_VRAM", 80, False, False), ("NO_VRAM", 80, True, False)],
)
def test_steps_are_recorded_where_every_block_stays(
    published: Path, state: str, gib: int, record: bool, recorded: bool
) -> None:
    plan = make_plan(known(published, "nf4"), MEGAPIXEL, MemoryManager(card(gib), state, record=record))  # type: ignore[arg-type]
    assert bool(plan.placed("transformer").recorded) is recorded
    assert not lowered(plan, known(published, "nf4"), "sample").placed("transformer").recorded


@pytest.mark.parametrize(
    ("state", "gib", "record", "stays"),
    [
        ("HIGH_VRAM", 80, True, ["encode", "decode"]),
        ("HIGH_VRAM", 80, False, []),
        ("LOW_VRAM", 80, True, []),  # the transformer does not stay either
        ("HIGH_VRAM", 12, True, ["decode"]),  # the text encoders need that room
    ],
)
def test_recorded_steps_stay_where_there_is_room(
    published: Path, state: str, gib: float, record: bool, stays: list[str]
) -> None:
    networks = known(published, "nf4")
    plan = make_plan(networks, MEGAPIXEL, MemoryManager(card(gib), state, record=record))  # type: ignore[arg-type]
    assert [stage.name for stage in plan.stages if stage.replay] == stays and plan.fits
    for stage in plan.stages:
        assert stage.replay in (0, plan.stage("sample").room)
    rows = {row["stage"]: row["kept_bytes"] for row in plan.rows()}
    for name in stays:
        stage = plan.stage(name)  # type: ignore[arg-type]
        assert rows[name] == sum(placed.nbytes for placed in stage.kept.values()) + stage.replay
        assert lowered(plan, networks, stage.name).stage(stage.name).replay == 0


@pytest.mark.parametrize("beside", [False, True])
def test_products_in_eight_bits_need_room_for_what_they_read(beside: bool) -> None:
    def room(format: str, library: Library = LIBRARIES["cuda"]) -> int:
        return step_room(FluxParams(), 1, 4032, 256, Storage(format, BF16), 0, library, beside=beside)

    unit = 4288 * 3072 * 2
    assert room("bf16") == room("nf4") == room("fp8_e4m3")
    assert room("fp8_rows") - room("bf16") == (unit // 2 if beside else 3 * unit // 2) + EIGHT_BITS
    plain = replace(LIBRARIES["cuda"], in_place=False)
    assert room("fp8_rows", plain) > room("bf16", plain) + 18 * unit, "numbers become rows by way of float32"


def test_what_is_converted_while_it_is_loaded_needs_room_too(published: Path) -> None:
    linear1 = (3 * 3072 + 12288) * 3072
    piece = TEMPORARIES * GPU_PIECE
    inventories = {name: known(published, name)["transformer"].inventory for name in ("bf16", "nf4", "fp8_rows")}
    converting = {name: each.converting for name, each in inventories.items()}
    # The two largest that may be at work at once; a file in 16 bits is its own source.
    assert converting == {"bf16": 0, "nf4": 2 * (2 * linear1 + piece), "fp8_rows": 2 * (2 * linear1 + piece)}
    assert known(published, "nf4")["t5"].inventory.converting < 1 << 20, "its matrices are kept as the file has them"
    tiny, large = Shape((256, 256)), Shape((2048, 2048))
    room = {shape: planned(published, "nf4", 24, shape=shape).stage("sample").room for shape in (tiny, large)}
    assert room[tiny] == converting["nf4"] < room[large]


@pytest.mark.parametrize(
    ("role", "name"), [("clip", "encode"), ("t5", "encode"), ("transformer", "sample"), ("autoencoder", "decode")]
)
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_every_stage_has_room_for_converting_its_networks_on_a_gpu(role: Role, name: StageName, kind: str) -> None:
    networks, manager = small(), MemoryManager(Card("a card", kind, 24 * GIB, 24 * GIB), "LOW_VRAM")
    before = make_plan(networks, SMALL, manager)
    networks[role] = replace(networks[role], inventory=replace(networks[role].inventory, converting=GIB))
    after = make_plan(networks, SMALL, manager)
    assert after.stage(name).room == (GIB if kind == "cuda" else before.stage(name).room)
    others = [stage for stage in before.stages if stage.name != name]
    assert [stage for stage in after.stages if stage.name != name] == others


# --- the published sizes on real cards -------------------------------------------------------------------------------

# Bytes of all modulation linears and of the embedders before them are 27 % of the weights, and are not needed while
# sampling. (storage, GiB of the card) -> whether the blocks that remain are all resident.
RESIDENT = {
    ("bf16", 8): False,
    ("bf16", 12): False,
    ("bf16", 16): False,
    ("bf16", 24): True,
    ("bf16", 80): True,
    ("fp8_e4m3", 8): False,
    ("fp8_e4m3", 12): True,
    ("fp8_e4m3", 16): True,
    ("fp8_e4m3", 24): True,
    ("fp8_e4m3", 80): True,
    ("nf4", 8): True,
    ("nf4", 12): True,
    ("nf4", 16): True,
    ("nf4", 24): True,
    ("nf4", 80): True,
}


@pytest.mark.parametrize(("storage", "gib"), RESIDENT)
def test_what_is_resident_without_modulation(published: Path, storage: str, gib: int) -> None:
    plan = planned(published, storage, gib)
    placed, weights = plan.placed("transformer"), known(published, storage)["transformer"].inventory
    blocks = [nbytes for _, nbytes in weights.blocks]
    assert plan.fits and placed.dropped
    assert (placed.streamed == ()) == RESIDENT[storage, gib]
    assert placed.fixed + placed.resident + placed.moved == weights.fixed + sum(blocks)
    passing = SLOTS * max(nbytes for _, nbytes in weights.conditioning)
    stage = plan.stage("sample")
    left = min(plan.budget.weights, plan.budget.total - stage.room - stage.base) - weights.fixed - passing
    over = sum(blocks) - left
    if placed.streamed:  # at least what is too much, at most the ring and a block more
        assert over <= placed.moved <= over + (SLOTS + 1) * max(blocks)
    else:
        assert over <= 0


@pytest.mark.parametrize("gib", [8, 12, 16, 24, 80])
@pytest.mark.parametrize("storage", ["bf16", "fp8_e4m3", "nf4"])
def test_no_vram_streams_every_block(published: Path, storage: str, gib: int) -> None:
    plan = planned(published, storage, gib, "NO_VRAM")
    assert plan.fits
    assert len(plan.placed("transformer").streamed) == 19 + 38
    assert len(plan.placed("t5").streamed) == 24
    assert plan.placed("transformer").resident == 0
    assert not any(stage.kept for stage in plan.stages)


@pytest.mark.parametrize(
    ("storage", "gib", "whole"),
    [("nf4", 8, False), ("nf4", 12, True), ("fp8_e4m3", 12, False), ("fp8_e4m3", 16, True), ("bf16", 24, False),
     ("bf16", 80, True)],
)  # fmt: skip
def test_high_vram_keeps_modulation_where_there_is_room(published: Path, storage: str, gib: int, whole: bool) -> None:
    plan = planned(published, storage, gib, "HIGH_VRAM")
    placed = plan.placed("transformer")
    assert plan.fits and placed.dropped is not whole
    if whole:
        assert (
            placed.nbytes - placed.ahead - placed.recorded == known(published, storage)["transformer"].inventory.nbytes
        )
        assert (placed.moved, placed.slots, placed.streamed) == (0, 0, ())


def test_weights_of_the_published_sizes(published: Path) -> None:
    """Those of the files' own bytes, and of nf4 its codes and scales; units start at multiples of 256 bytes."""
    for storage, expected in {"bf16": 23_802_816_640, "fp8_e4m3": 11_904_493_696, "nf4": 6_698_977_408}.items():
        assert known(published, storage)["transformer"].inventory.nbytes == pytest.approx(expected, rel=1e-4)
    weights = known(published, "bf16")["transformer"].inventory
    modulation = sum(nbytes for _, nbytes in weights.conditioning)
    assert 0.27 < modulation / weights.nbytes < 0.28
    assert known(published, "bf16")["t5"].inventory.nbytes == pytest.approx(9_524_621_312, rel=1e-4)


def test_eighty_gigabytes_keep_everything(published: Path) -> None:
    plan = planned(published, "bf16", 80, "HIGH_VRAM")
    assert all({*stage.networks, *stage.kept} == set(SIZES) for stage in plan.stages)
    assert all(not placed.streamed for stage in plan.stages for placed in stage.networks.values())


@pytest.mark.parametrize("state", PRESETS)
@pytest.mark.parametrize("gib", [6, 8, 10, 12, 16, 24, 32, 48, 80, 141])
def test_never_over_the_budget_where_it_fits(published: Path, state: str, gib: float) -> None:
    for storage in ("bf16", "nf4"):
        for shape in (MEGAPIXEL, Shape((2048, 2048), conditionings=2), Shape((512, 512), batch=4, picture=True)):
            plan = planned(published, storage, gib, state, shape)
            for stage in plan.stages:
                assert not plan.fits or stage.peak <= plan.budget.total
                weights = stage.weights + sum(placed.nbytes for placed in stage.kept.values())
                assert not stage.kept or weights <= plan.budget.weights
                assert stage.peak == weights + stage.replay + stage.room + stage.base
                assert not set(stage.kept) & set(stage.networks)


def test_the_engine_plans_for_a_card_that_is_not_there(published: Path) -> None:
    engine = LightweightEngine(Config(models_dir=published, device="cpu", offline=True, cache_dir=published / "cache"))
    request = GenerationRequest(prompt="a", width=1024, height=1024, steps=20)
    plan = engine.plan(request, card(24, "NVIDIA GeForce RTX 4090"))
    assert plan.storages == {"transformer": "nf4", "autoencoder": "bf16", "t5": "bf16", "clip": "bf16"}
    assert plan.fits and plan.stage("sample").passes == 20
    assert engine._model.networks is None, "nothing was loaded for it"
    assert engine.plan(request, card(24)) == replace(plan, card=card(24))


# --- rules -----------------------------------------------------------------------------------------------------------


def small(blocks: int = 4, *, mapped: bool = True) -> dict[Role, Network]:
    """Networks of round sizes: a transformer of 1 GiB, and 8 MiB for each of the others."""

    def network(params: object, each: int, count: int, conditioning: int = 0) -> Network:
        units = tuple((UnitName("block", str(i)), each) for i in range(count))
        mods = tuple((UnitName("conditioning", str(i)), conditioning) for i in range(count if conditioning else 0))
        return Network(params, Storage("bf16", BF16), Inventory(1 << 20, units, mods, 0, mapped))

    return {
        "transformer": network(FluxParams(), GIB // blocks, blocks, 16 << 20),
        "t5": network(T5Params(hidden_size=512), 4 << 20, 2),
        "clip": network(CLIPParams(), 0, 0),
        "autoencoder": network(AutoencoderParams(widths=(32, 64, 128, 128)), 0, 0),
    }


SMALL = Shape((512, 512), calls=4, rows=4, text=256)


def plan_of(
    gib: float, *, state: str = "HIGH_VRAM", shape: Shape = SMALL, name: str = "a card", **rules: object
) -> Plan:
    manager = MemoryManager(card(gib, name), state, reserve=0.0, **rules)  # type: ignore[arg-type]
    return make_plan(small(), shape, manager)


def test_stages_and_their_networks() -> None:
    plan = plan_of(24)
    assert [(stage.name, list(stage.networks)) for stage in plan.stages] == [
        ("encode", ["clip", "t5"]),
        ("sample", ["transformer"]),
        ("decode", ["autoencoder"]),
    ]
    assert (plan.peak, plan.fits) == (max(stage.peak for stage in plan.stages), True)


def test_what_was_used_last_is_kept_first() -> None:
    """Of two networks that fit beside a stage only one at a time, the one of the stage before it stays."""
    networks = small()
    for role in ("t5", "autoencoder"):
        known = networks[role].inventory
        networks[role] = replace(networks[role], inventory=replace(known, fixed=GIB // 2))  # type: ignore[index]
    alone = make_plan(networks, SMALL, MemoryManager(card(24), "LOW_VRAM", reserve=0.0)).stage("sample")
    room = alone.room + alone.base + networks["transformer"].inventory.nbytes + int(0.75 * GIB)
    kept = make_plan(networks, SMALL, MemoryManager(card(24), reserve=0.0, limit=room)).stage("sample").kept
    assert set(kept) == {"clip", "t5"}, "the text encoders ran just before; the autoencoder a job ago"
    decode = make_plan(networks, SMALL, MemoryManager(card(24), reserve=0.0)).stage("decode").kept
    assert list(decode) == ["transformer", "clip", "t5"]


@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_nothing_is_kept_in_low_states(state: str) -> None:
    assert not any(stage.kept for stage in plan_of(80, state=state).stages)


def test_a_large_picture_is_decoded_in_tiles_where_it_does_not_fit() -> None:
    shape = replace(SMALL, size=(2048, 2048))
    wide, narrow = plan_of(24, shape=shape), plan_of(24, shape=shape, limit=GIB)
    assert not wide.stage("decode").tiled and wide.stage("decode").peak > 2 * GIB
    assert narrow.stage("decode").tiled and narrow.stage("decode").peak <= GIB
    assert "in tiles" in narrow.table() and "in tiles" not in wide.table()
    assert not plan_of(24, limit=GIB // 2).stage("decode").tiled, "a picture of one tile gains nothing"


def test_a_start_picture_needs_room_only_where_encoding_needs_more() -> None:
    with_picture, without = (plan_of(24, shape=replace(SMALL, picture=p)).stage("decode") for p in (True, False))
    assert with_picture.room >= without.room


@pytest.mark.parametrize(
    ("field", "value"), [("batch", 3), ("conditionings", 2), ("rows", 4000), ("text", 4096), ("size", (1024, 1024))]
)
def test_room_grows_with_what_a_job_asks_for(field: str, value: object) -> None:
    assert plan_of(80, shape=replace(SMALL, **{field: value})).stage("sample").room > plan_of(80).stage("sample").room


@pytest.mark.parametrize(("widths", "cell"), [((32, 64), 2), ((32, 64, 128, 128), 8)])
def test_tokens_are_those_of_the_latent(widths: tuple[int, ...], cell: int) -> None:
    networks = small()
    networks["autoencoder"] = replace(networks["autoencoder"], params=AutoencoderParams(widths=widths))
    shape = replace(SMALL, size=(264, 512))
    sample = make_plan(networks, shape, MemoryManager(card(80))).stage("sample")
    tokens = pack(torch.empty(1, 16, 264 // cell, 512 // cell)).shape[1]
    assert sample.flops == step_flops(FluxParams(), 1, tokens, SMALL.text)


def test_on_a_host_only_mapped_weights_pass_through() -> None:
    host = Card("CPU", "cpu", 64 * GIB, 64 * GIB)
    manager = MemoryManager(host, "NO_VRAM")
    assert len(make_plan(small(), SMALL, manager).placed("transformer").streamed) == 4
    converted = make_plan(small(mapped=False), SMALL, manager).placed("transformer")
    assert converted.streamed == () and converted.nbytes == small()["transformer"].inventory.nbytes


def test_a_job_that_does_not_fit_is_refused_with_the_plan_and_one_piece_of_advice() -> None:
    plan_of(24).check()
    with pytest.raises(MemoryBudgetError) as caught:
        plan_of(24, limit=GIB // 8).check()
    sentence, _, table = str(caught.value).partition("\n")
    worst = max(plan_of(24, limit=GIB // 8).stages, key=lambda stage: stage.peak)
    assert sentence.startswith(
        f"the job needs {worst.peak / GIB:.2f} GiB in the stage {worst.name!r}, and 0.12 GiB may"
    )
    assert table == plan_of(24, limit=GIB // 8).table()


@pytest.mark.parametrize(
    ("shape", "advice"),
    [(replace(SMALL, batch=64), "ask for a smaller picture or fewer at once"),
     (Shape((64, 64), text=1), "use a smaller storage_dtype, or raise vram_limit")],
)  # fmt: skip
def test_the_advice_follows_from_what_takes_the_most(shape: Shape, advice: str) -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        plan_of(24, shape=shape, limit=GIB // 2).check()
    both = ("ask for a smaller picture or fewer at once", "use a smaller storage_dtype, or raise vram_limit")
    assert [text for text in both if text in str(caught.value)] == [advice]


@pytest.mark.parametrize(
    ("rules", "advice"),
    [({"limit": GIB // 8}, "raise vram_limit"),
     ({"fraction": 0.02}, "raise allocator_fraction"),
     ({"card": Card("full", "cuda", 24 * GIB, GIB // 2)}, "free memory that other programs hold"),
     ({"card": Card("small", "cuda", GIB // 2, GIB // 2)}, "use a card with more memory")],
)  # fmt: skip
def test_the_advice_follows_from_what_bounds_the_budget(rules: dict[str, Any], advice: str) -> None:
    manager = MemoryManager(**{"card": Card("large", "cuda", 24 * GIB, 24 * GIB), **rules})
    with pytest.raises(MemoryBudgetError, match=f"use a smaller storage_dtype, or {advice}"):
        make_plan(small(), Shape((64, 64), text=1), manager).check()


@pytest.mark.parametrize("name", ["encode", "sample", "decode"])
def test_lowered_keeps_nothing_else_and_as_little_as_can_be(name: str) -> None:
    plan = plan_of(24)
    less = lowered(plan, small(), name)  # type: ignore[arg-type]
    for before, after in zip(plan.stages, less.stages, strict=True):
        if before.name != name:
            assert after == before
            continue
        assert after.kept == {} and after.weights <= before.weights and after.peak < before.peak
        assert not after.tiled  # what was kept is more than half of what decoding works in
        for role, placed in after.networks.items():
            assert len(placed.streamed) == len(small()[role].inventory.blocks)
    again = lowered(less, small(), name)  # type: ignore[arg-type]
    assert again.stage(name).tiled == (name == "decode")  # type: ignore[arg-type]
    assert lowered(again, small(), name) == again  # type: ignore[arg-type]
    assert (less.card, less.budget, less.state, less.storages) == (plan.card, plan.budget, plan.state, plan.storages)


# --- time and text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", RATES)
def test_a_step_takes_computing_or_copying_at_least(gpu: str) -> None:
    tflops, gbps = RATES[gpu]
    resident = plan_of(24, name=f"NVIDIA {gpu}").stage("sample")
    flops = step_flops(FluxParams(), 1, 1024, 256)
    assert resident.floor(card(24, f"NVIDIA {gpu}")) == pytest.approx(flops / (tflops * 1e12))
    streamed = plan_of(24, name=gpu, state="NO_VRAM").stage("sample")
    floor = streamed.floor(card(24, gpu))
    assert streamed.moved == GIB and floor == pytest.approx(max(flops / (tflops * 1e12), GIB / (gbps * 1e9)))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200 NVL", "H200"),
        ("nvidia h100 80gb hbm3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10"),
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090"),
        ("Tesla T4", "T4"),
        ("H2000", None),
        ("NVIDIA T400", None),
        ("NVIDIA RTX A1000", None),
        ("a card of 24 GiB", None),
    ],
)
def test_a_card_is_known_by_a_part_of_its_name(name: str, known: str | None) -> None:
    assert known_card(name) == known


def test_a_step_in_eight_bits_takes_half_the_computing() -> None:
    networks = small()
    rows = replace(networks["transformer"], storage=Storage("fp8_rows", BF16))
    manager = MemoryManager(card(24, "H200"), "HIGH_VRAM", reserve=0.0)
    plain, eight = (
        make_plan(each, SMALL, manager).stage("sample") for each in (networks, {**networks, "transformer": rows})
    )
    least = plain.floor(card(24, "H200"))
    assert least and eight.floor(card(24, "H200")) == pytest.approx(least / 2)


def test_nothing_is_said_of_the_time_of_a_card_that_is_not_known() -> None:
    resident, streamed = (plan_of(24, state=state).stage("sample") for state in ("HIGH_VRAM", "NO_VRAM"))
    assert resident.floor(card(24)) is None
    assert streamed.floor(card(24)) == pytest.approx(GIB / 24e9), "but a slot is as fast as slots are"
    assert streamed.floor(Card("CPU", "cpu", GIB, GIB)) is None


def test_operations_of_a_step() -> None:
    """Source: 74 TFLOP at 1024 x 1024 with 512 tokens of text, of which 59.5 are linears."""
    assert step_flops(FluxParams(), 1, 4096, 512) == pytest.approx(74.4e12, rel=0.01)


def test_the_plan_as_text_and_rows() -> None:
    plan = plan_of(24, name="NVIDIA GeForce RTX 4090", state="NORMAL_VRAM", limit=GIB)
    assert plan.table().splitlines() == TABLE.splitlines()[1:]
    rows = plan.rows()
    assert json.loads(json.dumps(rows)) == rows
    assert [row["stage"] for row in rows] == ["encode", "sample", "decode"]
    for row, stage in zip(rows, plan.stages, strict=True):
        assert row["resident"] + row["slots"] + row["kept_bytes"] + row["room"] == row["peak"] == stage.peak


TABLE = """
stage   resident  slots    streamed/pass  kept     room     peak     floor/pass
encode  10 MiB    0 MiB    0 MiB          802 MiB  98 MiB   910 MiB
sample  257 MiB   544 MiB  768 MiB        11 MiB   167 MiB  979 MiB  107 ms
decode  1 MiB     0 MiB    0 MiB          811 MiB  163 MiB  975 MiB
NVIDIA GeForce RTX 4090: 1.00 GiB may be taken, 979 MiB at most will be (NORMAL_VRAM, transformer as bf16)
"""
