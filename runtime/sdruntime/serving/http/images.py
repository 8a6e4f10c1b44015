"""The images of requests and answers: files as base64 or as parts of a form, and the formats to answer in."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from sdruntime.arrays import Array
from sdruntime.bundle.model import LinearPreview
from sdruntime.errors import LibraryMissing, SettingError
from sdruntime.pipeline.images.imagefile import bytes_from_image, gray_from, image_from_bytes, opened
from sdruntime.pipeline.images.pixels import Pixels, to_uint8
from sdruntime.pipeline.images.png import png_from_image
from sdruntime.pipeline.metadata.write import png_text
from sdruntime.serving.http.problem import Problem
from sdruntime.serving.job import Finished

Format = Literal["png", "jpeg", "webp"]
KINDS: Mapping[str, str] = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
_DATA = "data:"


def file_of(name: str, value: Any) -> bytes:
    """Return the bytes of an image that a document holds as base64, alone or as a data URL. Raises Problem.

    No other URL and no path is ever opened.
    """
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise Problem(422, f"{name}: expected a file as base64", "invalid_image")
    text = value.partition(",")[2] if value.startswith(_DATA) else value
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Problem(422, f"{name}: not base64: send the bytes of an image file as base64", "invalid_image") from None


def pixels_of(name: str, value: Any, most: int) -> Pixels:
    """Return the pixels of an image in a document, uint8 [H, W, 3]. Raises Problem, also for more than `most` pixels."""
    try:
        pixels = image_from_bytes(file_of(name, value))
    except (SettingError, LibraryMissing) as error:
        raise Problem(422, f"{name}: {error}", "invalid_image") from error
    if pixels.shape[0] * pixels.shape[1] > most:
        raise Problem(422, f"{name}: {pixels.shape[1]}x{pixels.shape[0]}: at most {most:,} pixels", "image_too_large")
    return pixels


def mask_of(name: str, value: Any, most: int) -> Array:
    """Return a mask as gray uint8 [H, W]: white is generated."""
    return gray_from(pixels_of(name, value, most))


def transparency_of(name: str, value: Any) -> Array | None:
    """Return where an image file is transparent, uint8 [H, W]: 255 where it is wholly; None if it is nowhere."""
    try:
        with opened(file_of(name, value)) as image:
            if not image.has_transparency_data:
                return None
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
    except SettingError as error:
        raise Problem(422, f"{name}: {error}", "invalid_image") from error
    return None if (alpha == 255).all() else 255 - alpha


def encoded(image: Finished, kind: str = "png", quality: int | None = None) -> bytes:
    """Return the image file of a finished job. The PNG is the one that the command line writes."""
    return bytes_from_image(image.pixels, png_text(image.parameters), KINDS[kind], quality)


def preview_png(clean: Array, preview: LinearPreview | None, enlarge: int = 1) -> bytes | None:
    """Return the colours of latents float32 [C, h, w] as a PNG, each cell `enlarge` pixels wide; None without weights for it."""
    if preview is None:
        return None
    weights, bias = (np.array(values, np.float32) for values in (preview.weights, preview.bias))
    colours = to_uint8(np.einsum("rc,chw->rhw", weights, clean) + bias[:, None, None])
    return png_from_image(np.ascontiguousarray(colours.repeat(enlarge, 0).repeat(enlarge, 1)))
