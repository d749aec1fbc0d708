"""Upscalers: resampling against Pillow, tiles, networks against spandrel itself, names, and files that are hostile."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lightweight_engine.errors import (
    CorruptCheckpointError,
    ModelNotFoundError,
    RequestError,
    UnsupportedCheckpointError,
)
from lightweight_engine.upscalers import tiles
from lightweight_engine.upscalers.library import UpscalerLibrary
from lightweight_engine.upscalers.networks import NetworkUpscaler, Tiling, _fault, open_network
from lightweight_engine.upscalers.resampling import Filter, bicubic, lanczos, resample, to_image, to_levels
from lightweight_engine.upscalers.resizing import CROP, FILL, STRETCH, resize, resize_levels
from lightweight_engine.upscalers.upscaler import NONE, PLAIN, enlarged
from lightweight_engine.upscalers.visits import Visitor

spandrel = pytest.importorskip("spandrel")


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def esrgan_state(scale_convs: int = 2, width: int = 8, blocks: int = 1) -> dict[str, Tensor]:
    """A small network in Real-ESRGAN's key layout, with weights that keep pictures in range."""
    torch.manual_seed(7)
    grow = 32  # of every published one
    convs = {"conv_first": (3, width), "conv_body": (width, width), "conv_hr": (width, width), "conv_last": (width, 3)}
    convs |= {f"conv_up{i + 1}": (width, width) for i in range(scale_convs)}
    for block in range(blocks):
        for r in (1, 2, 3):
            inner = [(width + i * grow, grow if i < 4 else width) for i in range(5)]
            convs |= {f"body.{block}.rdb{r}.conv{i + 1}": sizes for i, sizes in enumerate(inner)}
    state = {}
    for name, (inputs, outputs) in convs.items():
        state[f"{name}.weight"] = torch.randn(outputs, inputs, 3, 3) * 0.08
        state[f"{name}.bias"] = torch.full((outputs,), 0.05)
    return state


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for folder in ("ESRGAN", "RealESRGAN"):
        (tmp_path / folder).mkdir()
    save_file(esrgan_state(), tmp_path / "ESRGAN" / "4x-UltraSharp.safetensors")
    torch.save({"params_ema": esrgan_state()}, tmp_path / "RealESRGAN" / "RealESRGAN_x4plus.pth")
    return tmp_path


# --- resampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 90), (90, 20), (33, 47), (41, 30), (7, 5), (200, 120)])
@pytest.mark.parametrize(("by_torch", "filter"), [(lanczos, Filter.LANCZOS), (bicubic, Filter.BICUBIC)])
def test_filters_by_torch_equal_those_of_pillow(
    size: tuple[int, int], by_torch: Callable[..., torch.Tensor], filter: Filter
) -> None:
    levels = noise(47, 61)
    assert torch.equal(by_torch(levels, size), to_levels(resample(to_image(levels), size, filter)))


def test_rows_come_before_columns() -> None:
    image = to_image(noise(96, 48))
    rows = image.resize((80, 96), Filter.LANCZOS)
    assert np.array_equal(resample(image, (80, 40)), rows.resize((80, 40), Filter.LANCZOS))


def test_transparent_colours_do_not_bleed() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    pixels = np.array(resample(image, (32, 32)))
    assert pixels[pixels[..., 3] > 8][:, 0].max() == 0


@pytest.mark.parametrize("mode", [CROP, FILL])
@pytest.mark.parametrize("size", [(64, 64), (50, 75), (75, 50), (16, 128), (1, 9)])
def test_every_mode_gives_the_size(mode: int, size: tuple[int, int]) -> None:
    assert resize(to_image(noise(41, 57)), size, mode).size == size


@pytest.mark.parametrize("mode", [STRETCH, CROP, FILL])
@pytest.mark.parametrize("size", [(57, 41), (64, 64), (50, 75), (75, 50), (16, 129), (61, 44), (1, 9), (200, 9)])
@pytest.mark.parametrize("channels", [1, 3])
def test_levels_get_the_bytes_of_pictures_in_every_mode(mode: int, size: tuple[int, int], channels: int) -> None:
    levels = noise(41, 57)[:channels]
    image = resize(to_image(levels), size, mode)
    assert image.mode == ("L" if channels == 1 and mode == STRETCH else "RGB")
    assert torch.equal(resize_levels(levels, size, mode), to_levels(image)[:channels])


