"""Detectors: what a network sees, what is made of its answers, which files are read, and that none of them runs."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from saved_detectors import NAMES, TINY_SEGMENTATION, random_network, save_whole
from torch import nn

from lightweight_engine.errors import (
    CorruptCheckpointError,
    MissingDependencyError,
    ModelError,
    ModelNotFoundError,
    RequestError,
    UnsupportedCheckpointError,
)
from lightweight_engine.extensions.boxes import MOST, Found, Letterbox, masks_of, resize_linear, select, suppress
from lightweight_engine.extensions.detector_files import IMAGE_SIZE, open_detector
from lightweight_engine.extensions.detector_list import Entry
from lightweight_engine.extensions.detector_networks import open_network, open_yolov8
from lightweight_engine.extensions.detectors import DetectorLibrary
from lightweight_engine.extensions.ultralytics_detector import checked_layers

FACE = "face_yolov8n.pt"


def picture(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("source", "longest", "resized", "corner", "size"),
    [
        ((640, 640), 640, (640, 640), (0, 0), (640, 640)),
        ((768, 1344), 640, (366, 640), (9, 0), (384, 640)),
        ((1, 1000), 640, (1, 640), (15, 0), (32, 640)),  # a side is at least a pixel
        ((100, 50), 128, (128, 64), (0, 0), (128, 64)),  # small ones are enlarged
        ((100, 100), 100, (128, 128), (0, 0), (128, 128)),  # to a multiple of 32
    ],
)
def test_letterbox(source: Any, longest: int, resized: Any, corner: Any, size: Any) -> None:
    letterbox = Letterbox.of(source[0], source[1], longest)
    assert (letterbox.resized, (letterbox.left, letterbox.top), letterbox.size) == (resized, corner, size)
    boxed = letterbox.apply(torch.zeros(source[1], source[0], 3, dtype=torch.uint8))
    assert boxed.shape == (size[1], size[0], 3)
    inner = boxed[letterbox.top :, letterbox.left :][: resized[1], : resized[0]]
    assert not inner.any() and boxed.sum() == 114 * (boxed.numel() - inner.numel())


def test_boxes_come_back_to_the_picture() -> None:
    letterbox = Letterbox.of(200, 100, 640)
    whole = torch.tensor([[letterbox.left, letterbox.top, 640 + letterbox.left, 320 + letterbox.top]]).float()
    assert letterbox.restore(whole).tolist() == [[0, 0, 200, 100]]
    assert letterbox.restore(whole * 2 - 300).tolist() == [[0, 0, 200, 100]]  # cut at the edges


def test_resizing_keeps_flat_and_halves_by_averages() -> None:
    flat = torch.full((7, 9, 3), 201, dtype=torch.uint8)
    assert (resize_linear(flat, 31, 5) == 201).all()
    squares = torch.arange(48, dtype=torch.uint8).reshape(4, 4, 3)
    assert resize_linear(squares, 2, 2)[0, 0].tolist() == [8, 9, 10]  # (0 + 3 + 12 + 15) / 4 = 7.5, rounded up


def decoded(rows: list[tuple[float, ...]]) -> torch.Tensor:
    """Columns of centre x, centre y, width, height, scores."""
    return torch.tensor(rows).T


def test_selection() -> None:
    found = select(
        decoded(
            [
                (50, 50, 20, 20, 0.5, 0.1),
                (51, 50, 20, 20, 0.7, 0.2),  # hides the first
                (51, 50, 20, 20, 0.1, 0.6),  # is of another class
                (90, 90, 8, 8, 0.3, 0.3),  # is not above 0.3
                (10, 10, 8, 8, 0.31, 0.2),
            ]
        ),
        2,
        0.3,
    )
    assert found.scores.tolist() == pytest.approx([0.7, 0.6, 0.31]) and found.classes.tolist() == [0, 1, 0]
    assert found.boxes[0].tolist() == [41, 40, 61, 60]
    only = select(decoded([(50, 50, 20, 20, 0.5, 0.1), (9, 9, 2, 2, 0.4, 0.6)]), 2, 0.3, [1])
    assert only.classes.tolist() == [1]


def test_no_more_than_the_cap_and_nothing_of_nothing() -> None:
    many = torch.arange(1000).float()
    boxes = torch.stack((many * 10, many * 0, many * 10 + 5, many * 0 + 5), dim=1)
    assert suppress(boxes).tolist() == list(range(MOST))
    assert suppress(boxes[:0]).tolist() == []
    assert suppress(torch.zeros(3, 4)).tolist() == [0, 1, 2]  # boxes without area cover nothing


def test_masks_stay_inside_their_boxes() -> None:
    found = Found(torch.tensor([[8.0, 4, 24, 12]]), torch.ones(1), torch.zeros(1).long(), torch.ones(1, 1))
    mask = masks_of(found, torch.ones(1, 8, 8), (32, 32))
    assert mask.shape == (1, 32, 32) and mask.sum() == 16 * 8 and mask[0, 4:12, 8:24].all()
    none = Found(*(part[:0] for part in found))
    assert masks_of(none, torch.ones(1, 8, 8), (32, 32)).shape == (0, 32, 32)


@cache
def tiny_state() -> dict[str, torch.Tensor]:
    return dict(random_network().state_dict())


def safetensors(path: Path, **metadata: str) -> Path:
    save_file(tiny_state(), path, metadata=metadata or None)
    return path


def whole(path: Path, **attributes: Any) -> Path:
    given = {"names": NAMES, "train_args": {"imgsz": 64}, **attributes}
    return save_whole(path, tiny_state(), **given)


def test_a_network_saved_whole_is_read(tmp_path: Path) -> None:
    file = open_detector(whole(tmp_path / FACE, yaml={"nc": 2}, criterion=None, stride=torch.tensor([8.0, 16, 32])))
    expected = tiny_state()
    assert (file.classes, file.image_size, file.layers) == (("face", "hand"), 64, {"nc": 2})
    assert file.checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(file.checkpoint.tensor(name), tensor), name


def test_the_averaged_network_comes_first(tmp_path: Path) -> None:
    path = save_whole(tmp_path / FACE, {"model.0.conv.weight": torch.zeros(1)}, ema=None, names=NAMES)
    assert open_detector(path).checkpoint.tensors.keys() == {"model.0.conv.weight"}


@pytest.mark.parametrize("kind", ["safetensors", "whole", "state"])
def test_all_forms_of_a_file_detect_the_same(tmp_path: Path, kind: str) -> None:
    network = random_network(eager=True)
    path = tmp_path / f"x.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        metadata = {"names": json.dumps(["face", "hand"]), "imgsz": "64", "stride": "32"}
        save_file(dict(network.state_dict()), path, metadata=metadata)
    elif kind == "whole":
        save_whole(path, network.state_dict(), names=["face", "hand"], args={"imgsz": [64, 32]})
    else:
        torch.save({"state_dict": network.state_dict()}, path)
    detector = open_network(Entry(path.name, path))
    assert detector.classes == (("0", "1") if kind == "state" else ("face", "hand")) and detector.nbytes > 100_000
    detector.image_size = 64  # type: ignore[attr-defined]
    found = detector.detect(picture(), 0.3)
    assert found and found == sorted(found, key=lambda each: -each.score)
    letterbox = Letterbox.of(96, 64, 64)
    pixels = letterbox.apply(torch.from_numpy(np.array(picture()))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = select(network.decode(network(pixels))[0], 2, 0.3)
    assert len(found) == len(expected.boxes)
    np.testing.assert_allclose([each.box for each in found], letterbox.restore(expected.boxes), atol=1e-3)
    assert all(0 <= x1 <= x2 <= 96 and 0 <= y1 <= y2 <= 64 for x1, y1, x2, y2 in (each.box for each in found))


def test_modes_of_pictures(tmp_path: Path) -> None:
    detector = open_network(Entry("x", whole(tmp_path / FACE)))
    for mode in ("L", "RGBA", "CMYK", "P", "1", "I;16"):
        detector.detect(picture().convert("L").convert(mode) if mode == "I;16" else picture().convert(mode), 0.5)


def test_segmentation_gives_masks_of_the_picture(tmp_path: Path) -> None:
    network = random_network(TINY_SEGMENTATION, eager=True)
    path = save_whole(tmp_path / "person.pt", network.state_dict(), "SegmentationModel", names=["person"])
    detector = open_network(Entry("person.pt", path))
    detector.image_size = 64  # type: ignore[attr-defined]
    found = detector.detect(picture(), 0.4)
    assert found
    for each in found:
        levels = np.asarray(each.mask)
        assert levels.shape == (64, 96) and levels.dtype == np.uint8 and levels.max() == 255


def test_where_memory_runs_out_the_network_looks_on_the_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_whole(tmp_path / FACE, random_network(eager=True).state_dict(), names=NAMES, args={"imgsz": 64})
    detector = open_yolov8(FACE, open_detector(path))
    expected = [(each.box, each.score) for each in detector.detect(picture(), 0.2)]
    visits = []

    @contextmanager
    def crowded(size: tuple[int, int]) -> Iterator[torch.device]:
        visits.append(size)
        yield torch.device("cpu")
        raise torch.OutOfMemoryError("CUDA out of memory")

    detector.visit = crowded
    with caplog.at_level(logging.WARNING):
        assert [(each.box, each.score) for each in detector.detect(picture(), 0.2)] == expected and expected
    assert visits == [(64, 64)] and "looks at the picture on the CPU" in caplog.text

    def broken(size: tuple[int, int]) -> Any:
        raise RuntimeError("another fault")

    detector.visit = broken
    with pytest.raises(RuntimeError, match="another fault"):
        detector.detect(picture(), 0.2)


def test_classes_are_a_filter(tmp_path: Path) -> None:
    path = save_whole(tmp_path / FACE, random_network(eager=True).state_dict(), names=NAMES, args={"imgsz": 64})
    detector = open_network(Entry(FACE, path))
    assert {each.label for each in detector.detect(picture(), 0.2)} == {"face", "hand"}
    assert {each.label for each in detector.detect(picture(), 0.2, ["HAND"])} == {"hand"}
    with pytest.raises(RequestError, match="face_yolov8n.pt does not know 'foot'; it knows: face, hand"):
        detector.check_classes(["hand", "foot"])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"names": "{"}, "'names' is no JSON"),
        ({"names": "3"}, "the names of its classes are no list"),
        ({"names": "[1, 2]"}, "not named by number"),
        ({"names": '{"0": "face", "7": "hand"}'}, "not named by number"),
        ({"names": '["face"]'}, "names 1 classes and tells 2 apart"),
        ({"imgsz": "0"}, "looks at pictures of 0 pixels"),
        ({"imgsz": "1000000"}, "looks at pictures of 1000000 pixels"),
        ({"imgsz": "true"}, "looks at pictures of True pixels"),
        ({"imgsz": '"640"'}, "looks at pictures of 640 pixels"),
    ],
)
def test_what_a_file_says_of_itself_is_checked(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = safetensors(tmp_path / "x.safetensors", **metadata)
    with pytest.raises(CorruptCheckpointError, match=f"x.safetensors: .*{message}"):
        open_network(Entry(path.name, path))


def test_other_models_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert open_detector(tmp_path / "x.safetensors").image_size == IMAGE_SIZE
    with pytest.raises(UnsupportedCheckpointError, match="x.safetensors: it is no YOLOv8 network: it has no tensor"):
        open_network(Entry("x.safetensors", tmp_path / "x.safetensors"))


class Asks:
    """Pickles as a call of anything."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


