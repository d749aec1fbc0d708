"""``info``: what a picture tells of its making. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from .console import Console
from .options import Debug, Json

Picture = Annotated[Path, typer.Argument(metavar="IMAGE", help="A png, jpg or webp file.")]


def info(image: Picture, json: Json = False, debug: Debug = False) -> None:
    """Print the text that a picture carries, and what its sidecar adds."""
    with Console(json=json, debug=debug) as console:
        from ..core.images import open_image, read_infotext, read_sidecar
        from ..core.infotext_parse import parse_infotext

        picture = open_image(image)
        text, sidecar = read_infotext(picture), read_sidecar(image)
        if text is None and sidecar is None:
            raise RequestError(f"{image} carries no parameters and has no sidecar; it was saved without them")
        parameters = parse_infotext(text, defaults=False) if text else {}
        if json:
            size = {"width": picture.width, "height": picture.height}
            console.result({**size, "infotext": text, "parameters": parameters, "sidecar": sidecar})
            return
        if text:
            console.data(text)
        for line in _sidecar_lines(sidecar or {}):
            console.data(line)


def _sidecar_lines(sidecar: dict[str, Any]) -> list[str]:
    """What the sidecar knows beyond the text: files with their hashes, device, times, an early end, warnings."""
    lines = [
        f"File of {row.get('role')}: {row.get('name')} {row.get('sha256') or ''}".rstrip() for row in _rows(sidecar)
    ]
    if device := sidecar.get("device"):
        lines.append(f"Device: {device}")
    timings = sidecar.get("timings")
    if isinstance(timings, dict):
        lines.append("Seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in timings.items()))
    if sidecar.get("interrupted"):
        lines.append("Ended early: it is as it was when its job was interrupted, with parts missing or not finished")
    lines += [f"Warning: {warning}" for warning in sidecar.get("warnings") or ()]
    return lines


def _rows(sidecar: dict[str, Any]) -> list[dict[str, Any]]:
    models = sidecar.get("models")
    return [row for row in models if isinstance(row, dict)] if isinstance(models, list) else []


def register(app: typer.Typer) -> None:
    app.command("info")(info)
