"""DPM-Solver and DPM-Solver++, multistep and singlestep: exponential integrators in lambda = log(alpha / sigma).

arXiv 2206.00927 (the model's output read as noise) and arXiv 2211.01095 (as the clean image, "++"). Notation of the papers:
D0, D1, D2 are the output and its scaled divided differences. The SDE forms double the exponents and add noise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from sdruntime.errors import SettingError
from sdruntime.sampling.grids import Path, vp_grid
from sdruntime.sampling.noise_schedule import Point
from sdruntime.sampling.samplers.integrals import phi
from sdruntime.sampling.samplers.keys import ANCESTRAL, DPM, LINSPACE, ZERO_SNR
from sdruntime.sampling.samplers.protocol import Draw, Solver, X, noise_of, stay_above_zero
from sdruntime.sampling.samplers.sampler import Sampler


class Algorithm(NamedTuple):
    """An algorithm_type. `data`: the model's output is read as the clean image, not as noise. `sde`: the equation is stochastic.

    `flipped`: the weight of D2 has the wrong sign of diffusers' SDE of order 3, which reduces that to order 1. `eta`: the share
    of the SDE's noise, 0 for none; k-diffusion's.
    """

    data: bool
    sde: bool
    flipped: bool
    eta: float = 0.0

    @classmethod
    def named(cls, name: str, third_order: str, eta: float = 1.0) -> Algorithm:
        data, sde = name.endswith("++"), name.startswith("sde-")
        if eta != 1 and not (data and sde):
            raise SettingError(f"eta {eta:g} with algorithm_type {name!r}: only 'sde-dpmsolver++' has a share of noise to choose")
        return cls(data=data, sde=sde, flipped=data and sde and third_order == "diffusers", eta=eta if sde else 0.0)

    def read(self, x: X, m: X, s: Point) -> X:
        return m if self.data else noise_of(x, m, s)


def dpm_multistep(
    x: X,
    path: Path,
    noise: Draw,
    *,
    solver_order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    third_order: str = "diffusers",
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Solver:
    """Multistep DPM-Solver: DPM-Solver++(2M), (3M) and related. The order grows from 1 and may decrease at the end.

    lower_order_final lowers it in the last two steps of paths of fewer than 15 steps; a last step to sigma 0 is always of
    order 1. third_order: the weights of the SDE of order 3, "diffusers" or "exact", which are k-diffusion's. eta,
    s_noise: the SDE's share of noise and a factor of it, as in k-diffusion.
    """
    algorithm = Algorithm.named(algorithm_type, third_order, eta)
    if s_noise != 1 and not algorithm.sde:
        raise SettingError(f"s_noise {s_noise:g} with algorithm_type {algorithm_type!r}: it adds no noise")
    if not algorithm.data:
        stay_above_zero(path, "algorithm_type", algorithm_type)
    past: deque[tuple[float, X]] = deque(maxlen=solver_order)
    short = lower_order_final and path.total < 15
    for left, (s, t) in zip(range(len(path), 0, -1), path, strict=True):
        x, m = yield x, s
        past.appendleft((s.lam, algorithm.read(x, m, s)))
        order = len(past)
        if left == 1 and (short or euler_at_final or t.sigma == 0):
            order = 1
        elif left == 2 and short:
            order = min(order, 2)
        derivatives = backward_differences([*past][:order], t.lam - s.lam)
        x = integrated(x, s, t, derivatives, algorithm, midpoint=order == 2 and solver_type == "midpoint")
        if algorithm.sde:
            x = x + s_noise * added_std(s, t, algorithm) * noise()
    return x


def dpm_singlestep(
    x: X,
    path: Path,
    noise: Draw,
    *,
    solver_order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
    third_order: str = "diffusers",
) -> Solver:
    """Singlestep DPM-Solver, such as DPM-Solver++(2S), (3S): blocks of 1 to 3 steps, each step from the start of its block."""
    algorithm = Algorithm.named(algorithm_type, third_order)
    if not algorithm.data:
        stay_above_zero(path, "algorithm_type", algorithm_type)
    to_clean = path.pairs[-1][1].sigma == 0
    orders = block_orders(path.total, solver_order, lower_order_final or to_clean, to_clean)
    block: list[tuple[float, X]] = []
    for order, (s, t) in zip(orders[path.total - len(path) :], path, strict=True):
        x, m = yield x, s
        if order == 1 or not block:  # an image-to-image start may fall inside a block
            block, start, first = [], x, s
        block.append((s.lam, algorithm.read(x, m, s)))
        derivatives = forward_differences(block, t.lam - first.lam, solver_type)
        x = integrated(start, first, t, derivatives, algorithm, midpoint=len(block) == 2 and solver_type == "midpoint")
        if algorithm.sde:
            x = x + added_std(first, t, algorithm) * noise()
    return x


def block_orders(steps: int, order: int, lower_final: bool, to_clean: bool) -> list[int]:
    """Return the order of each step: 1, 2, 3, 1, 2, 3, ... for order 3.

    An incomplete last block, or a last block to be lowered, ends in order 1.
    """
    block = list(range(1, order + 1))
    whole, rest = divmod(steps, order)
    if rest == 0 and lower_final and order > 1:
        whole, rest = whole - 1, order
    orders = block * whole + block[:rest]
    if to_clean or (lower_final and rest == order):
        orders[-1] = 1
    return orders


def backward_differences(past: list[tuple[float, X]], h: float) -> list[X]:
    """Return D0, D1, D2 at the newest of `past` [(lambda, value), newest first], in units of the step h.

    D2 is h² times the second divided difference: half of h² times the second derivative, which an exact third order requires.
    The authors' code, diffusers and k-diffusion do the same; this is why multistep order 3 converges with order 2.
    """
    (lam0, m0), *older = past
    if not older:
        return [m0]
    (lam1, m1), *oldest = older
    d1 = (m0 - m1) * (h / (lam0 - lam1))
    if not oldest:
        return [m0, d1]
    lam2, m2 = oldest[0]
    change = d1 - (m1 - m2) * (h / (lam1 - lam2))
    return [m0, d1 + change * ((lam0 - lam1) / (lam0 - lam2)), change * (h / (lam0 - lam2))]


def forward_differences(block: list[tuple[float, X]], h: float, solver_type: str) -> list[X]:
    """Return D0, D1, D2 at the oldest of `block`; the midpoint form of order 3 takes D1 from the newest and has no D2."""
    (lam0, m0), *newer = block
    rates = [(lam - lam0) / h for lam, _ in newer]
    slopes = [(m - m0) / r for r, (_, m) in zip(rates, newer, strict=True)]
    if len(slopes) < 2:
        return [m0, *slopes]
    if solver_type == "midpoint":
        return [m0, slopes[1]]
    (r1, r2), (d1, d2) = rates, slopes
    return [m0, (r2 * d1 - r1 * d2) / (r2 - r1), 2 * (d2 - d1) / (r2 - r1)]


def integrated(x: X, s: Point, t: Point, derivatives: list[X], algorithm: Algorithm, midpoint: bool) -> X:
    """Return x after one step of the exponential integrator from s to t, without its noise (arXiv 2211.01095, sections 4 and 5).

    `midpoint`: the second-order rule that gives D1 half the weight of D0, in place of the exact integral.
    """
    h = t.lam - s.lam
    if algorithm.data:
        stochastic = algorithm.eta * h if algorithm.eta else 0.0  # h is infinite in a step to sigma 0
        z, scale = -h - stochastic, -t.alpha
        x = t.sigma / s.sigma * math.exp(-stochastic) * x
    else:
        z, scale = h, -t.sigma * (2 if algorithm.sde else 1)
        x = t.alpha / s.alpha * x
    rules = [phi(k, z) for k in range(len(derivatives))]
    if midpoint:
        rules[1] = rules[0] / 2
    if algorithm.flipped and len(rules) == 3:
        rules[2] += 1
    return x + scale * sum(rule * d for rule, d in zip(rules, derivatives, strict=True))


def added_std(s: Point, t: Point, algorithm: Algorithm) -> float:
    """Return the standard deviation of the noise that the SDE adds between s and t. Raises SettingError if lambda decreases."""
    h = t.lam - s.lam
    if h < -1e-6:  # tolerance for rounding
        raise SettingError(
            "an SDE cannot step back to more noise: final_sigmas_type 'sigma_min' ends at the lowest trained sigma, "
            "and this schedule goes below it first (sigma_min, or a flow); set final_sigmas_type 'zero'"
        )
    if algorithm.data:
        return t.sigma * math.sqrt(max(-math.expm1(-2 * algorithm.eta * h), 0.0)) if algorithm.eta else 0.0
    return t.sigma * math.sqrt(max(math.expm1(2 * h), 0.0))


def _solver(order: int, algorithm: str) -> dict[str, Any]:
    """Return the settings that a name implies; solvers for the noise cannot step to sigma 0 and end at sigma_min."""
    fixed: dict[str, Any] = {"solver_order": order, "algorithm_type": algorithm}
    return fixed if algorithm.endswith("++") else {**fixed, "final_sigmas_type": "sigma_min"}


MULTISTEP_OPTIONS = (
    *("solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final", "third_order", "eta", "s_noise"),
)


def _multistep(name: str, solver_order: int, algorithm: str, *, fixed: Mapping[str, Any] | None = None, **more: Any) -> Sampler:
    return Sampler(
        name=name,
        solve=dpm_multistep,
        grid=partial(vp_grid, whole_cosine_times=False),
        space="vp",
        takes_schedule=True,
        reads={**DPM, **LINSPACE, **ZERO_SNR, **ANCESTRAL, "use_lu_lambdas": False, "euler_at_final": False},
        options=MULTISTEP_OPTIONS,
        choices={
            "solver_type": ("midpoint", "heun"),
            "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        },
        implied={**_solver(solver_order, algorithm), **(fixed or {})},
        diffusers="DPMSolverMultistepScheduler",
        **more,
    )


def _singlestep(name: str, solver_order: int, algorithm: str, **more: Any) -> Sampler:
    return Sampler(
        name=name,
        solve=dpm_singlestep,
        grid=vp_grid,
        space="vp",
        takes_schedule=True,
        reads={**DPM, "lower_order_final": False},
        options=("solver_order", "solver_type", "algorithm_type", "lower_order_final", "third_order"),
        choices={
            "solver_type": ("midpoint", "heun"),
            "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
        },
        implied=_solver(solver_order, algorithm),
        diffusers="DPMSolverSinglestepScheduler",
        **more,
    )


ROWS = (
    _multistep("dpmpp_2m", 2, "dpmsolver++", order=2, a1111=("DPM++ 2M",), about="DPM-Solver++(2M) (arXiv 2211.01095)"),
    _multistep("dpmpp_1m", 1, "dpmsolver++", order=1, about="DPM-Solver++ of order 1, which is DDIM in lambda"),
    _multistep("dpmpp_3m", 3, "dpmsolver++", order=2, about="DPM-Solver++(3M) (arXiv 2211.01095)"),
    _multistep("dpm_1m", 1, "dpmsolver", order=1, about="DPM-Solver of order 1 (arXiv 2206.00927)"),
    _multistep("dpm_2m", 2, "dpmsolver", order=2, about="DPM-Solver of order 2, multistep (arXiv 2206.00927)"),
    _multistep("dpm_3m", 3, "dpmsolver", order=2, about="DPM-Solver of order 3, multistep (arXiv 2206.00927)"),
    _multistep(
        "dpmpp_2m_sde",
        2,
        "sde-dpmsolver++",
        order=2,
        a1111=("DPM++ 2M SDE",),
        about="Stochastic DPM-Solver++(2M) (arXiv 2211.01095)",
    ),
    _multistep(
        "dpmpp_2m_sde_heun",
        2,
        "sde-dpmsolver++",
        fixed={"solver_type": "heun"},
        order=2,
        a1111=("DPM++ 2M SDE Heun",),
        about="Stochastic DPM-Solver++(2M) with the exact second-order weights (arXiv 2211.01095)",
    ),
    _multistep(
        "dpmpp_3m_sde",
        3,
        "sde-dpmsolver++",
        fixed={"third_order": "exact"},
        order=2,
        a1111=("DPM++ 3M SDE",),
        about="Stochastic DPM-Solver++(3M) (k-diffusion)",
    ),
    _singlestep("dpmpp_2s", 2, "dpmsolver++", order=2, about="DPM-Solver++(2S) (arXiv 2211.01095)"),
    _singlestep("dpmpp_3s", 3, "dpmsolver++", order=3, about="DPM-Solver++(3S) (arXiv 2211.01095)"),
    _singlestep("dpm_2s", 2, "dpmsolver", order=2, about="DPM-Solver-2 in steps of one call (arXiv 2206.00927)"),
    _singlestep("dpm_3s", 3, "dpmsolver", order=3, about="DPM-Solver-3 in steps of one call (arXiv 2206.00927)"),
)
