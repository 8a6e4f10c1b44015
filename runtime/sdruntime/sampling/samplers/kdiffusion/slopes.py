"""The samplers of EDM (arXiv 2206.00364) and of k-diffusion: steps along dx/dsigma = (x - clean) / sigma.

The equation is the same for variance-exploding and for rectified-flow x, so euler and heun serve both.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from sdruntime.sampling.grids import Path, ve_grid
from sdruntime.sampling.noise_schedule import Point
from sdruntime.sampling.samplers.integrals import adams_weights
from sdruntime.sampling.samplers.keys import (
    ANCESTRAL,
    BY_NAME,
    CHURN,
    FINAL,
    LINSPACE,
    SCHEDULED,
    STABLE,
    TRAINED,
    ZERO_SNR,
)
from sdruntime.sampling.samplers.protocol import Draw, Solver, X
from sdruntime.sampling.samplers.sampler import Sampler


def euler(x: X, path: Path, noise: Draw, **churn: float) -> Solver:
    """Euler's method: EDM, algorithm 2 without the second-order correction."""
    for s, t in path:
        x, s = churned(x, s, path, noise, **churn)
        x, m = yield x, s
        x = x + (t.sigma - s.sigma) * slope(x, m, s)
    return x


def euler_ancestral(x: X, path: Path, noise: Draw, *, eta: float = 1.0, s_noise: float = 1.0) -> Solver:
    """k-diffusion sample_euler_ancestral: Euler down to sigma_down, then noise up to the next level."""
    for s, t in path:
        x, m = yield x, s
        down, up = ancestral(s.sigma, t.sigma, eta)
        x = x + (down - s.sigma) * slope(x, m, s) + s_noise * up * noise()
    return x


def heun(x: X, path: Path, noise: Draw, **churn: float) -> Solver:
    """Heun's method: EDM, algorithm 2. The mean of the slopes at both ends; Euler for a step to sigma 0."""
    for s, t in path:
        x, s = churned(x, s, path, noise, **churn)
        x = yield from heun_step(x, s, t)
    return x


def heun_step(x: X, s: Point, t: Point) -> Solver:
    """One step of Heun's method, from s to t."""
    start, m = yield x, s
    d = slope(start, m, s)
    x = start + (t.sigma - s.sigma) * d
    if t.sigma > 0:
        x, m = yield x, t
        x = start + (t.sigma - s.sigma) * (d + slope(x, m, t)) / 2
    return x


def dpm2(x: X, path: Path, noise: Draw, **churn: float) -> Solver:
    """DPM-Solver-2 (arXiv 2206.00927, algorithm 1) as in k-diffusion: the slope at the middle in log sigma."""
    for s, t in path:
        x, s = churned(x, s, path, noise, **churn)
        x, m = yield x, s
        if t.sigma == 0:
            return x - s.sigma * slope(x, m, s)
        middle = path.levels.at_sigma(math.sqrt(s.sigma * t.sigma))
        start, x = x, x + (middle.sigma - s.sigma) * slope(x, m, s)
        x, m = yield x, middle
        x = start + (t.sigma - s.sigma) * slope(x, m, middle)
    return x


def dpm2_ancestral(x: X, path: Path, noise: Draw, *, eta: float = 1.0, s_noise: float = 1.0) -> Solver:
    """k-diffusion sample_dpm_2_ancestral: dpm2 down to sigma_down, then noise up to the next level."""
    for s, t in path:
        x, m = yield x, s
        if t.sigma == 0:
            return x - s.sigma * slope(x, m, s)
        down, up = ancestral_float32(s.sigma, t.sigma) if eta == 1 else ancestral(s.sigma, t.sigma, eta)
        middle = path.levels.at_sigma(math.sqrt(s.sigma * down))
        start, x = x, x + (middle.sigma - s.sigma) * slope(x, m, s)
        x, m = yield x, middle
        x = start + (down - s.sigma) * slope(x, m, middle) + s_noise * up * noise()
    return x


def lms(x: X, path: Path, noise: Draw, *, order: int = 4) -> Solver:
    """Adams-Bashforth in sigma with the true step sizes (k-diffusion sample_lms); the order grows from 1."""
    past: deque[tuple[float, X]] = deque(maxlen=order)
    for s, t in path:
        x, m = yield x, s
        past.appendleft((s.sigma, slope(x, m, s)))
        weights = adams_weights([sigma for sigma, _ in past], s.sigma, t.sigma)
        x = x + sum(w * d for w, (_, d) in zip(weights, past, strict=True))
    return x


