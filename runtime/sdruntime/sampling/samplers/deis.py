"""DEIS: the probability-flow ODE with the noise estimate interpolated in log rho, rho = sigma / alpha."""

from __future__ import annotations

from collections import deque
from functools import partial

from sdruntime.sampling.grids import Path, vp_grid
from sdruntime.sampling.samplers.integrals import adams_weights
from sdruntime.sampling.samplers.keys import (
    BY_NAME,
    FLOW,
    LINSPACE,
    PIXEL,
    SCHEDULED,
    TRAINED,
)
from sdruntime.sampling.samplers.protocol import Draw, Solver, X, noise_of
from sdruntime.sampling.samplers.sampler import Sampler


def deis(x: X, path: Path, noise: Draw, *, solver_order: int = 2, lower_order_final: bool = True) -> Solver:
    """Multistep DEIS, arXiv 2204.13902, equation 15 in its log-rho variant: d(x / alpha) = noise · d rho.

    In u = log rho, the integral has the weight exp(u). lower_order_final lowers the order of the last steps of paths of fewer
    than 15 steps.
    """
    past: deque[tuple[float, X]] = deque(maxlen=solver_order)
    short = lower_order_final and path.total < 15
    for left, (s, t) in zip(range(len(path), 0, -1), path, strict=True):
        x, m = yield x, s
        past.appendleft((-s.lam, noise_of(x, m, s)))
        order = min(len(past), left) if short else len(past)
        nodes = [u for u, _ in past][:order]
        weights = adams_weights(nodes, -s.lam, -t.lam, rate=1.0)
        x = t.alpha / s.alpha * x + t.sigma * sum(w * e for w, (_, e) in zip(weights, past, strict=False))
    return x


ROWS = (
    Sampler(
        name="deis",
        solve=deis,
        grid=partial(vp_grid, final="sigma_min", repeats_last=True),
        space="vp",
        order=2,
        takes_schedule=True,
        reads={
            **TRAINED,
            **LINSPACE,
            **SCHEDULED,
            **BY_NAME,
            **FLOW,
            **PIXEL,
            "solver_order": 2,
            "solver_type": "logrho",
            "algorithm_type": "deis",
            "lower_order_final": True,
        },
        options=("solver_order", "lower_order_final"),
        choices={"solver_type": ("logrho",), "algorithm_type": ("deis",)},
        diffusers="DEISMultistepScheduler",
        about="Diffusion exponential integrator sampler (arXiv 2204.13902)",
    ),
)
