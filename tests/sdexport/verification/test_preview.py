"""The fit of linear previews: exact where the decoder is linear, and a measured error where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from computed import Computing, Feeds

from sdexport.verification.preview import BEST, linear_preview
from sdruntime.arrays import Array
from sdruntime.bundle.model import ModelSpec

FACTOR, CHANNELS = 8, 4
RANDOM = np.random.default_rng(0)
ENCODED = RANDOM.standard_normal((CHANNELS, 3)).astype(np.float32)
WEIGHTS = (RANDOM.standard_normal((3, CHANNELS)) / 16).astype(np.float32)
BIAS = np.array([0.1, -0.2, 0.05], np.float32)
IMAGES = [RANDOM.integers(0, 256, (64, 96, 3), np.uint8) for _ in range(2)]
MODEL = {
    "name": "x",
    "family": "sd1",
    "prediction_type": "epsilon",
    "vae_factor": FACTOR,
    "size_multiple": 16,
    "default_size": (64, 96),
}


def encode(feeds: Feeds) -> dict[str, Array]:
    batch, _, height, width = feeds["sample"].shape
    means = feeds["sample"].reshape(batch, 3, height // FACTOR, FACTOR, width // FACTOR, FACTOR).mean((3, 5))
    mean = np.einsum("cr,brhw->bchw", ENCODED, means) + RANDOM.standard_normal((batch, CHANNELS, *means.shape[2:])) / 10
    return {"latent_mean": mean.astype(np.float32), "latent_logvar": np.zeros_like(mean, np.float32)}


def decoder(blurred: float) -> Callable[[Feeds], dict[str, Array]]:
    """A decoder whose image has the weights' colours, and an error of this size in each cell."""

    def decode(feeds: Feeds) -> dict[str, Array]:
        colours = np.einsum("rc,bchw->brhw", WEIGHTS, feeds["latent_sample"]) + BIAS[:, None, None]
        colours += blurred * np.sign(RANDOM.standard_normal(colours.shape))
        return {"sample": colours.repeat(FACTOR, 2).repeat(FACTOR, 3).astype(np.float32)}

    return decode


def fit(model: ModelSpec, blurred: float = 0.0) -> Any:
    engines = {name: Computing(name, work, most=1) for name, work in (("vae_encoder", encode), ("vae_decoder", decoder(blurred)))}
    return linear_preview(IMAGES, engines.__getitem__, model)


@pytest.mark.parametrize(
    "scale",
    [
        {"scaling_factor": 0.25},
        {"scaling_factor": 0.5, "shift_factor": 0.3},
        {"scaling_factor": 0.5, "latents_mean": (0.1, 0.0, -0.1, 0.2), "latents_std": (1.0, 2.0, 0.5, 1.5)},
    ],
)
def test_a_linear_decoder_is_found_exactly(scale: dict[str, Any]) -> None:
    model = ModelSpec(**MODEL, **scale)
    preview = fit(model)
    std = np.array(model.latents_std or [1.0] * CHANNELS)
    mean = np.array(model.latents_mean or [model.shift_factor] * CHANNELS)
    assert np.abs(np.array(preview.weights) - WEIGHTS * std / model.scaling_factor).max() < 1e-4
    assert np.abs(np.array(preview.bias) - (BIAS + WEIGHTS @ mean)).max() < 1e-4
    assert preview.psnr == BEST


def test_the_error_of_the_fit_is_measured() -> None:
    """An error of 0.1 in a range of 2 is 26 dB."""
    assert fit(ModelSpec(**MODEL, scaling_factor=1.0), blurred=0.1).psnr == pytest.approx(26.0, abs=0.3)
