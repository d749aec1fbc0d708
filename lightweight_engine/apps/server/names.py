"""Names of files in a request: they are looked up in lists of what is there, and are never paths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath

from ...errors import ModelNotFoundError, RequestError
from ...request import GenerationRequest
from .faults import ForbiddenError


def check_names(request: GenerationRequest) -> None:
    """Refuse names that are meant as paths; nothing is looked for.

    Raises:
        RequestError: one holds a NUL.
        ForbiddenError: one is an absolute path.
        ModelNotFoundError: one climbs out of its folder.
    """
    for field, name in _names(request):
        if "\0" in name:
            raise RequestError(f"{field}: the name holds a NUL; send it without", field=field)
        if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
            raise ForbiddenError(f"{field}: files are named as /capabilities lists them, not by paths", param=field)
        if ".." in PureWindowsPath(name).parts:  # whose separators are both
            raise ModelNotFoundError(f"{field}: there is no file of that name; /capabilities lists them")


def _names(request: GenerationRequest) -> Iterator[tuple[str, str]]:
    yield "hr_upscaler", request.hr_upscaler
    yield "img2img_upscaler", request.img2img_upscaler
    for spec in request.loras:
        if spec.name is not None:
            yield "loras", spec.name
