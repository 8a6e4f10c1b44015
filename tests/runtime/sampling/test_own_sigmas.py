"""Noise levels of the caller's: diffusers' tables where its class takes them, one rule for our other samplers, clear refusals."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from places import GOLDEN

from sdruntime.errors import SettingError
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.samplers import SAMPLERS, settled
from sdruntime.sampling.table import MOST_STEPS

CASES: list[dict[str, Any]] = json.loads((GOLDEN / "sigmas.json").read_text(encoding="utf-8"))["cases"]
STABLE = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SIGMAS = [14.6, 6.5, 2.5, 0.8, 0.2, 0.0]
TAKES = [name for name, row in SAMPLERS.items() if row.takes_schedule and row.space not in ("flow", "edm")]


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_tables_are_those_of_diffusers(name: str) -> None:
    cases = [case for case in CASES if case["config"]["_class_name"] == name]
    assert len(cases) >= 20
    for case in cases:
        table = compile_table(case["config"], sigmas=case["sigmas"], strength=case["strength"])
        rows = np.reshape(case["rows"], (table.steps + 1, -1))
        error = np.abs(table.unrolled() - rows).max(1) / np.abs(rows).max(1)
        assert error.max() < 1e-5, case["config"]
        np.testing.assert_allclose(table.scale, case["scale"], rtol=1e-5)
        np.testing.assert_allclose(table.start, case["start"], rtol=1e-5)
        np.testing.assert_allclose(table.t, case["t"], atol=2e-3)  # diffusers interpolates in float32


@pytest.mark.parametrize("name", TAKES)
def test_the_levels_of_a_schedule_give_its_table(name: str) -> None:
    row, settings = settled(STABLE, sampler=name, schedule="sgm_uniform")  # whose timesteps are fractional too
    points = [s for s, _ in row.grid(settings, 6, 0)] + [row.grid(settings, 6, 0).pairs[-1][1]]
    levels = [point.sigma / point.alpha for point in points]
    again = levels[-1] == pytest.approx(levels[-2])  # deis and sa_solver repeat the last level
    rows = slice(0, -1 if again else None)
    named = compile_table(STABLE, steps=6, sampler=name, schedule="sgm_uniform")
    own = compile_table(STABLE, sampler=name, sigmas=[*levels[:-1], levels[-1] / 2] if again else levels)
    assert own.t == pytest.approx(named.t, abs=2e-3)
    assert own.start == pytest.approx(named.start, rel=1e-6)
    np.testing.assert_allclose(own.unrolled()[rows], named.unrolled()[rows], atol=1e-5 * np.abs(named.unrolled()).max())


def test_an_image_starts_at_one_of_the_levels() -> None:
    table = compile_table(STABLE, sigmas=SIGMAS, strength=0.6)
    assert table.steps == 3
    assert table.start == pytest.approx((1.0, 2.5))
    for name in TAKES:
        alpha, sigma = compile_table(STABLE, sampler=name, sigmas=[*SIGMAS[:-1], 0.1], strength=0.6).start
        assert sigma / alpha == pytest.approx(2.5), name


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (STABLE, {"sampler": "ddim"}, "ddim takes no noise levels; samplers that do: euler, "),
        (STABLE, {"sampler": "lcm"}, "lcm takes no noise levels"),
        ({"prediction_type": "flow_prediction"}, {"sampler": "flow_unipc"}, "samplers that do: flow_euler, flow_heun$"),
        (STABLE, {"schedule": "karras"}, "sigmas with schedule 'karras': give one of them"),
        (STABLE, {"sampler": "DPM++ 2M Karras"}, "sigmas with schedule 'karras': give one of them"),
        ({**STABLE, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {"sampler": "dpmpp_2m"}, "use_flow_sigmas"),
        (STABLE, {"steps": 7}, "steps 7: the 6 sigmas make 5 steps of euler; omit steps"),
        (STABLE, {"sigmas": [14.6]}, "sigmas: got 1; euler needs at least 2"),
        (STABLE, {"sigmas": [1.0, 2.0, 0.0]}, r"sigmas\[1\] 2.0: expected less than the level before it, 1.0"),
        (STABLE, {"sigmas": [*np.linspace(14, 0, MOST_STEPS + 2)]}, "steps 1001: .* from 1 to 1000"),
        (STABLE, {"sampler": "dpm_2m"}, "cannot step to sigma 0: it needs .* sigmas that end above 0"),
        (STABLE, {"strength": 0.1}, "strength 0.1 of 5 steps leaves no steps"),
        (FLOW, {"sigmas": [1.0, 0.5, 0.0]}, "got 0; flow_euler takes those above 0, up to 1; omit the 0"),
        (FLOW, {"sigmas": [14.6, 0.5]}, "got 14.6; flow_euler takes those above 0, up to 1"),
        (FLOW, {"sigmas": [1.0, 0.5], "steps": 1}, "the 2 sigmas make 2 steps of flow_euler"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        compile_table(config, **{"sigmas": SIGMAS, **given})


def test_steps_that_agree_may_be_given() -> None:
    assert compile_table(STABLE, sigmas=SIGMAS, steps=5).to_json() == compile_table(STABLE, sigmas=SIGMAS).to_json()
    assert compile_table({**FLOW, "shift": 3.0}, sigmas=[1.0, 0.5], steps=2).steps == 2


def test_levels_beyond_all_that_was_trained_give_finite_tables_or_an_error() -> None:
    for name in TAKES:
        for levels in ([1e6, 1e-6, 0.0], [1e6, 1.0, 1e-30], [3e-39, 2e-39], [1.0, math.nextafter(1, 0) - 1e-7, 0.5]):
            try:
                table = compile_table(STABLE, sampler=name, sigmas=levels)
            except SettingError:
                continue
            assert np.isfinite(table.unrolled()).all()
