"""Training drawings: drawn by worker processes into shared memory while training already runs.

``Drawings`` holds pictures, captions as token ids, attributes, and where faces and hands are, by picture size.
``Latents`` encodes them as they come.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightweight_engine.flux.autoencoder import Autoencoder

from .captions import caption
from .draw import SIZES, Drawing, training_drawing
from .extras import EXTRAS
from .people import ATTRIBUTES, values
from .tokens import CLIP_LENGTH, Tokens

CHUNK = 64
CAPTIONS = 8  # per drawing
T5_KEPT = 96  # tokens kept of a caption; the padding up to 256 is added in the batch

KINDS = ("face", "hand")  # of marks
MARKS = 3  # a face and two hands

Size = tuple[int, int]
Draw = Callable[[int, int, Size], Drawing]
"""Seed, number and size to a drawing."""


def _shared(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeroed memory that forked workers write into."""
    count = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, max(count, 1) * np.dtype(dtype).itemsize), dtype, count).reshape(shape)


@dataclass
class Bucket:
    """All drawings of one size; the first ``ready`` of them are done."""

    size: Size
    count: int
    ready: int = 0
    images: np.ndarray = field(init=False)  # [N, H, W, 3] uint8
    clip: np.ndarray = field(init=False)  # [N, CAPTIONS, 77]
    t5: np.ndarray = field(init=False)  # [N, CAPTIONS, T5_KEPT]
    labels: np.ndarray = field(init=False)  # [N, attributes and extras], -1 where the view does not show it
    marks: np.ndarray = field(init=False)  # [N, MARKS, 5]: index of the kind (-1: none), left, top, right, bottom

    def __post_init__(self) -> None:
        width, height = self.size
        self.images = _shared((self.count, height, width, 3), np.uint8)
        self.clip = _shared((self.count, CAPTIONS, CLIP_LENGTH), np.int16)
        self.t5 = _shared((self.count, CAPTIONS, T5_KEPT), np.int16)
        self.labels = _shared((self.count, len(ATTRIBUTES) + len(EXTRAS)), np.int8)
        self.marks = _shared((self.count, MARKS, 5), np.float32)


@dataclass(frozen=True)
class _Work:
    """What forked workers inherit."""

    buckets: dict[Size, Bucket]
    seed: int
    draw: Draw
    texts: bool


_WORK: _Work | None = None


def _start_worker() -> None:
    os.nice(10)  # training goes first
    torch.set_num_threads(1)


def _draw_chunk(job: tuple[Size, int, int]) -> tuple[Size, int]:
    size, first, number = job
    assert _WORK is not None
    bucket = _WORK.buckets[size]
    last = min(first + CHUNK, bucket.count)
    for i in range(first, last):
        drawing = _WORK.draw(_WORK.seed, number + i - first, size)
        bucket.images[i] = np.asarray(drawing.image)
        bucket.labels[i] = labels_of(drawing)
        bucket.marks[i, :, 0] = -1
        for k, (what, *box) in enumerate(drawing.marks):
            bucket.marks[i, k] = (KINDS.index(what), *box)
        if _WORK.texts:
            _write_captions(bucket, i, drawing, np.random.default_rng([_WORK.seed, number + i - first, 1]))
    return size, last


def labels_of(drawing: Drawing) -> list[int]:
    """The index of each attribute's value, then 1 for each extra that was drawn; -1 where it cannot be seen."""
    if drawing.view != "bust" or drawing.person is None:
        return [-1] * (len(ATTRIBUTES) + len(EXTRAS))
    attributes = drawing.person.attributes.items()
    return [values(name).index(value) for name, value in attributes] + [int(e in drawing.extras) for e in EXTRAS]


def _write_captions(bucket: Bucket, i: int, drawing: Drawing, rng: np.random.Generator) -> None:
    tokens = Tokens.shipped()
    assert drawing.person is not None
    for k in range(CAPTIONS):
        text = caption(drawing.person, rng, drawing.view).text
        bucket.clip[i, k], bucket.t5[i, k] = tokens.clip_ids(text), tokens.t5_ids(text, T5_KEPT)


class Drawings:
    """Starts drawing ``count`` pictures in the background. Make it before CUDA is used: workers are forked.

    Args:
        only: draw those of one size, the very pictures that they are among all sizes.
        draw: what makes them, if not people as the transformer knows them; ``held_out`` is then its own affair.
        sizes: (width, height) to its share.
        texts: with captions.
    """

    def __init__(self, count: int, seed: int, *, workers: int | None = None, held_out: bool | None = False,
                 only: Size | None = None, draw: Draw | None = None, sizes: Mapping[Size, float] = SIZES,
                 texts: bool = True) -> None:  # fmt: skip
        global _WORK  # noqa: PLW0603 - the one way that shared memory reaches forked workers
        self._counts = {size: max(1, round(count * share)) for size, share in sizes.items()}
        self.shares = {size: share for size, share in sizes.items() if only in (None, size)}
        self.buckets = {size: Bucket(size, self._counts[size]) for size in self.shares}
        Tokens.shipped()
        _WORK = _Work(self.buckets, seed, draw or partial(training_drawing, held_out=held_out), texts)
        context = multiprocessing.get_context("fork")
        self._pool = context.Pool(workers or max(1, (os.cpu_count() or 2) - 2), initializer=_start_worker)
        self._results = self._pool.imap(_draw_chunk, list(self._jobs()))
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _jobs(self) -> Iterator[tuple[Size, int, int]]:
        """Chunks of all sizes in turn, so that every size is ready early."""
        jobs = []
        for size, count in self._counts.items():
            jobs += [((first + 1) / count, size, first) for first in range(0, count, CHUNK)]
        for number, (_, size, first) in enumerate(sorted(jobs)):
            if size in self.buckets:
                yield size, first, number * CHUNK

    def _collect(self) -> None:
        for size, last in self._results:  # in order, so that what is ready is a prefix
            self.buckets[size].ready = last

    @property
    def ready(self) -> int:
        return sum(bucket.ready for bucket in self.buckets.values())

    @property
    def count(self) -> int:
        return sum(bucket.count for bucket in self.buckets.values())

    def wait(self, count: int | None = None) -> None:
        """Until ``count`` drawings (at most all) are ready, and a chunk of every size."""
        wanted = min(count or self.count, self.count)
        while self.ready < wanted or not all(bucket.ready for bucket in self.buckets.values()):
            if not self._thread.is_alive() and self.ready < self.count:
                raise RuntimeError("a drawing process failed")
            self._thread.join(0.05)

    def close(self) -> None:
        self._pool.terminate()


