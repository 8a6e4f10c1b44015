"""Finished pictures, and what is told of them."""

from __future__ import annotations

from dataclasses import dataclass

from sdruntime.engine import Array
from sdruntime.image import parameters, png_text
from sdruntime.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One finished picture: uint8 [height, width, 3], what was asked, and what of its prompts did not fit the text encoder."""

    image: Array
    request: Request
    model: str
    sampler: str
    cut: str = ""

    @property
    def flat(self) -> bool:
        """Whether all of its pixels are one colour: black, most often."""
        return bool((self.image == self.image[0, 0]).all())

    @property
    def seed(self) -> int:
        return self.request.seed

    def text(self) -> dict[str, str]:
        """The text keys for a PNG: the settings as other tools read them, and the mark of a machine-made picture."""
        asked, (height, width) = self.request, self.image.shape[:2]
        return png_text(
            parameters(
                prompt=asked.prompt,
                negative=asked.negative or "",
                steps=asked.steps,
                sampler=" ".join(name for name in (self.sampler, asked.schedule) if name),
                guidance=asked.guidance,
                seed=asked.seed,
                size=(width, height),
                model=self.model,
                strength=None if asked.image is None else asked.strength,
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Finished pictures, in the order in which they were asked for."""

    pictures: tuple[Picture, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for each picture that is one colour all over."""
        return tuple(
            f"picture {k} (seed {each.seed}) is one colour all over, {each.image[0, 0].tolist()}: `sdruntime verify BUNDLE` "
            "tells whether the engines are sound"
            for k, each in enumerate(self.pictures)
            if each.flat
        )

    @property
    def images(self) -> list[Array]:
        """uint8 [height, width, 3] each."""
        return [picture.image for picture in self.pictures]

    @property
    def seeds(self) -> list[int]:
        return [picture.seed for picture in self.pictures]