TRAP = "trap"
CALLS = {
    "system": lambda trap: Asks(os.system, (f"touch {trap}",)),
    "eval": lambda trap: Asks(eval, (f"open({trap!r}, 'w')",)),
    "open": lambda trap: Asks(open, (trap, "w")),
    "load": lambda trap: Asks(torch.load, (trap,)),
    "module": lambda trap: Asks(nn.Linear, (2, 2)),  # a class of a layer may be named, and still is not called
    "getattr": lambda trap: Asks(getattr, (nn.Linear, "forward")),
    "import": lambda trap: Asks(__import__, ("os",)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("where", ["names", "train_args", "optimizer"])
def test_no_code_of_a_file_runs(tmp_path: Path, name: str, where: str) -> None:
    trap = tmp_path / TRAP
    path = whole(tmp_path / FACE, **{where: CALLS[name](str(trap))})
    with pytest.raises(UnsupportedCheckpointError, match=rf"{FACE}: its pickle is refused: it (asks for|calls) "):
        open_detector(path)
    assert not trap.exists()


def test_a_forward_that_was_replaced_is_no_matter(tmp_path: Path) -> None:
    """Some networks were saved after their layers had been given another method in place of ``forward``."""

    class Replaced(nn.SiLU):
        def __init__(self) -> None:
            super().__init__()
            self.forward = self.extra_repr  # type: ignore[assignment]

    Replaced.__module__, Replaced.__qualname__ = "torch.nn.modules.activation", "SiLU"
    Replaced.__name__ = "SiLU"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.modules.activation, "SiLU", Replaced)
        path = whole(tmp_path / FACE, act=Replaced())
    assert b"getattr" in path.read_bytes()
    assert open_detector(path).classes == ("face", "hand")


def archive(path: Path, program: bytes) -> Path:
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("x/data.pkl", program)
        file.writestr("x/data/0", bytes(64))
    return path


LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
PROGRAMS = {
    "a class that is called": (LINEAR + b"(K\x02K\x02tR.", "calls torch.nn.modules.linear.Linear"),
    "arguments of a new object": (LINEAR + b"(K\x02t\x81.", "makes an object of torch.nn.modules.linear.Linear"),
    "an object of a function": (b"ctorch._utils\n_rebuild_tensor_v2\n)\x81.", "makes an object of torch._utils"),
    "an object of nothing": (b"K\x01)\x81.", "makes an object of what is no class"),
    "attributes twice": (LINEAR + b")\x81" + b"}X\1\0\0\0aK\x01sb" * 2 + b".", "attributes that torch does not write"),
    "attributes that are no dictionary": (LINEAR + b")\x81]b.", "attributes that torch does not write"),
    "a method of a class": (
        b"c__builtin__\ngetattr\n" + LINEAR + b"X\1\0\0\0x\x86R.",
        "attribute of what is no object",
    ),
    "a method that is called": (
        b"c__builtin__\ngetattr\n" + LINEAR + b")\x81X\1\0\0\0x\x86R)R.",
        "what is no function",
    ),
    "a dotted name": (b"cultralytics.nn.tasks\nos.system\n.", "asks for ultralytics.nn.tasks.os.system"),
    "a function of the library": (
        b"cultralytics.nn.tasks\ntorch_safe_load\n.",
        "asks for ultralytics.nn.tasks.torch_safe",
    ),
    "another part of the library": (
        b"cultralytics.utils.downloads\nDownloader\n.",
        "asks for ultralytics.utils.downloads",
    ),
    "a lookalike": (b"cultralytics_evil.nn.tasks\nModel\n.", "asks for ultralytics_evil"),
    "a loop without end": (b"}" * 1_000_001, "more than 1,000,000 instructions"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_programs(tmp_path: Path, name: str) -> None:
    program, message = PROGRAMS[name]
    with pytest.raises(ModelError, match=f"x.pt: .*{message}"):
        open_detector(archive(tmp_path / "x.pt", b"\x80\x02" + program))


def module_program(levels: int, branches: int) -> bytes:
    """Modules in modules, each with ``branches`` names for the one below: few bytes, and many paths."""
    program = LINEAR + b")\x81q\0"
    for level in range(levels):
        names = b"".join(b"X\x01\0\0\0" + bytes([97 + n]) + b"h" + bytes([level]) for n in range(branches))
        program += b"0" + LINEAR + b")\x81q" + bytes([level + 1]) + b"}X\x08\0\0\0_modules}(" + names + b"usb"
    return b"\x80\x02}X\x05\0\0\0model" + program + b"s."


@pytest.mark.parametrize(("levels", "branches"), [(200, 1), (30, 2), (12, 20)])
def test_nested_modules_end(tmp_path: Path, levels: int, branches: int) -> None:
    path = archive(tmp_path / "x.pt", module_program(levels, branches))
    with pytest.raises(ModelError, match="nested too deeply"):
        open_detector(path)


def test_a_module_in_itself_ends(tmp_path: Path) -> None:
    program = b"\x80\x02}X\x05\0\0\0model" + LINEAR + b")\x81q\0}X\x08\0\0\0_modules}X\x01\0\0\0ah\0ssbs."
    with pytest.raises(ModelError, match="nested too deeply"):
        open_detector(archive(tmp_path / "x.pt", program))


@pytest.mark.parametrize("size", [0, -5, 10**9, 2**70, "640", 1.5, [640, 640, 640]])
def test_absurd_sizes_in_a_pickle(tmp_path: Path, size: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="looks at pictures of"):
        open_detector(whole(tmp_path / FACE, train_args={"imgsz": size}))


def test_pickles_that_are_not_of_torch(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"model": [1]}))
    with pytest.raises(ModelError, match="x.pt"):
        open_detector(tmp_path / "x.pt")


def test_a_library_lists_and_finds(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first / "adetailer" / "deep", second / "adetailer"):
        folder.mkdir(parents=True)
    whole(first / "adetailer" / "deep" / FACE)
    whole(second / "adetailer" / FACE, names=["a", "b"])
    safetensors(second / "adetailer" / "hand_tiny.safetensors")
    (second / "adetailer" / "notes.txt").write_text("nothing")
    both = DetectorLibrary([first, second, tmp_path / "absent"])
    assert both.names() == [FACE, "hand_tiny.safetensors"]
    assert both.find(FACE).classes == ("face", "hand")  # of the first folder
    assert both.find("hand_tiny") is both.find("hand_tiny.safetensors")
    assert both.held == both.find(FACE).nbytes + both.find("hand_tiny").nbytes
    both.release()
    assert both.held == 0


def test_networks_are_read_once_and_the_last_ones_kept(tmp_path: Path) -> None:
    (tmp_path / "adetailer").mkdir()
    for name in "abc":
        whole(tmp_path / "adetailer" / f"{name}.pt")
    few = DetectorLibrary([tmp_path], keep=2)
    a = few.find("a.pt")
    assert few.find("a.pt") is a
    few.find("b.pt")
    few.find("a.pt")
    few.find("c.pt")  # b goes
    assert few.find("a.pt") is a and few.held == 2 * a.nbytes
    path = whole(tmp_path / "adetailer" / "a.pt", names=["x", "y"])
    os.utime(path, ns=(1, 1))
    assert few.find("a.pt").classes == ("x", "y")  # another file by that name


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("face_yolo8n.pt", ModelNotFoundError, "did you mean 'face_yolov8n.pt'.*; there are: face_yolov8n.pt"),
        ("hand_yolo8n", ModelNotFoundError, "is 'hand_yolov8n.pt' meant. It is not here, and can be downloaded"),
        ("hand_yolov8s.pt", ModelNotFoundError, "download it from https://huggingface.co/Bingsu/adetailer into"),
        ("mediapipe_face_full", RequestError, "needs MediaPipe.*face_yolov8n.pt does its work"),
        ("../adetailer/face_yolov8n.pt", ModelNotFoundError, "no detector"),
        ("/etc/passwd", ModelNotFoundError, "no detector"),
        ("x" * 5000, ModelNotFoundError, "no detector"),
        ("", ModelNotFoundError, "no detector ''"),
    ],
)
def test_names_that_are_not_there(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    (tmp_path / "adetailer").mkdir()
    whole(tmp_path / "adetailer" / FACE)
    with pytest.raises(error, match=message) as caught:
        DetectorLibrary([tmp_path]).find(name)
    assert len(str(caught.value)) < 500


def layers(**changes: Any) -> dict[str, Any]:
    return {
        "nc": 2,
        "scale": "n",
        "scales": {"n": [0.5, 0.25, 1024]},
        "backbone": [[-1, 1, "Conv", [64, 3, 2]], [-1, 2, "C3k2", [256, False, 0.25]]],
        "head": [[-1, 1, "nn.Upsample", ["None", 2, "nearest"]], [[0, 1], 1, "Detect", ["nc"]]],
        "yaml_file": "x.yaml",
        **changes,
    }


def test_layers_that_are_known_pass() -> None:
    expected = {key: value for key, value in layers().items() if key != "yaml_file"}
    assert checked_layers(layers()) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "__import__('os').system('true')"}, "names an activation"),
        ({"backbone": [[-1, 1, "torch_safe_load", ["x.pt"]]]}, "it has a layer 'torch_safe_load'"),
        ({"backbone": [[-1, 1, "nn.Module", []]]}, "it has a layer 'nn.Module'"),
        ({"backbone": [[-1, 1, "Conv", ["__import__('os')"]]]}, "where a number belongs"),
        ({"backbone": [[-1, 10**6, "Conv", [64]]]}, "repeats Conv 1000000 times"),
        ({"backbone": [[-1, 1, "Conv", [10**9]]]}, "where a number belongs"),
        ({"backbone": [[-1, 1, "Conv", [64]]] * 101}, "at most 100 values"),
        ({"backbone": "Conv"}, "at most 100 values"),
        ({"backbone": [[-1, 1, "Detect", ["nc"]]]}, "more than one head"),
        ({"head": []}, "its last layer is none of"),
        ({"nc": "2"}, "where a number belongs"),
        ({"nc": float("inf")}, "where a number belongs"),
        ({"scale": "z"}, "its scale is none"),
        ({"scales": {"long": [1, 1, 1]}}, "not named by letters"),
        ({"scales": {"n": ["eval", 1, 1]}}, "where a number belongs"),
    ],
)
def test_layers_that_are_not_known_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_layers(layers(**changes))


def test_other_networks_need_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    path = save_whole(tmp_path / "yolo11n.pt", {"model.0.conv.weight": torch.zeros(4)}, names=NAMES, yaml=layers())
    before = dict(os.environ), torch.save
    with pytest.raises(MissingDependencyError, match=r"yolo11n.pt .*AGPL.*lightweight-engine\[adetailer\]"):
        open_network(Entry("yolo11n.pt", path))
    assert (dict(os.environ), torch.save) == before
    bad = save_whole(tmp_path / "bad.pt", {"model.0.conv.weight": torch.zeros(4)}, names=NAMES, yaml=layers(nc=None))
    with pytest.raises(UnsupportedCheckpointError, match="bad.pt: its list of layers has 'None'"):
        open_network(Entry("bad.pt", bad))
