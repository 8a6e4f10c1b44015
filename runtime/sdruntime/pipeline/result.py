"""Generated images, with their request and origin."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.errors import quoted
from sdruntime.pipeline.images.imagefile import write_image
from sdruntime.pipeline.metadata.write import Origin, parameters, png_text
from sdruntime.pipeline.requests.request import Request, short


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Image:
    """One generated image. `pixels`: uint8 [height, width, 3]. NumPy functions also accept the image itself.

    `sampler`: the requested one, or the checkpoint's. `cut`: the end of the prompt that the text encoder had no room for.
    """

    pixels: Array
    request: Request
    sampler: str
    origin: Origin
    cut: str = ""

    def __repr__(self) -> str:
        width, height = self.size
        return f"<Image {width}x{height}, seed {self.seed}, {short(self.request.prompt)}>"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.pixels, dtype) if copy else np.asarray(self.pixels, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3)"""
        return self.pixels.shape

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), as in Pillow."""
        return self.shape[1], self.shape[0]

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def flat(self) -> bool:
        """Whether all pixels have the same colour, usually black."""
        return bool((self.pixels == self.pixels[0, 0]).all())

    def save(self, path: Path | str, *, overwrite: bool = True) -> None:
        """Write a .png, or a .jpg or .webp (requires Pillow), with the settings as metadata.

        Raises SettingError, OutOfSpace, LibraryMissing. Without `overwrite`, an existing file is a SettingError.
        """
        write_image(path, self.pixels, self.text(), overwrite=overwrite)

    def text(self) -> dict[str, str]:
        """Return the text keys of a PNG: the settings as other programs read them, and XMP that marks a machine-made image."""
        return png_text(parameters(self.request, self.request.size or self.origin.size or self.size, self.origin))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Result:
    """Generated images, in the order of their requests."""

    images: tuple[Image, ...]
    folder: Path | None = field(default=None, repr=False)  # of the bundle, for the commands in warnings

    def __repr__(self) -> str:
        many = "s" if len(self.images) != 1 else ""
        return f"<Result of {len(self.images)} image{many}, seed{many} {short(self.seeds)[1:-1]}>"

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each image of a single colour."""
        command = "sdruntime verify" if self.folder is None else f"sdruntime verify {quoted(self.folder)}"
        return tuple(
            f"image {k} (seed {image.seed}) is one colour all over, {image.pixels[0, 0].tolist()}: "
            f"run `{command}` to check the engines"
            for k, image in enumerate(self.images)
            if image.flat
        )

    @property
    def pixels(self) -> list[Array]:
        """uint8 [height, width, 3] each."""
        return [image.pixels for image in self.images]

    @property
    def seeds(self) -> list[int]:
        return [image.seed for image in self.images]
