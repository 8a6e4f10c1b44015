"""Guidance: the model's two outputs, without and with the prompt, made into one.

It comes before the sampler sees the output, in whatever the model predicts (epsilon, v, sample or flow).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def combine(uncond: FloatArray, cond: FloatArray, scale: float | FloatArray, out: FloatArray | None = None) -> FloatArray:
    """Classifier-free guidance, uncond + scale · (cond − uncond), float32 [B, ...] (Ho & Salimans 2022, eq. 6, scale = 1 + w).

    `scale`: one for all rows, or float32 that broadcasts to them, such as [B,1,1,1]. `out` may be `cond`, but not `uncond`.
    """
    guided = np.subtract(cond, uncond, out=out)
    guided *= scale
    guided += uncond
    return guided


def rescale(guided: FloatArray, cond: FloatArray, phi: float | FloatArray) -> FloatArray:
    """Bring each row of `guided` [B, ...], in place, towards the standard deviation of `cond` (Lin et al. 2023, eq. 15-16).

    `phi`: 0 leaves `guided` as it is, 1 gives it all of cond's deviation; diffusers calls it guidance_rescale. A number, or
    float32 that broadcasts to rows, such as [B,1,1,1]. A row without any deviation has nothing to rescale and stays.
    """
    axes = tuple(range(1, guided.ndim))
    wanted, found = cond.std(axis=axes, keepdims=True), guided.std(axis=axes, keepdims=True)
    ratio = np.divide(wanted, found, out=np.ones_like(found), where=found > 0)
    guided *= phi * ratio + (1 - phi)
    return guided
