"""The rows of the registry: a sampler, its grid, and the keys of scheduler_config.json that it reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from sdruntime.path import consistency_grid, ddim_grid, ddpm_grid, flow_grid, pndm_grid, unipc_grid, ve_grid, vp_grid
from sdruntime.samplers.consistency import lcm, tcd
from sdruntime.samplers.ddim import ddim, ddpm
from sdruntime.samplers.deis import deis
from sdruntime.samplers.dpm import dpm_multistep, dpm_singlestep
from sdruntime.samplers.dpm_ancestral import dpmpp_2s_ancestral, dpmpp_sde
from sdruntime.samplers.kdiffusion import dpm2, dpm2_ancestral, euler, euler_ancestral, heun, lms
from sdruntime.samplers.keys import (
    BY_NAME,
    CLIP,
    CONSISTENCY,
    DPM,
    FINAL,
    FLOW,
    FLOW_MATCH,
    LEADING,
    LINSPACE,
    PIXEL,
    PNDM,
    SCHEDULED,
    STABLE,
    TRAINED,
    ZERO_SNR,
)
from sdruntime.samplers.pndm import ipndm, pndm
from sdruntime.samplers.protocol import Solver
from sdruntime.samplers.sa import sa_solver
from sdruntime.samplers.sampler import Sampler
from sdruntime.samplers.unipc import unipc


def _multistep(name: str, solver_order: int, algorithm: str, **more: Any) -> Sampler:
    """A row of the multistep DPM-Solver family; the noise-predicting ones cannot step to sigma 0 and stop before."""
    implied: dict[str, Any] = {"solver_order": solver_order, "algorithm_type": algorithm}
    if not algorithm.endswith("++"):
        implied["final_sigmas_type"] = "sigma_min"
    return Sampler(
        name=name,
        solve=dpm_multistep,
        grid=partial(vp_grid, whole_cosine_times=False),
        space="vp",
        takes_schedule=True,
        reads={**DPM, **LINSPACE, **ZERO_SNR, "use_lu_lambdas": False, "euler_at_final": False},
        options=("solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final"),
        choices={
            "solver_type": ("midpoint", "heun"),
            "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        },
        implied=implied,
        diffusers="DPMSolverMultistepScheduler",
        **more,
    )


def _singlestep(name: str, solver_order: int, algorithm: str, **more: Any) -> Sampler:
    implied: dict[str, Any] = {"solver_order": solver_order, "algorithm_type": algorithm}
    if not algorithm.endswith("++"):
        implied["final_sigmas_type"] = "sigma_min"
    return Sampler(
        name=name,
        solve=dpm_singlestep,
        grid=vp_grid,
        space="vp",
        takes_schedule=True,
        reads={**DPM, "lower_order_final": False},
        options=("solver_order", "solver_type", "algorithm_type", "lower_order_final"),
        choices={
            "solver_type": ("midpoint", "heun"),
            "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
        },
        implied=implied,
        diffusers="DPMSolverSinglestepScheduler",
        **more,
    )


def _sigmas(name: str, solve: Callable[..., Solver], diffusers: str | None, **more: Any) -> Sampler:
    """A row of the k-diffusion family, with the keys that all its diffusers classes read."""
    reads = {**TRAINED, **LINSPACE, **BY_NAME, **more.pop("reads")}
    return Sampler(
        **{"grid": ve_grid, **more},
        name=name,
        solve=solve,
        space="ve",
        takes_schedule=True,
        reads=reads,
        diffusers=diffusers,
    )


ROWS = (
    Sampler(
        name="ddim",
        solve=ddim,
        grid=ddim_grid,
        space="vp",
        order=1,
        reads={**TRAINED, **LEADING, **ZERO_SNR, **CLIP, "set_alpha_to_one": True, "eta": 0.0},
        options=("eta",),
        diffusers="DDIMScheduler",
        a1111=("DDIM",),
        about="Denoising diffusion implicit models (arXiv 2010.02502)",
    ),
    Sampler(
        name="ddpm",
        solve=ddpm,
        grid=ddpm_grid,
        space="vp",
        order=1,
        reads={**TRAINED, **LEADING, **ZERO_SNR, **CLIP, "variance_type": "fixed_small"},
        options=("variance_type",),
        diffusers="DDPMScheduler",
        about="Denoising diffusion probabilistic models (arXiv 2006.11239)",
    ),
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
        about="PNDM without the Runge-Kutta start, as Stable Diffusion 1 was published with (arXiv 2202.09778)",
    ),
    Sampler(
        name="ipndm",
        solve=ipndm,
        grid=ddim_grid,
        space="vp",
        order=2,
        reads={**TRAINED, **LEADING, **ZERO_SNR, "set_alpha_to_one": True},
        about="PNDM begun with lower orders, on the checkpoint's own schedule (arXiv 2204.13902)",
    ),
    _sigmas(
        "euler",
        euler,
        "EulerDiscreteScheduler",
        order=1,
        reads={
            **SCHEDULED,
            **ZERO_SNR,
            **FINAL,
            "sigma_min": None,
            "sigma_max": None,
            "interpolation_type": "linear",
            "timestep_type": "discrete",
        },
        a1111=("Euler",),
        about="Euler's method in sigma (arXiv 2206.00364)",
    ),
    _sigmas(
        "euler_a",
        euler_ancestral,
        "EulerAncestralDiscreteScheduler",
        order=1,
        reads=ZERO_SNR,
        a1111=("Euler a", "Euler Ancestral"),
        about="Euler with ancestral noise (k-diffusion)",
    ),
    _sigmas(
        "heun",
        heun,
        "HeunDiscreteScheduler",
        order=2,
        reads={**STABLE, **SCHEDULED, "clip_sample": False},
        a1111=("Heun",),
        about="Heun's method in sigma, two model calls a step (arXiv 2206.00364)",
    ),
    _sigmas(
        "dpm2",
        dpm2,
        "KDPM2DiscreteScheduler",
        order=2,
        grid=partial(ve_grid, whole_karras_times=True),
        reads={**STABLE, **SCHEDULED},
        a1111=("DPM2",),
        about="DPM-Solver-2 in sigma, two model calls a step (arXiv 2206.00927)",
    ),
    _sigmas(
        "dpm2_a",
        dpm2_ancestral,
        "KDPM2AncestralDiscreteScheduler",
        order=2,
        grid=partial(ve_grid, whole_karras_times=True),
        reads={**STABLE, **SCHEDULED},
        a1111=("DPM2 a", "DPM2 Ancestral"),
        about="DPM-Solver-2 with ancestral noise (k-diffusion)",
    ),
    _sigmas(
        "lms",
        lms,
        "LMSDiscreteScheduler",
        order=2,
        reads={**SCHEDULED, "order": 4},
        options=("order",),
        a1111=("LMS",),
        about="Linear multistep of order 4 in sigma (k-diffusion)",
    ),
    _sigmas(
        "dpmpp_2s_a",
        dpmpp_2s_ancestral,
        None,
        order=2,
        reads=SCHEDULED,
        a1111=("DPM++ 2S a", "DPM++ 2S Ancestral"),
        about="DPM-Solver++(2S) with ancestral noise, two model calls a step (k-diffusion)",
    ),
    _sigmas(
        "dpmpp_sde",
        dpmpp_sde,
        "DPMSolverSDEScheduler",
        order=2,
        reads={**STABLE, **SCHEDULED},
        a1111=("DPM++ SDE",),
        about="Stochastic DPM-Solver++, two model calls a step (k-diffusion)",
    ),
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
        "dpmpp_3m_sde",
        3,
        "sde-dpmsolver++",
        order=2,
        a1111=("DPM++ 3M SDE",),
        about="Stochastic DPM-Solver++(3M) (k-diffusion)",
    ),
    _singlestep("dpmpp_2s", 2, "dpmsolver++", order=2, about="DPM-Solver++(2S) (arXiv 2211.01095)"),
    _singlestep("dpmpp_3s", 3, "dpmsolver++", order=3, about="DPM-Solver++(3S) (arXiv 2211.01095)"),
    _singlestep("dpm_2s", 2, "dpmsolver", order=2, about="DPM-Solver-2 in steps of one call (arXiv 2206.00927)"),
    _singlestep("dpm_3s", 3, "dpmsolver", order=3, about="DPM-Solver-3 in steps of one call (arXiv 2206.00927)"),
    Sampler(
        name="unipc",
        solve=unipc,
        grid=unipc_grid,
        space="vp",
        order=2,
        takes_schedule=True,
        reads={
            **TRAINED,
            **LINSPACE,
            **SCHEDULED,
            **BY_NAME,
            **ZERO_SNR,
            **FINAL,
            **FLOW,
            **PIXEL,
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "lower_order_final": True,
            "disable_corrector": (),
            "solver_p": None,
            "sigma_min": None,
            "sigma_max": None,
            "shift_terminal": None,
        },
        options=("solver_order", "solver_type", "predict_x0", "lower_order_final", "disable_corrector"),
        choices={"solver_type": ("bh1", "bh2")},
        diffusers="UniPCMultistepScheduler",
        a1111=("UniPC",),
        about="Unified predictor-corrector (arXiv 2302.04867)",
    ),
    Sampler(
        name="deis",
        solve=deis,
        grid=partial(vp_grid, final="sigma_min"),
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
    Sampler(
        name="sa_solver",
        solve=sa_solver,
        grid=partial(vp_grid, final="sigma_min"),
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
            "predictor_order": 2,
            "corrector_order": 2,
            "algorithm_type": "data_prediction",
            "lower_order_final": True,
            "lambda_min_clipped": -math.inf,
            "variance_type": None,
        },
        options=("predictor_order", "corrector_order", "algorithm_type", "lower_order_final"),
        choices={"algorithm_type": ("data_prediction", "noise_prediction")},
        diffusers="SASolverScheduler",
        about="Stochastic Adams predictor-corrector (arXiv 2309.05019)",
    ),
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
        reads={**CONSISTENCY, "eta": 0.3},
        options=("eta",),
        diffusers="TCDScheduler",
        about="Trajectory consistency distillation (arXiv 2402.19159)",
    ),
    Sampler(
        name="flow_euler",
        solve=euler,
        grid=flow_grid,
        space="flow",
        order=1,
        takes_schedule=True,
        reads={
            **FLOW_MATCH,
            **SCHEDULED,
            **BY_NAME,
            "shift_terminal": None,
            "use_dynamic_shifting": False,
            "invert_sigmas": False,
            "stochastic_sampling": False,
        },
        diffusers="FlowMatchEulerDiscreteScheduler",
        about="Euler's method on a rectified flow (arXiv 2403.03206)",
    ),
    Sampler(
        name="flow_heun",
        solve=heun,
        grid=flow_grid,
        space="flow",
        order=2,
        takes_schedule=True,
        reads={**FLOW_MATCH, **BY_NAME},
        diffusers="FlowMatchHeunDiscreteScheduler",
        about="Heun's method on a rectified flow, two model calls a step (arXiv 2403.03206)",
    ),
)
