"""The pictures of an answer as files, in a temporary folder that lives until the next one."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

from ...core.images import encode
from ...results import GenerationResult

QUALITY = 100  # of webp and jpg


class OutputFolder:
    """Holds the files of one answer; they are gone with the next, and at the end of the process."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def clear(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()

    def write(self, result: GenerationResult) -> tuple[list[Path], list[str]]:
        """The pictures as ``<seed>-<uuid>.<format>`` with their texts, and what a person should know of them."""
        self.clear()
        self._folder = tempfile.TemporaryDirectory(prefix="predict-", ignore_cleanup_errors=True)
        kind, paths, warnings = result.request.output_format, [], []
        for image, seed, infotext in zip(result.images, result.seeds, result.infotexts, strict=True):
            file = encode(image, kind, infotext, QUALITY)
            path = Path(self._folder.name) / f"{seed}-{uuid.uuid4()}.{kind}"
            path.write_bytes(file.data)
            paths.append(path)
            warnings += file.warnings
        return paths, warnings