# --- tiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 5), (3, 300), (200, 150), (32, 32), (33, 100), (193, 40)])
@pytest.mark.parametrize("overlap", [0, 8])
def test_tiles_put_together_are_the_picture(size: tuple[int, int], overlap: int) -> None:
    """Where every tile holds the picture itself, blending changes nothing; before the border there is black."""
    width, height = size
    levels = noise(height, width)
    grid = tiles.split(size, 32, overlap)
    made = tiles.combine(tiles.cut(levels, grid), grid, 1)
    blended = (slice(max(overlap - (32 - height), 0) if height < 32 else 0, None),
               slice(max(overlap - (32 - width), 0) if width < 32 else 0, None))  # fmt: skip
    assert torch.equal(made[:, *blended], levels[:, *blended])


def test_blending_rounds_as_pillow_does() -> None:
    below, above = noise(16, 255, 1), noise(16, 255, 2)
    mask = Image.fromarray(np.arange(255, dtype=np.uint8)[None].repeat(16, 0))
    golden = to_image(below)
    golden.paste(to_image(above), (0, 0), mask)
    made = tiles._blend(below, above, torch.arange(255).view(1, 1, -1))
    assert torch.equal(made, to_levels(golden))


# --- networks -----------------------------------------------------------------------------------------------------


def test_equal_to_spandrel_called_directly(models: Path) -> None:
    path = models / "ESRGAN" / "4x-UltraSharp.safetensors"
    direct = spandrel.ModelLoader().load_from_file(path).eval()
    levels = noise(24, 20)
    with torch.inference_mode():
        colours = direct(levels.flip(0)[None].float() / 255)[0].flip(0)
    golden = (colours.clamp(0, 1) * 255).round().byte()
    ours = NetworkUpscaler("x", open_network(path), Tiling(tile=0)).once(levels)
    assert torch.equal(ours, golden)


