"""Bytes that the networks need, known before anything is loaded: weights by unit, and the room that a pass works in.

Weights follow from a file's header and the storage format. The room is the most that the tensors of a pass take at
once, read off the order in which ``forward`` makes and drops them; what libraries take inside an operation was measured
(docs/memory.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..backend.kernels.hopper import DIM
from ..backend.quantize import ROWS
from ..backend.streaming import aligned
from ..backend.together import read_together
from .keymaps import Part
from .load import CONVERTED, Storage, empty_network, linear_weights
from .params import AutoencoderParams, CLIPParams, FluxParams, T5Params
from .units import UnitName, in_order, unit_of


@dataclass(frozen=True)
class Inventory:
    """Bytes of a network's weights as they are kept.

    Attributes:
        fixed: of what is always on the device.
        blocks: of each block, in the order in which they run.
        conditioning: of each unit that computes modulation.
        scratch: of the largest matrix that is made anew at each use, because it is kept in another format.
        unpacked: of the largest matrix of a block, as numbers, that is kept in a packed format.
        mapped: whether every unit stays as the file has it, so that on a CPU it can be used from the mapped file.
        together: names of the weights that one product reads, group by group.
        converting: that lie on a GPU beside what is loaded, while the weights that take the most are converted there.
    """

    fixed: int
    blocks: tuple[tuple[UnitName, int], ...]
    conditioning: tuple[tuple[UnitName, int], ...]
    scratch: int
    mapped: bool
    unpacked: int = 0
    together: tuple[tuple[str, ...], ...] = ()
    converting: int = 0

    @property
    def nbytes(self) -> int:
        return self.fixed + sum(nbytes for _, nbytes in (*self.blocks, *self.conditioning))


def inventory(part: Part, storage: Storage, network: nn.Module | None = None) -> Inventory:
    """The weights of a part, from its header alone.

    Args:
        network: that of the part without its weights, where that has been built.
    """
    network = network or empty_network(part)
    linears = linear_weights(network)
    units: dict[UnitName, int] = {}
    scratch, unpacked, mapped = 0, 0, True
    conversions: list[int] = []
    for name, source in part.sources.items():
        linear = name in linears
        unit = unit_of(part.role, name)
        within = storage.within(unit)
        nbytes = within.nbytes(source, linear)
        units[unit] = units.get(unit, 0) + (nbytes if unit.kind == "fixed" else aligned(nbytes))
        conversions.append(within.converting(source, linear))
        mapped = mapped and (unit.kind == "fixed" or within.as_in_file(source, linear))
        kept = within.kept_as(source, linear)
        if linear and kept not in (storage.compute, ROWS):
            scratch = max(scratch, source.elements * storage.compute.itemsize)
            if isinstance(kept, str) and unit.kind == "block":
                unpacked = max(unpacked, source.elements * storage.compute.itemsize)
    names = set(units)
    return Inventory(
        fixed=sum(nbytes for name, nbytes in units.items() if name.kind == "fixed"),
        blocks=tuple((name, units[name]) for name in in_order(names, "block")),
        conditioning=tuple((name, units[name]) for name in in_order(names, "conditioning")),
        scratch=scratch,
        mapped=mapped,
        unpacked=unpacked,
        together=tuple(read_together(network)),
        converting=sum(sorted(conversions)[-CONVERTED:]),
    )


@dataclass(frozen=True)
class Library:
    """What libraries take inside operations, by kind of device; measured.

    Attributes:
        base: bytes once, whatever is computed (workspaces of matrix products, memory that the allocator keeps).
        convolution: full-size feature maps that the autoencoder's convolutions take beside their input and output, in
            16 bits and in float32.
        unfolding: how often a convolution in 16 bits writes out its input, where nothing computes it directly.
        scratch: times the largest matrix that is made anew at each use.
        kept: times the room of a pass that is taken beside it (matrix products pack their weights).
        in_place: what blocks do between their products is written where a product wrote before.
    """

    base: int
    convolution: tuple[float, float]
    unfolding: int
    scratch: float
    kept: float
    in_place: bool = False


EIGHT_BITS = 24 << 20
"""Bytes that products in 8 bits take for themselves beyond ``Library.base``: 18 to 21 MB of an H200."""

ATTENTION = 18 << 20
"""Bytes in which attention over heads of ``DIM`` numbers puts sums of cut jobs by, on a Hopper GPU."""

PLAIN_CONVOLUTION = (4.4, 4.4)
"""Of a GPU whose maps lie as pictures do, as it runs no programs."""

LIBRARIES = {
    "cuda": Library(base=64 << 20, convolution=(0.5, 4.4), unfolding=0, scratch=1.0, kept=0.0, in_place=True),
    "cpu": Library(base=80 << 20, convolution=(0.0, 0.0), unfolding=9, scratch=2.0, kept=0.55),
}


def modulation_table(params: FluxParams, rows: int, dtype: torch.dtype) -> int:
    """Bytes of the modulation vectors of ``rows`` steps and conditionings."""
    vectors = 12 * params.depth + 3 * params.depth_single_blocks + 2
    return rows * vectors * params.hidden_size * dtype.itemsize


def step_room(
    params: FluxParams,
    batch: int,
    image: int,
    text: int,
    storage: Storage,
    scratch: int,
    library: Library,
    *,
    beside: bool = False,
) -> int:
    """Bytes that one evaluation of the transformer works in, for ``image`` and ``text`` tokens.

    Args:
        beside: LoRAs act beside linears, which are then not taken apart.
    """
    unit = batch * (image + text) * params.hidden_size * storage.compute.itemsize
    mlp = params.mlp_hidden / params.hidden_size
    matrix = scratch * library.scratch / unit
    projected = 2 + 3 + mlp  # what linear1 is given and its norm, what it gives
    if library.in_place:
        last = 2 + matrix if beside else 1  # what attention gives; with LoRAs what linear2 gives too, beside all that
        points = (projected + matrix, projected + last)
    else:
        points = (
            projected + matrix,
            3 + mlp + 3 + 2 * mlp,  # activation beside attention: fused, attended, gelu, both joined, x
            4 + mlp + 2 + (1 + mlp) + matrix,  # linear2
        )
    workspace = ATTENTION if library.in_place and params.head_dim == DIM else 0
    if storage.format == ROWS:
        eight = 1 / storage.compute.itemsize
        rows = eight if library.in_place else 1 + 9 * eight  # plain torch: from a copy, by way of two in float32
        # What linear2 reads, beside x, fused and attended; where LoRAs act, beside what it gives in place of attended.
        points = (*points, 2 + 3 + mlp + (1 + mlp) * rows)
        workspace += EIGHT_BITS
    rotary = 3 * (image + text) * params.head_dim // 2 * 8
    return int((max(points) * unit + rotary + workspace) * (1 + library.kept))


def t5_room(params: T5Params, length: int, storage: Storage, scratch: int, library: Library) -> int:
    """Bytes that encoding ``length`` tokens works in."""
    size = storage.compute.itemsize
    scores = params.num_heads * length * length * size
    hidden = length * params.hidden_size * size
    work = 6 * hidden + max(4 * scores, 3 * length * params.mlp_hidden * size)
    return int(work * (1 + library.kept) + scratch * library.scratch)


def clip_room(params: CLIPParams, storage: Storage, scratch: int, library: Library) -> int:
    """Bytes that the CLIP text model works in."""
    work = params.max_positions * storage.compute.itemsize * (12 * params.hidden_size + 3 * params.mlp_hidden)
    return int(work * (1 + library.kept) + scratch * library.scratch)


def decode_room(params: AutoencoderParams, height: int, width: int, dtype: torch.dtype, library: Library) -> int:
    """Bytes that decoding a picture of ``height`` x ``width`` pixels works in: most around the finest level."""
    fine, coarse, coarser = (*params.widths, *params.widths[-1:] * 2)[:3]
    points = (
        coarser / 4 + coarse / 4 + 2 * coarse,  # enlarging: the level's input, its result, that enlarged and convolved
        2 * coarse + fine,  # first block: its input, that normed, convolved
        coarse + 3 * fine,  # the level's input, which is still held; a block's input, that normed, convolved
    )
    return _picture_room(max(points), fine, coarse, height * width, dtype, library)


def encode_room(params: AutoencoderParams, height: int, width: int, dtype: torch.dtype, library: Library) -> int:
    """Bytes that encoding a picture works in."""
    fine = params.widths[0]  # the level's input, which is still held; a block's input, that normed, convolved
    return _picture_room(4 * fine, fine, fine, height * width, dtype, library)


def _picture_room(channels: float, fine: int, convolved: int, pixels: int, dtype: torch.dtype, library: Library) -> int:
    """Bytes of ``channels`` of the finest level and of what convolving ``convolved`` of them takes.

    The picture itself, three channels of it, is there only when these are gone.
    """
    short = dtype.itemsize == 2
    unfolded = library.unfolding * convolved if short else 0
    return int((channels + library.convolution[not short] * fine + unfolded) * pixels * dtype.itemsize)


def step_flops(params: FluxParams, batch: int, image: int, text: int) -> float:
    """Floating-point operations of one evaluation, modulation apart."""
    d, m, s = params.hidden_size, params.mlp_hidden, image + text
    double = 2 * s * (4 * d * d + 2 * d * m)
    single = 2 * s * (d * (3 * d + m) + (d + m) * d)
    attention = 4 * s * s * d * (params.depth + params.depth_single_blocks)
    ends = 2 * image * 2 * d * params.in_channels
    return batch * (params.depth * double + params.depth_single_blocks * single + attention + ends)
