"""Betas, noise levels, and the schedules that are published as formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from solvers import STABLE

from sdruntime.errors import SettingError, UnknownName
from sdruntime.sampling.noise_schedule import (
    Curve,
    FlowCurve,
    Point,
    alpha_bars,
    at_ratio,
    linspace_float32,
    shifted,
    zero_terminal_snr,
)
from sdruntime.sampling.schedules.ratios import RATIO_SCHEDULES, beta_quantile, exponential, karras, polyexponential

SETTINGS = {**STABLE, "trained_betas": None}


def test_the_levels_of_stable_diffusion_are_the_published_ones() -> None:
    bars = alpha_bars(SETTINGS)
    assert bars.dtype == np.float32
    # The first and last of diffusers' alphas_cumprod, and k-diffusion's sigma_min and sigma_max of this model.
    assert bars[[0, 499, 999]] == pytest.approx([0.99915, 0.27763, 0.0046600], rel=2e-4)
    assert Curve(SETTINGS, "ve").sigmas[[0, -1]] == pytest.approx([0.0291675, 14.614643], rel=1e-5)


@pytest.mark.parametrize(("kind", "first", "last"), [("linear", 1e-4, 0.02), ("scaled_linear", 1e-4, 0.02)])
def test_betas_run_from_start_to_end(kind: str, first: float, last: float) -> None:
    bars = alpha_bars({**SETTINGS, "beta_schedule": kind, "beta_start": first, "beta_end": last, "num_train_timesteps": 10})
    assert 1 - bars[0] == pytest.approx(first, rel=1e-2)
    assert 1 - bars[-1] / bars[-2] == pytest.approx(last, rel=1e-4)


def test_betas_are_rounded_as_torch_rounds_them() -> None:
    """torch.linspace(sqrt(0.00085), sqrt(0.012), 1000), where NumPy's, rounded once, is another float32."""
    roots = linspace_float32(math.sqrt(0.00085), math.sqrt(0.012), 1000)
    assert roots[[2, 502, 998]].tolist() == [0.029315698891878128, 0.06955080479383469, 0.10946403443813324]
    assert linspace_float32(0.25, 0.5, 1).tolist() == [0.25]


def test_the_cosine_schedule_follows_its_curve_until_beta_is_capped() -> None:
    bars = alpha_bars({**SETTINGS, "beta_schedule": "squaredcos_cap_v2"})
    whole = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert bars[:-1] == pytest.approx(whole[1:-1] / whole[0], rel=1e-4)
    assert bars[-1] / bars[-2] == pytest.approx(1e-3, rel=1e-3)


def test_trained_betas_stand_over_the_formula() -> None:
    bars = alpha_bars({**SETTINGS, "trained_betas": [0.5, 0.5], "num_train_timesteps": 2})
    assert bars.tolist() == [0.5, 0.25]
    with pytest.raises(SettingError, match="between 0 and 1"):
        alpha_bars({**SETTINGS, "trained_betas": [0.5, 1.5], "num_train_timesteps": 2})
    with pytest.raises(UnknownName, match="beta_schedule"):
        alpha_bars({**SETTINGS, "beta_schedule": "sigmoid"})


def test_zero_terminal_snr_ends_in_noise_alone_and_keeps_the_first_level() -> None:
    betas = np.linspace(0.01, 0.1, 50).astype(np.float32)
    bars = np.cumprod(1 - zero_terminal_snr(betas).astype(np.float64))
    assert bars[-1] == pytest.approx(0, abs=1e-12)
    assert bars[0] == pytest.approx(0.99, rel=1e-6)
    curve = Curve({**SETTINGS, "rescale_betas_zero_snr": True}, "vp")
    assert curve.at_time(999) == (999.0, 0.0, 1.0)
    assert curve.sigmas[-1] == pytest.approx(4096, rel=1e-6), "what divides by alpha starts beside infinity, as in diffusers"


