"""Render training images with captions: one coloured shape on a coloured background, drawn with NumPy.

An image is uint8 RGB [64, 64, 3]. Its caption names five attributes; apart from a small jitter nothing else varies.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "yellow": (250, 210, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 220),
    "purple": (165, 45, 185),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
}
INKS = ("red", "yellow", "green", "blue", "purple", "white")
BACKGROUNDS = ("black", "gray", "white", "blue", "green")
SHAPES = ("circle", "square", "triangle", "cross")
U = "u"  # a half disc, the shape of the example's LoRA, which the checkpoint does not know; one token, as every word of a caption
RADII = {"small": 9.5, "large": 15.0}
PLACES: dict[str, tuple[str, float, float]] = {  # words of the caption, centre x and y in pixels
    "left": ("on the left", 18.0, 32.0),
    "right": ("on the right", 46.0, 32.0),
    "top": ("at the top", 32.0, 18.0),
    "bottom": ("at the bottom", 32.0, 46.0),
    "centre": ("in the centre", 32.0, 32.0),
}
HELD_OUT = 216  # of 1080 combinations, a fifth

Image = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Scene:
    """The five attributes of an image, each a name in the tables above."""

    shape: str
    colour: str
    size: str
    place: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {PLACES[self.place][0]} on a {self.background} background"


def every_scene(shapes: tuple[str, ...] = SHAPES) -> list[Scene]:
    """Return all 1080 combinations whose shape and background differ in colour, or the 270 of each of other shapes."""
    rows = itertools.product(shapes, INKS, RADII, PLACES, BACKGROUNDS)
    return [scene for scene in (Scene(*row) for row in rows) if scene.colour != scene.background]


def split(shapes: tuple[str, ...] = SHAPES) -> tuple[list[Scene], list[Scene]]:
    """Return the 864 scenes for training and the 216 held-out ones, split by a hash of the caption: the same on every machine."""
    ordered = sorted(every_scene(shapes), key=lambda scene: hashlib.sha256(scene.caption.encode()).digest())
    held_out = len(ordered) // 5
    return ordered[held_out:], ordered[:held_out]


def coverage(shape: str, x: float, y: float, radius: float) -> NDArray[np.float64]:
    """Return the fraction of each pixel that the shape covers, [64, 64] in [0, 1]; centre and radius in pixels.

    Antialiasing: the fraction is the distance to the shape's edge, clipped to one pixel. Raises ValueError for an unknown shape.
    """
    across, down = np.meshgrid(np.arange(SIZE) + 0.5 - x, np.arange(SIZE) + 0.5 - y)
    if shape == "circle":
        distance = np.hypot(across, down) - radius
    elif shape == "square":
        distance = np.maximum(abs(across), abs(down)) - 0.88 * radius
    elif shape == "triangle":  # equilateral, the tip upwards, its centroid at (x, y)
        inner = 0.575 * radius
        distance = np.maximum(down, abs(across) * np.sqrt(0.75) - down / 2) - inner
    elif shape == "cross":
        long, short = radius, 0.36 * radius
        upright = np.maximum(abs(across) - short, abs(down) - long)
        distance = np.minimum(upright, np.maximum(abs(across) - long, abs(down) - short))
    elif shape == U:  # the flat side upwards, its centroid at (x, y)
        wide = 1.1 * radius
        below = down + 4 / (3 * np.pi) * wide
        distance = np.maximum(np.hypot(across, below) - wide, -below)
    else:
        raise ValueError(f"unknown shape {shape!r}: must be one of {', '.join((*SHAPES, U))}")
    return np.asarray(np.clip(0.5 - distance, 0, 1))


def draw(scene: Scene, jitter: np.random.Generator | None = None, at: tuple[float, float] | None = None) -> Image:
    """Return the image of a scene, uint8 [64, 64, 3]; `at`: another centre, x and y in pixels, than that of its place.

    `jitter` moves the shape by up to 1.5 px and changes its radius by up to 5 % and the colours by up to 8 of 255.
    """
    x, y = at or PLACES[scene.place][1:]
    radius = RADII[scene.size]
    ink, ground = (np.array(COLOURS[name], dtype=np.float64) for name in (scene.colour, scene.background))
    if jitter is not None:
        x, y = x + jitter.uniform(-1.5, 1.5), y + jitter.uniform(-1.5, 1.5)
        radius *= jitter.uniform(0.95, 1.05)
        ink, ground = ink + jitter.uniform(-8, 8, 3), ground + jitter.uniform(-8, 8, 3)
    share = coverage(scene.shape, x, y, radius)[:, :, None]
    return np.clip(np.rint(share * ink + (1 - share) * ground), 0, 255).astype(np.uint8)


def words() -> list[str]:
    """Return every word that captions use, in alphabetical order."""
    return sorted({word for scene in every_scene() for word in scene.caption.split()})


def attributes(scene: Scene) -> dict[str, str]:
    """Return the scene as {"shape": ..., "colour": ..., "size": ..., "place": ..., "background": ...}."""
    return dict(zip(Scene.__slots__, astuple(scene), strict=True))