def slope(x: X, m: X, s: Point) -> X:
    """Return dx/dsigma at s if m is the clean image."""
    return (x - m) / s.sigma


def churned(
    x: X,
    s: Point,
    path: Path,
    noise: Draw,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> tuple[X, Point]:
    """Return x with fresh noise, and its level: lines 4 to 6 of EDM's algorithm 2, before a step from s.

    The level rises by the factor 1 + s_churn / steps, at most sqrt(2), for sigmas from s_tmin to s_tmax.
    """
    gamma = min(s_churn / len(path), math.sqrt(2) - 1) if s_tmin <= s.sigma <= s_tmax else 0.0
    if gamma == 0:
        return x, s
    up = path.levels.at_sigma(s.sigma * (1 + gamma))
    return x + s_noise * math.sqrt(up.sigma**2 - s.sigma**2) * noise(), up


def ancestral(sigma: float, after: float, eta: float = 1.0) -> tuple[float, float]:
    """Return (down, up), down² + up² = after²: the sigma to denoise to and the std of the noise to add.

    eta: from 0, no noise, to 1, DDPM's share.
    """
    up = eta * after * math.sqrt(1 - (after / sigma) ** 2)
    return math.sqrt(after**2 - up**2), up


def ancestral_float32(sigma: float, after: float) -> tuple[float, float]:
    """Return `ancestral` in float32 like diffusers' KDPM2AncestralDiscreteScheduler; a large step leaves few digits of `down`.

    If it leaves none, for which diffusers returns NaN, return the exact numbers.
    """
    high, low = np.float32(sigma), np.float32(after)
    up = np.sqrt(low**2 * (high**2 - low**2) / high**2)
    rest = low**2 - up**2
    return (float(np.sqrt(rest)), float(up)) if rest > 0 else ancestral(sigma, after)


def sigma_row(name: str, solve: Callable[..., Solver], diffusers: str | None, **more: Any) -> Sampler:
    """Return a row of the k-diffusion family, with the keys that all its diffusers classes read."""
    more = {"grid": ve_grid, **more, "reads": {**TRAINED, **LINSPACE, **BY_NAME, **more["reads"]}}
    return Sampler(name=name, solve=solve, space="ve", takes_schedule=True, diffusers=diffusers, **more)


ROWS = (
    sigma_row(
        "euler",
        euler,
        "EulerDiscreteScheduler",
        order=1,
        reads={
            **SCHEDULED,
            **ZERO_SNR,
            **FINAL,
            **CHURN,
            "interpolation_type": "linear",
            "timestep_type": "discrete",
        },
        options=tuple(CHURN),
        a1111=("Euler",),
        about="Euler's method in sigma (arXiv 2206.00364)",
    ),
    sigma_row(
        "euler_a",
        euler_ancestral,
        "EulerAncestralDiscreteScheduler",
        order=1,
        reads={**ZERO_SNR, **ANCESTRAL},
        options=tuple(ANCESTRAL),
        a1111=("Euler a", "Euler Ancestral"),
        about="Euler with ancestral noise (k-diffusion)",
    ),
    sigma_row(
        "heun",
        heun,
        "HeunDiscreteScheduler",
        order=2,
        reads={**STABLE, **SCHEDULED, **CHURN, "clip_sample": False},
        options=tuple(CHURN),
        a1111=("Heun",),
        about="Heun's method in sigma, two model calls per step (arXiv 2206.00364)",
    ),
    sigma_row(
        "dpm2",
        dpm2,
        "KDPM2DiscreteScheduler",
        order=2,
        grid=partial(ve_grid, whole_karras_times=True),
        reads={**STABLE, **SCHEDULED, **CHURN},
        options=tuple(CHURN),
        a1111=("DPM2",),
        about="DPM-Solver-2 in sigma, two model calls per step (arXiv 2206.00927)",
    ),
    sigma_row(
        "dpm2_a",
        dpm2_ancestral,
        "KDPM2AncestralDiscreteScheduler",
        order=2,
        grid=partial(ve_grid, whole_karras_times=True),
        reads={**STABLE, **SCHEDULED, **ANCESTRAL},
        options=tuple(ANCESTRAL),
        a1111=("DPM2 a", "DPM2 Ancestral"),
        about="DPM-Solver-2 with ancestral noise (k-diffusion)",
    ),
    sigma_row(
        "lms",
        lms,
        "LMSDiscreteScheduler",
        order=2,
        grid=partial(ve_grid, karras_bounds=False),
        reads={**SCHEDULED, "order": 4},
        options=("order",),
        a1111=("LMS",),
        about="Linear multistep of order 4 in sigma (k-diffusion)",
    ),
)
