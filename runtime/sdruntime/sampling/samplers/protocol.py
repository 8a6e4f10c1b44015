"""The protocol of samplers: a generator that yields a point to evaluate and receives the clean estimate there.

    def sampler(x, path, noise, *, options):
        for s, t in path:
            x, m = yield x, s        # x may come back edited; m is the estimate of the clean image
            x = ...                  # linear in x, m, values of previous steps, and noise()
        return x

X is anything that adds, and multiplies by a float: latents, or the unit vectors that `compile_table` runs samplers on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeAlias

from sdruntime.errors import SettingError
from sdruntime.sampling.grids import Path
from sdruntime.sampling.noise_schedule import Point

X: TypeAlias = Any
Draw: TypeAlias = Callable[[], X]
Solver: TypeAlias = Generator[tuple[X, Point], tuple[X, X], X]


def noise_of(x: X, m: X, s: Point) -> X:
    """Return the noise in x if m is its clean image: (x - alpha·m) / sigma."""
    return (x - s.alpha * m) / s.sigma


def moved(x: X, m: X, s: Point, t: Point) -> X:
    """Return x at level t with the same clean image m and the same noise: DDIM, and Euler in any space."""
    return t.alpha * m + t.sigma * noise_of(x, m, s)


def stay_above_zero(path: Path, key: str, value: Any) -> None:
    """Raise SettingError if a solver for the noise would step to sigma 0, where lambda and the integral are infinite."""
    if path.pairs[-1][1].sigma == 0:
        raise SettingError(
            f"{key} {value!r} cannot step to sigma 0: it needs final_sigmas_type 'sigma_min', or sigmas that end above 0"
        )
