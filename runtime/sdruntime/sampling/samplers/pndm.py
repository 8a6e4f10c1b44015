"""PNDM and iPNDM: Adams-Bashforth over past noise estimates, with DDIM's transfer function (arXiv 2202.09778)."""

from __future__ import annotations

from collections import deque

from sdruntime.sampling.grids import Path, ddim_grid, pndm_grid
from sdruntime.sampling.noise_schedule import Point
from sdruntime.sampling.prediction import clean_from_raw
from sdruntime.sampling.samplers.keys import (
    LEADING,
    PNDM,
    TRAINED,
    ZERO_SNR,
)
from sdruntime.sampling.samplers.protocol import Draw, Solver, X, moved, noise_of
from sdruntime.sampling.samplers.sampler import Sampler

ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def adams(past: deque[X]) -> X:
    """Return the linear multistep estimate of order len(past), newest first (equation 12)."""
    return sum(w * e for w, e in zip(ADAMS[len(past) - 1], past, strict=True))


def pndm(x: X, path: Path, noise: Draw, *, skip_prk_steps: bool = False, prediction_type: str = "epsilon") -> Solver:
    """PLMS, started by three pseudo Runge-Kutta steps (equation 13) or by one pseudo improved Euler step.

    It mixes the model's raw outputs e: for a v-model these are v, converted to an image estimate at the end of the step. That is
    diffusers' PNDM; mixing noise estimates is not quite the same.
    """
    v = prediction_type == "v_prediction"

    def output(x: X, m: X, s: Point) -> X:
        return (s.alpha * x - m) / s.sigma if v else noise_of(x, m, s)

    def transfer(x: X, s: Point, t: Point, e: X) -> X:
        p, q = clean_from_raw("v_prediction" if v else "epsilon", s)
        return moved(x, p * x + q * e, s, t)

    past: deque[X] = deque(maxlen=4)
    rest = iter(path)
    if skip_prk_steps:
        s, t = next(rest)
        start, m = yield x, s
        past.appendleft(output(start, m, s))
        x = transfer(start, s, t, past[0])
        if len(path) > 1:
            s, t = next(rest)
            x, m = yield x, t
            x = transfer(start, s, t, (output(x, m, t) + past[0]) / 2)
    else:
        for _ in range(3):
            (s, near), (_, centre), _, (_, t) = (next(rest) for _ in range(4))
            start, m = yield x, s
            k1 = output(start, m, s)
            x, m = yield transfer(start, s, near, k1), centre  # for an odd stride, the two midpoints differ by one in diffusers
            k2 = output(x, m, centre)
            x, m = yield transfer(start, s, centre, k2), centre
            k3 = output(x, m, centre)
            x, m = yield transfer(start, s, t, k3), t
            x = transfer(start, s, t, (k1 + 2 * k2 + 2 * k3 + output(x, m, t)) / 6)
            past.appendleft(k1)
    for s, t in rest:
        x, m = yield x, s
        past.appendleft(output(x, m, s))
        x = transfer(x, s, t, adams(past))
    return x


def ipndm(x: X, path: Path, noise: Draw) -> Solver:
    """Multistep from the first step on, with order growing from 1 to 4 (arXiv 2204.13902, appendix on iPNDM).

    Written as DDIM's step plus a correction by past estimates, so that a first step from alpha 0 needs no noise estimate there.
    """
    past: deque[X] = deque(maxlen=4)
    for s, t in path:
        x, m = yield x, s
        past.appendleft(noise_of(x, m, s))
        x = moved(x, m, s, t)
        if len(past) > 1:
            x = x + (t.sigma - t.alpha * s.sigma / s.alpha) * (adams(past) - past[0])
    return x


ROWS = (
    Sampler(
        name="pndm",
        solve=pndm,
        grid=pndm_grid,
        space="vp",
        order=2,
        reads=PNDM,
        options=("skip_prk_steps", "prediction_type"),
        diffusers="PNDMScheduler",
        about="Pseudo numerical methods with a Runge-Kutta start (arXiv 2202.09778)",
    ),
    Sampler(
        name="plms",
        solve=pndm,
        grid=pndm_grid,
        space="vp",
        order=2,
        reads=PNDM,
        options=("skip_prk_steps", "prediction_type"),
        implied={"skip_prk_steps": True},
        diffusers="PNDMScheduler",
        a1111=("PLMS",),
        about="PNDM without the Runge-Kutta start, the sampler of the Stable Diffusion 1 release (arXiv 2202.09778)",
    ),
    Sampler(
        name="ipndm",
        solve=ipndm,
        grid=ddim_grid,
        space="vp",
        order=2,
        reads={**TRAINED, **LEADING, **ZERO_SNR, "set_alpha_to_one": True},
        about="PNDM started with lower orders, on the checkpoint's own schedule (arXiv 2204.13902)",
    ),
)
