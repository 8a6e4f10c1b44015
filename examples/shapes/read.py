"""Read the shape, colour, size, place and background of an image, to judge the images of the checkpoint.

The attributes are measured: one that the image does not clearly show is None, which counts as wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import draw
import numpy as np
from numpy.typing import NDArray

NEAR = 60.0  # largest RGB distance from a named colour that counts as that colour, of 255
LIKE = 0.75  # least overlap (intersection over union) with a drawn shape that counts as that shape
SMALLEST = 30.0  # least coverage of a shape in pixels; the smallest shape has 155
OFF = 5.0  # largest distance from a named place in pixels; places are 14 apart
OFF_RADIUS = 2.5  # largest difference from a named radius in pixels; the two are 5.5 apart

Reading = dict[str, str | None]


@dataclass(frozen=True, slots=True)
class Ink:
    """The shape of an image: its colour, the coverage of each pixel in 0..1, its area and its centroid in pixels."""

    colour: NDArray[np.float64]
    share: NDArray[np.float64]
    area: float
    x: float
    y: float


def read(image: draw.Image, shapes: tuple[str, ...] = draw.SHAPES) -> Reading:
    """Return the five attributes of an RGB image, uint8 [64, 64, 3], by the names in draw's tables; None if it shows none.

    `shapes`: those that it may show.
    """
    reading: Reading = dict.fromkeys(draw.Scene.__slots__)
    ground = ground_of(image)
    reading["background"] = named(ground, draw.BACKGROUNDS)
    ink = ink_of(image)
    if ink is None:
        return reading
    reading["colour"] = named(ink.colour, draw.INKS)
    fits = {shape: fit(ink.share, shape, ink.x, ink.y, ink.area) for shape in shapes}
    shape = max(fits, key=lambda name: fits[name])
    if fits[shape] >= LIKE:
        reading["shape"] = shape
    radius = float(np.sqrt(ink.area / unit_area(shape)))
    size = min(draw.RADII, key=lambda name: abs(draw.RADII[name] - radius))
    reading["size"] = size if abs(draw.RADII[size] - radius) <= OFF_RADIUS else None
    gaps = {place: float(np.hypot(ink.x - at_x, ink.y - at_y)) for place, (_, at_x, at_y) in draw.PLACES.items()}
    place = min(gaps, key=lambda name: gaps[name])
    reading["place"] = place if gaps[place] <= OFF else None
    return reading


def ground_of(image: draw.Image) -> NDArray[np.float64]:
    """Return the colour of the background: the median at the edges of the image."""
    pixels = image.astype(np.float64)
    rim = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    sides = np.concatenate([pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    return np.asarray(np.median(np.concatenate([rim, sides]), axis=0))


def ink_of(image: draw.Image) -> Ink | None:
    """Return the shape of an image, None if it shows none."""
    pixels, ground = image.astype(np.float64), ground_of(image)
    away = np.linalg.norm(pixels - ground, axis=2)
    mask = largest_piece(away > max(45.0, away.max() / 2))
    if mask.sum() < SMALLEST:
        return None
    core = away >= np.quantile(away[mask], 0.3)
    colour = np.median(pixels[mask & core], axis=0)
    # The position of each pixel between the background's colour and the shape's is its coverage.
    step = colour - ground
    share = np.clip((pixels - ground) @ step / (step @ step), 0, 1) * grown(mask)
    share[share < 0.15] = 0
    area = float(share.sum())
    x, y = (float((share.sum(axis) * (np.arange(draw.SIZE) + 0.5)).sum() / area) for axis in (0, 1))
    return Ink(np.asarray(colour), share, area, x, y)


def named(colour: NDArray[np.float64], names: tuple[str, ...]) -> str | None:
    """Return the name of the nearest of all of draw's colours, if it is one of `names` and near enough; else None."""
    gaps = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in draw.COLOURS.items()}
    name = min(gaps, key=lambda known: gaps[known])
    return name if name in names and gaps[name] <= NEAR else None


def fit(share: NDArray[np.float64], shape: str, x: float, y: float, area: float) -> float:
    """Return the overlap (soft intersection over union, 0..1) of a coverage with the drawn shape of that area and centroid."""
    drawn = draw.coverage(shape, x, y, float(np.sqrt(area / unit_area(shape))))
    return float(np.minimum(share, drawn).sum() / np.maximum(share, drawn).sum())


@cache
def unit_area(shape: str) -> float:
    """Return the area of a shape of radius 1, measured on a drawn one."""
    return float(draw.coverage(shape, 32.0, 32.0, 14.0).sum()) / 14.0**2


def grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the mask grown by two pixels."""
    padded = np.pad(mask, 2)
    parts = [padded[dy : dy + draw.SIZE, dx : dx + draw.SIZE] for dy in range(5) for dx in range(5)]
    return np.asarray(np.logical_or.reduce(parts))


def largest_piece(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest connected piece of a mask (4-neighbours), without specks of noise."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(label, 1)
        around = (padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1])
        spread = np.where(mask, np.maximum.reduce([label, *around]), 0)
        if np.array_equal(spread, label):
            break
        label = spread
    if not mask.any():
        return mask
    return np.asarray(label == np.bincount(label[mask]).argmax())
