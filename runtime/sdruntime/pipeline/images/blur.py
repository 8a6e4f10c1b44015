"""Blur images uint8, [H, W] or [H, W, C]."""

from __future__ import annotations

import math

import numpy as np

from sdruntime.pipeline.images.pixels import Pixels

_PASSES = 3
_ONE = 1 << 24  # of a weight in fixed point


def gaussian(gray: Pixels, deviation: float) -> Pixels:
    """Blur a mask as AUTOMATIC1111's web UI does: a Gaussian cut at 2.5 deviations, along rows and then along columns.

    Edges are mirrored, without the outermost pixel twice. The web UI's library rounds its weights to 1/256; these are exact.
    """
    reach = int(2.5 * deviation + 0.5)
    if not reach:
        return gray
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    weights /= weights.sum()
    for axis in (1, 0):
        margin = [(0, 0), (0, 0)]
        margin[axis] = (reach, reach)
        padded = np.pad(gray.astype(np.float64), margin, mode="reflect")
        total = sum(
            weight * np.take(padded, range(k, k + gray.shape[axis]), axis=axis) for k, weight in enumerate(weights.tolist())
        )
        gray = np.floor(np.asarray(total) + 0.5).astype(np.uint8)
    return gray


def boxes(pixels: Pixels, radius: float) -> Pixels:
    """Blur bit for bit as Pillow's GaussianBlur does: three boxes along rows, then three along columns."""
    if not radius:
        return pixels
    box = _box_radius(radius)
    whole = int(box)
    weight = int(np.float32(_ONE) / (box * np.float32(2) + np.float32(1)))
    edge = (_ONE - (2 * whole + 1) * weight) // 2
    for axis in (1, 0):
        lines = np.moveaxis(pixels, axis, 0)
        length = len(lines)
        places = np.clip(np.arange(-whole - 1, length + whole + 1), 0, length - 1)
        for _ in range(_PASSES):
            wide = lines[places].astype(np.int64)  # from whole + 1 before the first to whole + 1 behind the last
            sums = np.cumsum(wide, axis=0)
            inner = sums[2 * whole + 1 : -1] - sums[:length]
            outer = wide[:length] + wide[2 * whole + 2 :]
            lines = ((inner * weight + outer * edge + _ONE // 2) >> 24).astype(np.uint8)
        pixels = np.ascontiguousarray(np.moveaxis(lines, 0, axis))
    return pixels


def _box_radius(deviation: float) -> np.float32:
    """Return the radius of the boxes (Gwosdek et al. 2011, equations 7, 11 and 14), in float32 as Pillow has it."""
    variance = np.float32(deviation) * np.float32(deviation) / np.float32(_PASSES)
    length = np.float32(math.sqrt(12.0 * float(variance) + 1.0))
    whole = np.float32(math.floor((float(length) - 1.0) / 2.0))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) * (whole + 1))
    radius: np.float32 = whole + part
    return radius
