"""Pictures that come with transparency, orientation or a palette, byte for byte."""

from __future__ import annotations

import io

import numpy as np
from goldens import Case
from PIL import Image

from lightweight_engine.core.pictures import PictureReader, flattened


def check(case: Case) -> None:
    if case["kind"] == "flatten":
        source = PictureReader().read(Image.fromarray(case.array(f"flat_in_{case.id}")))
        np.testing.assert_array_equal(np.array(flattened(source, case["bg"])), case.array(f"flat_out_{case.id}"))
    elif case["kind"] == "exif_orientation":
        made = PictureReader().read(turned(case.array("exif_in"), case["orientation"]))
        assert list(made.size) == case["out_size"]
        np.testing.assert_array_equal(np.array(made), case.array(f"exif_out_{case['orientation']}"))
    else:
        made = PictureReader().read(case.array("trns_png").tobytes())
        assert made.mode == case["out_mode"]
        np.testing.assert_array_equal(np.array(made), case.array("trns_out"))


def turned(pixels: np.ndarray, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()
