"""Images <-> latents, through the VAE's engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.bundle.interface import LOGVAR
from sdruntime.bundle.model import ModelSpec
from sdruntime.engines.finite import checked_rows


def decode(
    latents: Array,
    engine: Engine,
    model: ModelSpec,
    during: Callable[[int], str] = "image {}".format,
    bundle: Path | None = None,
) -> Array:
    """Decode latents float32 [B, C, h, w] to images float32 [B, 3, f·h, f·w] in about [-1, 1].

    Raises NotFinite; `during` describes a row for the message.
    """
    if model.latents_std:  # in the order of diffusers' StableDiffusionXLPipeline
        cells = latents * _channels(model.latents_std) / np.float32(model.scaling_factor) + _channels(model.latents_mean)
    else:
        cells = latents / np.float32(model.scaling_factor) + np.float32(model.shift_factor)
    return checked_rows(engine, {"latent_sample": np.ascontiguousarray(cells, np.float32)}, during, bundle)["sample"]


def encode(images: Array, noise: Array, engine: Engine, model: ModelSpec, bundle: Path | None = None) -> Array:
    """Encode images float32 [B, 3, H, W] in [-1, 1] to latents float32 [B, C, H/f, W/f], one draw from the VAE's posterior.

    `noise`: unit normal, of the latents' shape; a VAE without a posterior ignores it. The log-variance is clamped to
    [-30, 20], as in diffusers. Raises NotFinite.
    """
    feeds = {"sample": np.ascontiguousarray(images, np.float32)}
    posterior = checked_rows(engine, feeds, lambda row: "the initial image", bundle)
    if LOGVAR not in posterior:
        return scaled(posterior["latent_mean"], model)
    deviation = np.exp(0.5 * np.clip(posterior[LOGVAR], -30.0, 20.0))
    return scaled(posterior["latent_mean"] + deviation * noise, model)


def scaled(draw: Array, model: ModelSpec) -> Array:
    """Return a draw from the VAE's posterior, float32 [..., C, h, w], in the scale of the UNet's latents."""
    if model.latents_std:  # as in diffusers' StableDiffusionXLImg2ImgPipeline
        latents: Array = (draw - _channels(model.latents_mean)) * np.float32(model.scaling_factor) / _channels(model.latents_std)
        return latents
    latents = (draw - np.float32(model.shift_factor)) * np.float32(model.scaling_factor)
    return latents


def encode_mode(images: Array, engine: Engine, bundle: Path | None = None) -> Array:
    """Return the mode of the VAE's posterior of images float32 [B, 3, H, W] in [-1, 1], not scaled. Raises NotFinite."""
    feeds = {"sample": np.ascontiguousarray(images, np.float32)}
    return checked_rows(engine, feeds, lambda row: "the initial image", bundle)["latent_mean"]


def _channels(values: Sequence[float]) -> Array:
    return np.array(values, np.float32)[:, None, None]
