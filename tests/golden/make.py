"""Read the tables of coefficients off diffusers' own schedulers, and store them: the script behind `make golden`.

A scheduler is linear in its sample, the model's outputs and the noise. So it is run with a unit vector in the place of
each: the sample starts as e[0], call i is answered with e[1 + i], and draw k of its module's `randn_tensor` gives
e[1 + calls + k]. What it returns after each step is that x over (x[0], all m, all n): an unrolled row.

Needs torch, diffusers and scipy (diffusers' LMS and its beta schedule import it). Writes tables.npz beside itself:

    cases     JSON, a list: config, what compile_table is given, calls, and the rows that are kept
    refused   JSON, a list: the same, with what diffusers raised, or "not finite"
    numbers   float32, one after another for each case: start [2], t, scale, draws [calls], rows (cut behind row i's
              last possible entry: x[0], m[0 … i-1], n[0 … draws so far])

All rows are kept for up to 12 calls; beyond, rows 1 to 4, the middle one and the last two. All are compared here, and
what differs by more than 1e-5 is printed, with its error against diffusers' own arithmetic done in float64.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import json
import math
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

HERE = Path(__file__).parent
STEPS = (1, 2, 3, 4, 10, 25, 50)
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
MODULES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "LMSDiscreteScheduler": "lms_discrete",
    "EulerDiscreteScheduler": "euler_discrete",
    "EulerAncestralDiscreteScheduler": "euler_ancestral_discrete",
    "HeunDiscreteScheduler": "heun_discrete",
    "KDPM2DiscreteScheduler": "k_dpm_2_discrete",
    "KDPM2AncestralDiscreteScheduler": "k_dpm_2_ancestral_discrete",
    "DPMSolverMultistepScheduler": "dpmsolver_multistep",
    "DPMSolverSinglestepScheduler": "dpmsolver_singlestep",
    "DPMSolverSDEScheduler": "dpmsolver_sde",
    "UniPCMultistepScheduler": "unipc_multistep",
    "DEISMultistepScheduler": "deis_multistep",
    "SASolverScheduler": "sasolver",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
    "FlowMatchEulerDiscreteScheduler": "flow_match_euler_discrete",
    "FlowMatchHeunDiscreteScheduler": "flow_match_heun_discrete",
}
# What schedulers keep in float32, and compute coefficients from.
FLOAT32 = (
    *("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "betas", "alphas", "alphas_cumprod", "final_alpha_cumprod", "one"),
    *("alpha_t", "sigma_t", "lambda_t"),
)
SPACED = [name for name in MODULES if not name.startswith(("FlowMatch", "LCM", "TCD", "DPMSolverSingle"))]
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}


def variants() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(class, config, options of the step) that go through the whole matrix of predictions, spacings and steps."""
    for name in MODULES:
        if name == "PNDMScheduler":
            yield name, {"skip_prk_steps": True}, {}
            yield name, {"skip_prk_steps": False}, {}
        elif name == "DDIMScheduler":
            yield name, {"set_alpha_to_one": False}, {}
            yield name, {}, {"eta": 1.0}
        elif name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"):
            for order in (1, 2, 3):
                yield name, {"solver_order": order}, {}
            yield name, {"algorithm_type": "dpmsolver", **SIGMA_MIN}, {}
            yield name, {"algorithm_type": "sde-dpmsolver++"}, {}
        elif name in ("UniPCMultistepScheduler", "DEISMultistepScheduler"):
            for order in (1, 2, 3):
                yield name, {"solver_order": order}, {}
        else:
            yield name, {}, {}