class Batches:
    """Draws sizes by their share and pictures of one size by lot."""

    def __init__(self, drawings: Drawings, seed: int) -> None:
        self.drawings = drawings
        self.rng = np.random.default_rng(seed)
        shares = np.array(list(drawings.shares.values()))
        self._sizes, self._shares = list(drawings.shares), shares / shares.sum()

    def size(self) -> Size:
        return self._sizes[self.rng.choice(len(self._sizes), p=self._shares)]

    def block(self, batch: int, device: torch.device, crop: int | None = None) -> tuple[Tensor, Tensor]:
        """Pictures ``[B, 3, H, W]`` in 0..1 and their labels ``[B, ...]``; neighbours in memory, which is no order.

        ``batch`` is for pictures of 256 x 256; larger pictures come in fewer, smaller ones in more. With ``crop`` the
        pictures are cut to that side, all at one place, and ``batch`` is taken as it is.
        """
        bucket = self.drawings.buckets[self.size()]
        if crop is None:
            batch = max(1, round(batch * 256 * 256 / (bucket.size[0] * bucket.size[1])))
        batch = min(bucket.ready, batch)
        first = int(self.rng.integers(bucket.ready - batch + 1))
        images = bucket.images[first : first + batch]
        if crop is not None:
            top, left = (int(self.rng.integers(side - crop + 1)) for side in images.shape[1:3])
            images = np.ascontiguousarray(images[:, top : top + crop, left : left + crop])
        images = torch.from_numpy(images).to(device)
        labels = torch.from_numpy(bucket.labels[first : first + batch]).to(device).long()
        return images.permute(0, 3, 1, 2).float() / 255, labels


@dataclass
class LatentBucket:
    mean: Tensor  # [N, 16, h, w]
    clip: Tensor
    t5: Tensor
    ready: int = 0


class Latents:
    """The drawings through the autoencoder, kept on the device; ``update`` adds what has been drawn since."""

    def __init__(self, drawings: Drawings, autoencoder: Autoencoder, device: torch.device) -> None:
        self.drawings, self.device = drawings, device
        self.autoencoder = autoencoder.to(device, torch.bfloat16).eval()
        self.buckets = {}
        for size, bucket in drawings.buckets.items():
            shape = (bucket.count, autoencoder.params.z_channels, size[1] // 8, size[0] // 8)
            self.buckets[size] = LatentBucket(
                torch.empty(shape, dtype=torch.bfloat16, device=device),
                torch.empty(bucket.clip.shape, dtype=torch.int16, device=device),
                torch.empty(bucket.t5.shape, dtype=torch.int16, device=device),
            )

    @torch.no_grad()
    def update(self, chunks: int) -> None:
        """Encode up to ``chunks`` chunks of what has been drawn, of all sizes in turn."""
        for _ in range(chunks):
            sizes = [size for size, mine in self.buckets.items() if mine.ready < self.drawings.buckets[size].ready]
            if not sizes:
                return
            self._encode(min(sizes, key=lambda size: self.buckets[size].ready / self.drawings.buckets[size].count))

    def _encode(self, size: Size) -> None:
        mine, bucket = self.buckets[size], self.drawings.buckets[size]
        span = slice(mine.ready, min(mine.ready + CHUNK, bucket.ready))
        pixels = torch.from_numpy(bucket.images[span]).to(self.device).permute(0, 3, 1, 2).to(torch.bfloat16) / 255
        moments = self.autoencoder.encoder(2 * pixels - 1).float()
        mine.mean[span] = self.autoencoder.sample(moments, torch.zeros_like(moments[:, :16])).to(torch.bfloat16)
        mine.clip[span] = torch.from_numpy(bucket.clip[span]).to(self.device)
        mine.t5[span] = torch.from_numpy(bucket.t5[span]).to(self.device)
        mine.ready = span.stop

    def batch(self, size: Size, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents ``[B, 16, h, w]`` (float32), CLIP ids ``[B, 77]`` and T5 ids ``[B, T5_KEPT]`` by lot."""
        mine = self.buckets[size]
        rows = torch.randint(mine.ready, (batch,), generator=generator, device=self.device)
        which = torch.randint(CAPTIONS, (batch,), generator=generator, device=self.device)
        return mine.mean[rows].float(), mine.clip[rows, which].long(), mine.t5[rows, which].long()
