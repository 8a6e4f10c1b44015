"""Where diffusers asks the model: spacings by their formulas, and what the grids make of them."""

from __future__ import annotations

import numpy as np
import pytest
from solvers import STABLE

from sdruntime.errors import SettingError, UnknownName
from sdruntime.sampling.grids import chained, spaced
from sdruntime.sampling.noise_schedule import FlowCurve, at_ratio
from sdruntime.sampling.samplers import SAMPLERS


@pytest.mark.parametrize(
    ("spacing", "extra", "times"),
    [
        ("linspace", 0, [999, 749.25, 499.5, 249.75, 0]),
        ("leading", 0, [801, 601, 401, 201, 1]),
        ("trailing", 0, [999, 799, 599, 399, 199]),
        ("linspace", 1, [999, 799.2, 599.4, 399.6, 199.8]),
        ("leading", 1, [831, 665, 499, 333, 167]),
    ],
)
def test_spacings_are_those_of_the_paper(spacing: str, extra: int, times: list[float]) -> None:
    assert spaced(spacing, 5, 1000, 1, extra=extra) == pytest.approx(times)


def test_a_spacing_gives_as_many_steps_as_asked_for() -> None:
    for spacing in ("linspace", "leading", "trailing"):
        for steps in range(1, 300):
            assert len(spaced(spacing, steps, 1000, 0)) == steps
    with pytest.raises(UnknownName, match="did you mean leading"):
        spaced("leadin", 5, 1000, 0)


def test_the_curve_can_be_cut_at_its_noisy_end() -> None:
    settings = {**STABLE, "beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}
    sampler = SAMPLERS["dpmpp_2m"]
    path = sampler.grid(sampler.settings(settings, {}), 10, 0)
    assert -5.1 <= path.pairs[0][0].lam < -5.0
    assert path.pairs[0][0].t < 999


def test_ddim_steps_by_whole_strides_wherever_its_timesteps_are() -> None:
    """1000 // 3 is 333; linspace evaluates 999, 500, 0 (diffusers; the gaps are its own)."""
    sampler = SAMPLERS["ddim"]
    path = sampler.grid(sampler.settings({**STABLE, "timestep_spacing": "linspace"}, {}), 3, 0)
    assert [(s.t, t.t) for s, t in path] == [(999, 666), (500, 167), (0, -1)]
    assert path.pairs[-1][1].sigma == 0


def test_plms_names_its_second_timestep_twice() -> None:
    sampler = SAMPLERS["plms"]
    settings = sampler.settings({**STABLE, "steps_offset": 1}, sampler.implied)
    assert [(s.t, t.t) for s, t in sampler.grid(settings, 4, 0)] == [(751, 501), (751, 501), (501, 251), (251, 1), (1, -1)][
        :4
    ] + [(1, 0)]
    assert [(s.t, t.t) for s, t in sampler.grid(settings, 1, 0)] == [(1, 0)]


def test_pndm_begins_with_three_steps_of_four_calls() -> None:
    sampler = SAMPLERS["pndm"]
    path = sampler.grid(sampler.settings(STABLE, {}), 5, 0)
    assert len(path) == 3 * 4 + 2
    assert [(s.t, t.t) for s, t in path.pairs[:4]] == [(800, 700), (800, 700), (800, 600), (800, 600)]


def test_a_consistency_model_is_asked_at_distilled_timesteps_only() -> None:
    sampler = SAMPLERS["lcm"]
    for steps in (1, 2, 4, 8):
        path = sampler.grid(sampler.settings(STABLE, {}), steps, 0)
        assert all((s.t + 1) % 20 == 0 for s, _ in path)
        assert path.pairs[0][0].t == 999


def test_flow_sigmas_can_end_at_a_terminal() -> None:
    sampler = SAMPLERS["flow_euler"]
    path = sampler.grid(sampler.settings({"shift": 3.0, "shift_terminal": 0.1}, {}), 10, 0)
    assert path.pairs[0][0].sigma == pytest.approx(1)
    assert path.pairs[-1][0].sigma == pytest.approx(0.1)
    assert path.pairs[-1][1].sigma == 0


def test_an_image_to_image_start_cuts_the_path_and_remembers_its_length() -> None:
    sampler = SAMPLERS["euler"]
    settings = sampler.settings(STABLE, {})
    whole, cut = sampler.grid(settings, 10, 0), sampler.grid(settings, 10, 4)
    assert cut.pairs == whole.pairs[4:]
    assert (len(cut), cut.total) == (6, 10)


def test_a_path_does_not_stand_still() -> None:
    points = [at_ratio(t, sigma, "vp") for t, sigma in ((9.0, 2.0), (8.0, 1.0), (8.0, 1.0), (0.0, 0.0))]
    with pytest.raises(SettingError, match="visit timestep 8 twice: use fewer steps"):
        chained(points, 0, 1.0, FlowCurve(10))
    assert len(chained(points[:3], 0, 1.0, FlowCurve(10))) == 2, "a last step may be empty: karras with final sigma_min"


def test_sigma_bounds_hold_for_the_schedules_of_classes_that_read_them() -> None:
    sampler = SAMPLERS["euler"]
    settings = sampler.settings({**STABLE, "use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0}, {})
    sigmas = [s.sigma for s, _ in sampler.grid(settings, 5, 0)]
    assert (sigmas[0], sigmas[-1]) == pytest.approx((10.0, 0.1))
    assert np.all(np.diff(sigmas) < 0)
