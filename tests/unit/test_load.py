"""Parts of Flux found in files of every spelling, and loaded without a second copy."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import AE, CLIP, FLUX, T5, network, save, save_flux
from safetensors.torch import load_file, save_file

from lightweight_engine.backend.checkpoint import open_checkpoint
from lightweight_engine.backend.linear import CastLinear, PackedLinear
from lightweight_engine.backend.packed import GPU_PIECE, TEMPORARIES, Packed
from lightweight_engine.errors import CorruptCheckpointError, UnsupportedCheckpointError
from lightweight_engine.flux.autoencoder import Autoencoder
from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.convert import convert_part
from lightweight_engine.flux.footprint import inventory
from lightweight_engine.flux.keymaps import find_parts
from lightweight_engine.flux.load import (
    CONVERTED,
    Storage,
    _Scales,
    empty_network,
    linear_weights,
    load_part,
    read_as,
    read_params,
    several,
)
from lightweight_engine.flux.t5 import T5Encoder

CPU, META = torch.device("cpu"), torch.device("meta")
PREFIXES = ["", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "net.", "module.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_transformer_under_any_prefix(tmp_path: Path, prefix: str) -> None:
    parts = find_parts(open_checkpoint(save_flux(tmp_path / "x.safetensors", prefix=prefix)))
    assert list(parts) == ["transformer"]
    model = load_part(parts["transformer"], Storage("auto", torch.float32), device=CPU)
    assert model.params == FLUX


@pytest.mark.parametrize("guidance_embed", [True, False])
def test_dev_and_schnell_are_told_apart(tmp_path: Path, guidance_embed: bool) -> None:
    path = save_flux(tmp_path / "x.safetensors", guidance_embed=guidance_embed, depth=3, depth_single_blocks=2)
    params = read_params(find_parts(open_checkpoint(path))["transformer"])
    assert (params.guidance_embed, params.depth, params.depth_single_blocks) == (guidance_embed, 3, 2)
    assert params.mu == (1.15 if guidance_embed else 1.0)


def all_in_one(folder: Path) -> Path:
    merged = load_file(save_flux(folder / "t.safetensors", prefix="model.diffusion_model."))
    for name, prefix, module in (
        ("t5", "text_encoders.t5xxl.transformer.", network(T5Encoder, T5)),
        ("clip", "text_encoders.clip_l.transformer.", network(CLIPText, CLIP)),
        ("ae", "vae.", network(Autoencoder, AE)),
    ):
        merged |= load_file(save(folder / f"{name}.safetensors", module, prefix=prefix))
    merged["text_encoders.clip_l.transformer.text_projection.weight"] = torch.zeros(32, 32)
    merged["text_encoders.clip_l.logit_scale"] = torch.zeros(())
    save_file(
        merged, folder / "aio.safetensors", metadata={"config": '{"axes_dim": [8, 12, 12], "num_attention_heads": 2}'}
    )
    return folder / "aio.safetensors"


def test_all_in_one(tmp_path: Path) -> None:
    parts = find_parts(open_checkpoint(all_in_one(tmp_path)))
    assert set(parts) == {"transformer", "t5", "clip", "autoencoder"}
    assert parts["clip"].ignored == ("text_encoders.clip_l.transformer.text_projection.weight",)
    for part in parts.values():
        load_part(part, Storage("auto", torch.float32), device=CPU)


def test_the_shared_table_under_its_other_name(tmp_path: Path) -> None:
    state = network(T5Encoder, T5).state_dict()
    state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    save_file(state, tmp_path / "x.safetensors")
    assert "shared.weight" in find_parts(open_checkpoint(tmp_path / "x.safetensors"))["t5"].sources


def test_matching_dtypes_are_views_of_the_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_flux(tmp_path / "x.safetensors", dtype=torch.float32))
    model = load_part(find_parts(checkpoint)["transformer"], Storage("auto", torch.float32), device=CPU)
    mapped = checkpoint.tensor("img_in.weight").untyped_storage().data_ptr()
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == {mapped}


def test_kept_file_dtype_gives_the_same_numbers(tmp_path: Path) -> None:
    part = find_parts(open_checkpoint(save(tmp_path / "x.safetensors", network(T5Encoder, T5), dtype=torch.float16)))[
        "t5"
    ]
    upcast = load_part(part, Storage("auto", torch.float32), device=CPU)
    kept = load_part(part, Storage("file", torch.float32), device=CPU)
    assert any(isinstance(module, CastLinear) for module in kept.modules())
    assert kept.shared.weight.dtype == torch.float16
    ids = torch.randint(0, 64, (2, 9))
    assert torch.equal(upcast(ids), kept(ids))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("double_blocks.0.img_mlp.2.weight"), "1 missing .*img_mlp.2.weight"),
        (lambda state: state.update({"double_blocks.0.extra": torch.zeros(1)}), "1 unexpected .*extra"),
        (lambda state: state.update({"txt_in.bias": torch.zeros(5)}), "of another shape .*txt_in.bias"),
        (lambda state: state.pop("img_in.weight"), "img_in.weight.*missing"),
    ],
)
def test_keys_that_do_not_fit_are_named(tmp_path: Path, change, words: str) -> None:
    path = save_flux(tmp_path / "x.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"config": '{"axes_dim": [8, 12, 12]}'})
    with pytest.raises(UnsupportedCheckpointError, match=words):
        load_part(find_parts(open_checkpoint(path))["transformer"], Storage("auto", torch.float32), device=CPU)


def test_unknown_axes_need_a_hint(tmp_path: Path) -> None:
    path = save_flux(tmp_path / "x.safetensors")
    save_file(load_file(path), path)
    part = find_parts(open_checkpoint(path))["transformer"]
    with pytest.raises(UnsupportedCheckpointError, match="RoPE axes"):
        read_params(part)
    assert read_params(replace(part, given={"axes_dim": (8, 12, 12)})) == FLUX


def test_damaged_metadata(tmp_path: Path) -> None:
    path = save_flux(tmp_path / "x.safetensors")
    save_file(load_file(path), path, metadata={"config": "[1"})
    with pytest.raises(CorruptCheckpointError, match="config"):
        read_params(find_parts(open_checkpoint(path))["transformer"])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"], "is a LoRA"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "is a LoRA"),
        (["double_stream_modulation_img.lin.weight"], "Flux.2"),
        (["distilled_guidance_layer.norms.0.scale"], "Chroma"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "Stable Diffusion"),
        (["single_transformer_blocks.0.attn.to_q.weight"], "diffusers layout"),
        (["something.else"], "no part of Flux.1 .*something.else"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, keys: list[str], words: str) -> None:
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedCheckpointError, match=words):
        find_parts(open_checkpoint(tmp_path / "x.safetensors"))


def test_a_packed_file_is_kept_packed_or_read_as_numbers(tmp_path: Path) -> None:
    part = find_parts(open_checkpoint(save_flux(tmp_path / "x.safetensors", dtype=torch.float8_e4m3fn)))["transformer"]
    packed, plain = (load_part(part, Storage(format, torch.float32), device=CPU) for format in ("auto", "fp32"))
    kept = packed.get_submodule("img_in")
    assert isinstance(kept, PackedLinear) and kept.values.dtype == torch.float8_e4m3fn
    x = torch.randn(2, FLUX.in_channels)
    assert torch.equal(kept(x), plain.get_submodule("img_in")(x))


@pytest.mark.parametrize("format", ["nf4", "fp4", "fp8_e5m2", "gguf:Q8_0", "gguf:Q4_0"])
def test_a_plain_file_is_packed_as_it_is_read(tmp_path: Path, format: str) -> None:
    part = find_parts(open_checkpoint(save_flux(tmp_path / "x.safetensors")))["transformer"]
    storage = Storage(format, torch.float32)
    model = load_part(part, storage, device=CPU)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    # A GGUF block takes 32 numbers of a row: a linear of 48 columns stays in the dtype that is computed in.
    plain = {"txt_in.weight"} if format.startswith("gguf:") else set()
    assert {f"{name}.weight" for name in packed} == linear_weights(empty_network(part)) - plain
    assert {module.spec.name for module in packed.values()} == {format}
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert inventory(part, storage).nbytes == pytest.approx(held, abs=256 * len(part.sources))


def test_convolutions_on_a_cpu_have_their_channels_last(tmp_path: Path) -> None:
    """The order changes where numbers lie, not which: pictures are those of the plain order within rounding."""
    module: Any = network(Autoencoder, AE)
    path = save(tmp_path / "ae.safetensors", module, dtype=torch.float32)
    part = find_parts(open_checkpoint(path))["autoencoder"]
    loaded: Any = load_part(part, Storage("auto", torch.float32), device=CPU)
    weights = [weight for weight in loaded.parameters() if weight.dim() == 4]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in module.state_dict().items())
    latent, pixels = torch.randn(1, 16, 4, 6), torch.rand(1, 3, 32, 48)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.decode(latent), module.decode(latent), rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded.encoder(pixels), module.encoder(pixels), rtol=0, atol=1e-4)


def test_maps_keep_their_channels_last_from_the_first_convolution_to_the_last() -> None:
    module: Any = network(Autoencoder, AE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    given: list[torch.Tensor] = []
    for layer in module.modules():
        if not list(layer.children()) and layer not in (module.encoder.conv_in, module.decoder.conv_in):
            layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.inference_mode():
        module.decoder(torch.randn(2, 16, 4, 6))
        module.encoder(torch.rand(2, 3, 32, 48))
    assert given and all(each.is_contiguous(memory_format=torch.channels_last) for each in given)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_what_several_threads_make_comes_in_order(threads: int) -> None:
    names, lock, ahead = [str(i) for i in range(30)], threading.Lock(), 5
    made, most = [], 0

    def make(name: str) -> int:
        with lock:
            made.append(name)
        return int(name) ** 2

    for taken, (name, value) in enumerate(several(make, names, threads=threads, ahead=ahead)):
        assert (name, value) == (str(taken), taken**2)
        most = max(most, len(made) - taken)
    assert sorted(made, key=int) == names
    assert most <= (ahead + 1 if threads else 1)


def test_nothing_more_is_made_once_one_fails() -> None:
    made = []

    def make(name: str) -> str:
        if name == "0":
            raise ValueError("as expected")
        made.append(name)
        return name

    with pytest.raises(ValueError, match="as expected"):
        list(several(make, [str(i) for i in range(1000)], threads=2, ahead=500))
    assert len(made) < 500


def test_few_weights_are_converted_at_once_beside_a_cpu(tmp_path: Path) -> None:
    part = find_parts(open_checkpoint(save_flux(tmp_path / "x.safetensors")))["transformer"]
    lock, now, most = threading.Lock(), 0, 0

    def bring(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        return tensor.to(META)

    def home(name: str, value: torch.Tensor | Packed) -> torch.Tensor | Packed:
        nonlocal now
        with lock:
            now -= 1
        return value

    load_part(part, Storage("auto", torch.float32), device=META, bring=bring, home=home, threads=8)
    assert (now, most) == (0, CONVERTED)


def test_what_is_taken_as_it_is_waits_for_no_turn(tmp_path: Path) -> None:
    part = find_parts(open_checkpoint(save_flux(tmp_path / "x.safetensors", dtype=torch.float32)))["transformer"]
    several_at_once, waiting = threading.Barrier(CONVERTED + 2), iter(range(CONVERTED + 2))

    def home(name: str, value: torch.Tensor | Packed) -> torch.Tensor | Packed:
        if next(waiting, None) is not None:
            several_at_once.wait(timeout=30)
        assert isinstance(value, torch.Tensor)
        return value.to(META)

    load_part(part, Storage("auto", torch.float32), device=META, home=home, threads=CONVERTED + 2)


@pytest.mark.parametrize("format", ["auto", "file", "fp16", "nf4", "fp8_e4m3", "fp8_rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_is_brought_to_be_converted_is_counted(tmp_path: Path, dtype: torch.dtype, format: str) -> None:
    part = find_parts(open_checkpoint(save_flux(tmp_path / "x.safetensors", dtype=dtype)))["transformer"]
    storage, linears = Storage(format, torch.bfloat16), linear_weights(empty_network(part))
    for name, source in part.sources.items():
        brought: list[torch.Tensor] = []

        def bring(tensor: torch.Tensor, brought: list[torch.Tensor] = brought) -> torch.Tensor:
            brought.append(tensor)
            return tensor

        made = read_as(part, name, storage.kept_as(source, name in linears), CPU, bring)
        result = {tensor.data_ptr() for tensor in (made.parts.values() if isinstance(made, Packed) else [made])}
        expected = sum(tensor.nbytes for tensor in brought if tensor.data_ptr() not in result)
        if expected:
            expected += TEMPORARIES * min(source.elements, GPU_PIECE)
            expected += 4 * source.elements if source.format != "plain" and isinstance(made, Packed) else 0
        assert storage.converting(source, name in linears) == expected


def test_scales_that_are_looked_at_together_are_named_as_when_they_are_read(tmp_path: Path) -> None:
    convert_part(
        find_parts(open_checkpoint(save_flux(tmp_path / "x.safetensors")))["transformer"],
        "nf4",
        tmp_path / "nf4.safetensors",
        device=CPU,
    )
    tensors, metadata = load_file(tmp_path / "nf4.safetensors"), open_checkpoint(tmp_path / "nf4.safetensors").metadata
    part = find_parts(open_checkpoint(tmp_path / "nf4.safetensors"))["transformer"]
    names = [name for name, source in part.sources.items() if source.format == "nf4"]
    scales = _Scales(part)
    for name in names:
        scales.add(name, part.sources[name].read(look=False))
    scales.check()
    tensors[f"{names[2]}.absmax"][1] = torch.nan
    save_file(tensors, tmp_path / "bad.safetensors", metadata=dict(metadata))
    bad = find_parts(open_checkpoint(tmp_path / "bad.safetensors"))["transformer"]
    with pytest.raises(CorruptCheckpointError, match="its absmax has values that are not finite") as expected:
        load_part(bad, Storage("auto", torch.float32), device=CPU)
    scales = _Scales(bad)
    for name in names:
        scales.add(name, bad.sources[name].read(look=False))
    with pytest.raises(CorruptCheckpointError) as found:
        scales.check()
    assert str(found.value) == str(expected.value) and names[2] in str(found.value)
