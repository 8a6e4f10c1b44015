"""Show how an image is coming along: the estimate of the finished image, as colours.

linear   one colour per latent cell, by the weights that were fitted at export: nearly free, blurred
full     decoded by the VAE: the image itself, for the time of a decoding
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from sdruntime.arrays import Array
from sdruntime.bundle.manifest import ModelSpec
from sdruntime.errors import SettingError, UnknownName, Unsupported
from sdruntime.pipeline.images.pixels import Pixels, to_uint8

Kind = Literal["linear", "full"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def check_preview(kind: str, model: ModelSpec) -> None:
    """Check that a bundle has what this kind of preview needs. Raises UnknownName, Unsupported."""
    if kind not in KINDS:
        raise UnknownName("kind of preview", kind, KINDS)
    if kind == "linear" and model.preview is None:
        raise Unsupported(
            'preview "linear": the bundle has no weights for it, since it was exported with --no-verify or by an older sdexport: '
            'use "full", or export it again'
        )


def linear_colours(latents: Array, model: ModelSpec) -> Pixels:
    """Return the colours of latents float32 [C, h, w], uint8 [h, w, 3]. Raises SettingError for another number of channels."""
    assert model.preview is not None  # checked by `check_preview`
    if latents.shape[0] != model.latent_channels:
        raise SettingError(f"latents of {latents.shape[0]} channels: the model has {model.latent_channels}")
    weights, bias = (np.array(values, np.float32) for values in (model.preview.weights, model.preview.bias))
    return to_uint8(np.einsum("rc,chw->rhw", weights, latents) + bias[:, None, None])
