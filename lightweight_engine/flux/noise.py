"""Noise: where it is drawn, one stream per picture, variations, and the Brownian tree of the SDE samplers.

A picture's noise depends on its own seed only, never on the batch it is drawn in. With ``compat="forge"`` the global
torch generator is reseeded as the reference does; otherwise no global state is read or written.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..labels import Compat

Source = Literal["GPU", "CPU", "NV"]
Shape = tuple[int, ...]

_PHILOX_ROUNDS = 10
_MASK32 = np.uint64(0xFFFFFFFF)


def random_seed() -> int:
    """A seed for a request that names none, in the reference's range."""
    return random.SystemRandom().randrange(4_294_967_294)


def side_seed(seed: int) -> int:
    """The seed of what is drawn beside a picture's own noise: VAE, mask and DDPM noise (the reference's rule)."""
    return (seed + 100_000) % 65_536


class Stream(Protocol):
    """A sequence of standard normal draws that a seed determines."""

    def randn(self, shape: Shape) -> Tensor: ...


class TorchStream:
    """The draws of a torch generator on a device."""

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def randn(self, shape: Shape) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._generator.device)


class PhiloxStream:
    """The draws of a CUDA generator, imitated on the CPU: Philox 4x32-10 and the sine half of Box-Muller.

    It gives the reference's values. The CUDA generator of torch 2.11 gave others on an H200: the layout of counters
    belongs to torch's version. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3".
    """

    def __init__(self, seed: int) -> None:
        self._key = (np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF))
        self._calls = 0

    def randn(self, shape: Shape) -> Tensor:
        count = math.prod(shape)
        counter = [np.full(count, self._calls, np.uint64), *(np.zeros(count, np.uint64) for _ in range(3))]
        counter[2] = np.arange(count, dtype=np.uint64)
        self._calls += 1
        first, second = _philox(counter, self._key)
        unit, turn = np.float64(np.float32(2.3283064e-10)), np.float64(np.float32(2.3283064e-10 * 6.2831855))
        u = first.astype(np.float64) * unit + unit / 2
        v = second.astype(np.float64) * turn + turn / 2
        return torch.from_numpy((np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(np.float32)).view(shape)


def _philox(counter: list[np.ndarray], key: tuple[np.uint64, np.uint64]) -> tuple[np.ndarray, np.ndarray]:
    """The first two output words of Philox 4x32-10 for counters of four 32-bit words, held in 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        low, high = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = high >> 32 ^ c1 ^ k0, high & _MASK32, low >> 32 ^ c3 ^ k1, low & _MASK32
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _MASK32, (k1 + np.uint64(0xBB67AE85)) & _MASK32
    return c0, c1


def open_stream(source: Source, seed: int, device: torch.device | str = "cpu") -> Stream:
    """The stream of a seed: drawn on ``device`` (GPU), on the CPU, or on the CPU as an NVIDIA GPU would (NV)."""
    return PhiloxStream(seed) if source == "NV" else TorchStream(seed, "cpu" if source == "CPU" else device)


class ImageNoise:
    """The noise of a batch, one stream per picture.

    Args:
        shape: of one latent, ``(C, h, w)``.
        seeds: one for each picture.
        device: where the results lie, and where the source "GPU" draws.
        subseeds: of the variation, one for each picture; used where ``subseed_strength`` is above 0.
        resize_from: ``(h, w)`` in latent cells of another size whose noise is pasted into the middle.
        seed_delta: added to the seeds once the first noise is drawn (ENSD).
        compat: ``forge`` also reseeds the global torch generator while the first noise is drawn.
    """

    def __init__(
        self,
        shape: Shape,
        seeds: Sequence[int],
        *,
        source: Source = "GPU",
        device: torch.device | str = "cpu",
        subseeds: Sequence[int] = (),
        subseed_strength: float = 0.0,
        resize_from: tuple[int, int] | None = None,
        seed_delta: int = 0,
        compat: Compat = "fixed",
    ) -> None:
        self.shape = shape
        self.seeds = tuple(seeds)
        self.source: Source = source
        self.device = device
        self.compat: Compat = compat
        self._subseeds = subseeds if subseed_strength > 0 else ()
        self._subseed_strength = subseed_strength
        self._first_shape = (shape[0], *resize_from) if resize_from else shape
        self._seed_delta = seed_delta
        self._streams = [open_stream(source, seed, device) for seed in self.seeds]

    def first(self) -> Tensor:
        """The noise that sampling starts from, ``[B, C, h, w]``; to be drawn once, before ``next``."""
        noise = torch.stack([self._first_of(index) for index in range(len(self.seeds))]).to(self.device)
        if self._seed_delta:
            self._streams = [open_stream(self.source, seed + self._seed_delta, self.device) for seed in self.seeds]
        return noise

    def next(self) -> Tensor:
        """The next draw of every picture's stream, ``[B, C, h, w]``."""
        return torch.stack([stream.randn(self.shape) for stream in self._streams]).to(self.device)

    def side(self) -> Callable[[Tensor], Tensor]:
        """Noise beside the pictures' own (masks, DDPM): a function from a batch to noise like it.

        Per picture, seeded with ``side_seed`` on the noise device; with ``forge``, whatever the global generator holds.
        """
        if self.compat == "forge":
            return torch.randn_like
        streams = [open_stream(self.source, side_seed(seed), self.device) for seed in self.seeds]
        return lambda x: torch.stack([stream.randn(tuple(x.shape[1:])) for stream in streams]).to(x.device)

    def brownian(self, sigma_min: float, sigma_max: float) -> BrownianNoise:
        """The noise of the SDE samplers for these pictures."""
        return BrownianNoise(self.shape, self.seeds, sigma_min, sigma_max, source=self.source, device=self.device)

    def _first_of(self, index: int) -> Tensor:
        seed, stream = self.seeds[index], self._streams[index]
        own = stream.randn(self.shape)
        resized = self._first_shape != self.shape
        noise = self._fresh(seed) if resized else own
        if self._subseeds:
            noise = slerp(self._subseed_strength, noise, self._fresh(self._subseeds[index]))
        if self.compat == "forge":
            torch.manual_seed(side_seed(seed))
        return paste_centred(own, noise) if resized else noise

    def _fresh(self, seed: int) -> Tensor:
        return open_stream(self.source, seed, self.device).randn(self._first_shape)


def slerp(weight: float, low: Tensor, high: Tensor) -> Tensor:
    """Between two noises ``[C, h, w]`` along the arc, column by column, by the reference's rule."""
    unit_low = low / low.norm(dim=1, keepdim=True)
    unit_high = high / high.norm(dim=1, keepdim=True)
    cosine = (unit_low * unit_high).sum(1)
    if cosine.mean() > 0.9995:
        return low * weight + high * (1 - weight)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    from_low, from_high = torch.sin((1 - weight) * angle) / sine, torch.sin(weight * angle) / sine
    return from_low.unsqueeze(1) * low + from_high.unsqueeze(1) * high


def paste_centred(canvas: Tensor, patch: Tensor) -> Tensor:
    """``canvas`` ``[C, h, w]`` with ``patch`` over its middle; a larger patch is cut alike on both sides."""
    result = canvas.clone()
    target, source = [], []
    for have, want in zip(canvas.shape[1:], patch.shape[1:], strict=True):
        margin = (have - want) // 2
        size = want if margin >= 0 else want + 2 * margin
        target.append(slice(max(margin, 0), max(margin, 0) + size))
        source.append(slice(max(-margin, 0), max(-margin, 0) + size))
    result[:, target[0], target[1]] = patch[:, source[0], source[1]]
    return result


class _Node(NamedTuple):
    """An interval of a Brownian tree: its place among the nodes of its depth, its times, its increment."""

    place: int
    depth: int
    low: float
    high: float
    increment: Tensor


class BrownianTree:
    """A Brownian path on ``[start, end]`` that a seed alone determines, whatever is asked of it in whatever order.

    Increments come from halving: a node's seed follows from the entropy and its place in the tree, and times are
    rounded to six decimals. Source: the halfway tree of torchsde 0.2.6 (Apache-2.0), whose values it reproduces.

    Args:
        draw: the standard normal draw of a seed.
    """

    _DIGITS = 6
    _POOL_SIZE = 24
    _KEPT_NODES = 32

    def __init__(self, start: float, end: float, entropy: int, draw: Callable[[int], Tensor]) -> None:
        self._entropy = entropy
        self._draw = draw
        whole = self._seeded(3) * math.sqrt(end - start)
        self._root = _Node(0, 0, round(start, self._DIGITS), round(end, self._DIGITS), whole)
        self._left_halves: dict[tuple[int, int], Tensor] = {}

    def increment(self, start: float, end: float) -> Tensor:
        """W(end) - W(start) for ``start <= end``; times outside the tree are moved to its ends."""
        root = self._root
        start, end = (round(min(max(t, root.low), root.high), self._DIGITS) for t in (start, end))
        if start == end:
            return torch.zeros_like(root.increment)
        pieces: list[Tensor] = []
        self._collect(pieces, start, end, root)
        return sum(pieces[1:], start=pieces[0])

    def _collect(self, pieces: list[Tensor], start: float, end: float, node: _Node) -> None:
        """Append the increments of the largest nodes that make up ``[start, end]``, a part of ``node``."""
        if (start, end) == (node.low, node.high):
            pieces.append(node.increment)
            return
        left, right = self._halves(node)
        if start < left.high:
            self._collect(pieces, start, min(end, left.high), left)
        if end > right.low:
            self._collect(pieces, max(start, right.low), end, right)

    def _halves(self, node: _Node) -> tuple[_Node, _Node]:
        """A node's two halves: the left one from the Brownian bridge, the right one what remains."""
        middle = round(0.5 * (node.high + node.low), self._DIGITS)
        key = (node.place, node.depth)
        half = self._left_halves.pop(key, None)
        if half is None:
            before, after, scale = middle - node.low, node.high - middle, 1 / (node.high - node.low)
            half = before * node.increment * scale + math.sqrt(before * after * scale) * self._seeded(4, key)
        self._left_halves[key] = half  # last in, so that the first to go is the longest unused
        if len(self._left_halves) > self._KEPT_NODES:
            del self._left_halves[next(iter(self._left_halves))]
        left = _Node(2 * node.place, node.depth + 1, node.low, middle, half)
        right = _Node(2 * node.place + 1, node.depth + 1, middle, node.high, node.increment - half)
        return left, right

    def _seeded(self, words: int, key: tuple[int, ...] = ()) -> Tensor:
        """The draw of a node; ``words`` is how many seeds the source takes for it, of which the first is used."""
        sequence = np.random.SeedSequence(self._entropy, spawn_key=key, pool_size=self._POOL_SIZE)
        return self._draw(int(sequence.generate_state(words)[0]))


class BrownianNoise:
    """Unit noise between two sigmas for a batch, from one Brownian tree per picture.

    Args:
        sigma_min: lowest positive sigma of the whole schedule.
        sigma_max: its highest.
    """

    def __init__(
        self,
        shape: Shape,
        seeds: Sequence[int],
        sigma_min: float,
        sigma_max: float,
        *,
        source: Source = "GPU",
        device: torch.device | str = "cpu",
    ) -> None:
        self._device = device

        def draw(seed: int) -> Tensor:
            return open_stream(source, seed, device).randn(shape).to(device)

        self._trees = [BrownianTree(sigma_min, sigma_max, seed, draw) for seed in seeds]

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """Unit noise for the step between two sigmas, ``[B, C, h, w]``; its sign turns with the direction."""
        low, high = min(sigma, sigma_next), max(sigma, sigma_next)
        scale = math.copysign(1 / math.sqrt(high - low), sigma_next - sigma)
        return torch.stack([tree.increment(low, high) for tree in self._trees]) * scale
