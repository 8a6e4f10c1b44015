"""Samplers run directly, without a table: on latents, or on rows of coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from sdruntime.sampling.grids import Path
from sdruntime.sampling.noise_schedule import Point, Space, at_ratio
from sdruntime.sampling.prediction import clean_from_raw, input_scale
from sdruntime.sampling.samplers import Sampler

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def solve(
    sampler: Sampler, path: Path, x: Any, clean: Callable[[Any, Point], Any], noise: Callable[[], Any], options: Mapping[str, Any]
) -> Any:
    """The generator's result where clean(x, point) estimates the image."""
    steps = sampler.solve(x, path, noise, **options)
    x, point = next(steps)
    while True:
        try:
            x, point = steps.send((x, clean(x, point)))
        except StopIteration as end:
            return end.value


def clean_by(model: Callable[[Any, float], Any], prediction: str, space: Space) -> Callable[[Any, Point], Any]:
    """The clean estimate of a raw model(scaled x, t)."""

    data = 0.5 if space == "edm" else None

    def clean(x: Any, point: Point) -> Any:
        p, q = clean_from_raw(prediction, point, data)
        return p * x + q * model(input_scale(point, space, data) * x, point.t)

    return clean


class Smooth:
    """Levels of a continuous schedule; t is 500 everywhere, the middle of SA-Solver's stochastic interval."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def at_sigma(self, sigma: float) -> Point:
        return at_ratio(500.0, sigma, self.space)

    def at_time(self, t: int) -> Point:
        raise AssertionError("a continuous schedule has no trained timesteps")


def smooth_path(sampler: Sampler, space: Space, steps: int) -> Path:
    """Even in log ratio from 2 to 0.1 (in flow: even in sigma, 0.95 to 0.05), above zero at its end."""
    levels = Smooth(space)
    ratios = np.linspace(0.95, 0.05, steps + 1) if space == "flow" else np.geomspace(2.0, 0.1, steps + 1)
    points = [at_ratio(500.0, ratio, space) for ratio in ratios.tolist()]
    pairs = list(pairwise(points))
    if sampler.name == "plms":
        pairs.insert(1, pairs[0])
    if sampler.name == "pndm":
        middles = [at_ratio(500.0, math.sqrt(s.sigma * t.sigma / (s.alpha * t.alpha)), space) for s, t in pairs[:3]]
        kutta = [((s, middle), (s, middle), (s, t), (s, t)) for (s, t), middle in zip(pairs[:3], middles, strict=True)]
        pairs = [pair for four in kutta for pair in four] + pairs[3:]
    return Path(pairs=tuple(pairs), total=len(pairs), start_sigma=1.0, levels=levels)
