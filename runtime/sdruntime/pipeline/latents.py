"""Images <-> latents, through the VAE's engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.bundle.manifest import ModelSpec
from sdruntime.engines.finite import checked_rows


def decode(
    latents: Array,
    engine: Engine,
    model: ModelSpec,
    during: Callable[[int], str] = "image {}".format,
    bundle: Path | None = None,
) -> Array:
    """Latents float32 [B, C, h, w] -> images float32 [B, 3, f·h, f·w] in about [-1, 1]. `during` says of a row whose it is.

    Raises NotFinite.
    """
    if model.latents_std:  # in this order, as diffusers' StableDiffusionXLPipeline has it
        cells = latents * _channels(model.latents_std) / np.float32(model.scaling_factor) + _channels(model.latents_mean)
    else:
        cells = latents / np.float32(model.scaling_factor) + np.float32(model.shift_factor)
    return checked_rows(engine, {"latent_sample": np.ascontiguousarray(cells, np.float32)}, during, bundle)["sample"]


def encode(pictures: Array, noise: Array, engine: Engine, model: ModelSpec, bundle: Path | None = None) -> Array:
    """Images float32 [B, 3, H, W] in [-1, 1] -> latents float32 [B, C, H/f, W/f], a draw from the VAE's posterior.

    `noise`: unit normal, of the latents' shape. The log-variance is clamped to [-30, 20] as diffusers does. Raises NotFinite.
    """
    feeds = {"sample": np.ascontiguousarray(pictures, np.float32)}
    posterior = checked_rows(engine, feeds, lambda row: "the image to begin from", bundle)
    deviation = np.exp(0.5 * np.clip(posterior["latent_logvar"], -30.0, 20.0))
    drawn: Array = posterior["latent_mean"] + deviation * noise
    if model.latents_std:  # as diffusers' StableDiffusionXLImg2ImgPipeline has it
        drawn = (drawn - _channels(model.latents_mean)) * np.float32(model.scaling_factor) / _channels(model.latents_std)
    else:
        drawn = (drawn - np.float32(model.shift_factor)) * np.float32(model.scaling_factor)
    return drawn


def _channels(values: Sequence[float]) -> Array:
    return np.array(values, np.float32)[:, None, None]


def time_ids(shape: tuple[int, int, int], model: ModelSpec) -> Array:
    """SDXL's size conditioning, float32 [6]: original size, crop corner, target size, each (height, width) in pixels
    (arXiv 2307.01952, section 2.2): an uncropped image of the generated size."""
    height, width = shape[1] * model.vae_factor, shape[2] * model.vae_factor
    return np.array([height, width, 0, 0, height, width], np.float32)
