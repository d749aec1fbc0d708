"""Parts written in another storage format: bit for bit what quantising on load makes, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from factories import AE, CLIP, FLUX, T5, network, save, save_flux
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightweight_engine.backend.model_files import open_model
from lightweight_engine.backend.safetensors_writer import PAGE, write_safetensors
from lightweight_engine.errors import ConfigError, CorruptCheckpointError, OutputError, UnsupportedCheckpointError
from lightweight_engine.flux.autoencoder import Autoencoder
from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.convert import FORMATS, convert_part, converted_size
from lightweight_engine.flux.keymaps import Part, Role, find_parts
from lightweight_engine.flux.load import PLAIN, Storage, load_part
from lightweight_engine.flux.t5 import T5Encoder
from lightweight_engine.flux.transformer import Flux

CPU = torch.device("cpu")
PACKED = [format for format in FORMATS if format not in PLAIN]


def part_of(path: Path, role: Role = "transformer") -> Part:
    return find_parts(open_model(path))[role]


def flux(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Part:
    return part_of(save_flux(folder / "small.safetensors", dtype=dtype))


def text(folder: Path, role: Role) -> Part:
    if role == "t5":
        return part_of(save(folder / "t5.safetensors", network(T5Encoder, T5)), role)
    clip = network(CLIPText, CLIP)
    return part_of(save(folder / "clip.safetensors", clip, config={"num_attention_heads": 2}), role)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key].float(), theirs[key].float()) for key in ours
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("role", ["transformer", "t5", "clip"])
def test_it_loads_as_the_original_quantised_on_load(tmp_path: Path, role: Role, format: str) -> None:
    part = flux(tmp_path) if role == "transformer" else text(tmp_path, role)
    path = tmp_path / "out" / "converted.safetensors"
    convert_part(part, format, path, device=CPU)
    converted = part_of(path, role)
    assert converted.storage == ("plain" if format in PLAIN else format)
    assert path.stat().st_size == converted_size(part, format)
    stored = Storage(format, torch.float32)
    assert same_state(
        load_part(part, stored, device=CPU),
        load_part(converted, stored if format in PLAIN else Storage("auto", torch.float32), device=CPU),
    )
    assert converted.hints == part.hints


def test_all_but_linears_keeps_its_dtype(tmp_path: Path) -> None:
    save_flux(tmp_path / "a.safetensors", dtype=torch.float16)
    tensors = load_file(tmp_path / "a.safetensors")
    scale = "double_blocks.0.img_attn.norm.key_norm.scale"
    tensors[scale] = tensors[scale].float()
    save_file(tensors, tmp_path / "b.safetensors", metadata={"config": json.dumps({"axes_dim": FLUX.axes_dim})})
    convert_part(part_of(tmp_path / "b.safetensors"), "bf16", tmp_path / "c.safetensors", device=CPU)
    written = load_file(tmp_path / "c.safetensors")
    assert written[scale].dtype == torch.float32
    assert written["img_in.bias"].dtype == torch.float16
    assert written["img_in.weight"].dtype == torch.bfloat16


def test_the_layout_of_bitsandbytes(tmp_path: Path) -> None:
    part = flux(tmp_path)
    convert_part(part, "nf4", tmp_path / "nf4.safetensors", device=CPU)
    with safe_open(tmp_path / "nf4.safetensors", "pt") as file:
        metadata = file.metadata()
        weight = "img_in.weight"
        state = json.loads(bytes(file.get_tensor(f"{weight}.quant_state.bitsandbytes__nf4").tolist()))
        assert state == {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}
        assert file.get_tensor(weight).shape == (64 * 64 // 2, 1)
        assert (file.get_tensor(weight).dtype, file.get_tensor(f"{weight}.absmax").dtype) == (
            torch.uint8,
            torch.float32,
        )
        assert file.get_tensor(f"{weight}.quant_map").shape == (16,)
    assert json.loads(metadata["config"])["axes_dim"] == list(FLUX.axes_dim)
    assert json.loads(metadata["converted_from"])["file"] == "small.safetensors"
    starts = [info.start for info in open_model(tmp_path / "nf4.safetensors").tensors.values()]
    assert min(starts) % PAGE == 0


def test_a_double_quantised_file_keeps_its_scales(tmp_path: Path) -> None:
    """Rewritten in its own format, nothing is rounded, and scales of 8 bits stay that."""
    convert_part(flux(tmp_path), "nf4", tmp_path / "nf4.safetensors", device=CPU)
    tensors = load_file(tmp_path / "nf4.safetensors")
    name = "single_blocks.0.linear1.weight"
    absmax = tensors[f"{name}.absmax"]
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [320, 64]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.125}
    tensors[f"{name}.absmax"] = torch.arange(len(absmax), dtype=torch.int32).remainder(256).to(torch.uint8)
    tensors[f"{name}.nested_absmax"] = torch.rand(-(-len(absmax) // 256))
    tensors[f"{name}.nested_quant_map"] = torch.linspace(-1, 1, 256)
    text = json.dumps(state).encode()
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    config = {"config": json.dumps({"axes_dim": FLUX.axes_dim})}
    save_file(tensors, tmp_path / "double.safetensors", metadata=config)
    double = part_of(tmp_path / "double.safetensors")
    convert_part(double, "nf4", tmp_path / "again.safetensors", device=CPU)
    again = part_of(tmp_path / "again.safetensors")
    auto = Storage("auto", torch.float32)
    assert same_state(load_part(double, auto, device=CPU), load_part(again, auto, device=CPU))
    assert again.sources[name].pieces[0][0].details["nested_offset"] == 0.125


@pytest.mark.parametrize("rows", [1, 320])
def test_scales_of_fp8_are_kept(tmp_path: Path, rows: int) -> None:
    convert_part(flux(tmp_path), "fp8_e4m3", tmp_path / "fp8.safetensors", device=CPU)
    tensors = load_file(tmp_path / "fp8.safetensors")
    tensors["single_blocks.0.linear1.scale_weight"] = torch.rand(rows)
    config = {"config": json.dumps({"axes_dim": FLUX.axes_dim})}
    save_file(tensors, tmp_path / "scaled.safetensors", metadata=config)
    scaled = part_of(tmp_path / "scaled.safetensors")
    convert_part(scaled, "fp8_e4m3", tmp_path / "again.safetensors", device=CPU)
    auto = Storage("auto", torch.float32)
    assert same_state(
        load_part(scaled, auto, device=CPU), load_part(part_of(tmp_path / "again.safetensors"), auto, device=CPU)
    )


@pytest.mark.parametrize("format", PACKED)
def test_what_is_quantised_becomes_plain_again_and_nothing_else(tmp_path: Path, format: str) -> None:
    convert_part(flux(tmp_path), format, tmp_path / "packed.safetensors", device=CPU)
    packed = part_of(tmp_path / "packed.safetensors")
    convert_part(packed, "fp32", tmp_path / "plain.safetensors", device=CPU)
    plain = part_of(tmp_path / "plain.safetensors")
    assert {source.format for source in plain.sources.values()} == {"plain"}
    stored = Storage("fp32", torch.float32)
    assert same_state(load_part(packed, stored, device=CPU), load_part(plain, stored, device=CPU))
    other = "fp4" if format == "nf4" else "nf4"
    with pytest.raises(
        UnsupportedCheckpointError, match=rf"packed\.safetensors: .* as {format}\).*second time.*--force"
    ):
        convert_part(packed, other, tmp_path / "other.safetensors", device=CPU)
    assert not (tmp_path / "other.safetensors").exists()
    convert_part(packed, other, tmp_path / "other.safetensors", device=CPU, force=True)
    assert part_of(tmp_path / "other.safetensors").storage == other


def test_formats_and_parts_that_cannot_be_written(tmp_path: Path) -> None:
    part = flux(tmp_path)
    with pytest.raises(ConfigError, match="'gguf:Q8_0' cannot be written to a safetensors file; use one of bf16"):
        convert_part(part, "gguf:Q8_0", tmp_path / "x.safetensors", device=CPU)
    ae = part_of(save(tmp_path / "ae.safetensors", network(Autoencoder, AE)), "autoencoder")
    with pytest.raises(UnsupportedCheckpointError, match="ae.safetensors: an autoencoder is small"):
        convert_part(ae, "nf4", tmp_path / "x.safetensors", device=CPU)


def test_an_error_half_way_leaves_nothing(tmp_path: Path) -> None:
    module = network(Flux, FLUX)
    module.final_layer.linear.weight.view(-1)[0] = torch.inf  # type: ignore[union-attr,operator]
    part = part_of(save(tmp_path / "inf.safetensors", module, config={"axes_dim": FLUX.axes_dim}))
    with pytest.raises(CorruptCheckpointError, match=r"inf\.safetensors: final_layer\.linear\.weight: .*not finite"):
        convert_part(part, "nf4", tmp_path / "out" / "x.safetensors", device=CPU)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = flux(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match="GB are free there; free some, or name another folder"):
        convert_part(part, "nf4", tmp_path / "out" / "x.safetensors", device=CPU)
    monkeypatch.undo()
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        _full(tmp_path)
    with pytest.raises(OutputError, match="cannot be written: File exists; name another folder"):
        convert_part(part, "nf4", tmp_path / "small.safetensors" / "x.safetensors", device=CPU)
    assert list((tmp_path / "out").iterdir()) == []


def _full(folder: Path) -> None:
    """The disk fills up after the room was measured."""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(4)
        raise OSError(28, "No space left on device")

    layout = {name: torch.empty(4, device="meta") for name in "ab"}
    write_safetensors(folder / "out" / "x.safetensors", layout, {}, tensors())


def test_tensors_must_be_those_of_the_layout(tmp_path: Path) -> None:
    layout = {"a": torch.empty(4, device="meta"), "b": torch.empty(0, device="meta")}
    good = [("a", torch.zeros(4)), ("b", torch.zeros(0))]
    for wrong in (good[:1], [*good, ("c", torch.zeros(1))], [("a", torch.zeros(5)), good[1]], good[::-1]):
        with pytest.raises(ValueError, match="expected|did not come"):
            write_safetensors(tmp_path / "x", layout, {}, iter(wrong))
        assert list(tmp_path.iterdir()) == []
    write_safetensors(tmp_path / "x", layout, {"k": "ü"}, iter(good))
    assert load_file(tmp_path / "x")["b"].shape == (0,)
    assert open_model(tmp_path / "x").metadata == {"k": "ü"}


def test_gguf_becomes_plain_and_only_by_force_another_format(tmp_path: Path) -> None:
    """Block types in a checkpoint of ours stand for a GGUF file; an embedding in blocks is written as float32."""
    from lightweight_engine.backend.quantize import quantize

    source = part_of(save(tmp_path / "t5.safetensors", network(T5Encoder, replace(T5, hidden_size=64))), "t5")
    gguf = _as_gguf(tmp_path / "t5.gguf", load_file(tmp_path / "t5.safetensors"))
    part = part_of(gguf, "t5")
    assert part.storage == "gguf:Q8_0"
    with pytest.raises(UnsupportedCheckpointError, match="as gguf:Q8_0"):
        convert_part(part, "nf4", tmp_path / "x.safetensors", device=CPU)
    convert_part(part, "nf4", tmp_path / "x.safetensors", device=CPU, force=True)
    written = load_file(tmp_path / "x.safetensors")
    table = quantize(source.sources["shared.weight"].read(), "gguf:Q8_0")  # type: ignore[arg-type]
    assert written["shared.weight"].dtype == torch.float32
    assert torch.equal(written["shared.weight"], table.dequantize())


def _as_gguf(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, "t5")
    for name, tensor in tensors.items():
        numbers = tensor.float().numpy()
        wide = numbers.ndim == 2 and numbers.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if wide else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(numbers, kind) if wide else numbers
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
