"""Measure how much an output or an image differs from its reference: relative error, cosine, PSNR, SSIM."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdruntime.arrays import Array
from sdruntime.pipeline.images.pixels import Pixels

EQUAL = 200.0  # dB: the PSNR of two equal arrays
_WINDOW = 8  # pixels of a side
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much an output differs from its reference: the largest error `max_abs`, the same `relative` to the reference's largest
    magnitude, the cosine of the angle between them, and the PSNR in dB with that magnitude as the peak (at most EQUAL)."""

    max_abs: float
    relative: float
    cosine: float
    psnr: float

    @classmethod
    def of(cls, ours: Array, reference: Array, largest: float) -> Difference:
        """Compare two arrays of the same size. `largest`: the largest magnitude of the whole reference output."""
        one, other = ours.reshape(-1).astype(np.float64), reference.reshape(-1).astype(np.float64)
        worst = float(np.abs(one - other).max())
        lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
        peak = largest or 1.0
        return cls(
            max_abs=worst,
            relative=worst / peak,
            cosine=min(float(one @ other) / lengths, 1.0) if lengths else float(worst == 0),
            psnr=_decibels(peak, float(np.mean((one - other) ** 2))),
        )


def image_psnr(ours: Pixels, reference: Pixels) -> float:
    """Return the PSNR of two uint8 images in dB, with 255 as the peak (at most EQUAL)."""
    return _decibels(255.0, float(np.mean((ours.astype(np.float64) - reference) ** 2)))


def ssim(ours: Pixels, reference: Pixels) -> float:
    """Return the mean structural similarity of two uint8 images [H, W, 3], over all windows of 8×8 pixels of every channel.

    Wang, Bovik, Sheikh, Simoncelli 2004, equation 13, with K1 = 0.01, K2 = 0.03 and uniform windows, as in their section III-B.
    """
    x, y = ours.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = _means(x), _means(y)
    var_x, var_y = _means(x * x) - mean_x**2, _means(y * y) - mean_y**2
    covariance = _means(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    likeness /= (mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)
    return float(likeness.mean())


def _means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of every window of 8×8, computed from cumulative sums."""
    sums = np.zeros((values.shape[0] + 1, values.shape[1] + 1, *values.shape[2:]))
    sums[1:, 1:] = values.cumsum(axis=0).cumsum(axis=1)
    n = _WINDOW
    windows: NDArray[np.float64] = (sums[n:, n:] - sums[:-n, n:] - sums[n:, :-n] + sums[:-n, :-n]) / n**2
    return windows


def _decibels(peak: float, error: float) -> float:
    return EQUAL if error == 0 else min(10 * float(np.log10(peak**2 / error)), EQUAL)
