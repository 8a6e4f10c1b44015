"""Decide whether the VAE runs on tiles of an image, and of which size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sdruntime.backends.base.engine import CPU, Engine
from sdruntime.bundle.model import ModelSpec
from sdruntime.bundle.roles import role
from sdruntime.engines.pool import Engines
from sdruntime.errors import SettingError
from sdruntime.pipeline.vae.tiles import Span, TiledEngine, even_spans

OFF, AUTO = "off", "auto"
LEAST = 8  # latent cells of a tile's side
MOST_CPU_PIXELS = 2 << 20  # of an image that a CPU engine takes whole
CPU_TILE = 1024  # pixels of a tile's side, if the size is the only reason for tiles


def check_tile(tile: int | str, model: ModelSpec) -> None:
    """Check a tile's side in pixels against the VAE. Raises SettingError."""
    factor = model.vae_factor
    if not isinstance(tile, str) and (tile % factor or tile < LEAST * factor):
        near = max(LEAST * factor, round(tile / factor) * factor)
        raise SettingError(
            f"tile {tile}: the side must be a multiple of {factor} pixels, and at least {LEAST * factor}, since neighbours "
            f"overlap; the nearest is {near}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """The tiles of a component for an image. `image` and `tile`: (height, width) in latent cells. `factor`: the VAE's."""

    component: str
    factor: int
    image: tuple[int, int]
    tile: tuple[int, int]
    whole_fits: bool

    @property
    def dims(self) -> dict[str, int]:
        """The sizes of a call with a tile."""
        cell = cell_of(self.component, self.factor)
        return {"height": self.tile[0] * cell, "width": self.tile[1] * cell}

    @property
    def text(self) -> str:
        """The size of a tile in pixels, as 1024x768."""
        return f"{self.tile[1] * self.factor}x{self.tile[0] * self.factor}"

    @property
    def line(self) -> str:
        """A text about the tiles for users."""
        size = f"{self.image[1] * self.factor}x{self.image[0] * self.factor}"
        rows, columns = self._spans
        why = "--tile off takes it whole, with more memory" if self.whole_fits else "no engine takes the whole image"
        return (
            f"size {size}: the VAE takes the image in {len(rows) * len(columns)} overlapping tiles of {self.text}, which changes "
            f"its colours a little; {why}"
        )

    def engine(self, choose: Callable[..., Engine]) -> Engine:
        """Return the engine for the whole image, over those that `choose(rows=…, height=…, width=…)` returns for tiles."""
        rows, columns = self._spans
        outputs = 1 if role(self.component).in_pixels else self.factor
        return TiledEngine(choose, rows, columns, cell_in=cell_of(self.component, self.factor), cell_out=outputs)

    @property
    def _spans(self) -> tuple[list[Span], list[Span]]:
        rows, columns = (even_spans(side, tile) for side, tile in zip(self.image, self.tile, strict=True))
        return rows, columns


def tiling(engines: Engines, component: str, factor: int, height: int, width: int) -> Tiling | None:
    """Return the tiles for an image of `height` and `width` in latent cells, or None if the VAE runs on the whole image.

    With the option `tile` "auto", these are tiles: an image that no engine takes, in the largest tiles that one takes, and an
    image of more than MOST_CPU_PIXELS on a CPU, in tiles of CPU_TILE. `factor`: the VAE's.
    """
    option = engines.options.tile
    if option == OFF or (option == AUTO and engines.caller_engine is not None):
        return None
    whole, cell = (height, width), cell_of(component, factor)
    if option != AUTO:
        side = int(option) // factor
        tile, fits = (min(height, side), min(width, side)), True
    else:
        fits = engines.has(component, height=height * cell, width=width * cell)
        if fits and (height * width * factor**2 <= MOST_CPU_PIXELS or not _on_cpu(engines, component, cell, whole)):
            return None
        tile = max(
            _admitted(engines, component, factor, whole),
            key=lambda tile: (not _on_cpu(engines, component, cell, tile), tile[0] * tile[1]),
            default=whole,
        )
    return Tiling(component=component, factor=factor, image=whole, tile=tile, whole_fits=fits) if tile != whole else None


def _admitted(engines: Engines, component: str, factor: int, whole: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the largest tile of each profile of the engines for this machine."""
    cell = cell_of(component, factor)
    for spec in engines.bundle.manifest.engines:
        for profile in spec.profiles if spec.component == component else ():
            tile = []
            for name, side in zip(("height", "width"), whole, strict=True):
                low, _, high = profile[name]
                most = min(side, CPU_TILE // factor) if spec.target == CPU else side
                tile.append(max(-(-low // cell), min(high // cell, most)))
            fits = all(min(side, LEAST) <= part <= side for part, side in zip(tile, whole, strict=True))
            if fits and engines.has(component, height=tile[0] * cell, width=tile[1] * cell):
                yield tile[0], tile[1]


def _on_cpu(engines: Engines, component: str, cell: int, size: tuple[int, int]) -> bool:
    return engines.choose(component, height=size[0] * cell, width=size[1] * cell).target == CPU


def cell_of(component: str, factor: int) -> int:
    """Return the size of a latent cell in the input of a component."""
    return factor // role(component).factor(factor)
