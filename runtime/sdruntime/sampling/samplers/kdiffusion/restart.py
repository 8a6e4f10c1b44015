"""Restart sampling (arXiv 2306.14878): Heun's method that returns to more noise and repeats a part of the path."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from sdruntime.sampling.grids import Path
from sdruntime.sampling.noise_schedule import Point
from sdruntime.sampling.samplers.kdiffusion.slopes import heun_step, sigma_row
from sdruntime.sampling.samplers.keys import SCHEDULED
from sdruntime.sampling.samplers.protocol import Draw, Solver, X
from sdruntime.sampling.schedules.ratios import karras

FROM, TO = 0.1, 2.0  # the sigma that is reached before each restart, and the one to return to
FEWEST = 20  # steps; fewer have no restart


def restart(x: X, path: Path, noise: Draw, *, s_noise: float = 1.0) -> Solver:
    """Heun's method through the steps with restarts; noise raises x from the end of a step to the start of the next."""
    before = None
    for s, t in with_restarts(path):
        if before is not None and before.sigma < s.sigma:
            x = x + s_noise * math.sqrt(s.sigma**2 - before.sigma**2) * noise()
        x = yield from heun_step(x, s, t)
        before = t
    return x


def with_restarts(path: Path) -> Iterator[tuple[Point, Point]]:
    """Yield as many steps as the path has, by the defaults of AUTOMATIC1111's web UI.

    From 20 steps on: 9 steps are of one restart from sigma 0.1 to 2; from 36 on, half of the steps are of two. The others, and
    each restart, are spaced as by the "karras" schedule.
    """
    steps = len(path)
    if steps < FEWEST:
        yield from path
        return
    length, times = (9, 1) if steps < 36 else (steps // 4, 2)
    first, last, end = path.pairs[0][0], path.pairs[-1][0], path.pairs[-1][1]
    sigmas = karras(first.sigma, last.sigma, steps - length * times).tolist()
    points = [first, *map(path.levels.at_sigma, sigmas[1:-1]), last, end]
    low = min(range(len(points)), key=lambda i: abs(points[i].sigma - FROM))
    high = min(range(len(points)), key=lambda i: abs(points[i].sigma - TO))
    for i, (s, t) in enumerate(pairwise(points), start=1):
        yield s, t
        if i == low and high < low:
            again = [points[high], *map(path.levels.at_sigma, karras(points[high].sigma, t.sigma, length + 1)[1:-1].tolist()), t]
            for _ in range(times):
                yield from pairwise(again)


ROWS = (
    sigma_row(
        "restart",
        restart,
        None,
        order=2,
        reads={**SCHEDULED, "s_noise": 1.0},
        options=("s_noise",),
        a1111=("Restart",),
        about="Heun's method with restarts from 20 steps on, two model calls per step (arXiv 2306.14878)",
    ),
)
