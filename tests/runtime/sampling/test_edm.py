"""Models in EDM's preconditioning: the tables of diffusers' EDM schedulers, and samplers that fit no such model."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from places import GOLDEN
from solvers import STABLE

from sdruntime.errors import SettingError
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.executor import run
from sdruntime.sampling.samplers import SAMPLERS

CASES: list[dict[str, Any]] = json.loads((GOLDEN / "edm.json").read_text(encoding="utf-8"))["cases"]
PLAYGROUND = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 0.5}
NAMES = [name for name, row in SAMPLERS.items() if row.space == "edm"]


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_tables_are_those_of_diffusers(name: str) -> None:
    cases = [case for case in CASES if case["config"]["_class_name"] == name]
    assert len(cases) > 30
    for case in cases:
        table = compile_table(case["config"], steps=case["steps"], strength=case["strength"])
        assert table.draws.tolist() == case["draws"]
        rows = np.reshape(case["rows"], (table.steps + 1, -1))
        error = np.abs(table.unrolled() - rows).max(1) / np.abs(rows).max(1)
        assert error.max() < 1e-5, case["config"]
        np.testing.assert_allclose(table.t, case["t"], atol=2e-6)  # log(sigma) / 4 in float32
        np.testing.assert_allclose(table.scale, case["scale"], rtol=1e-5)
        np.testing.assert_allclose(table.start, case["start"], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_model_of_gaussian_data_keeps_its_deviation(name: str) -> None:
    """For data N(0, 0.5²) the best raw output is 0: the clean estimate is c_skip·x, and the end has the data's deviation."""
    noises = iter(np.random.default_rng(0).standard_normal((400, 20_000)).astype(np.float32))
    table = compile_table(PLAYGROUND, steps=100, sampler=name)
    first = next(noises) * np.float32(table.start[1])
    end = run(table, first, lambda x, t: np.zeros_like(x), lambda: next(noises))
    assert end.std() == pytest.approx(0.5, rel=0.06)  # euler_a converges slowly
    scaled = table.levels[:, 1] * table.scale
    assert np.allclose(table.scale, 1 / np.hypot(0.5, table.levels[:, 1]))
    assert table.t == pytest.approx(np.log(scaled / table.scale) / 4, abs=1e-6)


def test_own_levels_and_schedules_work() -> None:
    own = compile_table(PLAYGROUND, sigmas=[80.0, 10.0, 1.0, 0.1, 0.0])
    assert own.t == pytest.approx([math.log(sigma) / 4 for sigma in (80, 10, 1, 0.1)])
    assert own.start == pytest.approx((0.0, math.hypot(80, 1)))
    even = compile_table(PLAYGROUND, steps=5, schedule="exponential")
    assert np.diff(np.log(even.levels[:, 1])) == pytest.approx(np.full(4, math.log(0.002 / 80) / 4), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (PLAYGROUND, {"sampler": "euler"}, "trained in EDM's preconditioning .* samplers for it: edm_euler, edm_dpmpp_2m"),
        (PLAYGROUND, {"sampler": "DPM++ 2M Karras"}, "trained in EDM's preconditioning"),
        ({"_class_name": "EulerDiscreteScheduler", **STABLE}, {"sampler": "edm_euler"}, "without EDM's .* for it: ddim, ddpm"),
        (PLAYGROUND, {"schedule": "sgm_uniform"}, "takes karras, exponential"),
        (PLAYGROUND, {"schedule": "align_your_steps"}, "takes karras, exponential"),
        ({**PLAYGROUND, "prediction_type": "sample"}, {}, "prediction_type 'sample'"),
        ({**PLAYGROUND, "sigma_max": 0.001}, {}, "needs min <= max"),
        ({**PLAYGROUND, "thresholding": True}, {}, "thresholding"),
        ({**PLAYGROUND, "sigma_schedule": "linear"}, {}, "sigma_schedule"),
    ],
)
def test_what_does_not_fit_is_refused(config: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        compile_table(config, steps=5, **given)
