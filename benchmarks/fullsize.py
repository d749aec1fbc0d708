"""Random Flux.1 files at full size: as heavy and as slow as the published ones, where those may not travel.

    python -m benchmarks.fullsize FOLDER [--formats nf4 fp8_e4m3]

Numbers are drawn on the GPU, where there is one, each tensor with a seed of its own name, and written by several
threads straight to their places in the file, so that 34 GB into memory take seconds. They are no zeros, which would
compute faster than real weights do: matrices are normal with the spread fan_in^-0.5, so that activations stay finite
through all blocks, norms are near one, and modulation is weak.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightweight_engine.backend.model_files import open_model
from lightweight_engine.backend.satellites import WRITABLE
from lightweight_engine.core.models import TINY
from lightweight_engine.flux.convert import convert_part
from lightweight_engine.flux.keymaps import Role, find_parts
from lightweight_engine.flux.load import NETWORKS
from lightweight_engine.flux.params import AutoencoderParams, CLIPParams, FluxParams, T5Params

MEMORY = Path("/dev/shm")
"""Backed by memory on Linux: reading from there is reading from a warm page cache."""

WRITERS = min(8, os.cpu_count() or 1)

# safetensors' names of the dtypes that are written here.
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}
# The published files' own.
FILE_DTYPES: dict[Role, torch.dtype] = {
    "transformer": torch.bfloat16,
    "t5": torch.float16,
    "clip": torch.float16,
    "autoencoder": torch.float32,
}
PATHS: dict[Role, str] = {
    "transformer": "Stable-diffusion/random.safetensors",
    "t5": "text_encoder/t5.safetensors",
    "clip": "text_encoder/clip.safetensors",
    "autoencoder": "VAE/ae.safetensors",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the four networks; the defaults are the published ones."""

    transformer: FluxParams = field(default_factory=FluxParams)
    t5: T5Params = field(default_factory=T5Params)
    clip: CLIPParams = field(default_factory=CLIPParams)
    autoencoder: AutoencoderParams = field(default_factory=AutoencoderParams)

    def of(self, role: Role) -> Any:
        return getattr(self, role)

    @property
    def hints(self) -> dict[str, Any]:
        """What a reader cannot tell from shapes; as a file's ``config``."""
        return {
            "axes_dim": self.transformer.axes_dim,
            "num_attention_heads": self.clip.num_heads,
            "theta": self.transformer.theta,
        }


# For trying a program out: seconds on a CPU, and blocks enough that a ring goes around.
SMALL = Sizes(
    FluxParams(
        vec_in_dim=64, context_in_dim=96, hidden_size=128, mlp_hidden=512, num_heads=2, depth=4,
        depth_single_blocks=8, axes_dim=(16, 24, 24),
    ),
    T5Params(vocab_size=256, hidden_size=96, num_layers=4, num_heads=4, head_dim=24, mlp_hidden=192),
    CLIPParams(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2, mlp_hidden=128),
    AutoencoderParams(widths=(32, 32, 32, 32), num_res_blocks=1),
)  # fmt: skip

# A pattern of names -> (mean, spread); the first that matches holds, and other matrices get fan_in^-0.5.
_SPREADS: tuple[tuple[re.Pattern[str], float, float], ...] = (
    (re.compile(r".*norm.*\.(scale|weight)"), 1.0, 0.05),
    (re.compile(r".*\.bias"), 0.0, 0.02),
    (re.compile(r"shared\.weight"), 0.0, 1.0),
    (re.compile(r".*relative_attention_bias\.weight"), 0.0, 1.0),
    (re.compile(r".*embedding\.weight"), 0.0, 0.02),
)
_MODULATION = re.compile(r".*(_mod|modulation|adaLN_modulation)\.(lin|1)\.weight")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: ``make`` gives it, on whatever device."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> int:
    """Write tensors that are made one by one, several at a time; returns the bytes of the file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places, end = {}, 0
    for name, entry in entries.items():
        places[name] = end
        header[name] = {
            "dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes],
        }  # fmt: skip
        end += entry.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(start + end)
        file.flush()
        staging = _Staging(max(entry.nbytes for entry in entries.values()))

        def write(name: str) -> None:
            raw = staging.on_host(entries[name].make())
            if os.pwrite(file.fileno(), raw, start + places[name]) != len(raw):
                raise OSError(f"{path}: {name} could not be written as a whole; is the disk full?")

        with ThreadPoolExecutor(WRITERS) as pool:
            for done in pool.map(write, entries):
                assert done is None
    return start + end


class _Staging(threading.local):
    """A page-locked buffer for each thread: fresh memory would be faulted in page by page, for every tensor."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._buffer: Tensor | None = None

    def on_host(self, tensor: Tensor) -> memoryview:
        """The bytes of a tensor; valid until the next call of this thread."""
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        if flat.is_cuda:
            if self._buffer is None:
                self._buffer = torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=True)
            flat = self._buffer[: len(flat)].copy_(flat)
        return flat.numpy().data


