"""Show how an image is coming along: the estimate of the finished image, as colours.

linear   one colour per latent cell, by the weights that were fitted at export: nearly free, blurred
tiny     decoded by the tiny VAE of the bundle (`sdexport build --preview-vae`): sharp, at a fraction of the VAE's time
full     decoded by the VAE: the image itself, for the time of a decoding
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.bundle.manifest import Manifest
from sdruntime.bundle.model import ModelSpec
from sdruntime.bundle.roles import PREVIEW
from sdruntime.engines.finite import checked_rows
from sdruntime.errors import SettingError, UnknownName, Unsupported
from sdruntime.pipeline.images.pixels import Pixels, to_uint8

Kind = Literal["linear", "tiny", "full"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def best_preview(manifest: Manifest) -> Kind:
    """Return the kind that shows most among those that cost little; "full" if the bundle has none of them."""
    return "tiny" if PREVIEW in manifest.components else "full" if manifest.model.preview is None else "linear"


def check_preview(kind: str, manifest: Manifest) -> None:
    """Check that a bundle has what this kind of preview needs. Raises UnknownName, Unsupported."""
    if kind not in KINDS:
        raise UnknownName("kind of preview", kind, KINDS)
    if kind == "tiny" and PREVIEW not in manifest.components:
        raise Unsupported('preview "tiny": the bundle has no decoder for it: export it again with --preview-vae, or use "full"')
    if kind == "linear" and manifest.model.preview is None:
        raise Unsupported(
            'preview "linear": the bundle has no weights for it, since it was exported with --no-verify or by an older sdexport: '
            'use "full", or export it again'
        )


def tiny_image(latents: Array, engine: Callable[..., Engine], during: str) -> Pixels:
    """Return latents float32 [C, h, w], decoded by the tiny VAE, uint8 [H, W, 3]. Raises NotFinite, with `during`."""
    decoder = engine(PREVIEW, height=latents.shape[1], width=latents.shape[2])
    return to_uint8(checked_rows(decoder, {"latent_sample": latents[None]}, lambda _: during)["sample"][0])


def linear_colours(latents: Array, model: ModelSpec) -> Pixels:
    """Return the colours of latents float32 [C, h, w], uint8 [h, w, 3]. Raises SettingError for another number of channels."""
    assert model.preview is not None  # checked by `check_preview`
    if latents.shape[0] != model.latent_channels:
        raise SettingError(f"latents of {latents.shape[0]} channels: the model has {model.latent_channels}")
    weights, bias = (np.array(values, np.float32) for values in (model.preview.weights, model.preview.bias))
    return to_uint8(np.einsum("rc,chw->rhw", weights, latents) + bias[:, None, None])
