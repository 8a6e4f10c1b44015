"""Few-step samplers of distilled models: jump to the clean image, then add new noise up to the next level."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from sdruntime.sampling.grids import Path, consistency_grid
from sdruntime.sampling.samplers.keys import (
    CONSISTENCY,
)
from sdruntime.sampling.samplers.protocol import Draw, Solver, X, moved
from sdruntime.sampling.samplers.sampler import Sampler

SIGMA_DATA = 0.5


def lcm(x: X, path: Path, noise: Draw, *, timestep_scaling: float = 10.0) -> Solver:
    """Latent consistency model, arXiv 2310.04378, algorithm 3 with the boundary condition of equation 4."""
    for s, t in path:
        x, m = yield x, s
        scaled = s.t * timestep_scaling
        norm = math.hypot(scaled, SIGMA_DATA)
        x = scaled / norm * m + (SIGMA_DATA / norm) ** 2 * x
        if t.sigma > 0:
            x = t.alpha * x + t.sigma * noise()
    return x


def tcd(x: X, path: Path, noise: Draw, *, eta: float = 0.3) -> Solver:
    """Trajectory consistency, arXiv 2402.19159, algorithm 4: down to (1 - eta)·t (eta is gamma there), then noise up to t."""
    for left, (s, t) in zip(range(len(path), 0, -1), path, strict=True):
        x, m = yield x, s
        below = path.levels.at_time(int(np.float32(1 - eta) * np.float32(t.t)))
        x = moved(x, m, s, below)
        if eta > 0 and left > 1:
            ratio = t.alpha / below.alpha
            x = ratio * x + math.sqrt(1 - ratio**2) * noise()
    return x


ROWS = (
    Sampler(
        name="lcm",
        solve=lcm,
        grid=partial(consistency_grid, to_clean=True),
        space="vp",
        order=0,
        reads={**CONSISTENCY, "timestep_scaling": 10.0},
        options=("timestep_scaling",),
        diffusers="LCMScheduler",
        a1111=("LCM",),
        about="Latent consistency models, distilled (arXiv 2310.04378)",
    ),
    Sampler(
        name="tcd",
        solve=tcd,
        grid=partial(consistency_grid, to_clean=False),
        space="vp",
        order=0,
        reads={**CONSISTENCY, "eta": 0.0},
        options=("eta",),
        diffusers="TCDScheduler",
        about="Trajectory consistency distillation (arXiv 2402.19159)",
    ),
)
