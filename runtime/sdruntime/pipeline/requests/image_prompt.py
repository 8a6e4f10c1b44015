"""Images that steer another one as a text does, through an IP-Adapter (Ye et al. 2023, arXiv 2308.06721)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdruntime.arrays import Array
from sdruntime.errors import LibraryMissing, SettingError, shown
from sdruntime.pipeline.images.imagefile import ImageLike, pixels_from
from sdruntime.pipeline.requests.ranges import Range

IMAGE_PROMPT_SCALE = Range(0, 10)
DEFAULT_SCALE = 1.0
MOST_IMAGES = 16  # of one image prompt


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class ImagePrompt:
    """An image, or several, that an IP-Adapter reads beside the text. Raises SettingError for an invalid field.

    `image`: as that of a Request, or a list of such images, which count together; their pixels are in `images`. `scale`: how
    much they count; 0 gives the image without them.
    """

    image: ImageLike | Sequence[ImageLike]
    scale: float = DEFAULT_SCALE

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", IMAGE_PROMPT_SCALE.number("image_prompt: scale", self.scale))
        listed = list(self.image) if isinstance(self.image, list | tuple) else [self.image]
        if not 1 <= len(listed) <= MOST_IMAGES:
            raise SettingError(f"image_prompt: got {len(listed)} images; expected 1 to {MOST_IMAGES}")
        try:
            object.__setattr__(self, "image", tuple(pixels_from(image) for image in listed))
        except (SettingError, LibraryMissing) as error:
            raise type(error)(f"image_prompt: {error}") from error

    @property
    def images(self) -> tuple[Array, ...]:
        """The pixels of each image, uint8 [H, W, 3]."""
        images: tuple[Array, ...] = self.image  # type: ignore[assignment]
        return images

    def __repr__(self) -> str:
        sizes = ", ".join("{1}x{0}".format(*image.shape[:2]) for image in self.images)
        return f"<ImagePrompt {sizes}, scale {self.scale:g}>"


def image_prompt_of(value: Any) -> ImagePrompt | None:
    """Return an ImagePrompt, or None as it is. Raises SettingError."""
    if value is not None and not isinstance(value, ImagePrompt):
        raise SettingError(f"image_prompt {shown(value)}: expected ImagePrompt(image=…)")
    return value