def test_points_keep_the_law_of_their_space() -> None:
    for ratio in (0.0, 0.03, 0.5, 1.0):
        assert at_ratio(5.0, ratio, "ve") == (5.0, 1.0, ratio)
        _, alpha, sigma = at_ratio(5.0, ratio, "vp")
        assert (alpha**2 + sigma**2, sigma / alpha) == pytest.approx((1, ratio))
        assert sum(at_ratio(5.0, ratio, "flow")[1:]) == 1


def test_lambda_is_infinite_at_both_ends() -> None:
    assert Point(0.0, 1.0, 0.0).lam == math.inf
    assert Point(0.0, 0.0, 1.0).lam == -math.inf
    assert Point(0.0, 0.8, 0.4).lam == pytest.approx(math.log(2))


def test_a_level_between_trained_ones_has_a_timestep_between_theirs() -> None:
    curve = Curve(SETTINGS, "ve")
    between = math.sqrt(float(curve.sigmas[10]) * float(curve.sigmas[11]))
    assert curve.at_sigma(between).t == pytest.approx(10.5, abs=1e-3)
    assert curve.time_of(1e-3) == 0
    assert curve.time_of(1e3) == 999
    assert curve.ratio_at(np.array([10.5])) == pytest.approx((curve.sigmas[10] + curve.sigmas[11]) / 2)
    for t in (0, 500, 999):
        vp = Curve(SETTINGS, "vp")
        assert vp.at_time(t) == pytest.approx(vp.at_sigma(float(vp.sigmas[t])), rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_timestep_that_was_not_trained_is_refused(t: int) -> None:
    with pytest.raises(SettingError, match=f"timestep {t}, but the model was trained on 0 to 999"):
        Curve(SETTINGS, "vp").at_time(t)


def test_a_flow_counts_its_share_of_noise_in_timesteps() -> None:
    assert FlowCurve(1000).at_sigma(0.25) == (250.0, 0.75, 0.25)
    assert FlowCurve(1000).at_time(250) == (250.0, 0.75, 0.25)
    assert shifted(np.array([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]


@pytest.mark.parametrize("name", RATIO_SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_a_schedule_falls_from_high_to_low(name: str, steps: int) -> None:
    sigmas = RATIO_SCHEDULES[name](14.6, 0.03, steps)
    assert len(sigmas) == steps
    assert sigmas[0] == pytest.approx(14.6)
    assert np.all(np.diff(sigmas) < 0)
    if steps > 1:
        assert sigmas[-1] == pytest.approx(0.03)


def test_karras_is_even_in_the_seventh_root_and_exponential_in_the_logarithm() -> None:
    assert np.diff(karras(80.0, 0.002, 9) ** (1 / 7)) == pytest.approx(np.full(8, -(80 ** (1 / 7) - 0.002 ** (1 / 7)) / 8))
    assert np.diff(np.log(exponential(80.0, 0.002, 9))) == pytest.approx(np.full(8, -math.log(40000) / 8))
    assert polyexponential(80.0, 0.002, 9) == pytest.approx(exponential(80.0, 0.002, 9))
    assert np.log(polyexponential(math.e, 1.0, 3, rho=2.0)) == pytest.approx([1, 0.25, 0])


def test_beta_quantiles_are_those_of_the_distribution() -> None:
    known = {0.001: 1.855873851745199e-05, 0.01: 0.0008612388215429059, 0.1: 0.03958440558878085, 0.25: 0.17568037865269498}
    p = np.array([*known, 0.5, 0.9])
    assert beta_quantile(p) == pytest.approx([*known.values(), 0.5, 0.9604155944112192], rel=1e-12)  # scipy.stats.beta.ppf
    # and their own integral: d(quantile)/dp = 1 / density
    x = beta_quantile(np.linspace(0.05, 0.95, 2001))
    density = (x * (1 - x)) ** -0.4 * math.gamma(1.2) / math.gamma(0.6) ** 2
    assert np.gradient(x, 0.9 / 2000)[1:-1] == pytest.approx(1 / density[1:-1], rel=1e-4)
    assert beta_quantile(np.array([0.0, 1.0])).tolist() == [0.0, 1.0]
