"""``replay`` on the command line: LoRAs from the cache, and pictures without a sidecar. On the demonstration model."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli, Done, command_line
from factories import save_flux
from loopback import Site, serving
from lora_models import random_lora
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from lightweight_engine import GenerationRequest, LightweightEngine
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.core.replay import replay, save_result
from lightweight_engine.errors import RequestError
from tools.tiny.draw import training_drawing

pytestmark = pytest.mark.usefixtures("small_jobs")

SAME = "identical: every pixel is the same"
SMALL = ("--width", 64, "--height", 64, "--steps", 2, "--seed", 5, "--device", "cpu")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return command_line(capsys, tmp_path, monkeypatch)


def style() -> bytes:
    shapes = {role: part.shapes for role, part in ModelLibrary([TINY]).choose().parts.items()}
    return save(random_lora(shapes, seed=3))


def again(cli: Cli, path: object, *more: object) -> Done:
    return cli("replay", path, "--device", "cpu", *more)


class TestAddresses:
    @pytest.fixture
    def drawn(self, cli: Cli, tmp_path: Path) -> tuple[Site, str, tuple[object, ...]]:
        """A picture with a LoRA of a server that is gone by now, and the cache that has its file."""
        cache = ("--set", f"cache_dir={tmp_path / 'cache'}")
        with serving() as site:
            site.files["style.safetensors"] = style()
            address = f"{site.url('style.safetensors?token=SECRET')}:0.5"
            done = cli("generate", "a cat", *SMALL, "--lora", address, "--set", f"allow_hosts={site.name}", *cache)
        assert done.code == 0, done.err
        return site, done.out.strip(), cache

    def test_offline_the_cache_needs_no_leave_to_ask_a_host(
        self, cli: Cli, drawn: tuple[Site, str, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site, path, cache = drawn
        refused = again(cli, path, *cache)
        assert (refused.code, "add it to allow_hosts" in refused.err) == (6, True), refused.err
        monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("something was fetched"))
        done = again(cli, path, "--offline", *cache)
        assert (done.code, done.out.strip()) == (0, SAME), done.err
        assert len(site.asked) == 1

    def test_offline_what_the_cache_lacks_is_refused_as_before(
        self, cli: Cli, drawn: tuple[Site, str, tuple[object, ...]], tmp_path: Path
    ) -> None:
        _, path, cache = drawn
        (file,) = (tmp_path / "cache").rglob("content/*.safetensors")
        file.unlink()
        done = again(cli, path, "--offline", *cache)
        assert (done.code, "add it to allow_hosts" in done.err, "loading" in done.err) == (6, True, False), done.err


Bare = Callable[..., str]

PARAMETERS = (
    "Steps: 2, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.7, Seed: 5, Size: 64x64"
)


@pytest.fixture
def bare(cli: Cli) -> Bare:
    """Draws a picture, whose sidecar is lost."""

    def draw(*more: object, prompt: str = "a woman") -> str:
        done = cli("generate", prompt, *SMALL, *more)
        assert done.code == 0, done.err
        path = Path(done.out.strip())
        path.with_suffix(".json").unlink()
        return str(path)

    return draw


def written(folder: Path, parameters: str, prompt: str = "a woman") -> Path:
    """A picture with a text."""
    text = PngInfo()
    text.add_text("parameters", f"{prompt}\n{parameters}")
    Image.new("RGB", (64, 64)).save(folder / "other.png", pnginfo=text)
    return folder / "other.png"


class TestText:
    """What the text in the picture tells is made again; what it does not is asked for, or told."""

    def test_the_text_is_gone_by_and_says_so(self, cli: Cli, bare: Bare) -> None:
        done = again(cli, bare())
        assert (done.code, done.out.strip()) == (0, SAME), done.err
        (told,) = (line for line in done.err.splitlines() if line.startswith("warning: 0"))
        assert "00000-5.json is not there, so that the picture's own text is gone by" in told

    @pytest.mark.parametrize("prompt", ["a woman<lora:night:0.7>", "a woman<lora:night.safetensors:1:0.5>"])
    def test_loras_of_tags(self, cli: Cli, bare: Bare, prompt: str) -> None:
        done = again(cli, bare(prompt=prompt))
        assert (done.code, done.out.strip()) == (0, SAME), done.err

    def test_a_lora_of_a_tag_that_is_gone(self, cli: Cli, tmp_path: Path) -> None:
        done = again(cli, written(tmp_path, f'{PARAMETERS}, Lora hashes: "nigth: 0123456789"', "a woman<lora:nigth:1>"))
        assert (done.code, "loading" in done.err) == (3, False)
        assert "there is no LoRA called 'nigth'; did you mean 'night'?" in done.err

    def test_loras_without_a_strength_are_asked_for(self, cli: Cli, bare: Bare) -> None:
        done = again(cli, bare("--lora", "hat:0.5", prompt="a woman<lora:night:0.7>"))
        assert (done.code, done.out, "loading" in done.err) == (2, "", False)
        assert "error: loras: the picture's text names hat (" in done.err and "night" not in done.err
        assert "--lora NAME_OR_URL:STRENGTH" in done.err
        path = bare("--lora", "hat:0.5", "--lora", "night:0.7")
        done = again(cli, path, "--lora", "night:0.7")
        assert done.code == 2 and "error: --lora: the picture's text names hat (" in done.err
        done = again(cli, path, "--lora", "night:0.7", "--lora", "hat:0.5")
        assert (done.code, done.out.strip()) == (0, SAME), done.err
        done = again(cli, path, "--lora", "night:0.7", "--lora", "hat:0.6")
        assert done.code == 9, done.err
        assert again(cli, path, "--lora", "night:0.7", "--lora", "nigth").code == 3

    def test_a_lora_by_another_name_is_told(self, cli: Cli, bare: Bare, tmp_path: Path) -> None:
        path = bare("--lora", "hat:0.5")
        (tmp_path / "models" / "Lora").mkdir(parents=True)
        shutil.copy(TINY / "Lora" / "hat.safetensors", tmp_path / "models" / "Lora" / "cap.safetensors")
        done = again(cli, path, "--lora", "cap:0.5")
        assert (done.code, done.out.strip()) == (0, SAME), done.err
        assert "warning: loras: cap stands for hat (" in done.err
        done = again(cli, path, "--lora", "night:0.5")
        assert done.code == 9 and "another LoRA file: hat had the hash" in done.out
        done = again(cli, path, "--lora", "hat:0.5", "--lora", "night:0.5")
        assert done.code == 9 and "does not name night, which acts all the same" in done.err

    def test_a_sidecar_tells_its_loras(self, cli: Cli) -> None:
        path = cli("generate", "a woman", *SMALL).out.strip()
        done = again(cli, path, "--lora", "night")
        assert done.code == 2 and "the sidecar tells those of the picture; leave --lora out" in done.err

    def test_a_start_picture_and_a_mask_are_asked_for(self, cli: Cli, bare: Bare, tmp_path: Path) -> None:
        training_drawing(7, 1, (64, 64)).image.save("start.png")
        mask = Image.new("L", (64, 64))
        mask.paste(255, (16, 16, 48, 40))
        mask.save("mask.png")
        path = bare("--image", "start.png", "--denoising-strength", 0.5)
        done = again(cli, path)
        assert (done.code, done.out, "loading" in done.err) == (2, "", False)
        assert "image: the picture was made with a start picture, which its text does not hold" in done.err
        assert "give it by --image FILE" in done.err
        assert "2 files were given" in again(cli, path, "--image", "start.png", "--image", "start.png").err
        done = again(cli, path, "--image", "start.png")
        assert (done.code, done.out.strip()) == (0, SAME), done.err
        assert "does not tell resize_mode, " in done.err and "or whether there was a mask" in done.err
        assert "image: whether start.png is what the picture was made with is not known" in done.err
        options = ("--inpaint-full-res", "--inpainting-mask-invert", "--inpainting-fill", 2, "--mask-blur", 2)
        inpaint = ("--image", "start.png", "--denoising-strength", 0.5, "--mask", "mask.png")
        path = bare(*inpaint, *options, "--inpaint-full-res-padding", 9)
        done = again(cli, path, "--image", "start.png")
        assert done.code == 2 and "the picture was made with a mask, which its text does not hold" in done.err
        done = again(cli, path, "--image", "start.png", "--mask", "mask.png")
        assert (done.code, done.out.strip()) == (0, SAME), done.err
        path = bare(*inpaint, "--mask-blur", 0)  # of which the text says nothing
        done = again(cli, path, "--image", "start.png", "--mask", "mask.png")
        assert (done.code, done.out.strip()) == (0, SAME), done.err
        assert again(cli, path, "--image", "start.png").code == 9

    def test_no_picture_is_taken_where_there_was_none(self, cli: Cli, bare: Bare) -> None:
        path = bare()
        for field in ("image", "mask"):
            done = again(cli, path, f"--{field}", path)
            assert done.code == 2 and "the picture was made with none, and 1 file was given" in done.err

    def test_the_passes_of_the_detailer(self, cli: Cli, bare: Bare) -> None:
        drawn = next(
            each for each in (training_drawing(7, number, (256, 256)) for number in range(100))
            if [mark.what for mark in each.marks].count("face") == 1
        )  # fmt: skip
        drawn.image.save("start.png")
        passes = (
            '{"ad_model": "None"}',
            '{"ad_model": "face_tiny", "ad_use_steps": true, "ad_steps": 2, "ad_denoising_strength": 0.5,'
            ' "ad_prompt": "a face: a, b", "ad_use_sampler": true, "ad_sampler": "Heun", "ad_mask_k": 2}',
        )
        options = [each for values in passes for each in ("--adetailer-passes", values)]
        start = ("--width", 256, "--height", 256, "--image", "start.png", "--denoising-strength", 0)
        path = bare(*start, *options)
        done = again(cli, path, "--image", "start.png")
        assert (done.code, done.out.strip()) == (0, SAME), done.err
        assert "skip_img2img" in done.err
        plain = bare(*start)
        assert Image.open(path).tobytes() != Image.open(plain).tobytes(), "the pass painted something"

    def test_the_hires_pass_and_its_upscaler(self, cli: Cli, bare: Bare, tmp_path: Path) -> None:
        hires = ("--hr-scale", 1.5, "--hr-upscaler", "4x_tiny", "--hr-steps", 2, "--denoising-strength", 0.5)
        done = again(cli, bare(*hires))
        assert (done.code, done.out.strip()) == (0, SAME), done.err
        text = f"{PARAMETERS}, Denoising strength: 0.5, Hires upscale: 1.5, Hires upscaler: 4x-Gone"
        done = again(cli, written(tmp_path, text))
        assert (done.code, "loading" in done.err) == (3, False) and "4x-Gone" in done.err

    def test_what_is_not_done_again_is_told(self, cli: Cli, tmp_path: Path) -> None:
        text = (
            f"{PARAMETERS}, Model hash: 0123456789, Model: gone, Tiling: True, ControlNet 0: x, VAE Decoder: Full, "
            "ADetailer model: face_tiny, ADetailer confidence: 0.5, ADetailer restore face: True, "
            "ADetailer use separate VAE 2nd: True, ADetailer model 99th: face_tiny, ADetailer moods: many, "
            "Version: f2.0.1"
        )
        done = again(cli, written(tmp_path, text))
        assert done.code == 9, done.err
        assert "not made by this engine (f2.0.1)" in done.err
        assert (
            "names what is not done again: Tiling, ControlNet 0, ADetailer restore face, "
            "ADetailer use separate VAE 2nd, ADetailer model 99th, ADetailer moods\n"
        ) in done.err
        assert "no checkpoint is called gone, as the picture's text has it; name it by --checkpoint" in done.err
        assert "another transformer file: tiny, where the text has gone (0123456789)" in done.out

    def test_what_a_text_has_to_tell(self, cli: Cli, tmp_path: Path) -> None:
        done = again(cli, written(tmp_path, "Steps: 2, Sampler: Euler, Size: 64x64"))
        assert done.code == 2 and "seed: the picture's text tells none" in done.err
        done = again(cli, written(tmp_path, "Steps: 2, Seed: 5, Size: 64x64"))
        assert "the picture's text does not tell sampler, cfg_scale; the defaults are taken" in done.err
        for wrong in ("ADetailer model: face_tiny, ADetailer mask blur: much", "Mask blur: much"):
            done = again(cli, written(tmp_path, f"{PARAMETERS}, {wrong}"))
            assert (done.code, "is 'much', not a number" in done.err) == (2, True), done.err

    def test_the_checkpoint_that_the_text_names(self, cli: Cli, bare: Bare, tmp_path: Path) -> None:
        path = bare()
        save_flux(tmp_path / "models" / "Stable-diffusion" / "small.safetensors")
        done = again(cli, path)
        assert (done.code, done.out.strip()) == (0, SAME), done.err

    def test_noise_is_that_of_the_text(self, cli: Cli, bare: Bare, tmp_path: Path) -> None:
        drawn = bare()
        (tmp_path / "engine.toml").write_text('noise_source = "NV"\n')
        assert again(cli, drawn).code == 0


def test_from_python_too_nothing_is_left_out(
    engine: LightweightEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    fields = {"prompt": "a woman", "width": 64, "height": 64, "steps": 2, "seed": 5}
    paths = []
    for loras in ((), ("night:0.7",)):
        (saved,) = save_result(engine.run(GenerationRequest(**fields, loras=loras)), tmp_path)
        assert saved.sidecar is not None
        saved.sidecar.unlink()
        paths.append(saved.path)
    assert replay(engine, paths[0]).identical
    assert "is not there, so that the picture's own text is gone by" in caplog.text
    with pytest.raises(RequestError, match=r"names night \("):
        replay(engine, paths[1])
