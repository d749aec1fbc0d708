"""The folders of a models folder, or of an install around one: where files of a kind are looked for, and put.

Loads no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

INSIDE = "models"
"""The folder of an install of WebUI, Forge or ComfyUI that holds its models."""

# What is no part of a model, by the folders of ours and of WebUI or ComfyUI that hold it; the usual one first.
LORAS = ("Lora", "loras")
UPSCALERS = ("ESRGAN", "upscale_models")
DETECTORS = ("adetailer",)


def bases_of(root: Path) -> list[Path]:
    """The folders that hold those of the kinds: a models folder itself, and the one in it where it is an install."""
    inside = root / INSIDE
    return [root, inside] if os.path.isdir(inside) else [root]


def folders_of(root: Path, names: Sequence[str]) -> list[Path]:
    """The folders of a kind, whether they are there or not, the most wanted first."""
    return [base / name for base in bases_of(root) for name in names]


def place_for(root: Path, names: Sequence[str]) -> Path:
    """The folder of a kind that a new file goes into: one that is there, which others may read too, else the usual one.

    Args:
        names: of the kind's folders, the usual one first.
    """
    there = next((folder for folder in folders_of(root, names) if os.path.isdir(folder)), None)
    return there or bases_of(root)[-1] / names[0]


def place_beside(path: Path, names: Sequence[str]) -> Path:
    """The folder of a kind that a file belongs in which lies elsewhere: the nearest to it that is there.

    Args:
        names: of the kind's folders, the usual one first; it is named where none is there.
    """
    around = (folder for base in path.parents for folder in folders_of(base, names))
    return next(filter(os.path.isdir, around), Path(INSIDE, names[0]))
