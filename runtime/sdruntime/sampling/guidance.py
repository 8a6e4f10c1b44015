"""Guidance: combine the model's unconditional and conditional outputs.

It applies to the raw output, whatever the model predicts (epsilon, v, sample or flow), before the sampler reads it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import SettingError
from sdruntime.sampling.table import Table

FloatArray = NDArray[np.float32]


def over_calls(
    guidances: tuple[float, ...], interval: tuple[float, float], calls: int, *, least: float = 1.0
) -> tuple[float, ...]:
    """Return the guidance of each of `calls` model calls, 1 for none: `guidances`, one or as many, within an interval.

    Guidances below `least` become that.

    Outside of the interval there is no guidance (arXiv 2404.07724). It is (start, end) in shares of the calls: call i, from 0, is
    inside from int(start·calls) to below int(end·calls), as in diffusers' guiders. Raises SettingError.
    """
    if len(guidances) not in (1, calls):
        raise SettingError(f"guidance: got a list of {len(guidances)} numbers; the request makes {calls} model calls")
    values = guidances * calls if len(guidances) == 1 else guidances
    first, end = (int(share * calls) for share in interval)
    return tuple(max(least, value) if first <= i < end else 1.0 for i, value in enumerate(values))


def plus_plus(table: Table, scales: tuple[float, ...], sampler: str) -> tuple[float, ...]:
    """Return the guidance of each model call with which the table's steps are those of CFG++, scale λ of each call in [0, 1].

    CFG++ (Chung et al. 2024, arXiv 2406.08070, algorithm 2) guides the estimate of the clean image with λ and takes the noise of
    the unconditional output. A step x' = a·x + b·m that reads one output, m, of which p·x + q·m is the clean image, is
    P·clean + Q·noise with P = (a − b·p/q)·alpha + b/q. Guided with w, the clean image counts b·w/q at a given x; so w = λ·P·q/b.
    Raises SettingError for a sampler whose step reads earlier outputs or states: it mixes the guidances of several steps.
    """
    if np.any(table.X[:, 1:]) or np.any(table.M[:, 1:]):
        raise SettingError(
            f"cfg_pp with {sampler}: its steps read outputs of earlier ones, for which CFG++ is not defined: use one with one "
            "output a step, such as ddim, euler or euler_a"
        )
    (p, q), a, b, alpha = table.clean.T, table.X[:, 0], table.M[:, 0], table.levels[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.where(b == 0, 1.0, 1 + (a - b * p / q) * alpha * q / b)
    if not np.isfinite(factors).all():
        raise SettingError(f"cfg_pp with {sampler}: this schedule begins or ends at a level without signal or without noise")
    return tuple(float(factor * scale) for factor, scale in zip(factors, scales, strict=True))


def combine(uncond: FloatArray, cond: FloatArray, scale: float | FloatArray, out: FloatArray | None = None) -> FloatArray:
    """Return uncond + scale · (cond − uncond), float32 [B, ...]: classifier-free guidance.

    Ho & Salimans 2022, eq. 6, scale = 1 + w.
    `scale`: a number, or float32 that broadcasts to rows, such as [B,1,1,1]. `out` may be `cond`, but not `uncond`.
    """
    guided = np.subtract(cond, uncond, out=out)
    guided *= scale
    guided += uncond
    return guided


def combine_with_image(uncond: FloatArray, image: FloatArray, cond: FloatArray, scale: float, image_scale: float) -> FloatArray:
    """Return uncond + scale · (cond − image) + image_scale · (image − uncond): guidance by a text and an image.

    Brooks et al. 2022 (InstructPix2Pix, arXiv 2211.09800), equation 3. `image`: the output for the image without the text.
    """
    guided: FloatArray = uncond + np.float32(scale) * (cond - image) + np.float32(image_scale) * (image - uncond)
    return guided


def guidance_embedding(scale: float, width: int) -> FloatArray:
    """Return the embedding of a guidance scale, float32 [width], for models that take the guidance as an input.

    Luo et al. 2023 (latent consistency models, arXiv 2310.04378): the sinusoidal embedding of 1000·(scale − 1). In float32, as in
    diffusers: float64 differs from it by up to 2e-4.
    """
    half = width // 2
    rates = np.exp(np.arange(half, dtype=np.float32) * -(np.log(np.float32(10_000)) / np.float32(half - 1)))
    angles = np.float32(scale - 1) * np.float32(1000) * rates
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2, np.float32)]).astype(np.float32)


def rescale(guided: FloatArray, cond: FloatArray, phi: float | FloatArray) -> FloatArray:
    """Scale each row of `guided` [B, ...], in place, towards the standard deviation of `cond` (Lin et al. 2023, eq. 15-16).

    `phi`: from 0, no change, to 1, the full deviation of `cond`; guidance_rescale in diffusers. A number, or float32 that
    broadcasts to rows, such as [B,1,1,1]. A constant row (deviation 0) is not changed.
    """
    axes = tuple(range(1, guided.ndim))
    target, actual = cond.std(axis=axes, keepdims=True), guided.std(axis=axes, keepdims=True)
    ratio = np.divide(target, actual, out=np.ones_like(actual), where=actual > 0)
    guided *= phi * ratio + (1 - phi)
    return guided