def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers that a parameter of this name and shape might hold; the same ones for the same device."""
    mean, spread = next(((m, s) for pattern, m, s in _SPREADS if pattern.fullmatch(name)), (0.0, 0.0))
    if not spread:
        spread = torch.Size(shape[1:]).numel() ** -0.5 * (0.3 if _MODULATION.fullmatch(name) else 1.0)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=dtype, device=device).normal_(mean, spread, generator=generator)


def shapes_of(role: Role, params: Any) -> dict[str, tuple[int, ...]]:
    """The parameters of a network."""
    with torch.device("meta"):
        module = NETWORKS[role][1](params)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def write_model(folder: Path, sizes: Sizes, device: torch.device, roles: Sequence[Role] = ()) -> dict[Role, Path]:
    """Files of all networks, or of ``roles``, in the layout of a models folder."""
    paths: dict[Role, Path] = {}
    for role in roles or tuple(PATHS):
        dtype = FILE_DTYPES[role]
        entries = {
            name: Entry(dtype, shape, partial(draw, name, shape, dtype, device))
            for name, shape in shapes_of(role, sizes.of(role)).items()
        }
        paths[role] = folder / PATHS[role]
        write_safetensors(paths[role], entries, {"config": json.dumps(sizes.hints)})
    return paths


def write_packed(path: Path, formats: Sequence[str], device: torch.device) -> list[Path]:
    """The one network of a file in other formats, beside it: the engine's own conversion."""
    (part,) = find_parts(open_model(path)).values()
    paths = [path.with_stem(f"{path.stem}-{format}") for format in formats]
    for format, made in zip(formats, paths, strict=True):
        convert_part(part, format, made, device=device)
    return paths


def write_tokenizers(folder: Path) -> None:
    """Those of a models folder, as long to read as the published ones: 49,408 words of CLIP and 32,100 of T5."""
    pick = random.Random(0)

    def words(count: int, beside: Iterable[str]) -> list[str]:
        found = dict.fromkeys(beside)
        while len(found) < count:
            found["".join(pick.choices("abcdefghijklmnopqrstuvwxyz", k=pick.randint(2, 9)))] = None
        return list(found)

    clip, t5 = folder / "tokenizers" / "clip_l", folder / "tokenizers" / "t5xxl"
    shutil.copytree(TINY / "tokenizers", folder / "tokenizers", dirs_exist_ok=True)
    vocab = words(49_408, json.loads((clip / "vocab.json").read_text(encoding="utf-8")))
    (clip / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocab)}), encoding="utf-8")
    merges = [f"{word[:1]} {word[1:]}" for word in vocab[-48_894:]]
    (clip / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    made = json.loads((t5 / "tokenizer.json").read_text(encoding="utf-8"))
    known = dict(made["model"]["vocab"])
    made["model"]["vocab"] = [[word, known.get(word, -10.0)] for word in words(32_100, known)]
    (t5 / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that is gone afterwards, in memory where the system has such."""
    return tempfile.TemporaryDirectory(prefix="flux-", dir=MEMORY if MEMORY.is_dir() else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a models folder, made where there is none")
    parser.add_argument("--formats", nargs="*", choices=WRITABLE, default=[], help="also the transformer packed so")
    parser.add_argument("--small", action="store_true", help="small networks")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SMALL if args.small else Sizes()
    start = time.perf_counter()
    paths = list(write_model(args.folder, sizes, device).values())
    paths += write_packed(paths[0], args.formats, device)
    seconds, total = time.perf_counter() - start, sum(path.stat().st_size for path in paths)
    print(f"{total / 1e9:.2f} GB in {seconds:.1f} s, {total / seconds / 1e9:.2f} GB/s, from {device}")


if __name__ == "__main__":
    main()