@pytest.mark.parametrize("name", ["Compact", "OmniSR", "RealCUGAN", "SeemoRe", "SwiftSRGAN"])
def test_other_architectures_equal_spandrel_too(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    module = import_module(f"spandrel.architectures.{name}")
    kinds = (each for each in vars(module).values() if isinstance(each, type) and issubclass(each, nn.Module))
    state = {key: value.contiguous() for key, value in next(kinds)().state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    direct = spandrel.ModelLoader().load_from_file(tmp_path / "x.safetensors").eval()
    levels = noise(33, 40)
    with torch.inference_mode():
        golden = (direct(levels.flip(0)[None].float() / 255)[0].flip(0).clamp(0, 1) * 255).round().byte()
    ours = NetworkUpscaler(name, open_network(tmp_path / "x.safetensors"), Tiling(tile=0)).once(levels)
    assert ours.shape[1] == 33 * direct.scale and torch.equal(ours, golden)


def test_networks_for_something_else_are_refused(models: Path) -> None:
    known = open_network(models / "ESRGAN" / "4x-UltraSharp.safetensors")
    common = {"tags": [], "supports_half": True, "supports_bfloat16": True, "input_channels": 3, "output_channels": 3}
    module = nn.Conv2d(3, 3, 1)
    given = (module, module.state_dict(), known.architecture)
    painter = spandrel.MaskedImageModelDescriptor(*given, purpose="Inpainting", **common)
    faces = spandrel.ImageModelDescriptor(*given, purpose="FaceSR", scale=2, **common)
    assert "inpainting" in str(_fault(painter)) and "faces" in str(_fault(faces))
    assert _fault(known) is None


@pytest.mark.parametrize("tiling", [Tiling(32, 8), Tiling(32, 8, blended=False), Tiling(192, 8, blended=False)])
def test_tiles_come_near_the_whole(models: Path, tiling: Tiling) -> None:
    network = open_network(models / "ESRGAN" / "4x-UltraSharp.safetensors")
    levels = noise(40, 70)
    whole = NetworkUpscaler("x", network, Tiling(tile=0)).once(levels).int()
    made = NetworkUpscaler("x", network, tiling).once(levels).int()
    assert made.shape == (3, 160, 280)
    assert (made - whole).abs().float().mean() < 2


def test_tiles_together_give_what_they_give_alone(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = NetworkUpscaler("x", open_network(models / "ESRGAN" / "4x-UltraSharp.safetensors"), Tiling(32, 8))
    alone = upscaler.once(noise(40, 70))
    monkeypatch.setattr(upscaler, "_together", lambda tile: 5)
    assert (upscaler.once(noise(40, 70)).int() - alone.int()).abs().max() <= 1


def test_a_caller_can_stop_between_tiles(models: Path) -> None:
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise InterruptedError

    network = open_network(models / "ESRGAN" / "4x-UltraSharp.safetensors")
    upscaler = NetworkUpscaler("x", network, Tiling(32, 8), after_tile=stop)
    with pytest.raises(InterruptedError):
        upscaler.once(noise(40, 70))
    assert seen == [(1, 6), (2, 6)]


def test_a_network_visits_a_device_as_it_is_and_comes_back_as_it_was(models: Path) -> None:
    module = open_network(models / "ESRGAN" / "4x-UltraSharp.safetensors").model.to(memory_format=torch.channels_last)
    golden = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    visitor = Visitor(module, torch.device("meta"))
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    assert all(torch.equal(tensor, golden[name]) for name, tensor in module.state_dict().items())
    assert len({tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}) == 1
    with pytest.raises(InterruptedError), visitor.there():
        for name, tensor in module.state_dict().items():
            assert tensor.is_meta and tensor.shape == golden[name].shape and tensor.stride() == golden[name].stride()
        raise InterruptedError
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in module.parameters())


def test_numbers_there_are_those_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several types and orders, at places of their own; the copy is a CPU's, which stands for a device."""
    module = nn.Module()
    module.register_buffer("short", torch.randn(3, 5).half())
    module.register_buffer("mixed", torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    module.register_buffer("part", torch.randn(8, 8)[:, ::2])
    module.register_buffer("number", torch.tensor(7))
    golden = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    visitor = Visitor(module, torch.device("meta"))
    home = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    monkeypatch.setattr(visitor, "_device", torch.device("cpu"))
    monkeypatch.setattr(visitor._arena, "buffer", Copied(visitor._arena.buffer))
    with visitor.there():
        there = module.state_dict()
        assert all(torch.equal(tensor, golden[name]) for name, tensor in there.items())
        assert all(tensor.data_ptr() != home[name] for name, tensor in there.items())


class Copied:
    """Memory that comes to a device as a copy, although that is a CPU too."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def to(self, device: torch.device, non_blocking: bool) -> Tensor:
        return self.buffer.clone()


def test_on_a_gpu_the_next_tiles_are_begun_before_the_last_are_waited_for(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    network = open_network(models / "ESRGAN" / "4x-UltraSharp.safetensors")
    upscaler = NetworkUpscaler("x", network, Tiling(32, 8), after_tile=lambda done, _: events.append(f"told {done}"))
    golden = upscaler.once(noise(40, 70))
    begin, count = upscaler._begun, iter(range(1, 10))

    def begun(cut: Tensor) -> Callable[[], Tensor]:
        events.append(f"begun {next(count)}")
        return begin(cut)

    events.clear()
    monkeypatch.setattr(upscaler, "_begun", begun)
    monkeypatch.setattr(upscaler, "device", torch.device("cuda"))
    monkeypatch.setattr(upscaler, "_together", lambda tile: 2)
    assert (upscaler.once(noise(40, 70)).int() - golden.int()).abs().max() <= 1
    assert events == ["begun 1", "begun 2", "told 2", "begun 3", "told 4", "told 6"]


def test_colours_that_are_no_numbers_are_black() -> None:
    assert NetworkUpscaler._bytes(torch.tensor([float("nan"), 2.0, -1.0, 0.5])).tolist() == [0, 255, 0, 128]


@pytest.mark.parametrize(("by", "size"), [(1.5, (56, 40)), (4.5, (184, 128)), (1, (40, 24))])
def test_sizes_are_multiples_of_eight(models: Path, by: float, size: tuple[int, int]) -> None:
    network = UpscalerLibrary([models]).find("4x-UltraSharp")
    for upscaler in (*PLAIN, network):
        made = upscaler.upscale(noise(30, 41), by)
        assert (made.shape[2], made.shape[1]) == size


def test_enlarging_runs_no_network_where_the_picture_is_large_enough() -> None:
    class Never:
        name, scale = "never", 4

        def upscale(self, levels: Tensor, by: float) -> Tensor:
            raise AssertionError

    levels = noise(30, 40)
    assert torch.equal(enlarged(levels, (40, 30), Never()), levels)
    assert enlarged(levels, (20, 30), Never()).shape == (3, 30, 20)


# --- names --------------------------------------------------------------------------------------------------------


def test_names_and_files(models: Path) -> None:
    library = UpscalerLibrary([models])
    assert library.names() == ["None", "Lanczos", "Nearest", "4x-UltraSharp", "R-ESRGAN 4x+"]
    assert library.find("none") is NONE
    assert library.find("r-esrgan 4X+").scale == 4
    assert library.entries()[1].family.tiling.half


def test_networks_are_read_once_and_a_bounded_number_kept(models: Path) -> None:
    library = UpscalerLibrary([models], keep=1)
    first = library.find("4x-UltraSharp")
    assert library.find("4x-UltraSharp") is first
    library.find("R-ESRGAN 4x+")
    assert library.find("4x-UltraSharp") is not first
    assert library.held > 0
    library.release()
    assert library.held == 0


def test_a_file_that_changed_is_read_again(models: Path) -> None:
    library = UpscalerLibrary([models])
    first = library.find("4x-UltraSharp")
    save_file(esrgan_state(scale_convs=1), models / "ESRGAN" / "4x-UltraSharp.safetensors")
    second = library.find("4x-UltraSharp")
    assert (first.scale, second.scale) == (4, 2)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("4x-UltraSharpe", ModelNotFoundError, "did you mean '4x-UltraSharp'"),
        ("LDSR", RequestError, "choose one of: None, Lanczos"),
        ("Latent (bicubc)", ModelNotFoundError, "did you mean 'Latent (bicubic)'"),
        ("", ModelNotFoundError, "Latent (nearest-exact)"),
        ("SwinIR 4x", ModelNotFoundError, "SwinIR_4x.pth"),
        ("ESRGAN_4x", ModelNotFoundError, "ESRGAN_4x.pth"),
        ("../../etc/passwd", ModelNotFoundError, "there is no upscaler"),
        ("x\0y", ModelNotFoundError, "there is no upscaler"),
        ("", ModelNotFoundError, "there is no upscaler"),
    ],
)
def test_unknown_names(models: Path, name: str, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match="hr_upscaler: ") as caught:
        UpscalerLibrary([models]).find(name, field="hr_upscaler")
    assert said in str(caught.value)


def test_no_folder_is_no_files(tmp_path: Path) -> None:
    assert UpscalerLibrary([tmp_path / "nowhere"]).names() == ["None", "Lanczos", "Nearest"]


# --- hostile files ------------------------------------------------------------------------------------------------


class _Runs:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "4x.pth"
    torch.save({"conv_first.weight": torch.zeros(1), "x": _Runs(mark)}, path)
    with pytest.raises(UnsupportedCheckpointError, match="could run code"):
        open_network(path)
    assert not mark.exists()


def test_code_in_a_pickle_of_the_old_format_does_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "4x.pth"
    path.write_bytes(pickle.dumps(_Runs(mark), protocol=2))
    with pytest.raises(UnsupportedCheckpointError):
        open_network(path)
    assert not mark.exists()


def _huge_width() -> dict[str, Tensor]:
    """One small tensor that asks for a network of 100,000 channels: 360 GB for each of its layers."""
    state = esrgan_state()
    state["conv_first.weight"] = torch.zeros(100_000, 3, 3, 3)
    return state


def _huge_depth() -> dict[str, Tensor]:
    state = esrgan_state(width=128)
    state |= {f"body.{i}.rdb1.conv1.weight": torch.zeros(1) for i in range(1, 3000)}
    return state


def _other_network() -> dict[str, Tensor]:
    return nn.Sequential(nn.Linear(4, 4)).state_dict()


@pytest.mark.parametrize("make", [_huge_width, _huge_depth, _other_network], ids=lambda make: make.__name__)
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "4x.safetensors"
    save_file(make(), path)
    with pytest.raises(UnsupportedCheckpointError, match=r"4x\.safetensors"):
        open_network(path)


def test_too_many_tensors(tmp_path: Path) -> None:
    path = tmp_path / "4x.safetensors"
    save_file({f"model.{i}": torch.zeros(1) for i in range(10_001)}, path)
    with pytest.raises(UnsupportedCheckpointError, match="more than any upscaler"):
        open_network(path)


@pytest.mark.parametrize("cut", [0, 3, 1000])
def test_truncated_files(models: Path, cut: int) -> None:
    for path in (models / "ESRGAN" / "4x-UltraSharp.safetensors", models / "RealESRGAN" / "RealESRGAN_x4plus.pth"):
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises((CorruptCheckpointError, UnsupportedCheckpointError)):
            open_network(path)


def test_a_zip_bomb(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"0" * (64 << 20))
    path = tmp_path / "4x.pth"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CorruptCheckpointError, match="compressed"):
        open_network(path)


def test_a_network_for_one_channel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grey.safetensors"
    state = esrgan_state()
    state["conv_first.weight"] = state["conv_first.weight"][:, :1].contiguous()
    state["conv_last.weight"] = state["conv_last.weight"][:1].contiguous()
    state["conv_last.bias"] = state["conv_last.bias"][:1].contiguous()
    save_file(state, path)
    with pytest.raises(UnsupportedCheckpointError, match="1 channels to 1"):
        open_network(path)
