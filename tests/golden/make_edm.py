"""Read the tables of diffusers' EDM schedulers, and store them as edm.json.

Each case is what compile_table is given (config, steps, strength), and what make.py's `read_off` finds: start, t, scale, draws
and all unrolled rows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from make import MODULES, prepare, read_off

HERE = Path(__file__).parent
MODULES |= {"EDMEulerScheduler": "edm_euler", "EDMDPMSolverMultistepScheduler": "edm_dpmsolver_multistep"}
PLAYGROUND = {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 0.5}
COSXL = {"sigma_max": 120.0, "sigma_min": 0.002, "sigma_data": 1.0, "sigma_schedule": "exponential"}
ENDS: tuple[dict[str, Any], ...] = ({}, {"final_sigmas_type": "sigma_min"})


def configs() -> Iterator[dict[str, Any]]:
    predictions = [{"prediction_type": name} for name in ("epsilon", "v_prediction")]
    for model, prediction, end in itertools.product((PLAYGROUND, COSXL), predictions, ENDS):
        yield {"_class_name": "EDMEulerScheduler", **model, **prediction, **end}
    yield {"_class_name": "EDMEulerScheduler", "rho": 5.0, "sigma_max": 30.0, "sigma_min": 0.02}
    multistep = {"_class_name": "EDMDPMSolverMultistepScheduler"}
    for order, algorithm in itertools.product((1, 2, 3), ("dpmsolver++", "sde-dpmsolver++")):
        for solver, end in itertools.product(("midpoint", "heun"), ENDS):
            if (order, algorithm) != (3, "sde-dpmsolver++"):  # diffusers has no such update
                chosen = {"solver_order": order, "algorithm_type": algorithm, "solver_type": solver}
                yield {**multistep, **(PLAYGROUND if order > 1 else COSXL), **chosen, **end}
    for order in (2, 3):
        yield {**multistep, **PLAYGROUND, "solver_order": order, "lower_order_final": False, **ENDS[1]}
        yield {**multistep, **PLAYGROUND, "solver_order": order, "euler_at_final": True, "prediction_type": "v_prediction"}


def cases() -> Iterator[dict[str, Any]]:
    for config in configs():
        for steps, strength in ((1, None), (3, None), (16, None), (8, 0.6)):
            if steps > 1 or config.get("sigma_schedule") != "exponential":  # with one step, diffusers begins at sigma_min
                yield {"config": config, "steps": steps, "strength": strength, "options": {}}


def main() -> None:
    prepare()
    read = []
    for told in cases():
        found = read_off(told)
        if not np.isfinite(found["rows"]).all():  # solver_type heun divides by a step of no length at its end
            continue
        numbers = {"t": found["t"], "scale": found["scale"], "rows": found["rows"]}
        listed = {name: [float(f"{x:.8g}") for x in values.ravel()] for name, values in numbers.items()}
        read.append({**told, "start": [float(x) for x in found["start"]], "draws": found["draws"].tolist(), **listed})
    lines = ",\n".join(json.dumps(each) for each in read)
    (HERE / "edm.json").write_text(f'{{"diffusers": "{diffusers.__version__}", "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{len(read)} tables")


if __name__ == "__main__":
    main()
