"""Images that steer another one as a text does, through an IP-Adapter (Ye et al. 2023, arXiv 2308.06721)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdruntime.arrays import Array
from sdruntime.errors import LibraryMissing, SettingError, shown
from sdruntime.pipeline.images.imagefile import ImageLike, gray_from, pixels_from
from sdruntime.pipeline.requests.ranges import Range

IMAGE_PROMPT_SCALE = Range(0, 10)
DEFAULT_SCALE = 1.0
MOST_IMAGES = 16  # of one image prompt


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class ImagePrompt:
    """An image, or several, that an IP-Adapter reads beside the text. Raises SettingError for an invalid field.

    `image`: as that of a Request, or a list of such images, which count together; their pixels are in `images`. `scale`: how
    much they count; 0 gives the image without them. `mask`: where each image counts, white, one for each image; they are resized
    to the generated image, and their gray is in `masks`. None: everywhere.
    """

    image: ImageLike | Sequence[ImageLike]
    scale: float = DEFAULT_SCALE
    mask: ImageLike | Sequence[ImageLike] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", IMAGE_PROMPT_SCALE.number("image_prompt: scale", self.scale))
        images, masks = _listed(self.image), [] if self.mask is None else _listed(self.mask)
        if not 1 <= len(images) <= MOST_IMAGES:
            raise SettingError(f"image_prompt: got {len(images)} images; expected 1 to {MOST_IMAGES}")
        if self.mask is not None and len(masks) != len(images):
            raise SettingError(f"image_prompt: got {len(masks)} masks for {len(images)} images; expected one for each, or none")
        object.__setattr__(self, "image", _read(images, pixels_from, "image_prompt"))
        object.__setattr__(self, "mask", _read(masks, gray_from, "image_prompt: mask") or None)

    @property
    def images(self) -> tuple[Array, ...]:
        """The pixels of each image, uint8 [H, W, 3]."""
        images: tuple[Array, ...] = self.image  # type: ignore[assignment]
        return images

    @property
    def masks(self) -> tuple[Array, ...]:
        """The mask of each image, uint8 [H, W] from 0 (the image does not count) to 255, or () without masks."""
        masks: tuple[Array, ...] = self.mask or ()  # type: ignore[assignment]
        return masks

    def __repr__(self) -> str:
        sizes = ", ".join("{1}x{0}".format(*image.shape[:2]) for image in self.images)
        return f"<ImagePrompt {sizes}{', masked' if self.masks else ''}, scale {self.scale:g}>"


def _read(images: Sequence[ImageLike], read: Callable[[ImageLike], Array], where: str) -> tuple[Array, ...]:
    try:
        return tuple(map(read, images))
    except (SettingError, LibraryMissing) as error:
        raise type(error)(f"{where}: {str(error).removeprefix('image: ')}") from error


def _listed(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    return list(images) if isinstance(images, list | tuple) else [images]


def image_prompt_of(value: Any) -> ImagePrompt | None:
    """Return an ImagePrompt, or None as it is. Raises SettingError."""
    if value is not None and not isinstance(value, ImagePrompt):
        raise SettingError(f"image_prompt {shown(value)}: expected ImagePrompt(image=…)")
    return value
