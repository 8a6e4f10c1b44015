"""An image that steers another one through a ControlNet (arXiv 2302.05543) or a T2I-Adapter (arXiv 2302.08453)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdruntime.arrays import Array
from sdruntime.errors import LibraryMissing, SettingError, UnknownName, shown
from sdruntime.pipeline.images.imagefile import FITS, ImageLike, gray_from, pixels_from
from sdruntime.pipeline.images.maps import CANNY, HIGH, INPAINT, LOW, PREPROCESSORS, Preprocess
from sdruntime.pipeline.requests.ranges import SHARE, Range

SCALE = Range(0, 10)
TYPE = Range(0, 63, whole=True)  # of the types of a ControlNet-Union
GRADIENT = Range(0, 2040)  # of 8-bit colours
ControlFit = Literal["resize", "crop", "exact"]
CONTROL_FITS: tuple[ControlFit, ...] = (*FITS, "exact")
MOST_CONTROLS = 16  # of one request
CONTROL_NUMBERS: Mapping[str, float] = {"scale": 1.0, "start": 0.0, "end": 1.0, "low": LOW, "high": HIGH}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class Control:
    """An image that a ControlNet or a T2I-Adapter reads. Raises SettingError for an invalid field, as `Request` does.

    `image`: as that of a Request; its pixels are in `pixels`. `net`: its name in the bundle, None for the only
    one. `scale`: how much it counts. `start`, `end`: the part of the model calls that it acts in, from 0 to 1. `fit`: how to
    bring the image to the size that is generated: "resize", as diffusers does, "crop", which keeps the proportions, or "exact",
    which refuses an image of another size. `preprocess`: what to make of the image at that size, "canny" (edges, with the
    thresholds `low` and `high`), "gray", "color" (a grid of mean colours), "invert", or "inpaint" (-1 in the pixels that `mask`,
    an image of the same size, marks white); None, "resize" and "tile" take it as it is. `type`: of the image, for a
    ControlNet-Union: a number, diffusers' control_mode.
    """

    image: ImageLike
    net: str | None = None
    scale: float = CONTROL_NUMBERS["scale"]
    start: float = CONTROL_NUMBERS["start"]
    end: float = CONTROL_NUMBERS["end"]
    fit: ControlFit = "resize"
    preprocess: Preprocess | None = None
    low: float = CONTROL_NUMBERS["low"]
    high: float = CONTROL_NUMBERS["high"]
    mask: ImageLike | None = None
    type: int | None = None

    def __post_init__(self) -> None:
        if self.net is not None and not isinstance(self.net, str):
            raise SettingError(f"control: net {shown(self.net)}: expected the name of a ControlNet of the bundle")
        if self.type is not None:
            object.__setattr__(self, "type", TYPE.number("control: type", self.type))
        for name, allowed in (("scale", SCALE), ("start", SHARE), ("end", SHARE), ("low", GRADIENT), ("high", GRADIENT)):
            object.__setattr__(self, name, allowed.number(f"control: {name}", getattr(self, name)))
        if self.start >= self.end:
            raise SettingError(f"control: start {self.start:g} is not below end {self.end:g}")
        if self.fit not in CONTROL_FITS:
            raise UnknownName("fit", str(self.fit), CONTROL_FITS)
        if self.preprocess is not None and self.preprocess not in PREPROCESSORS:
            raise UnknownName("preprocess", str(self.preprocess), PREPROCESSORS)
        try:
            object.__setattr__(self, "image", pixels_from(self.image))
            object.__setattr__(self, "mask", None if self.mask is None else gray_from(self.mask))
        except (SettingError, LibraryMissing) as error:
            raise type(error)(f"control: {error}") from error
        self._check_preprocess()

    def _check_preprocess(self) -> None:
        named = self.preprocess or "none"
        if (self.low, self.high) != (LOW, HIGH) and self.preprocess != CANNY:
            raise SettingError(f"control: low {self.low:g} and high {self.high:g} are thresholds of canny; preprocess is {named}")
        if self.low > self.high:
            raise SettingError(f"control: low {self.low:g} is above high {self.high:g}")
        if (self.mask is not None) != (self.preprocess == INPAINT):
            what = "needs a mask, which marks what to paint" if self.mask is None else f"takes no mask, which is for {INPAINT}"
            raise SettingError(f"control: preprocess {named} {what}")
        if self.mask is not None and self.mask.shape != self.pixels.shape[:2]:
            sizes = " and ".join(f"{width}x{height}" for height, width in (self.mask.shape, self.pixels.shape[:2]))
            raise SettingError(f"control: the mask and the image are {sizes}: they must be of one size")

    @property
    def pixels(self) -> Array:
        """The pixels of the image, uint8 [H, W, 3]."""
        pixels: Array = self.image
        return pixels

    def __repr__(self) -> str:
        height, width = self.pixels.shape[:2]
        named = f"{self.net} " if self.net else ""
        limits = "" if (self.start, self.end) == (0, 1) else f", {self.start:g} to {self.end:g}"
        source = f"{self.preprocess} of " if self.preprocess else ""
        return f"<Control {named}{source}{width}x{height}, scale {self.scale:g}{limits}>"

    def acts(self, call: int, calls: int) -> bool:
        """Return whether it acts in a model call, as in diffusers' pipelines."""
        return not (call / calls < self.start or (call + 1) / calls > self.end)


def controls_of(value: Any) -> tuple[Control, ...]:
    """Return one Control, or a sequence of them, as a tuple. Raises SettingError."""
    controls = (value,) if isinstance(value, Control) else tuple(value) if isinstance(value, Sequence) else None
    if controls is None or not all(isinstance(control, Control) for control in controls):
        raise SettingError(f"control {shown(value)}: expected Control(image=…), or a list of them")
    if len(controls) > MOST_CONTROLS:
        raise SettingError(f"control: got {len(controls)}; at most {MOST_CONTROLS}")
    return controls
