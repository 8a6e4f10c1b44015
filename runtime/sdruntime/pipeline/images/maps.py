"""Maps that ControlNets read and that need no network: edges, gray, a grid of colours, and pixels to be painted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdruntime.arrays import Array
from sdruntime.pipeline.images.imagefile import gray_from
from sdruntime.pipeline.images.pixels import Pixels

Preprocess = Literal["canny", "gray", "color", "invert", "inpaint", "resize", "tile"]
CANNY, INPAINT = "canny", "inpaint"  # the one with thresholds, and the one with a mask
# thresholds of a gradient: of the edges that count beside others, and of those that count alone
LOW, HIGH = 100.0, 200.0
CELL = 64  # pixels: the side of a cell of the grid of colours
_TAN_22 = 13573  # tan(22.5°) in units of 1/32768


def canny(pixels: Pixels, low: float = LOW, high: float = HIGH) -> Pixels:
    """Return the edges of an image, white on black: Canny 1986, bit for bit as OpenCV's Canny with these thresholds.

    Gradients are those of Sobel, of the colour where they are largest, measured as |dx| + |dy|.
    """
    dx, dy = _gradients(pixels.astype(np.int32))
    size = np.abs(dx) + np.abs(dy)
    best = size.argmax(axis=2)[..., None]
    dx, dy, size = (np.take_along_axis(channel, best, axis=2)[..., 0] for channel in (dx, dy, size))
    thin = _is_ridge(dx, dy, size) & (size > low)
    edges = np.where(_connected(thin & (size > high), thin), np.uint8(255), np.uint8(0))
    return np.repeat(edges[..., None], 3, axis=2)


def _gradients(colours: Array) -> tuple[Array, Array]:
    """Return Sobel's derivatives along x and y; the outermost pixels are repeated beyond the image."""
    padded = np.pad(colours, ((1, 1), (1, 1), (0, 0)), mode="edge")
    along = padded[:, 2:] - padded[:, :-2]
    across = padded[2:] - padded[:-2]
    dx = along[:-2] + 2 * along[1:-1] + along[2:]
    dy = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    return dx, dy


def _is_ridge(dx: Array, dy: Array, size: Array) -> NDArray[np.bool_]:
    """Return where a gradient is larger than its neighbours' in its direction, one of four."""
    height, width = size.shape
    padded = np.pad(size, 1)

    def beside(down: int, right: int) -> Array:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    flat, steep = y < x * _TAN_22, y > x * _TAN_22 + (x << 16)
    falling = (dx < 0) != (dy < 0)
    diagonal = np.where(falling, (size > beside(-1, 1)) & (size > beside(1, -1)), (size > beside(-1, -1)) & (size > beside(1, 1)))
    level = (size > beside(0, -1)) & (size >= beside(0, 1))
    upright = (size > beside(-1, 0)) & (size >= beside(1, 0))
    ridge: NDArray[np.bool_] = np.where(flat, level, np.where(steep, upright, diagonal))
    return ridge


def _connected(strong: NDArray[np.bool_], all_: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels of `all_` that a chain of neighbours joins to a strong one."""
    height, width = all_.shape
    reached = np.zeros((height + 2, width + 2), np.bool_)
    open_ = np.pad(all_, 1)
    frontier = np.flatnonzero(np.pad(strong, 1))
    steps = np.array([down * (width + 2) + right for down in (-1, 0, 1) for right in (-1, 0, 1)])
    flat_reached, flat_open = reached.reshape(-1), open_.reshape(-1)
    while frontier.size:
        flat_reached[frontier] = True
        near = np.unique(frontier[:, None] + steps)
        frontier = near[flat_open[near] & ~flat_reached[near]]
    return reached[1:-1, 1:-1]


def gray(pixels: Pixels) -> Pixels:
    """Return an image in gray, with Pillow's weights of the colours."""
    return np.repeat(gray_from(pixels)[..., None], 3, axis=2)


def color(pixels: Pixels) -> Pixels:
    """Return a grid of squares of CELL pixels, each in the mean colour of the image there; the last ones may be cut off."""
    height, width = pixels.shape[:2]
    rows, columns = (range(0, side, CELL) for side in (height, width))
    sums = np.add.reduceat(np.add.reduceat(pixels.astype(np.float64), rows, axis=0), columns, axis=1)
    counts = np.outer([min(CELL, height - at) for at in rows], [min(CELL, width - at) for at in columns])
    means = np.floor(sums / counts[..., None] + 0.5).astype(np.uint8)
    grid: Pixels = means.repeat(CELL, axis=0)[:height].repeat(CELL, axis=1)[:, :width]
    return grid


def invert(pixels: Pixels) -> Pixels:
    """Return the negative of an image: white lines on black, from black lines on white."""
    negative: Pixels = 255 - pixels
    return negative


def unchanged(pixels: Pixels) -> Pixels:
    """Return the image itself: the tiles of a tile ControlNet are those of the image, and a mask marks pixels later."""
    return pixels


def marked(image: Array, mask: NDArray[np.uint8]) -> Array:
    """Return an image float32 [3, H, W] with -1 where the mask, uint8 [H, W], is over one half: what is to be painted."""
    return np.where(mask > 127, np.float32(-1), image)


PREPROCESSORS: Mapping[Preprocess, Callable[[Pixels], Pixels]] = {
    "canny": canny,
    "gray": gray,
    "color": color,
    "invert": invert,
    "inpaint": unchanged,
    "resize": unchanged,
    "tile": unchanged,
}
