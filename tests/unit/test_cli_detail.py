"""``detail`` on the command line, with the detectors that ship with the engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli, command_line
from PIL import Image

from tools.tiny.draw import training_drawing


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return command_line(capsys, tmp_path, monkeypatch)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A person with one face to be seen, of a size that is no multiple of 8."""
    for number in range(100):
        drawn = training_drawing(7, number, (256, 256))
        if [mark.what for mark in drawn.marks].count("face") == 1:
            wide = Image.new("RGB", (261, 256), drawn.image.getpixel((0, 0)))  # type: ignore[arg-type]
            wide.paste(drawn.image)
            wide.save(tmp_path / "person.png")
            return tmp_path / "person.png"
    raise AssertionError("no such drawing")


def test_list(cli: Cli) -> None:
    assert cli("detail", "--list").out.split() == ["face_tiny.safetensors", "hand_tiny.safetensors"]


def test_a_damaged_detector_is_listed_as_such_and_told_with_its_field(cli: Cli, picture: Path, tmp_path: Path) -> None:
    bad = tmp_path / "models" / "adetailer" / "bad.pt"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"PK")
    rows = dict(line.partition("  ")[::2] for line in cli("detail", "--list").out.splitlines())
    assert "bad.pt" in rows["bad.pt"] and rows["face_tiny.safetensors"] == ""
    told = json.loads(cli("detail", "--list", "--json").out)
    assert {"bad.pt", "face_tiny.safetensors"} <= set(told["detectors"]) and list(told["problems"]) == ["bad.pt"]
    done = cli("detail", picture, "--preview", "--adetailer-passes", '{"ad_model": "bad.pt"}')
    assert done.code == 3 and "ad_model: bad.pt" in done.err
    assert f"note  detector file: {told['problems']['bad.pt']}\n" in cli("doctor").out


def test_preview_paints_nothing(cli: Cli, picture: Path, tmp_path: Path) -> None:
    done = cli("detail", picture, "--preview", "-o", tmp_path / "out", "--json")
    told = json.loads(done.out)
    assert told["passes"][0][0]["label"] == "face"
    assert Image.open(told["path"]).size == (261, 256)


def test_a_preview_takes_the_place_of_no_other(cli: Cli, picture: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "other" / "person.png", tmp_path / "out"
    other.parent.mkdir()
    Image.new("RGB", (64, 64)).save(other)
    paths = [Path(cli("detail", each, "--preview", "-o", out).out.strip()) for each in (picture, other)]
    assert [path.name for path in paths] == ["person-found.png", "person-found-2.png"]
    assert [Image.open(path).size for path in paths] == [(261, 256), (64, 64)]


def test_a_face_is_painted_and_the_rest_stays(cli: Cli, picture: Path, tmp_path: Path) -> None:
    args = '{"ad_steps": 1, "ad_denoising_strength": 0.6, "ad_use_cfg_scale": false}'
    hands = '{"ad_disable": true}'
    done = cli(
        "detail", picture, "-o", tmp_path / "out", "--adetailer-args", args, "--adetailer-args-hands", hands, "--json"
    )
    told = json.loads(done.out)
    assert told["passes"][0]["painted"] == 1
    assert "no effect" not in done.err  # of what the request for a mask holds, which nobody sent
    before, after = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (picture, told["path"]))
    assert before.shape == after.shape
    changed = np.abs(before - after).sum(axis=2) > 0
    left, top, right, bottom = (int(side) for side in told["passes"][0]["found"][0]["box"])
    changed[max(top - 24, 0) : bottom + 24, max(left - 24, 0) : right + 24] = False
    assert not changed.any()


def test_what_cannot_be_detailed(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    assert cli("detail", tmp_path / "text.png").code == 2
    assert cli("detail", tmp_path / "none.png").code == 2
    assert "there is no picture to detail" in cli("detail").err
    for size, said in (((4104, 16), "over 4096 pixels (setting max_side)"), ((64, 15), "less than 16 pixels")):
        Image.new("RGB", size).save(tmp_path / "odd.png")
        done = cli("detail", tmp_path / "odd.png")
        assert done.code == 2 and f"the picture of {size[0]}x{size[1]} has a side of {said}; give --width" in done.err
        assert cli("detail", tmp_path / "odd.png", "-W", 64, "-H", 64, "--preview", "-o", tmp_path / "out").code == 0


def test_preview_finds_in_a_picture_of_any_size_that_is_read(cli: Cli, picture: Path, tmp_path: Path) -> None:
    with Image.open(picture) as person:
        wide = Image.new("RGB", (4104, 256), person.getpixel((0, 0)))  # type: ignore[arg-type]
        wide.paste(person)
    for side, image in (("long", wide), ("small", Image.new("RGB", (64, 15)))):
        image.save(tmp_path / f"{side}.png")
        done = cli("detail", tmp_path / f"{side}.png", "--preview", "-o", tmp_path / "out", "--json")
        assert done.code == 0, done.err
        with Image.open(json.loads(done.out)["path"]) as shown:
            assert shown.size == image.size
    limit = ("--set", "max_picture_megapixels=1")
    done = cli("detail", tmp_path / "long.png", "--preview", *limit)
    assert done.code == 2 and "has more than 1,000,000 pixels" in done.err


def test_generate_says_what_was_found(cli: Cli, picture: Path, tmp_path: Path) -> None:
    args = '{"ad_use_steps": true, "ad_steps": 1, "ad_denoising_strength": 0.1}'
    own = ("--adetailer-args", args, "--adetailer-args-hands", '{"ad_disable": true}', "-o", tmp_path / "out")
    start = ("--image", picture, "--denoising-strength", 0.1, "--width", 256, "--height", 256, "--steps", 10)
    done = cli("generate", "a woman", *start, "--adetailer", "-n", 2, "--seed", 1, *own)
    assert done.code == 0, done.err
    assert "picture 1: face_tiny: 1 found, 1 painted" in done.err and "picture 2: face_tiny: " in done.err
