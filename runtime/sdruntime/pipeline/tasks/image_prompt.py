"""Image prompts: from the images of a request to the UNet's inputs, through the image encoder of an IP-Adapter.

Source: diffusers' IPAdapterMixin and IPAdapterMaskProcessor, transformers' CLIPImageProcessor.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.bundle.dimensions import size_of
from sdruntime.bundle.interface import (
    IMAGE_BIAS,
    IMAGE_MASKED,
    IMAGE_MASKS,
    IMAGE_SCALE,
    IMAGE_TOKENS,
    NO_TOKEN,
    PRESENCE,
    sides_over,
)
from sdruntime.bundle.manifest import ComponentSpec
from sdruntime.bundle.roles import IMAGE_ENCODER
from sdruntime.engines.finite import checked_rows
from sdruntime.errors import SettingError
from sdruntime.pipeline.images.resampling import resample
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.vae.resize import resized

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's images
_KEPT = 16  # encoded images
_HALF = 128  # of a mask: from here on the image counts
Entries = dict[str, Array]  # inputs of a row of the UNet


class ImagePrompts:
    """Encode image prompts for a bundle; keeps the tokens of the last images."""

    def __init__(self, components: Mapping[str, ComponentSpec], folder: Path) -> None:
        self._components, self._folder = components, folder
        self._kept: OrderedDict[bytes, Array] = OrderedDict()

    @property
    def most(self) -> int:
        """How many images a request may have: as many as the UNet takes tokens of; 0 without an IP-Adapter."""
        encoder = self._components.get(IMAGE_ENCODER)
        tensors = {tensor.name: tensor for tensor in self._components["unet"].optional_inputs}
        if encoder is None or IMAGE_TOKENS not in tensors:
            return 0
        (per_image,) = (tensor.shape[1] for tensor in encoder.outputs if tensor.name == IMAGE_TOKENS)
        count = tensors[IMAGE_TOKENS].shape[1]
        assert isinstance(per_image, int)
        assert isinstance(count, int)
        return count // per_image

    def check(self, request: Request) -> None:
        """Raises SettingError if the bundle cannot take the images of a request."""
        if request.image_prompt is None:
            return
        if not self.most:
            raise SettingError("image_prompt: the bundle has no IP-Adapter: export it again with --ip-adapter FILE")
        if len(request.image_prompt.images) > self.most:
            count = len(request.image_prompt.images)
            raise SettingError(f"image_prompt: got {count} images; this bundle's IP-Adapter takes at most {self.most}")

    def rows(
        self, request: Request, size: tuple[int, int], sides: tuple[int, int], engine: Callable[..., Engine]
    ) -> tuple[Entries, Entries]:
        """Return the entries of a request's rows: of the prompt, and of the negative prompt. Raises NotFinite.

        `size`: (width, height) of the image in pixels, `sides`: (height, width) of its latents.
        """
        prompt = request.image_prompt
        if prompt is None or prompt.scale == 0:
            return {}, {}
        side = self._side()
        images = [clip_pixels(pixels, side) for pixels in prompt.images]
        absent = np.zeros((3, side, side), np.float32)
        *present, nothing = self._tokens([*((image, 1.0) for image in images), (absent, 0.0)], engine)
        shared = {IMAGE_SCALE: np.array(prompt.scale, np.float32), **self._masks(prompt.masks, size, sides)}
        one, other = ({**self._filled(tokens), **shared} for tokens in (present, [nothing] * len(present)))
        return one, other

    def forget(self) -> None:
        """Release the encoded images."""
        self._kept.clear()

    def _side(self) -> int:
        side = self._components[IMAGE_ENCODER].inputs[0].shape[-1]
        assert isinstance(side, int)
        return side

    def _filled(self, tokens: Sequence[Array]) -> Entries:
        """Return the tokens of images, and none in the place of those that the UNet could also take."""
        joined = np.concatenate(tokens)
        count = self.most * len(tokens[0])
        padded = np.zeros((count, joined.shape[1]), np.float32)
        padded[: len(joined)] = joined
        bias = np.full(count, NO_TOKEN, np.float32)
        bias[: len(joined)] = 0
        return {IMAGE_TOKENS: padded, IMAGE_BIAS: bias}

    def _masks(self, masks: Sequence[Array], size: tuple[int, int], sides: tuple[int, int]) -> Entries:
        """Return where each image counts, at each size of the UNet's layers; nothing if they count everywhere."""
        if not masks:
            return {}
        whole = np.stack([resample(mask, size, "lanczos") >= _HALF for mask in masks]).astype(np.float32)
        taken = {tensor.name for tensor in self._components["unet"].optional_inputs}
        cells = dict(zip(("height", "width"), sides, strict=True))
        entries = {IMAGE_MASKED: np.array(1, np.float32)}
        for divisor, name in IMAGE_MASKS.items():
            if name in taken:
                height, width = (size_of(dim, cells) for dim in sides_over(divisor))
                parts = np.zeros((height, width, self.most), np.float32)
                parts[..., : len(masks)] = resized(whole, (height, width), "bicubic").transpose(1, 2, 0)
                entries[name] = parts
        return entries

    def _tokens(self, images: Sequence[tuple[Array, float]], engine: Callable[..., Engine]) -> list[Array]:
        """Return the tokens of each image, [N, D], in one call for those that are not kept."""
        keys = [hashlib.sha256(image.tobytes() + str(presence).encode()).digest() for image, presence in images]
        missing = [k for k, key in enumerate(keys) if key not in self._kept and key not in keys[:k]]
        known = {key: self._kept[key] for key in keys if key in self._kept}
        if missing:
            feeds = {
                "pixel_values": np.stack([images[k][0] for k in missing]),
                PRESENCE: np.array([images[k][1] for k in missing], np.float32),
            }
            encoder = engine(IMAGE_ENCODER, rows=len(missing), adapters=None)
            during = "image {} of an image prompt"
            outputs = checked_rows(encoder, feeds, lambda row: during.format(missing[row] + 1), self._folder)
            known |= {keys[k]: tokens for k, tokens in zip(missing, outputs[IMAGE_TOKENS], strict=True)}
        for key, tokens in known.items():
            self._kept[key] = tokens
            self._kept.move_to_end(key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return [known[key] for key in keys]


def clip_pixels(pixels: Array, side: int) -> Array:
    """Return an image as CLIP takes it, float32 [3, side, side]: the middle of it, with its shorter side at `side`, bicubic."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    wide, high = (side, side * height // width) if width == short else (side * width // height, side)
    resized = resample(pixels, (wide, high), "bicubic")
    left, top = (wide - side) // 2, (high - side) // 2
    part = resized[top : top + side, left : left + side].astype(np.float32) / np.float32(255)
    normal = (part - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


def unused_lines(request: Request, *, refines: bool) -> Iterator[str]:
    """Yield a line for each image prompt that has no effect."""
    if request.image_prompt is not None and refines:
        yield "image_prompt has no effect on the steps of the refiner"
    elif request.image_prompt is not None and request.image_prompt.scale == 0:
        yield "image_prompt has no effect at scale 0"
