"""The keys of scheduler_config.json that samplers read, grouped as in the diffusers classes, with their defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sdruntime.errors import SettingError, UnknownName
from sdruntime.sampling.grids import FAMILY

# The defaults are those of the diffusers classes, except that keys which only filter images (clip_sample, thresholding) are
# always false: they count only if a file sets them to true.
TRAINED: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
STABLE: Mapping[str, Any] = {**TRAINED, "beta_start": 0.00085, "beta_end": 0.012}
LEADING: Mapping[str, Any] = {"timestep_spacing": "leading", "steps_offset": 0}
LINSPACE: Mapping[str, Any] = {"timestep_spacing": "linspace", "steps_offset": 0}
PNDM: Mapping[str, Any] = {**TRAINED, **LEADING, "set_alpha_to_one": False, "skip_prk_steps": False}
SCHEDULED: Mapping[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,  # parameters of few classes; from_config passes them to the others all the same
    "sigma_max": None,
}
BY_NAME: Mapping[str, Any] = {"schedule": None, FAMILY: None}
CHURN: Mapping[str, Any] = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
ANCESTRAL: Mapping[str, Any] = {"eta": 1.0, "s_noise": 1.0}
ZERO_SNR: Mapping[str, Any] = {"rescale_betas_zero_snr": False}
FINAL: Mapping[str, Any] = {"final_sigmas_type": "zero"}
FLOW: Mapping[str, Any] = {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False}
PIXEL: Mapping[str, Any] = {"thresholding": False}
CLIP: Mapping[str, Any] = {"thresholding": False, "clip_sample": False}
DPM: Mapping[str, Any] = {
    **TRAINED,
    **SCHEDULED,
    **BY_NAME,
    **FLOW,
    **PIXEL,
    "solver_order": 2,
    "solver_type": "midpoint",
    "algorithm_type": "dpmsolver++",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
    "third_order": "diffusers",  # not in any file: the name dpmpp_3m_sde implies it
}
CONSISTENCY: Mapping[str, Any] = {
    **STABLE,
    **ZERO_SNR,
    **CLIP,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
}
FLOW_MATCH: Mapping[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0, "prediction_type": "flow_prediction"}
EDM: Mapping[str, Any] = {
    **BY_NAME,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
EDM_DPM: Mapping[str, Any] = {
    **EDM,
    **ANCESTRAL,
    **PIXEL,
    "solver_order": 2,
    "solver_type": "midpoint",
    "algorithm_type": "dpmsolver++",
    "lower_order_final": True,
    "euler_at_final": False,
    "third_order": "exact",  # not in any file; diffusers' class has no order 3 of the SDE
}
FLOW_ONLY: Mapping[str, tuple[str, ...]] = {"prediction_type": ("flow_prediction",)}

# How the model was trained: only its file sets these. A request may set every other key that its sampler reads: OPTIONS.
TRAINING = frozenset({*TRAINED, *ZERO_SNR, "sigma_data"})
OPTIONS = frozenset({
    *("timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "eta", "variance_type"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"),
    *("sigma_min", "sigma_max", "final_sigmas_type", "lambda_min_clipped"),
    *("flow_shift", "shift", "shift_terminal", "sigma_schedule", "rho"),
    *("order", "solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final", "third_order"),
    *("predict_x0", "disable_corrector", "predictor_order", "corrector_order"),
    *("original_inference_steps", "timestep_scaling"),
    *("s_churn", "s_tmin", "s_tmax", "s_noise"),
    # not expressible in a table: a request may set the one supported value, if the file has another
    *("thresholding", "clip_sample", "use_dynamic_shifting", "invert_sigmas", "stochastic_sampling"),
    *("interpolation_type", "timestep_type", "solver_p"),
})  # fmt: skip


def check_options(options: Mapping[str, Any]) -> None:
    """Raise SettingError for an option that a request may not set, or for NaN, UnknownName for one that no sampler has."""
    for key, value in options.items():
        if not isinstance(key, str):
            raise SettingError(f"option {key!r}: the name must be text")
        if key in TRAINING:
            raise SettingError(f"option {key}: the model was trained with the value in its scheduler_config.json; omit it")
        if key not in OPTIONS:
            raise UnknownName("sampler option", key, OPTIONS)
        if value != value:
            raise SettingError(f"option {key}: expected a number, got NaN")