def minor_variants() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(class, config, options) that go through fewer steps, in epsilon and one spacing."""
    multi, single, unipc = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"
    for order, algorithm in itertools.product((1, 2, 3), ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")):
        final = {} if algorithm.endswith("++") else SIGMA_MIN
        for solver in ("midpoint", "heun"):
            told = {"solver_order": order, "algorithm_type": algorithm, "solver_type": solver, **final}
            yield multi, told, {}
            if algorithm != "sde-dpmsolver":
                yield single, told, {}
    for order in (2, 3):
        yield multi, {"solver_order": order, "lower_order_final": False}, {}
        yield multi, {"solver_order": order, "euler_at_final": True, **SIGMA_MIN}, {}
        yield multi, {"solver_order": order, **SIGMA_MIN}, {}
        yield single, {"solver_order": order, "lower_order_final": True, **SIGMA_MIN}, {}
        yield single, {"solver_order": order, **SIGMA_MIN}, {}
        yield unipc, {"solver_order": order, "lower_order_final": False}, {}
        yield unipc, {"solver_order": order, "solver_type": "bh1"}, {}
        yield unipc, {"solver_order": order, "predict_x0": False, **SIGMA_MIN}, {}
        yield unipc, {"solver_order": order, "disable_corrector": [1, 2]}, {}
        yield "DEISMultistepScheduler", {"solver_order": order, "lower_order_final": False}, {}
    yield multi, {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}, {}
    yield single, {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}, {}
    for predictor, corrector in ((1, 1), (1, 2), (2, 1), (3, 3), (3, 4)):
        orders = {"predictor_order": predictor, "corrector_order": corrector}
        yield "SASolverScheduler", orders, {}
        yield "SASolverScheduler", {**orders, "algorithm_type": "noise_prediction"}, {}
    yield "EulerDiscreteScheduler", SIGMA_MIN, {}
    yield "DDPMScheduler", {"variance_type": "fixed_large"}, {}
    yield "DDPMScheduler", {"variance_type": "fixed_small_log"}, {}
    yield "DDIMScheduler", {}, {"eta": 0.4}
    yield "LMSDiscreteScheduler", {}, {"order": 2}
    yield "TCDScheduler", {}, {"eta": 0.0}
    yield "TCDScheduler", {}, {"eta": 1.0}
    yield "LCMScheduler", {"original_inference_steps": 100, "timestep_scaling": 7.0}, {}
    for name in MODULES:
        if not name.startswith("FlowMatch"):
            yield name, {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}, {}
            yield name, {"beta_schedule": "squaredcos_cap_v2"}, {}
            yield name, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {}
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
        for name in SPACED:
            for betas in ("scaled_linear", "squaredcos_cap_v2") if key == "use_karras_sigmas" else ("scaled_linear",):
                yield name, {key: True, "beta_schedule": betas}, {}
    yield single, {"use_karras_sigmas": True}, {}
    yield "EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}, {}
    for shift, key in itertools.product((1.0, 3.0), ("", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")):
        yield "FlowMatchEulerDiscreteScheduler", {"shift": shift, **({key: True} if key else {})}, {}
    yield "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.1}, {}
    yield "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {}
    for name in (multi, single, unipc, "DEISMultistepScheduler"):
        for shift in (1.0, 3.0):
            yield name, {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}, {}
    yield unipc, {"use_flow_sigmas": True, "flow_shift": 3.0, "shift_terminal": 0.1, "prediction_type": "flow_prediction"}, {}


def cases() -> Iterator[dict[str, Any]]:
    """What compile_table is given, and diffusers as well: config, steps, strength, options."""
    for name, config, options in variants():
        flow = name.startswith("FlowMatch")
        for prediction in ("flow_prediction",) if flow else ("epsilon", "v_prediction", "sample"):
            for spacing in ("leading", "trailing", "linspace") if name in SPACED else ("leading",):
                for steps in STEPS:
                    told = {"prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": 1}
                    yield case(name, {**STABLE, **told, **config} if not flow else config, steps, options)
        for strength, steps in itertools.product((0.3, 0.75, 1.0), (10, 20)):
            told = {"timestep_spacing": "leading", "steps_offset": 1}
            yield case(name, {**STABLE, **told, **config} if not flow else config, steps, options, strength)
    for name, config, options in minor_variants():
        base = {} if name.startswith("FlowMatch") else {**STABLE, "timestep_spacing": "linspace"}
        for steps in (2, 5, 20):
            yield case(name, {**base, **config}, steps, options)


def case(name: str, config: dict[str, Any], steps: int, options: dict[str, Any], strength: float | None = None) -> dict[str, Any]:
    return {"config": {"_class_name": name, **config}, "steps": steps, "strength": strength, "options": options}


class Brownian:
    """In place of DPMSolverSDE's noise sampler: fresh noise for the first of two nested intervals in sigma, and for the
    second what it shares with the first beside fresh noise."""

    def __init__(self, *_: Any) -> None:
        self.inner: tuple[float, float, torch.Tensor] | None = None

    def __call__(self, sigma: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        fresh = Brownian.fresh()
        if self.inner is None:
            self.inner = float(sigma), float(after), fresh
            return fresh
        high, middle, first = self.inner
        self.inner = None
        rho = (high - middle) / (high - float(after))
        return math.sqrt(rho) * first + math.sqrt(1 - rho) * fresh


def read_off(told: dict[str, Any], kind: torch.dtype = torch.float32) -> dict[str, Any]:
    """start, t, scale, draws, and all unrolled rows [calls + 1, 1 + calls + draws] of one case.

    `sigmas` of a case are in the place of its `steps`.

    With torch.float64 the noise levels, as diffusers rounds them, and all that is computed from them are of that type.
    """
    config = dict(told["config"])
    name = told.get("sampler") or config["_class_name"]
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    made = getattr(module, name)
    scheduler = made.from_config({**config, **unclipped(set(inspect.signature(made.__init__).parameters))})
    if "sigmas" in told:
        scheduler.set_timesteps(sigmas=told["sigmas"])
    else:
        scheduler.set_timesteps(told["steps"])
    for name in FLOAT32:
        if isinstance(held := getattr(scheduler, name, None), torch.Tensor):
            setattr(scheduler, name, held.to(kind))
    begin = 0
    if told["strength"] is not None:
        steps = told.get("steps", len(scheduler.timesteps))
        begin = steps - min(int(steps * told["strength"]), steps)
    times = scheduler.timesteps[begin * scheduler.order :]
    if (told["strength"] is not None or told.get("placed")) and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin * scheduler.order)
    start = (0.0, float(getattr(scheduler, "init_noise_sigma", 1.0)))
    if told["strength"] is not None:
        start = noised(scheduler, times[:1])

    room = 1 + 3 * len(times)
    drawn = 0

    def fresh(*_: Any, **__: Any) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        return unit(len(times) + drawn)

    def unit(place: int) -> torch.Tensor:
        vector = torch.zeros(1, room, dtype=kind)
        vector[0, place] = 1.0
        return vector

    module.randn_tensor = fresh
    Brownian.fresh = fresh
    x = unit(0)
    scales, draws, rows = [], [], []
    for i, t in enumerate(times):
        rows.append(x[0].numpy().astype(np.float64))
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        widest = int(x.abs().argmax())
        scales.append(float(shown[0, widest] / x[0, widest]))
        before = drawn
        x = scheduler.step(unit(1 + i), t, x, **told["options"]).prev_sample
        draws.append(drawn - before)
    rows.append(x[0].numpy().astype(np.float64))
    arrays = {
        "t": [float(t) for t in times],
        "scale": scales,
        "draws": draws,
        "rows": np.array(rows)[:, : 1 + len(times) + drawn],
    }
    return {"start": start, **{name: np.array(values) for name, values in arrays.items()}}


def noised(scheduler: Any, time: torch.Tensor) -> tuple[float, float]:
    add = getattr(scheduler, "add_noise", None)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    if add is None:
        return float(scheduler.scale_noise(one, time, zero)), float(scheduler.scale_noise(zero, time, one))
    return float(add(one, zero, time)), float(add(zero, one, time))


def unclipped(reads: set[str]) -> dict[str, Any]:
    return {"clip_sample": False} if "clip_sample" in reads else {}


def kept_rows(calls: int) -> list[int]:
    if calls <= 12:
        return list(range(1, calls + 1))
    return sorted({1, 2, 3, 4, calls // 2, calls - 1, calls})


def row_width(row: int, draws: np.ndarray) -> list[int]:
    """Columns of an unrolled row that can hold anything: x[0], m before the row, n drawn before it."""
    calls = len(draws)
    return [*range(1 + row), *range(1 + calls, 1 + calls + int(draws[:row].sum()))]


def difference(told: dict[str, Any], found: dict[str, Any]) -> float:
    """The largest error of any unrolled row, with that of t, scale and start folded in; infinite where calls differ."""
    from sdruntime.errors import SettingError
    from sdruntime.sampling.compile import compile_table

    name = told.get("sampler") or told["config"]["_class_name"]
    options = {"eta": 0.3, **told["options"]} if name == "TCDScheduler" else told["options"]  # the class's own default
    try:
        table = compile_table(told["config"], sampler=name, steps=told["steps"], strength=told["strength"], **options)
    except SettingError:
        return math.inf
    if table.draws.tolist() != found["draws"].tolist():
        return math.inf
    rows = np.abs(table.unrolled() - found["rows"]).max(1) / np.abs(found["rows"]).max(1)
    scale, start = np.abs(table.scale / found["scale"] - 1), np.abs(np.subtract(table.start, found["start"]))
    return float(max(rows.max(), scale.max(), start.max() / max(found["start"]), np.abs(table.t - found["t"]).max() * 1e-3))


def prepare() -> None:
    """Make diffusers' schedulers importable and quiet, DPMSolverSDE's noise plain, and square roots exact."""
    if importlib.util.find_spec("scipy") is None:
        sys.exit("make golden needs scipy, which diffusers' LMS and beta schedule import: pip install scipy")
    torchsde = types.ModuleType("torchsde")  # its Brownian tree is not used here, diffusers only wants to import it
    torchsde.__spec__ = importlib.machinery.ModuleSpec("torchsde", None)
    sys.modules.setdefault("torchsde", torchsde)
    importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").BrownianTreeNoiseSampler = Brownian
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    exact_roots()


def exact_roots() -> None:
    """Round torch's float32 square roots as IEEE 754 says: on some CPUs every sixth is an ulp off (by MKL).

    Over a thousand steps, or in a difference of near equals, that ulp is 1e-4 of a row and more.
    """
    root, power = torch.Tensor.sqrt, torch.Tensor.__pow__

    def exact(x: torch.Tensor) -> torch.Tensor:
        return root(x.double()).to(x.dtype)

    torch.sqrt = torch.Tensor.sqrt = exact
    torch.Tensor.__pow__ = lambda x, exponent: exact(x) if exponent == 0.5 else power(x, exponent)


def main() -> None:
    prepare()
    kept, refused, numbers = [], [], []
    for told in cases():
        try:
            found = read_off(told)
            why = None if np.isfinite(found["rows"]).all() else "not finite"
        except Exception as error:  # whatever it is, it goes on the list
            why = type(error).__name__
        if why is not None:
            refused.append({**told, "why": why})
            continue
        rows = kept_rows(len(found["t"]))
        kept.append({**told, "calls": len(found["t"]), "rows": rows})
        numbers += [found["start"], found["t"], found["scale"], found["draws"]]
        numbers += [found["rows"][row][row_width(row, found["draws"])] for row in rows]
        error = difference(told, found)
        if error > 1e-5:
            print(f"{error:.1e}, in float64 {difference(told, read_off(told, torch.float64)):.1e}: {json.dumps(told)}")
    flat = np.concatenate([np.asarray(part, np.float64) for part in numbers]).astype(np.float32)
    told = {"cases": json.dumps(kept), "refused": json.dumps(refused), "diffusers": diffusers.__version__}
    np.savez_compressed(HERE / "tables.npz", numbers=flat, **told)
    print(f"{len(kept)} tables in {flat.size} numbers; {len(refused)} that diffusers refuses or makes not finite")


if __name__ == "__main__":
    main()
