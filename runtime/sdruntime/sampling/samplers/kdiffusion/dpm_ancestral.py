"""DPM-Solver++(2S) with added noise: k-diffusion's dpmpp_2s_ancestral and dpmpp_sde, in sigma (alpha = 1)."""

from __future__ import annotations

import math
from functools import partial

from sdruntime.sampling.grids import Path, ve_grid
from sdruntime.sampling.samplers.kdiffusion.slopes import ancestral, sigma_row
from sdruntime.sampling.samplers.keys import (
    ANCESTRAL,
    SCHEDULED,
    STABLE,
)
from sdruntime.sampling.samplers.protocol import Draw, Solver, X


def dpmpp_2s_ancestral(x: X, path: Path, noise: Draw, *, eta: float = 1.0, s_noise: float = 1.0) -> Solver:
    """k-diffusion sample_dpmpp_2s_ancestral: 2S down to sigma_down, then noise up to the next level."""
    for s, t in path:
        x, m = yield x, s
        if t.sigma == 0:
            return m
        down, up = ancestral(s.sigma, t.sigma, eta)
        middle = path.levels.at_sigma(math.sqrt(s.sigma * down))
        start, x = x, toward(x, m, s.sigma, middle.sigma)
        x, m = yield x, middle
        x = toward(start, m, s.sigma, down) + s_noise * up * noise()
    return x


def dpmpp_sde(x: X, path: Path, noise: Draw, *, eta: float = 1.0, s_noise: float = 1.0) -> Solver:
    """k-diffusion sample_dpmpp_sde with r = 1/2: each half step is ancestral.

    The noises are increments of one Brownian motion in sigma. The interval of the second includes that of the first, so they
    share the part rho of the second's variance.
    """
    for s, t in path:
        x, m = yield x, s
        if t.sigma == 0:
            return m
        middle = path.levels.at_sigma(math.sqrt(s.sigma * t.sigma))
        down, up = ancestral(s.sigma, middle.sigma, eta)
        first = noise()
        start, x = x, toward(x, m, s.sigma, down) + s_noise * up * first
        x, m = yield x, middle
        down, up = ancestral(s.sigma, t.sigma, eta)
        rho = (s.sigma - middle.sigma) / (s.sigma - t.sigma)
        both = math.sqrt(rho) * first + math.sqrt(1 - rho) * noise()
        x = toward(start, m, s.sigma, down) + s_noise * up * both
    return x


def toward(x: X, m: X, sigma: float, after: float) -> X:
    """Return x with its noise reduced from sigma to `after` if m is the clean image."""
    return after / sigma * x + (1 - after / sigma) * m


ROWS = (
    sigma_row(
        "dpmpp_2s_a",
        dpmpp_2s_ancestral,
        None,
        order=2,
        reads={**SCHEDULED, **ANCESTRAL},
        options=tuple(ANCESTRAL),
        a1111=("DPM++ 2S a", "DPM++ 2S Ancestral"),
        about="DPM-Solver++(2S) with ancestral noise, two model calls per step (k-diffusion)",
    ),
    sigma_row(
        "dpmpp_sde",
        dpmpp_sde,
        "DPMSolverSDEScheduler",
        order=2,
        grid=partial(ve_grid, karras_bounds=False),
        reads={**STABLE, **SCHEDULED, **ANCESTRAL},
        options=tuple(ANCESTRAL),
        a1111=("DPM++ SDE",),
        about="Stochastic DPM-Solver++, two model calls per step (k-diffusion)",
    ),
)
