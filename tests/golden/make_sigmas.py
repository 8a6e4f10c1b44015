"""Read the tables of noise levels of the caller's off diffusers' schedulers that take `sigmas`, and store them as sigmas.json.

Each case is what compile_table is given (config, sigmas, strength), and what make.py's `read_off` finds: start, t, scale and all
unrolled rows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
from make import STABLE, prepare, read_off

HERE = Path(__file__).parent
EULER: tuple[list[float], ...] = (
    [14.6146, 9.5, 5.25, 2.0, 0.7, 0.1, 0.0],
    [20.0, 3.0, 0.5, 0.02],  # beyond the trained levels at both ends, and not to 0
    [1.5, 0.0],
)
FLOW = ([1.0, 0.85, 0.6, 0.35, 0.1], [0.7, 0.2], [0.9])
EULER_CONFIGS: tuple[dict[str, Any], ...] = (
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"timestep_spacing": "linspace", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},  # neither counts
    {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"timestep_spacing": "leading", "use_beta_sigmas": True, "sigma_max": 12.0, "prediction_type": "sample"},
)
FLOW_CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"shift": 3.0},
    {"shift": 3.0, "use_karras_sigmas": True},  # between the first and the last of them
    {"shift": 1.5, "use_exponential_sigmas": True, "sigma_min": 0.05},
    {"shift": 3.0, "shift_terminal": 0.05},
)


def cases() -> Iterator[dict[str, Any]]:
    for config, sigmas, strength in itertools.product(EULER_CONFIGS, EULER, (None, 0.6)):
        told = {"_class_name": "EulerDiscreteScheduler", **STABLE, **config}
        if strength is None or len(sigmas) > 2:
            yield {"config": told, "sigmas": sigmas, "strength": strength, "options": {}}
    for config, sigmas, strength in itertools.product(FLOW_CONFIGS, FLOW, (None, 0.6)):
        told = {"_class_name": "FlowMatchEulerDiscreteScheduler", **config}
        if len(sigmas) > 1 or (strength is None and "shift_terminal" not in config):
            yield {"config": told, "sigmas": sigmas, "strength": strength, "options": {}}


def main() -> None:
    prepare()
    read = []
    for told in cases():
        found = read_off(told)
        numbers = {"t": found["t"], "scale": found["scale"], "rows": found["rows"]}
        listed = {name: [float(f"{x:.9g}") for x in values.ravel()] for name, values in numbers.items()}
        read.append({**told, "start": found["start"], **listed})
    lines = ",\n".join(json.dumps(each) for each in read)
    (HERE / "sigmas.json").write_text(f'{{"diffusers": "{diffusers.__version__}", "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{len(read)} tables")


if __name__ == "__main__":
    main()
