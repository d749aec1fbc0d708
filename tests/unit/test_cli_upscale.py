"""The command ``upscale``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli, command_line
from PIL import Image
from safetensors.torch import save_file
from test_hires_fix import compact_state

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.core.images import read_infotext, save
from lightweight_engine.errors import RequestError
from lightweight_engine.upscalers.resampling import to_image, to_levels


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    Image.effect_noise((41, 30), 60).convert("RGB").save(tmp_path / "small.png")
    (tmp_path / "models" / "ESRGAN").mkdir(parents=True)
    save_file(compact_state(), tmp_path / "models" / "ESRGAN" / "4x-Small.safetensors")
    return command_line(capsys, tmp_path, monkeypatch)


def test_a_picture_is_made_larger(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("spandrel")
    first, second = (cli("upscale", "small.png", "--upscaler", "4x-Small", "--device", "cpu") for _ in range(2))
    assert first.code == 0, first.err
    assert [Path(each.out.strip()).name for each in (first, second)] == ["small-2x.png", "small-2x-2.png"]
    assert Image.open(tmp_path / first.out.strip()).size == (82, 60)


def test_the_engine_gives_what_the_upscaler_gives(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("spandrel")
    picture = Image.effect_noise((40, 32), 60).convert("RGB")
    engine = LightweightEngine(Config(models_dir=tmp_path / "models", device="cpu"))
    direct = engine.upscalers.find("4x-Small").upscale(to_levels(picture), 3)
    assert np.array_equal(np.array(engine.upscale(picture, 3, "4x-Small")), np.array(to_image(direct)))


def test_names_are_listed(cli: Cli) -> None:
    assert {"Lanczos", "4x-Small"} <= set(cli("upscale", "--list").out.split("\n"))
    assert "4x-Small" in json.loads(cli("upscale", "--list", "--json").out)["upscalers"]


def test_a_damaged_upscaler_is_listed_as_such_and_told_with_its_option(cli: Cli, tmp_path: Path) -> None:
    bad = tmp_path / "models" / "ESRGAN" / "bad.pth"
    bad.write_bytes(b"PK")
    rows = dict(line.partition("  ")[::2] for line in cli("upscale", "--list").out.splitlines())
    assert "bad.pth" in rows["bad"] and rows["4x-Small"] == rows["Lanczos"] == ""
    told = json.loads(cli("upscale", "--list", "--json").out)
    assert {"bad", "4x-Small"} <= set(told["upscalers"]) and list(told["problems"]) == ["bad"]
    done = cli("upscale", "small.png", "--upscaler", "bad", "--device", "cpu")
    assert done.code == 3 and done.err.startswith("error: --upscaler: bad.pth")
    noted = f"note  upscaler file: {told['problems']['bad']}\n      -> replace or remove {bad.relative_to(tmp_path)}"
    assert noted in cli("doctor").out
    checks = json.loads(cli("doctor", "--set", "hr_upscaler=bad", "--json").out)["checks"]
    assert {check["state"] for check in checks if check["name"] == "upscaler file"} == {"bad"}


def test_as_data_and_in_another_format(cli: Cli) -> None:
    done = cli("upscale", "small.png", "--by", 1.5, "--upscaler", "Lanczos", "--format", "jpg", "--json", "-q")
    found = json.loads(done.out)
    assert (found["width"], found["height"]) == (61, 45) and found["path"].endswith("small-1.5x.jpg")


def test_a_quality_counts_where_a_format_has_one(cli: Cli, tmp_path: Path) -> None:
    command = ("upscale", "small.png", "--upscaler", "Lanczos", "--format")
    low, usual = (cli(*command, "jpg", *quality) for quality in (("--quality", 5), ()))
    sizes = [(tmp_path / each.out.strip()).stat().st_size for each in (low, usual)]
    assert sizes[0] < sizes[1] and "--quality" not in low.err
    assert "warning: --quality had no effect on png" in cli(*command, "png", "--quality", 5).err


@pytest.mark.parametrize("before", ["png", "jpg", "webp"])
@pytest.mark.parametrize("after", ["png", "jpg", "webp"])
def test_the_text_of_a_picture_stays_in_its_file(cli: Cli, tmp_path: Path, before: str, after: str) -> None:
    text = "a cat, größer\nSteps: 2, Sampler: Euler, Seed: 7, Size: 41x30"
    save(Image.open(tmp_path / "small.png"), tmp_path, "told", format=before, infotext=text)
    done = cli("upscale", f"told.{before}", "--upscaler", "Lanczos", "--format", after)
    assert done.code == 0 and read_infotext(tmp_path / done.out.strip()) == text
    assert text in cli("info", done.out.strip()).out


def test_a_picture_without_text_gets_none(cli: Cli, tmp_path: Path) -> None:
    assert read_infotext(tmp_path / cli("upscale", "small.png", "--upscaler", "Lanczos").out.strip()) is None


def test_a_text_that_a_format_does_not_hold_is_told(cli: Cli, tmp_path: Path) -> None:
    save(Image.open(tmp_path / "small.png"), tmp_path, "told", infotext="x" * 70_000)
    done = cli("upscale", "told.png", "--upscaler", "Lanczos", "--format", "jpg")
    assert "longer than a JPEG's EXIF can hold" in done.err
    assert read_infotext(tmp_path / done.out.strip()) == "x" * 70_000


def test_to_a_size_by_two(cli: Cli, tmp_path: Path) -> None:
    size = ("--width", 50, "--height", 50, "--crop")
    two = ("--upscaler", "Lanczos", "--upscaler-2", "Nearest", "--upscaler-2-visibility", 0.5)
    done = cli("upscale", "small.png", *size, *two)
    assert done.code == 0 and done.out.strip().endswith("small-50x50.png"), done.err
    assert Image.open(tmp_path / done.out.strip()).size == (50, 50)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "no picture to enlarge"),
        (("none.png",), 2, "there is no such file"),
        (("small.png", "--upscaler", "4x-Smal"), 3, "--upscaler: "),
        (("small.png", "--upscaler", "4x-Smal"), 3, "did you mean '4x-Small'"),
        (("small.png", "--upscaler", "ESRGAN_4x"), 3, "ESRGAN_4x.pth"),
        (("small.png", "--upscaler-2", "Lanczoz"), 3, "did you mean 'Lanczos'"),
        (("small.png", "--by", "0"), 2, "--by: 0 is too small; give more than 0, up to 16"),
        (("small.png", "--by", "2x"), 2, "error: --by: '2x' is no number; give more than 0, up to 16"),
        (("small.png", "--width", "wide"), 2, "error: --width: 'wide' is no whole number; give 1 or more"),
        (("small.png", "--by", "1e9"), 2, "is too large; give more than 0, up to 16"),
        (("small.png", "--by", "16", "--set", "max_side=100"), 2, "error: --by: the picture would have 656x480 pixels"),
        (("small.png", "--set", "max_side=50"), 2, "error: --by: the picture would have 82x60 pixels"),
        (("small.png", "--format", "gif"), 2, "error: --format: "),
        (("small.png", "--device", "cuda"), 2, "error: device: cuda is asked for"),
        (
            ("small.png", "--by", "2", "--height", "9"),
            2,
            "error: --by, --width and --height cannot all hold; give --by, or --width and --height\n",
        ),
        (("small.png", "--crop"), 2, "error: --crop needs a size to cut to; give --width and --height\n"),
        (
            ("small.png", "--upscaler-2-visibility", "1"),
            2,
            "error: --upscaler-2-visibility is of a second upscaler; name it in --upscaler-2\n",
        ),
        (
            ("small.png", "--upscaler-2", "Lanczos"),
            2,
            "error: --upscaler-2 would not be seen; give --upscaler-2-visibility above 0, or leave it out\n",
        ),
    ],
)
def test_what_cannot_be(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, said: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = cli("upscale", *arguments)
    assert done.code == code and said in done.err
    assert "warning" not in done.err, "nothing is said of a job that is none"


def test_wrong_options_are_told_before_a_picture_is_fetched(cli: Cli) -> None:
    assert "error: --crop needs a size" in cli("upscale", "none.png", "--crop").err


def test_a_format_by_its_other_spelling(cli: Cli) -> None:
    done = cli("upscale", "small.png", "--upscaler", "Lanczos", "--format", "JPEG")
    assert done.code == 0 and done.out.strip().endswith("small-2x.jpg"), done.err


def test_the_help_has_no_model_that_is_not_needed(cli: Cli) -> None:
    told = cli("upscale", "--help").out
    assert "--models-dir" in told and "--upscaler" in told
    assert not any(name in told for name in ("--checkpoint", "--t5", "--clip", "--vae"))


def test_transparency_is_kept(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    picture.paste((0, 255, 0, 255), (0, 0, 8, 16))
    engine = LightweightEngine(Config(models_dir=tmp_path, device="cpu"))
    made = engine.upscale(picture, 2, "Nearest")
    assert made.mode == "RGBA" and made.getpixel((2, 2)) == (0, 255, 0, 255) and made.getpixel((30, 2))[3] == 0
    with pytest.raises(RequestError, match="LDSR"):
        engine.upscale(picture, 2, "LDSR")
