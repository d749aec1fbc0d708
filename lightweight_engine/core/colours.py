"""A picture in the colours of another: its histograms in Lab, with its own luminosity."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]

# sRGB to XYZ at D65, divided by its white.
_TO_XYZ = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
) / np.array([[0.950456], [1.0], [1.088754]])
_FROM_XYZ = np.linalg.inv(_TO_XYZ)
_LUMINOSITY = np.array([0.3, 0.59, 0.11])  # of blend modes (W3C compositing)
_KNEE = 0.008856


def match_colours(image: Image.Image, like: Image.Image) -> Image.Image:
    """``image`` with the distribution of colours of ``like``, RGB; light and shade stay its own."""
    own = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    target = _to_lab(np.asarray(like.convert("RGB"), dtype=np.float64) / 255)
    lab = _to_lab(own)
    matched = np.stack([_matched(lab[..., i], target[..., i]) for i in range(3)], axis=-1)
    made = _with_luminosity(_from_lab(matched), own)
    return Image.fromarray((made * 255).round().clip(0, 255).astype(np.uint8))


def _matched(values: Array, like: Array) -> Array:
    """Values moved so that their distribution is that of others."""
    _, places, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    levels, like_counts = np.unique(like.ravel(), return_counts=True)
    own_share, like_share = counts.cumsum() / values.size, like_counts.cumsum() / like.size
    return np.interp(own_share, like_share, levels)[places].reshape(values.shape)


def _to_lab(rgb: Array) -> Array:
    """sRGB in 0..1 to Lab in 256 levels a channel, as its histogram is taken."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ _TO_XYZ.T
    f = np.where(xyz > _KNEE, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lightness = 116 * f[..., 1] - 16
    lab = np.stack([lightness * 2.55, 500 * (f[..., 0] - f[..., 1]) + 128, 200 * (f[..., 1] - f[..., 2]) + 128], -1)
    return lab.round().clip(0, 255)


def _from_lab(lab: Array) -> Array:
    middle = (lab[..., 0] / 2.55 + 16) / 116
    f = np.stack([middle + (lab[..., 1] - 128) / 500, middle, middle - (lab[..., 2] - 128) / 200], axis=-1)
    xyz = np.where(f**3 > _KNEE, f**3, (f - 16 / 116) / 7.787)
    linear = (xyz @ _FROM_XYZ.T).clip(0, 1)
    return np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def _with_luminosity(colours: Array, light: Array) -> Array:
    """The first picture's hue and saturation with the second one's luminosity (W3C compositing, "luminosity")."""
    moved = colours + ((light - colours) @ _LUMINOSITY)[..., None]
    level = (moved @ _LUMINOSITY)[..., None]
    low, high = moved.min(-1, keepdims=True), moved.max(-1, keepdims=True)
    moved = np.where(low < 0, level + (moved - level) * level / np.maximum(level - low, 1e-9), moved)
    return np.where(high > 1, level + (moved - level) * (1 - level) / np.maximum(high - level, 1e-9), moved)
