"""Reading LoRA files: what is applied, what is reported, what is refused and in which words."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from lora_models import deep_shapes, lora_file, numbers, pair, small_shapes
from test_lora_keys import kohya_modules, peft_modules
from torch import Tensor

from lightweight_engine.backend.lora import merged
from lightweight_engine.backend.lora_algorithms import Dora, LowRank, Orthogonal, Swapped
from lightweight_engine.errors import AdapterError
from lightweight_engine.flux.lora_files import LoraFile, read_lora
from lightweight_engine.flux.lora_keys import LoraNames

H = 64
QKV = "double_blocks.0.img_attn.qkv.weight"
TO_Q = "transformer.transformer_blocks.0.attn.to_q"
PROJ = "lora_unet_double_blocks_0_img_attn_proj"
KOHYA = "lora_down.weight lora_up.weight"


def read(folder: Path, tensors: dict[str, Tensor], *, metadata: dict | None = None, **options: object) -> LoraFile:
    return read_lora(lora_file(folder, tensors, metadata=metadata), small_shapes(), **options)  # type: ignore[arg-type]


def refused(folder: Path, tensors: dict[str, Tensor]) -> str:
    with pytest.raises(AdapterError) as error:
        read(folder, tensors)
    message = str(error.value)
    assert message.startswith("style.safetensors")
    return message


def test_split_projections_meet_in_one_parameter(tmp_path: Path) -> None:
    tensors = {}
    for name in ("to_q", "to_v"):
        tensors |= pair(f"transformer.transformer_blocks.0.attn.{name}", H, H)
    lora = read(tmp_path, tensors)
    changes = lora.changes["transformer"][QKV]
    assert [change.rows for change in changes] == [(0, H), (2 * H, 3 * H)]
    assert lora.report.patches == {"transformer": 2}
    result = merged(torch.zeros(3 * H, H), [(change, 1.0) for change in changes])
    assert not result[H : 2 * H].any() and result[:H].any() and result[2 * H :].any()


def test_both_text_encoders_and_the_transformer(tmp_path: Path) -> None:
    tensors = {
        **pair(PROJ, H, H, names=KOHYA),
        **pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 64, 32, names=KOHYA),
        **pair("lora_te3_encoder_block_0_layer_1_DenseReluDense_wo", 48, 64, names=KOHYA),
    }
    lora = read(tmp_path, tensors)
    assert lora.report.patches == {"transformer": 1, "clip": 1, "t5": 1}
    assert list(lora.changes["t5"]) == ["encoder.block.0.layer.1.DenseReluDense.wo.weight"]


@pytest.mark.parametrize(("modules", "count"), [(peft_modules(), 494), (kohya_modules(), 304)], ids=["peft", "kohya"])
def test_full_files_are_counted_as_the_reference_counts(tmp_path: Path, modules: list[str], count: int) -> None:
    names, shapes = LoraNames.of(deep_shapes()), deep_shapes()
    tensors = {}
    for module in modules:
        place = names.place(module)
        assert place is not None
        rows, width = shapes["transformer"][place.parameter]
        rows = place.rows[1] - place.rows[0] if place.rows else rows
        tensors |= pair(module, rows, width, rank=1)
    report = read_lora(lora_file(tmp_path, tensors), shapes).report
    assert report.patches == {"transformer": count}
    assert (report.applied, report.found, report.ignored) == (count, count, ())


def test_the_last_layer_of_diffusers_is_swapped(tmp_path: Path) -> None:
    lora = read(tmp_path, pair("transformer.norm_out.linear", 2 * H, H))
    (change,) = lora.changes["transformer"]["final_layer.adaLN_modulation.1.weight"]
    assert isinstance(change.delta, Swapped)


def test_control_lora(tmp_path: Path) -> None:
    scale = numbers(32)
    tensors = {
        **pair("img_in", H, 128),
        "img_in.lora_B.bias": numbers(H),
        "double_blocks.0.img_attn.norm.key_norm.scale": scale,
    }
    lora = read(tmp_path, tensors)
    assert lora.input_channels == 128
    assert lora.report.patches == {"transformer": 3}
    changes = lora.changes["transformer"]
    (bias,) = changes["img_in.bias"]
    torch.testing.assert_close(bias.delta.merge(torch.zeros(H), 0.5), tensors["img_in.lora_B.bias"] * 0.5)
    (replaced,) = changes["double_blocks.0.img_attn.norm.key_norm.scale"]
    assert torch.equal(replaced.delta.merge(torch.ones(32), 0.5), scale)
    assert read(tmp_path, pair(PROJ, H, H)).input_channels is None


def test_options_reach_the_deltas(tmp_path: Path) -> None:
    tensors = {
        **pair(PROJ, H, H),
        f"{PROJ}.dora_scale": numbers(H, 1),
        "lora_unet_double_blocks_0_img_mlp_0.oft_blocks": numbers(8, 16, 16),
    }
    for compat, exact in (("fixed", True), ("forge", False)):
        changes = read(tmp_path, tensors, compat=compat, exact_dora=exact).changes["transformer"]
        (dora,) = changes["double_blocks.0.img_attn.proj.weight"]
        (turned,) = changes["double_blocks.0.img_mlp.0.weight"]
        assert isinstance(dora.delta, Dora) and dora.delta.exact is exact
        assert isinstance(turned.delta, Orthogonal) and turned.delta.squared is (compat == "forge")


def test_whole_numbers_as_alpha(tmp_path: Path) -> None:
    lora = read(tmp_path, {**pair(PROJ, H, H), f"{PROJ}.alpha": torch.tensor([1])})
    (change,) = lora.changes["transformer"]["double_blocks.0.img_attn.proj.weight"]
    assert isinstance(change.delta, LowRank) and change.delta.scale == 0.5


# The scale that metadata declares

ADAPTER = {
    "transformer.r": 4,
    "transformer.lora_alpha": 8,
    "transformer.use_rslora": False,
    "transformer.alpha_pattern": {"transformer_blocks.0.attn.to_k": 3},
}


def scale_of(lora: LoraFile) -> float:
    (change,) = lora.changes["transformer"][QKV]
    assert isinstance(change.delta, LowRank)
    return change.delta.scale


@pytest.mark.parametrize(
    ("changed", "module", "scale"),
    [
        ({}, TO_Q, 2.0),
        ({"transformer.use_rslora": True}, TO_Q, 4.0),
        ({}, "transformer.transformer_blocks.0.attn.to_k", 0.75),
        ({}, "transformer_blocks.0.attn.to_q", 2.0),
    ],
)
def test_declared_scale(tmp_path: Path, changed: dict, module: str, scale: float) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({**ADAPTER, **changed})}
    lora = read(tmp_path, pair(module, H, H, rank=4), metadata=metadata)
    assert scale_of(lora) == scale
    assert "metadata" in str(lora.report)


def test_an_alpha_of_its_own_counts_more_than_metadata(tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps(ADAPTER)}
    lora = read(tmp_path, {**pair(TO_Q, H, H, rank=4), f"{TO_Q}.alpha": torch.tensor(1.0)}, metadata=metadata)
    assert scale_of(lora) == 0.25


def test_metadata_of_kohya_only_repeats(tmp_path: Path) -> None:
    lora = read(tmp_path, pair(TO_Q, H, H), metadata={"ss_network_alpha": "16", "ss_network_dim": "2"})
    assert scale_of(lora) == 1.0 and lora.report.notes == ()


def test_settings_of_peft_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True}))
    tensors = pair(f"base_model.model.{TO_Q.removeprefix('transformer.')}", H, H, rank=4)
    mine = read_lora(lora_file(tmp_path, tensors, name="adapter_model.safetensors"), small_shapes())
    assert scale_of(mine) == 4.0
    another = read_lora(lora_file(tmp_path, tensors, name="another.safetensors"), small_shapes())
    assert scale_of(another) == 1.0


DAMAGED = (
    "{",
    "[]",
    '{"transformer.lora_alpha": "x"}',
    '{"transformer.lora_alpha": NaN}',
    '{"transformer.lora_alpha": true}',
    '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": [1]}',
    "[" * 100_000,
    " " * 1_100_000,
)


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_declarations(tmp_path: Path, text: str) -> None:
    with pytest.raises(AdapterError, match=r"style\.safetensors: lora_adapter_metadata .* download it again"):
        read(tmp_path, pair(TO_Q, H, H), metadata={"lora_adapter_metadata": text})


# What is reported


def test_partly_matched_files_are_applied_with_a_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = pair(TO_Q, H, H)
    for number in range(1, 5):
        tensors |= pair(f"transformer.transformer_blocks.{number}.attn.to_q", H, H)
    with caplog.at_level(logging.WARNING):
        report = read(tmp_path, tensors).report
    text = str(report)
    assert text.startswith("style.safetensors: 1 of 5 modules applied; 8 tensors ignored (no such module in the model)")
    assert text.count("lora_") == 5 and text.endswith(", …")
    assert caplog.messages == [text]


def test_what_is_complete_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert str(read(tmp_path, pair(TO_Q, H, H)).report) == "style.safetensors: 1 of 1 modules applied"
    assert caplog.messages == []


IGNORED = {
    "no such module in the model": {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())},
    "no kind of tensor that is known": {f"{TO_Q}.oft_R.weight": numbers(2, 2)},
    "factors of a convolution": {
        **pair("lora_unet_img_in", H, H, names=KOHYA),
        "lora_unet_img_in.lora_mid.weight": numbers(2, 2, 3, 3),
    },
    "the model has no such bias": {
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.diff_b": numbers(32),
    },
    "no factors belong to them": {"lora_unet_img_in.alpha": torch.ones(())},
}


@pytest.mark.parametrize("reason", IGNORED)
def test_what_is_ignored_has_a_reason(tmp_path: Path, reason: str) -> None:
    report = read(tmp_path, {**pair(TO_Q, H, H), **IGNORED[reason]}).report
    (row,) = report.ignored
    assert reason in row.reason
    assert sorted(row.names) == sorted(IGNORED[reason])
    assert (report.applied, report.found) == (1, 2)


def test_two_spellings_of_one_module_are_added_up_and_said(tmp_path: Path) -> None:
    lora = read(tmp_path, {**pair(TO_Q, H, H), **pair("lora_transformer_transformer_blocks_0_attn_to_q", H, H)})
    first, second = lora.changes["transformer"][QKV]
    assert first.rows == second.rows
    assert "added up" in str(lora.report)
    assert lora.report.patches == {"transformer": 1}


def test_a_rank_above_that_of_the_matrix_is_said(tmp_path: Path) -> None:
    assert "has the rank 100" in str(read(tmp_path, pair(TO_Q, H, H, rank=100)).report)
    with pytest.raises(AdapterError, match=r"to_q.*rank 4,096"):
        read(tmp_path, pair(TO_Q, H, H, rank=4096))


# What is refused

REFUSED = {
    "is an SDXL LoRA (lora_unet_input_blocks_4_1_proj_in.lora_down.weight); it cannot be used": pair(
        "lora_unet_input_blocks_4_1_proj_in", 4, 4, names=KOHYA
    ),
    "is an SD3 LoRA": pair(TO_Q, 1536, 1536),
    "is a Flux.2 LoRA": pair("double_blocks.0.img_attn.qkv", 3 * 6144, 6144, rank=1),
    "is a Chroma LoRA": {
        **pair(PROJ, H, H),
        **pair("lora_unet_distilled_guidance_layer_layers_0_in_layer", 4, 4),
    },
    f"{QKV} ({TO_Q}) expects 64 inputs, the file has 80": pair(TO_Q, H, 80),
    f"{QKV} ({TO_Q}) expects the shape [64, 64], the file has [192, 64]": pair(TO_Q, 3 * H, H),
    "no tensor fits Flux.1": pair("some.other.module", 4, 4),
    "is no LoRA that this engine knows (first keys: double_blocks": {
        "double_blocks.0.img_attn.norm.key_norm.scale": numbers(32),
        QKV: numbers(3 * H, H),
    },
    f"{PROJ}: lora_up (lora_B) is missing": {f"{PROJ}.lora_down.weight": numbers(2, H)},
    f"'{PROJ}.lora_down.weight' has values that are not finite": {
        **pair(PROJ, H, H, names=KOHYA),
        f"{PROJ}.lora_down.weight": numbers(2, H).fill_(float("nan")),
    },
    f"'{PROJ}.alpha' has values that are not finite": {
        **pair(PROJ, H, H, names=KOHYA),
        f"{PROJ}.alpha": torch.tensor(float("inf")),
    },
    "is torch.int8; use a file with floating-point numbers": {
        f"{PROJ}.lora_down.weight": torch.ones(2, H, dtype=torch.int8),
        f"{PROJ}.lora_up.weight": torch.ones(H, 2, dtype=torch.int8),
    },
    "stand for one tensor": {**pair(TO_Q, H, H), f"{TO_Q}.lora_down.weight": numbers(2, H)},
    "0 of 1 modules applied; 1 tensors ignored (no factors belong to them)": {f"{PROJ}.alpha": torch.ones(())},
}


@pytest.mark.parametrize("text", REFUSED)
def test_refusals_name_file_and_fault(tmp_path: Path, text: str) -> None:
    assert text in refused(tmp_path, REFUSED[text])


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert "is no LoRA" in refused(tmp_path, {})


def test_eight_bit_floats_are_read(tmp_path: Path) -> None:
    tensors = {name: value.to(torch.float8_e4m3fn) for name, value in pair(TO_Q, H, H).items()}
    (change,) = read(tmp_path, tensors).changes["transformer"][QKV]
    wanted = tensors[f"{TO_Q}.lora_B.weight"].float() @ tensors[f"{TO_Q}.lora_A.weight"].float()
    torch.testing.assert_close(change.delta.change(torch.zeros(H, H), 1.0), wanted)
