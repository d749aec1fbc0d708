"""Our networks and what is made of them against ultralytics, where it is installed: the same weights, the same boxes.

The weights are those of the data, trained: random ones give hundreds of boxes with one score, in no order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from goldens import PROJECT, golden_dir
from PIL import Image
from safetensors.torch import load_file

from lightweight_engine.errors import UnsupportedCheckpointError
from lightweight_engine.extensions.boxes import Letterbox
from lightweight_engine.extensions.detector_list import Entry
from lightweight_engine.extensions.detector_networks import open_network
from lightweight_engine.extensions.ultralytics_detector import quietly
from lightweight_engine.upscalers.resampling import resample

FOLDER = golden_dir() / "pipelines" / "models_yolo"
BOXES = 0.01  # pixels
MASKS = 1  # level


@pytest.fixture(scope="module")
def library() -> Any:
    with quietly():
        # Before 8.4 both sides of a picture were scaled alike, which puts boxes up to 0.02 pixels elsewhere.
        return pytest.importorskip("ultralytics", "8.4", reason="the extra `adetailer` is not installed")


def networks() -> list[Path]:
    return sorted(FOLDER.glob("*.safetensors"))


def pictures(count: int = 24) -> list[Image.Image]:
    """The pictures of the data, and some put together from them in other sizes."""
    path = golden_dir() / "pipelines" / "yolo_det.npz"
    if not path.exists():
        pytest.skip("the slim copy of the goldens has no pictures for detectors")
    data = np.load(path)
    found = [Image.fromarray(data[name]) for name in sorted(data) if name.startswith("img_")]
    draw = np.random.default_rng(1)
    for _ in range(count):
        width, height = draw.integers(60, 500, 2).tolist()
        patches = draw.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
        made = Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
        for _ in range(int(draw.integers(1, 6))):
            at = (int(draw.integers(0, width)), int(draw.integers(0, height)))
            made.paste(found[int(draw.integers(len(found)))], at)
        found.append(made)
    return found


def save(library: Any, weights: Path, path: Path, *, segmentation: bool) -> Path:
    """The weights as a file of ultralytics; a segmentation network gets parts for masks that are drawn at random."""
    from ultralytics.nn.tasks import DetectionModel, SegmentationModel  # type: ignore[import-not-found]

    about = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    torch.manual_seed(3)
    layers = about["yaml"]
    if segmentation:
        layers["head"][-1] = [layers["head"][-1][0], 1, "Segment", ["nc", 32, 256]]
    network = (SegmentationModel if segmentation else DetectionModel)(layers, verbose=False)
    assert network.load_state_dict(load_file(weights), strict=False).unexpected_keys == []
    network.names = {int(number): name for number, name in about["names"].items()}
    network.args = {"imgsz": about["train_imgsz"], "task": "segment" if segmentation else "detect"}
    network.task = network.args["task"]
    torch.save({"model": network, "train_args": network.args}, path)
    return path


@pytest.mark.parametrize("segmentation", [False, True], ids=["detection", "segmentation"])
@pytest.mark.parametrize("weights", [pytest.param(path, id=path.stem) for path in networks()])
def test_boxes_and_masks(library: Any, tmp_path: Path, weights: Path, segmentation: bool) -> None:
    path = save(library, weights, tmp_path / "x.pt", segmentation=segmentation)
    ours, theirs = open_network(Entry("x.pt", path)), library.YOLO(path)
    count = 0
    for confidence in (0.3, 0.01):
        for image in pictures():
            expected = theirs.predict(image, conf=confidence, verbose=False, device="cpu")[0]
            found = ours.detect(image, confidence)
            count += len(found)
            assert [each.label for each in found] == [expected.names[int(kind)] for kind in expected.boxes.cls]
            if found:
                np.testing.assert_allclose([each.score for each in found], expected.boxes.conf, rtol=0, atol=1e-4)
                np.testing.assert_allclose([each.box for each in found], expected.boxes.xyxy, rtol=0, atol=BOXES)
            if segmentation:
                _compare_masks(found, expected, image)
    assert count > 100


def _compare_masks(found: Any, expected: Any, image: Image.Image) -> None:
    masks = [] if expected.masks is None else expected.masks.data
    assert len(masks) == len(found)
    for each, mask in zip(found, masks, strict=True):
        levels = Image.fromarray((mask > 0).byte().mul(255).numpy())
        picture = np.asarray(resample(levels, image.size, Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(picture - np.asarray(each.mask)).max() <= MASKS


@pytest.mark.parametrize("name", ["yolo11n", "yolo11n-seg", "yolov8s-worldv2"])
def test_other_networks_answer_as_the_library(library: Any, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    theirs = library.YOLO(f"{name}.yaml")
    theirs.save(tmp_path / f"{name}.pt")
    state = torch.random.get_rng_state()
    ours = open_network(Entry(f"{name}.pt", tmp_path / f"{name}.pt"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ours.classes == tuple(theirs.names[number] for number in range(len(theirs.names)))
    pixels = Letterbox.of(300, 200, 320).apply(torch.from_numpy(np.array(pictures(1)[-1].resize((300, 200)))))
    pixels = pixels.permute(2, 0, 1)[None] / 255
    network = theirs.model.half().float().eval()  # files hold half precision
    with torch.inference_mode():
        decoded, prototypes = ours.network(pixels)  # type: ignore[attr-defined]
        expected = network(pixels)[0]
    joined, masks = expected if isinstance(expected, tuple | list) else (expected, None)
    torch.testing.assert_close(decoded, joined[0], rtol=0, atol=1e-3)
    assert (prototypes is None) == (masks is None)
    if masks is not None:
        torch.testing.assert_close(prototypes, masks[0], rtol=0, atol=1e-4)
    ours.detect(pictures(1)[-1], 0.001)


def test_a_list_of_layers_that_asks_for_more_than_the_file_holds(library: Any, tmp_path: Path) -> None:
    network = library.YOLO("yolo11n.yaml").model
    network.yaml["scales"]["n"][1:] = [20.0, 60_000]  # a network of terabytes
    torch.save({"model": network}, tmp_path / "x.pt")
    with pytest.raises(UnsupportedCheckpointError, match="x.pt: its list of layers asks for more than the file holds"):
        open_network(Entry("x.pt", tmp_path / "x.pt"))
    network.yaml["scales"]["n"] = [0.5, 0.125, 1024]
    torch.save({"model": network}, tmp_path / "x.pt")
    with pytest.raises(UnsupportedCheckpointError, match="x.pt: its tensors are not those of its layers"):
        open_network(Entry("x.pt", tmp_path / "x.pt"))


def test_the_library_leaves_no_trace(tmp_path: Path) -> None:
    """In a process of its own: nothing is written, asked for, or changed for all by its import."""
    pytest.importorskip("ultralytics", "8.4")
    code = """
        import os, pathlib, socket, sys
        import numpy, torch
        from lightweight_engine.extensions.ultralytics_detector import quietly
        def refuse(*_): raise AssertionError("a look at the network")
        socket.socket.connect = socket.socket.connect_ex = refuse
        before = dict(os.environ), torch.save, repr(numpy.get_printoptions())
        with quietly():
            from ultralytics.nn import tasks
        assert (dict(os.environ), torch.save, repr(numpy.get_printoptions())) == before
        from ultralytics.utils import AUTOINSTALL, ONLINE
        assert not AUTOINSTALL and not ONLINE
        assert not list(pathlib.Path(os.environ["HOME"]).rglob("*ltralytics*"))
        """
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / ".config")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
