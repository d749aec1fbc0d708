"""Model files by the names that clients know them by: titles with hashes, file names, paths of the models folder."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ....core.models import FORGE_HASH
from ....errors import ModelNotFoundError, RequestError, closest, some_of
from ..faults import ForbiddenError
from ..service import Service
from .options import NO_CHOICE, Options

Row = Mapping[str, Any]

CHECKPOINT = "sd_model_checkpoint"


@dataclass(frozen=True)
class Catalogue:
    """What the worker told of the models folder, as of its last job.

    Attributes:
        checkpoints, modules: rows as of ``facts.Facts``.
        configured: file of the checkpoint that is used where nobody chooses.
    """

    checkpoints: Sequence[Row]
    modules: Sequence[Row]
    configured: str | None
    models_dir: Path

    @classmethod
    def of(cls, service: Service) -> Catalogue:
        facts = service.supervisor.facts
        rows = (facts.get("checkpoints", ()), facts.get("modules", ()))
        return cls(*rows, facts.get("configured"), service.config.models_dir)

    def checkpoint(self, name: str | None) -> Row | None:
        """The checkpoint of a name; of none, that which is configured.

        Raises:
            ModelNotFoundError: there is no such checkpoint; tells close names.
        """
        if name:
            return self._find(name, self.checkpoints, CHECKPOINT)
        return next((row for row in self.checkpoints if row["filename"] == self.configured), None)

    def autoencoders(self) -> list[Row]:
        return [row for row in self.modules if row["role"] == "autoencoder"]

    def fields(self, options: Options, of_request: Collection[str] = ()) -> dict[str, Any]:
        """The fields of a request for the models that options name; none for those that are left to the configuration.

        Args:
            of_request: names of options that the request itself brings, for messages.

        Raises:
            ModelNotFoundError: a name is of no file.
            ForbiddenError: one is a path outside of the models folder.
        """

        def find(option: str, name: str, rows: Sequence[Row]) -> Row:
            return self._find(name, rows, f"override_settings.{option}" if option in of_request else option)

        fields: dict[str, Any] = {}
        for name in options.forge_additional_modules:
            row = find("forge_additional_modules", name, self.modules)
            fields[row["field"]] = row["filename"]
        if (name := options.sd_vae or "").lower() not in NO_CHOICE:
            fields["vae"] = find("sd_vae", name, self.autoencoders())["filename"]
        if name := options.sd_model_checkpoint:
            fields["checkpoint"] = find(CHECKPOINT, name, self.checkpoints)["filename"]
        if options.forge_unet_storage_dtype.lower() not in NO_CHOICE:
            fields["storage_dtype"] = options.forge_unet_storage_dtype
        return fields

    def _find(self, name: str, rows: Sequence[Row], field: str) -> Row:
        wanted = self._within(name, field)
        for spelled in (wanted, FORGE_HASH.sub("", wanted)):
            if found := next((row for row in rows if spelled in _names_of(row)), None):
                return found
        known = [row.get("title") or row["model_name"] for row in rows]
        meant = closest(wanted, known)
        there = f"did you mean {meant!r}?" if meant else f"there are: {some_of(known)}"
        raise ModelNotFoundError(f"{field}: no model file is called {PurePath(name).name!r:.120}; {there}", field=field)

    def _within(self, name: str, field: str) -> str:
        """A path below the models folder as the worker names files; any other name as it is."""
        if "\0" in name:
            raise RequestError(f"{field}: the name holds a NUL; send it without", field=field)
        if not PurePath(name).is_absolute():
            return name
        path, root = os.path.normpath(name), os.path.abspath(self.models_dir)
        if not Path(path).is_relative_to(root):
            raise ForbiddenError(f"{field}: the path is of no model in the models folder; send a name", param=field)
        return str(Path(path).relative_to(root))


def _names_of(row: Row) -> set[str]:
    path = PurePath(row["filename"])
    hashes = {row.get("hash"), row.get("sha256")} - {None, ""}
    return {row.get("title", ""), row["model_name"], row["filename"], path.name, path.stem, *hashes} - {""}
