"""Upscalers by name: those without a network, and the files in the folders of a models folder. Loads no torch.

Names are those of Stable Diffusion WebUI and Forge: the stem of a file, or a fixed one for files that everybody has.
Listing reads names of files only, and their headers where it is asked what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..backend.kept_files import by_name, files_below
from ..backend.model_files import problem_of
from ..backend.model_folders import UPSCALERS, bases_of, place_for
from ..errors import ModelNotFoundError, RequestError, closest
from ..labels import LATENT_UPSCALERS

SUFFIXES = (".safetensors", ".pth", ".pt")
PLAIN_NAMES = ("None", "Lanczos", "Nearest")
"""Upscalers that need no file."""

HIRES = "hr_upscaler"
"""The field that takes the ways of enlarging a latent too."""


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut for a network.

    Args:
        tile: side of a tile in pixels; 0 takes the whole picture.
        blended: neighbours are blended along a ramp in bytes; else every output is the mean of all tiles over it.
        half: runs in float16 on a GPU, where the architecture can.
    """

    tile: int = 192
    overlap: int = 8
    blended: bool = True
    half: bool = False


@dataclass(frozen=True)
class Family:
    """Files of one kind.

    Args:
        folder: below a models folder, in any case.
        names: stem of a file that everybody has -> what people call it; the first that has a name is its usual one.
    """

    folder: str
    tiling: Tiling = field(default_factory=Tiling)
    names: dict[str, str] = field(default_factory=dict)


ESRGAN, COMFY = UPSCALERS
"""Forge's folder for most of them, and ComfyUI's for all kinds, whose files are called by their stems."""

FAMILIES = (
    Family(ESRGAN, names={"ESRGAN_4x": "ESRGAN_4x", "ESRGAN": "ESRGAN_4x", "4x-UltraSharp": "4x-UltraSharp"}),
    Family(COMFY),
    Family(
        "RealESRGAN",
        Tiling(half=True),
        {
            "RealESRGAN_x4plus": "R-ESRGAN 4x+",
            "RealESRGAN_x4plus_anime_6B": "R-ESRGAN 4x+ Anime6B",
            "realesr-general-x4v3": "R-ESRGAN General 4xV3",
            "realesr-general-wdn-x4v3": "R-ESRGAN General WDN 4xV3",
            "realesr-animevideov3": "R-ESRGAN AnimeVideo",
            "RealESRGAN_x2plus": "R-ESRGAN 2x+",
        },
    ),
    Family(
        "SwinIR",
        Tiling(blended=False),
        {"SwinIR_4x": "SwinIR 4x", "003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN": "SwinIR 4x"},
    ),
    Family(
        "ScuNET",
        Tiling(tile=256, blended=False),
        {"scunet_color_real_gan": "ScuNET GAN", "ScuNET": "ScuNET GAN", "scunet_color_real_psnr": "ScuNET PSNR"},
    ),
    Family("DAT", Tiling(half=True), {"DAT_x2": "DAT x2", "DAT_x3": "DAT x3", "DAT_x4": "DAT x4"}),
    Family("HAT"),
)

REFUSED = {"LDSR": "a latent diffusion model of its own, which neither Forge nor this engine has"}


@dataclass(frozen=True)
class Entry:
    """A file that an upscaler is read from."""

    name: str
    path: Path
    family: Family

    @property
    def problem(self) -> str | None:
        """Why its file cannot be opened, by the header alone; whether it holds an upscaler, its reading tells."""
        return problem_of(self.path)


class UpscalerFiles:
    """The upscalers of some folders, as far as names tell.

    Args:
        roots: models folders; of two files of one name, that of the first counts.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = tuple(roots)

    def entries(self) -> list[Entry]:
        """The files that are there, sorted by name."""
        return by_name(entry for root in self.roots for entry in _scan(root))

    def names(self) -> list[str]:
        """All names to choose from: those without a network first."""
        return [*PLAIN_NAMES, *(entry.name for entry in self.entries())]

    def problems(self) -> dict[str, str]:
        """Names of those whose files cannot be opened, with the reason."""
        return {entry.name: problem for entry in self.entries() if (problem := entry.problem)}

    def entry(self, name: str, *, field: str = "upscaler") -> Entry | None:
        """The file of an upscaler; None of one that needs none.

        Args:
            field: of the request, for the message.

        Raises:
            ModelNotFoundError: there is none of that name, or its file is not there.
            RequestError: it is one that this engine does not run.
        """
        if name.lower() in (plain.lower() for plain in PLAIN_NAMES):
            return None
        entries = self.entries()
        exact = [entry for entry in entries if entry.name == name]
        found = next(iter(exact or [entry for entry in entries if entry.name.lower() == name.lower()]), None)
        if found is None:
            raise self._unknown(name, field)
        return found

    def _unknown(self, name: str, field: str) -> RequestError | ModelNotFoundError:
        names = [*self.names(), *(LATENT_UPSCALERS if field == HIRES else ())]
        if name in REFUSED:
            why = f"{field}: {name} is {REFUSED[name]}"
            return RequestError(f"{why}; choose one of: {', '.join(names)}", field=field)
        for family in FAMILIES:
            stem = next((stem for stem, known in family.names.items() if known.lower() == name.lower()), None)
            if stem is not None:
                folders = (family.folder, COMFY) if family.names[stem] == stem else (family.folder,)
                places = ", ".join(str(_place(root, folders)) for root in self.roots[:1])
                return ModelNotFoundError(
                    f"{field}: {name!r} needs the file {stem}.pth, and it is not in {places}; put it there, or choose "
                    f"one of: {', '.join(names)}",
                    field=field,
                )
        meant = closest(name, names)
        hint = f" (did you mean {meant!r}?)" if meant else ""
        message = f"{field}: there is no upscaler {name!r:.80}{hint}; choose one of: {', '.join(names)}"
        return ModelNotFoundError(message, field=field)


def _scan(root: Path) -> Iterator[Entry]:
    """The files of all families below a models folder; links to folders are followed once."""
    for folder, family in _folders(root):
        for path in files_below(folder, SUFFIXES):
            yield Entry(family.names.get(path.stem, path.stem), path, family)


def _folders(root: Path) -> Iterator[tuple[Path, Family]]:
    """The folders of a models folder that are there, in any case."""
    wanted = {family.folder.lower(): family for family in FAMILIES}
    for base in bases_of(root):
        try:
            folders = sorted(path for path in base.iterdir() if path.name.lower() in wanted and path.is_dir())
        except OSError:
            continue
        yield from ((folder, wanted[folder.name.lower()]) for folder in folders)


def _place(root: Path, folders: Sequence[str]) -> Path:
    """The folder that a new file goes into: the first of these that is there, in any case, else the usual one."""
    there = [path for path, family in _folders(root) if family.folder in folders]
    return there[0] if there else place_for(root, folders)
