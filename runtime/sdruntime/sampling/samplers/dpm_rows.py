"""The registry's rows of the DPM-Solver family: many names for two diffusers classes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sdruntime.sampling.grids import vp_grid
from sdruntime.sampling.samplers.dpm import dpm_multistep, dpm_singlestep
from sdruntime.sampling.samplers.keys import DPM, LINSPACE, ZERO_SNR
from sdruntime.sampling.samplers.sampler import Sampler


def _solver(order: int, algorithm: str) -> dict[str, Any]:
    """What a name of the DPM-Solver family fixes; those that predict noise cannot step to sigma 0 and stop before."""
    fixed: dict[str, Any] = {"solver_order": order, "algorithm_type": algorithm}
    return fixed if algorithm.endswith("++") else {**fixed, "final_sigmas_type": "sigma_min"}


def _multistep(name: str, solver_order: int, algorithm: str, *, fixed: Mapping[str, Any] | None = None, **more: Any) -> Sampler:
    return Sampler(
        name=name,
        solve=dpm_multistep,
        grid=partial(vp_grid, whole_cosine_times=False),
        space="vp",
        takes_schedule=True,
        reads={**DPM, **LINSPACE, **ZERO_SNR, "use_lu_lambdas": False, "euler_at_final": False},
        options=("solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final", "third_order"),
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


DPM_ROWS = (
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
