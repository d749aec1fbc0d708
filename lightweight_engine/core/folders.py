"""Where models lie in a models folder, by the names of files and folders alone. Loads no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from ..backend.kept_files import folders_below
from ..backend.model_files import CONFIG, INDEX, SHARD
from ..backend.model_folders import place_for
from ..errors import ModelNotFoundError

SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".bin")

# Folders of Stable Diffusion WebUI, Forge and ComfyUI that hold parts of Flux, ours first.
DRAWING = ("Stable-diffusion", "checkpoints", "unet", "diffusion_models")
READING = ("text_encoder", "text_encoders", "clip")
DECODING = ("VAE", "vae")
FOLDERS = (*DRAWING, *READING, *DECODING)


def title_of(path: Path) -> str:
    """What people call the model at a path: its name without the suffix; a folder's has none."""
    if path.name.endswith(INDEX):
        return Path(path.name.removesuffix(INDEX)).stem
    return path.name if path.is_dir() else path.stem


def stray_models(root: Path) -> str | None:
    """A sentence on model files at the top of a models folder, where nothing looks; None where there are none."""
    try:
        names = sorted(path.name for path in root.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    except OSError:
        return None
    if not names:
        return None
    some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"nothing looks at the top of {root} for models ({some}); move them into its folders, as {put_into(root)}"


def put_into(root: Path, folders: Sequence[str] = DRAWING) -> str:
    """The folder that a new file goes into, a checkpoint if nothing else is said, for a message that names ``root``."""
    return f"{place_for(root, folders).relative_to(root).as_posix()}/"


def models_below(folder: Path) -> Iterator[Path]:
    """Models below a folder: files, indices of shards, folders of diffusers; see ``folders_below``."""
    for current, below, names in folders_below(folder, _raise_unreadable):
        if current != folder and is_model_folder(below, names):
            below.clear()
            yield current
        else:
            yield from (current / name for name in _once_each(names))


def is_model_folder(folders: Collection[str], names: Collection[str]) -> bool:
    """Whether a folder is one model: a pipeline of diffusers, or a component with its sizes beside its only file."""
    if "model_index.json" in names or "transformer" in folders:
        return True
    models = [name for name in _once_each(names) if not SHARD.match(name)]
    return CONFIG in names and len(models) == 1


def _once_each(names: Collection[str]) -> Iterator[str]:
    """Files with a model's suffix; of shards their index, or the first where it is missing."""
    shards: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(INDEX):
            yield name
        elif name.lower().endswith(SUFFIXES):
            shard = SHARD.match(name)
            if shard is None or int(shard["count"]) < 2:
                yield name
            else:
                shards.setdefault(f"{shard['stem']}{shard['suffix']}{INDEX}", []).append(name)
    yield from (min(pieces) for index, pieces in shards.items() if index not in names)


def _raise_unreadable(error: OSError) -> None:
    """A folder that is not there is none of the folders we look into; one that may not be read hides files."""
    if isinstance(error, PermissionError):
        raise ModelNotFoundError(f"{error.filename} may not be read by this user; change its permissions") from None


def kernels_folder(cache_dir: Path) -> Path:
    """Where programs that were compiled for a GPU are kept."""
    return cache_dir / "kernels"


def quantized_folder(cache_dir: Path) -> Path:
    """Where parts that were quantised on load are kept."""
    return cache_dir / "quantized"
