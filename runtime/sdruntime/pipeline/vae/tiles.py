"""Run a VAE engine on overlapping tiles of a large image, and blend its outputs.

Group normalization and attention see only their tile, so a tiled image differs from one that is decoded whole, away from the
seams too. Larger tiles differ less.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import CPU, Engine, EngineWrapper
from sdruntime.backends.base.feeds import call_rows
from sdruntime.bundle.limits import any_shape
from sdruntime.bundle.manifest import EngineSpec

OVERLAP = 0.25  # of a tile's side, as in diffusers
Span = tuple[int, int]  # start and stop, in latent cells
Place = tuple[Span, Span]  # a tile's rows and columns
Choose = Callable[..., Engine]


def even_spans(side: int, tile: int, overlap: float = OVERLAP) -> list[Span]:
    """Return tiles of one size, spread evenly over a side. Neighbours share at least the overlap.

    diffusers cuts off the last tile instead, to a single cell in the worst case, and a narrow tile has other colours.
    """
    shared = max(1, int(tile * overlap))
    count = max(1, -(-(side - shared) // (tile - shared)))
    return [(start, min(start + tile, side)) for start in (k * (side - tile) // max(1, count - 1) for k in range(count))]


class TiledEngine(EngineWrapper):
    """The VAE's decoder or encoder for one size, over an engine that runs on tiles of it.

    `rows`, `columns`: the tiles along the height and the width, in latent cells. A cell is `cell_in` numbers wide in the input
    and `cell_out` in the output. `engine(rows=…, height=…, width=…)` returns the engine for a call.
    """

    def __init__(
        self, engine: Choose, rows: Sequence[Span], columns: Sequence[Span], *, cell_in: int = 1, cell_out: int = 1
    ) -> None:
        self._choose, self._cell_in, self._cell_out = engine, cell_in, cell_out
        self._rows, self._columns = rows, columns
        height, width = (max(stop - start for start, stop in spans) * cell_in for spans in (rows, columns))
        super().__init__(engine(rows=1, height=height, width=width))

    @property
    def spec(self) -> EngineSpec:
        """The engine of the tiles, as if it were built for every size."""
        return dataclasses.replace(super().spec, profiles=(any_shape(self.component.dimensions),))

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        ((name, whole),) = feeds.items()
        if self._one_by_one and len(whole) > 1:
            images = [self({name: whole[k : k + 1]}) for k in range(len(whole))]
            return {key: np.concatenate([image[key] for image in images]) for key in images[0]}
        parts: dict[str, dict[Place, Array]] = {}
        for places in self._calls():
            tiles = np.concatenate([_part(whole, place, self._cell_in) for place in places])
            height, width = tiles.shape[-2:]
            outputs = call_rows(self._choose(rows=len(tiles), height=height, width=width), {name: tiles})
            for key, array in outputs.items():
                split = np.split(array, len(places))
                parts.setdefault(key, {}).update((place, part.copy()) for place, part in zip(places, split, strict=True))
        return {key: self._blended(tiles) for key, tiles in parts.items()}

    @property
    def _one_by_one(self) -> bool:
        """Whether each tile is a call: on a CPU, activations grow with the rows; on a GPU, their memory is reserved."""
        return super().spec.target == CPU

    def _calls(self) -> Iterator[list[Place]]:
        """Yield the tiles of each call, all of one shape."""
        by_shape: dict[tuple[int, ...], list[Place]] = {}
        for place in itertools.product(self._rows, self._columns):
            by_shape.setdefault(tuple(stop - start for start, stop in place), []).append(place)
        for places in by_shape.values():
            count = 1 if self._one_by_one else len(places)
            yield from (places[start : start + count] for start in range(0, len(places), count))

    def _blended(self, tiles: dict[Place, Array]) -> Array:
        """Join the tiles, each faded into the one above it, then into the one on its left, in place and in diffusers' order."""
        scale = self._cell_out
        some = next(iter(tiles.values()))
        height, width = (spans[-1][1] * scale for spans in (self._rows, self._columns))
        whole = np.empty((*some.shape[:-2], height, width), some.dtype)
        for i, rows in enumerate(self._rows):
            for j, columns in enumerate(self._columns):
                tile = tiles[rows, columns]
                if i:
                    above = self._rows[i - 1]
                    _fade(tiles[above, columns].swapaxes(-1, -2), tile.swapaxes(-1, -2), (above[1] - rows[0]) * scale)
                if j:
                    left = self._columns[j - 1]
                    _fade(tiles[rows, left], tile, (left[1] - columns[0]) * scale)
                _part(whole, (rows, columns), scale)[...] = tile  # the next tiles overwrite what they share with it
        return whole


def _part(whole: Array, place: Place, scale: int) -> Array:
    """Return the view of a tile, where a cell is `scale` numbers wide."""
    rows, columns = (slice(start * scale, stop * scale) for start, stop in place)
    return whole[..., rows, columns]


def _fade(before: Array, after: Array, shared: int) -> None:
    """Fade linearly from the last `shared` columns of one tile to the first ones of the next, in which the result is stored."""
    weights = np.arange(shared) / shared
    kept, new = (1 - weights).astype(after.dtype), weights.astype(after.dtype)
    after[..., :shared] = before[..., -shared:] * kept + after[..., :shared] * new
