"""Our YOLOv8: sizes from shapes, names of published files, norms folded in, decoding, and that it can be trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from saved_detectors import TINY, TINY_SEGMENTATION, random_network
from torch import Tensor, nn

from lightweight_engine.errors import UnsupportedCheckpointError
from lightweight_engine.extensions.yolov8 import YOLOv8, anchor_points, build, fold_norms
from lightweight_engine.extensions.yolov8_sizes import SCALES, YOLOv8Sizes

# Of the published files with 80 classes: parameters that are trained, in all.
PUBLISHED = {"n": 3_157_200, "s": 11_166_560, "m": 25_902_640, "l": 43_691_520, "x": 68_229_648}
PUBLISHED_SEGMENTATION = {"n": 3_409_968, "s": 11_821_056, "m": 27_285_968}


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(("segmentation", "counts"), [(False, PUBLISHED), (True, PUBLISHED_SEGMENTATION)])
def test_published_sizes(segmentation: bool, counts: dict[str, int]) -> None:
    for scale, count in counts.items():
        depth, width, widest = SCALES[scale]
        sizes = YOLOv8Sizes.scaled(80, depth=depth, width=width, widest=widest, segmentation=segmentation)
        with torch.device("meta"):
            network = YOLOv8(sizes)
        assert sum(tensor.numel() for tensor in network.parameters()) == count, scale
        assert YOLOv8Sizes.from_shapes(shapes_of(network)) == sizes


@pytest.mark.parametrize("sizes", [TINY, TINY_SEGMENTATION], ids=["detection", "segmentation"])
def test_folded_norms_change_nothing(sizes: YOLOv8Sizes) -> None:
    network = random_network(sizes)
    folded = build(network.state_dict())
    assert folded.sizes == replace(sizes, normalised=False)
    assert fold_norms(folded.state_dict()).keys() == folded.state_dict().keys()  # folded once is folded
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = network(x), folded(x)
        torch.testing.assert_close(folded.decode(found), network.decode(expected), rtol=0, atol=1e-3)
    if sizes.masks:
        assert found.prototypes.shape == (2, sizes.masks.prototypes, 16, 24)
        torch.testing.assert_close(found.prototypes, expected.prototypes, rtol=0, atol=1e-4)


def test_half_precision_files_are_computed_in_full() -> None:
    network = build({name: tensor.half() for name, tensor in random_network(TINY).state_dict().items()})
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


def test_decoding_by_hand() -> None:
    """A distribution that is certain of a bin has its number as distance."""
    network = YOLOv8(TINY).eval()
    with torch.no_grad():
        raw = network(torch.rand(1, 3, 64, 64))
    for level in (*raw.boxes, *raw.classes):
        level.fill_(-40)
    for side, distance in enumerate((1, 2, 3, 4)):  # left, top, right, bottom
        raw.boxes[0][0, side * 16 + distance, 2, 1] = 40
    raw.classes[0][0, 1, 2, 1] = 0
    decoded = network.decode(raw)
    x, y, width, height, *scores = decoded[0, :, 2 * 8 + 1].tolist()
    assert (x, y, width, height) == pytest.approx(((1.5 + 1) * 8, (2.5 + 1) * 8, 4 * 8, 6 * 8))
    assert scores == pytest.approx([0, 0.5], abs=1e-6)
    assert decoded.shape == (1, 6, 64 + 16 + 4)


def test_anchor_points() -> None:
    points, strides = anchor_points([(2, 3), (1, 2), (1, 1)])
    assert points.T.tolist()[:4] == [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5]]
    assert strides.tolist() == [[8] * 6 + [16] * 2 + [32]]


def test_training_moves_everything_but_the_bins() -> None:
    network = random_network(TINY_SEGMENTATION).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    raw = network(torch.rand(2, 3, 64, 64))
    parts = [*raw.boxes, *raw.classes, *raw.coefficients, raw.prototypes]
    loss = sum((part**2).mean() for part in parts) + network.decode(raw)[:, :4].mean() * 1e-3
    assert isinstance(loss, Tensor)
    loss.backward()
    torch.optim.SGD(filter(lambda p: p.requires_grad, network.parameters()), lr=0.1).step()
    still = [name for name, tensor in network.state_dict().items() if torch.equal(tensor, before[name])]
    assert still == ["model.22.dfl.conv.weight"]


def test_untrained_scores_are_low() -> None:
    network = YOLOv8(TINY).eval()
    with torch.no_grad():
        assert network.decode(network(torch.rand(1, 3, 64, 64)))[:, 4:].max() < 0.05


def spoil(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    state = dict(random_network(TINY).state_dict())
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    return state


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.7.conv.weight", None, "no tensor 'model.7.conv.weight'"),
        ("model.22.dfl.conv.weight", None, "no tensor 'model.22.dfl.conv.weight'"),
        ("model.22.dfl.conv.weight", torch.zeros(1), "too few dimensions"),
        ("model.16.conv.weight", None, "model.16.conv.weight is nothing where"),
        ("model.16.bn.bias", None, "model.16.bn.bias is nothing where of"),
        ("model.23.bn.bias", torch.zeros(3), "model.23.bn.bias is of the shape .3. where nothing"),
        ("model.22.cv2.1.2.bias", None, "model.22.cv2.1.2.bias is nothing where of the shape .64."),
        ("model.0.conv.weight", torch.zeros(0, 3, 3, 3), "model.0.conv.weight has no numbers"),
        ("model.23.cv1.weight", torch.zeros(3), "model.23.cv1.weight is of the shape .3. where nothing"),
        ("model.3.conv.weight", torch.zeros(32, 16, 5, 5), r"model.3.conv.weight is of the shape .32, 16, 5, 5."),
        ("model.22.cv3.1.2.bias", torch.zeros(9), "model.22.cv3.1.2.bias is of the shape .9. where of the shape .2."),
    ],
)
def test_other_networks_are_refused(name: str, tensor: Tensor | None, message: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=f"it is no YOLOv8 network: .*{message}"):
        build(spoil(name, tensor))
