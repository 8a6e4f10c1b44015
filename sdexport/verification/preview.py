"""Fit the colours of latents, for previews without the VAE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.bundle.model import LinearPreview, ModelSpec
from sdruntime.pipeline.images.pixels import from_uint8
from sdruntime.pipeline.vae.latents import decode, encode_mode, scaled
from sdruntime.verification.inputs import patches

BEST = 99.0  # dB, for an exact fit


def linear_preview(images: Sequence[Array], engine: Callable[[str], Engine], model: ModelSpec) -> LinearPreview:
    """Fit a linear map from latents to colours by least squares.

    It is fitted to the VAE's encodings of `images`, uint8 [H, W, 3] of one size, and of images of random colours, against their
    decodings averaged over each latent cell.
    """
    height, width, _ = images[0].shape
    pixels = [from_uint8(image) for image in (*images, *(patches((width, height), seed) for seed in range(len(images))))]
    encoder = engine("vae_encoder")
    latents = [scaled(encode_mode(image[None], encoder), model) for image in pixels]
    decoder = engine("vae_decoder")
    colours = [_averaged(decode(image, decoder, model)[0], model.vae_factor) for image in latents]
    cells = np.concatenate([image[0].reshape(model.latent_channels, -1).T for image in latents]).astype(np.float64)
    target = np.concatenate([colour.reshape(3, -1).T for colour in colours]).astype(np.float64)
    fit, *_ = np.linalg.lstsq(np.column_stack([cells, np.ones(len(cells))]), target, rcond=None)
    error = np.mean((np.clip(cells @ fit[:-1] + fit[-1], -1, 1) - target) ** 2)
    return LinearPreview(
        weights=tuple(tuple(_rounded(value) for value in row) for row in fit[:-1].T),
        bias=tuple(_rounded(value) for value in fit[-1]),
        psnr=round(min(BEST, 10 * math.log10(4 / error)), 1) if error else BEST,
    )


def _averaged(image: Array, factor: int) -> Array:
    """Return an image [3, H, W], clipped to [-1, 1], as the means of its blocks of `factor` by `factor` pixels."""
    _, height, width = image.shape
    blocks = np.clip(image, -1, 1).reshape(3, height // factor, factor, width // factor, factor)
    means: Array = blocks.mean((2, 4))
    return means


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
