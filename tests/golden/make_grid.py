"""The wide grid: some 2,000 generated settings, read off diffusers' schedulers as make.py does, and stored as grid.npz.

Each class has axes: the betas, the spacing, the sigma schedule, bounds that a sibling wrote, solver options, 1 to 999 steps, ...
An axis is a list of values, each a piece of a config. `covering` combines them so that every value of an axis meets every value
of every other axis; nothing is picked by hand.

A case is read twice: in float32, as diffusers computes, and in float64 from diffusers' own float32 noise levels. The second is
stored, so that 1e-5 can be held for 999 steps as well; `rounding` is how far diffusers' float32 is from it (up to 100 steps).

grid.npz holds

    cases     JSON, a list: config, sampler, steps, strength, options; calls, rounding; `why` diffusers itself fails, if it does.
              Its text-to-image pipelines look their first step up by its timestep, which fails where two steps share it:
              then `placed` is true, the first step's index was given as its image-to-image pipelines do, and `why` is kept.
    numbers   float32, one after another for each case that could be read: start [2], t, scale, draws [calls], and of the rows
              in kept_rows the columns in kept_columns (layout.py)
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from layout import kept_columns, kept_rows
from make import MODULES, STABLE, difference, prepare, read_off

HERE = Path(__file__).parent
STEPS = (1, 2, 3, 4, 5, 7, 10, 12, 14, 15, 20, 25, 30, 50, 100, 250, 500, 999)
Piece = Mapping[str, Any]

LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
BETAS: list[Piece] = [
    STABLE,
    {**STABLE, **LINEAR},
    {**STABLE, **COSINE},
    {**STABLE, **COSINE, "num_train_timesteps": 500},
    {**STABLE, "num_train_timesteps": 1234},
]
ZERO_SNR = {"rescale_betas_zero_snr": True}
PREDICTIONS: list[Piece] = [{"prediction_type": kind} for kind in ("epsilon", "v_prediction", "sample")]
SPACINGS: list[Piece] = [
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
]
SCHEDULES: list[Piece] = [{}, *({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta"))]
# What EulerDiscrete and UniPC have in __init__, others find among the keys that from_config keeps; the last are EDM's.
BOUNDS: list[Piece] = [
    {},
    {"sigma_min": 0.1, "sigma_max": 10.0},
    {"sigma_max": 30.0},
    {"sigma_min": 0.03},
    {"sigma_min": 0.002, "sigma_max": 80.0},
]
FINAL: list[Piece] = [{}, {"final_sigmas_type": "sigma_min"}]
FLOW: list[Piece] = [
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": s} for s in (0.5, 1.0, 3.0, 7.0)
]
STRENGTHS: list[Piece] = [{}, {"strength": 0.6}]
SIBLING: list[Piece] = [{}, {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}]


def switch(key: str, *values: Any) -> list[Piece]:
    return [{key: value} for value in values]


def option(key: str, *values: Any) -> list[Piece]:
    return [{"options": {key: value}} for value in values]


VE_AXES = [SPACINGS, SCHEDULES, BOUNDS]
VP_GRIDS = [*SPACINGS, *SCHEDULES[1:], *FLOW]
NOT_LAST = switch("lower_order_final", True, False)
NOISE = [{"algorithm_type": kind, **FINAL[1]} for kind in ("dpmsolver", "sde-dpmsolver")]  # cannot step to sigma 0
DATA = [{"algorithm_type": kind, **final} for kind in ("dpmsolver++", "sde-dpmsolver++") for final in FINAL]
DPM_AXES = [
    *(BOUNDS, STRENGTHS),
    switch("solver_order", 1, 2, 3),
    switch("solver_type", "midpoint", "heun"),
    switch("lambda_min_clipped", -math.inf, -5.1),
]
AXES: Mapping[str, list[list[Piece]]] = {
    "DDIMScheduler": [SPACINGS, STRENGTHS, switch("set_alpha_to_one", True, False), option("eta", 0.0, 0.5, 1.0)],
    "DDPMScheduler": [SPACINGS, STRENGTHS, BOUNDS, switch("variance_type", "fixed_small", "fixed_large", "fixed_small_log")],
    "PNDMScheduler": [SPACINGS, STRENGTHS, switch("set_alpha_to_one", True, False), switch("skip_prk_steps", True, False)],
    "LMSDiscreteScheduler": [*VE_AXES, option("order", 1, 2, 3, 4)],
    "EulerDiscreteScheduler": [*VE_AXES, STRENGTHS, FINAL],
    "EulerAncestralDiscreteScheduler": [SPACINGS, STRENGTHS, BOUNDS],
    "HeunDiscreteScheduler": [*VE_AXES, STRENGTHS],
    "KDPM2DiscreteScheduler": [*VE_AXES, STRENGTHS],
    "KDPM2AncestralDiscreteScheduler": [*VE_AXES, STRENGTHS],
    "DPMSolverSDEScheduler": [*VE_AXES, STRENGTHS],
    "DPMSolverMultistepScheduler": [
        [*VP_GRIDS, {"use_lu_lambdas": True}],
        [*DATA, *NOISE],
        [*NOT_LAST, {"euler_at_final": True}],
        *DPM_AXES,
    ],
    "DPMSolverSinglestepScheduler": [[{}, *VP_GRIDS[4:]], [*DATA, NOISE[0]], NOT_LAST, *DPM_AXES],
    "UniPCMultistepScheduler": [
        *(BOUNDS, STRENGTHS),
        [*VP_GRIDS, {**FLOW[2], "shift_terminal": 0.1}],
        switch("solver_order", 1, 2, 3),
        switch("solver_type", "bh2", "bh1"),
        [*FINAL, {"predict_x0": False, **FINAL[1]}],
        NOT_LAST,
        switch("disable_corrector", [], [0], [1, 2]),
    ],
    "DEISMultistepScheduler": [BOUNDS, STRENGTHS, VP_GRIDS, switch("solver_order", 1, 2, 3), NOT_LAST],
    "SASolverScheduler": [
        *(BOUNDS, STRENGTHS, VP_GRIDS),
        [{"predictor_order": p, "corrector_order": c} for p, c in ((2, 2), (1, 1), (1, 2), (2, 1), (3, 3), (3, 4))],
        switch("algorithm_type", "data_prediction", "noise_prediction"),
        NOT_LAST,
    ],
    "LCMScheduler": [STRENGTHS, switch("original_inference_steps", 50, 100), switch("timestep_scaling", 10.0, 7.0)],
    "TCDScheduler": [STRENGTHS, switch("original_inference_steps", 50, 100), option("eta", 0.0, 0.3, 1.0)],
    "FlowMatchEulerDiscreteScheduler": [STRENGTHS, SCHEDULES, BOUNDS, switch("shift_terminal", None, 0.1)],
    "FlowMatchHeunDiscreteScheduler": [STRENGTHS],
}
NO_SAMPLE = (
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
READS_ZERO_SNR = (
    *("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "LCMScheduler", "TCDScheduler"),
)


def axes_of(name: str) -> list[list[Piece]]:
    if name.startswith("FlowMatch"):
        trained = [{}, {"num_train_timesteps": 500}]
        return [switch("steps", *STEPS), switch("shift", 0.5, 1.0, 3.0, 7.0), trained, *AXES[name]]
    betas = [*BETAS, {**STABLE, **ZERO_SNR}] if name in READS_ZERO_SNR else BETAS
    predictions = PREDICTIONS[:2] if name in NO_SAMPLE else PREDICTIONS
    return [switch("steps", *STEPS), betas, predictions, SIBLING, *AXES[name]]


def covering(axes: Sequence[Sequence[Any]], dice: random.Random) -> list[list[int]]:
    """Rows of indices, one an axis, in which every two values of any two axes occur together."""
    wanted = {
        ((a, i), (b, j))
        for a, first in enumerate(axes)
        for b, second in enumerate(axes[a + 1 :], a + 1)
        for i in range(len(first))
        for j in range(len(second))
    }
    order = sorted(wanted)
    dice.shuffle(order)
    rows = []
    for pair in order:
        if pair not in wanted:
            continue
        row = dict(pair)
        for axis in dice.sample(range(len(axes)), len(axes)):
            if axis in row:
                continue
            gains = [sum(tuple(sorted((each, (axis, i)))) in wanted for each in row.items()) for i in range(len(axes[axis]))]
            best = [i for i, gain in enumerate(gains) if gain == max(gains)]
            row[axis] = dice.choice(best)
        placed = sorted(row.items())
        wanted -= {(one, other) for k, one in enumerate(placed) for other in placed[k + 1 :]}
        rows.append([row[axis] for axis in range(len(axes))])
    return rows


def cases() -> list[dict[str, Any]]:
    """What compile_table is given, and diffusers as well."""
    found = []
    for name in MODULES:
        axes, dice = axes_of(name), random.Random(name)
        rows: list[list[int]] = []
        while len(rows) < 90:
            rows += covering(axes, dice)
        for row in rows:
            config: dict[str, Any] = {}
            for axis, i in zip(axes, row, strict=True):
                config |= axis[i]
            found.append(fitting(name, config))
    found += [fitting(name, config) for name, config in failing()]
    return list({json.dumps(case): case for case in found}.values())


def fitting(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """One case; what its axes cannot have together is mended."""
    told = {key: config.pop(key, default) for key, default in (("steps", 0), ("strength", None), ("options", {}))}
    told["steps"] = min(told["steps"], config.get("num_train_timesteps", 1000) - 1)
    if name in ("LCMScheduler", "TCDScheduler"):
        told["steps"] = min(told["steps"], config["original_inference_steps"])
    if name == "PNDMScheduler" and not config["skip_prk_steps"]:  # tables.npz has what diffusers makes of it otherwise
        told |= {"steps": max(told["steps"], 4), "strength": None}
    if told["strength"] is not None and told["steps"] * told["strength"] < 1:
        told["strength"] = None
    if config.get("rescale_betas_zero_snr") and config["prediction_type"] == "epsilon":
        config["prediction_type"] = "v_prediction"
    if config.get("use_flow_sigmas"):
        config["prediction_type"] = "flow_prediction"
    return {"config": {"_class_name": config.pop("_class_name", name), **config}, "sampler": name, **told}


def failing() -> Iterator[tuple[str, dict[str, Any]]]:
    """What diffusers cannot do, or does with a NaN."""
    for steps in (1, 5, 20):
        base = {**STABLE, "prediction_type": "epsilon", "steps": steps}
        yield "DDPMScheduler", {**base, "variance_type": "fixed_large_log"}
        for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"):
            yield name, {**base, "algorithm_type": "dpmsolver"}
            yield name, {**base, "algorithm_type": "sde-dpmsolver++", **FINAL[1], **SCHEDULES[1], "sigma_min": 0.002}
        yield "UniPCMultistepScheduler", {**base, "predict_x0": False}
        yield "UniPCMultistepScheduler", {**base, "solver_type": "bh1"}
        for name in (
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "DEISMultistepScheduler",
            "SASolverScheduler",
        ):
            for schedule in SCHEDULES[1:]:
                yield name, {**base, **schedule, **FLOW[1]}


def read(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The case with `rounding` or `why`, and what is read off diffusers, or None where it gives nothing."""
    why = None
    for placed in ({}, {"placed": True}):
        try:
            exact = read_off({**case, **placed}, torch.float64)
            plain = read_off({**case, **placed}) if case["steps"] <= 100 else exact
        except Exception as error:  # whatever it is, it goes on the list
            why = why or f"{type(error).__name__}: {error}"
            continue
        if not np.isfinite(plain["rows"]).all():
            return {**case, "why": why or "not finite"}, None
        scale = np.abs(plain["rows"]).max(1)
        rounding = float((np.abs(plain["rows"] - exact["rows"]).max(1) / scale).max())
        told = {"calls": len(exact["t"]), "rounding": float(f"{rounding:.1e}")}
        return {**case, **placed, **told, **({"why": why} if why else {})}, exact
    return {**case, "why": why}, None


def main() -> None:
    prepare()
    told, numbers = [], []
    for case in cases():
        entry, found = read(case)
        told.append(entry)
        if found is None:
            continue
        numbers += [found["start"], found["t"], found["scale"], found["draws"]]
        numbers += [found["rows"][row][kept_columns(row, found["draws"])] for row in kept_rows(entry["calls"])]
        if (error := difference(entry, found)) > 1e-5:
            print(f"{error:.1e}: {json.dumps(entry)}")
    flat = np.concatenate([np.asarray(part, np.float64) for part in numbers]).astype(np.float32)
    np.savez_compressed(HERE / "grid.npz", numbers=flat, cases=json.dumps(told), diffusers=diffusers.__version__)
    print(f"{len(told)} settings in {flat.size} numbers; {sum('calls' not in entry for entry in told)} that diffusers cannot do")


if __name__ == "__main__":
    main()
