"""Churn, shares of noise and restarts, against k-diffusion's published loops written by hand for a linear model.

The model is eps = 0.3·x + 0.1 on the scaled x, so that the hand needs no timesteps; noises come from one list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from solvers import STABLE

from sdruntime.errors import SettingError
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.executor import run
from sdruntime.sampling.table import Table

NOISE = np.random.default_rng(3).standard_normal((90, 4, 6))
CONFIG = {**STABLE, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}


def epsilon(x: Any, t: float = 0.0) -> Any:
    return 0.3 * x + 0.1


def denoised(x: Any, sigma: float) -> Any:
    return x - sigma * epsilon(x / math.sqrt(sigma**2 + 1))


def to_d(x: Any, sigma: float, estimate: Any) -> Any:
    return (x - estimate) / sigma


def karras(steps: int, low: float, high: float) -> list[float]:
    ramp = np.linspace(0, 1, steps)
    return [*((high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7).tolist(), 0.0]


def sigmas_of(steps: int) -> list[float]:
    bars = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)[[0, 999]]
    low, high = np.sqrt((1 - bars) / bars).tolist()
    return karras(steps, low, high)


def error(sampler: str, steps: int, by_hand: Callable[[Any, list[float], Iterator[Any]], Any], **options: Any) -> float:
    """The largest difference between a table's result and the hand's, relative to the largest number."""
    table = compile_table(CONFIG, steps=steps, sampler=sampler, schedule="karras", **options)
    drawn = iter(NOISE[1:].astype(np.float32))
    start = NOISE[0] * table.start[1]
    found = run(table, start.astype(np.float32), epsilon, lambda: next(drawn))
    expected = by_hand(start, sigmas_of(steps), iter(NOISE[1:]))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def gamma_of(sigma: float, steps: int, churn: float, low: float, high: float) -> float:
    return min(churn / steps, 2**0.5 - 1) if low <= sigma <= high else 0.0


CHURNS = [
    {"s_churn": 4.0},
    {"s_churn": 100.0, "s_noise": 1.003},
    {"s_churn": 6.0, "s_tmin": 0.05, "s_tmax": 5.0, "s_noise": 1.01},
    {"s_churn": 3.0, "s_tmax": 14.0},  # none at the first step
]


@pytest.mark.parametrize("options", CHURNS)
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm2"])
def test_churn_is_that_of_k_diffusion(sampler: str, options: dict[str, float]) -> None:
    churn, low, high = options["s_churn"], options.get("s_tmin", 0.0), options.get("s_tmax", math.inf)

    def by_hand(x: Any, sigmas: list[float], noises: Iterator[Any]) -> Any:
        for now, after in pairwise(sigmas):
            gamma = gamma_of(now, len(sigmas) - 1, churn, low, high)
            hat = now * (gamma + 1)
            if gamma > 0:
                x = x + next(noises) * options.get("s_noise", 1.0) * (hat**2 - now**2) ** 0.5
            d = to_d(x, hat, denoised(x, hat))
            if sampler == "euler" or after == 0:
                x = x + d * (after - hat)
            elif sampler == "heun":
                second = x + d * (after - hat)
                x = x + (d + to_d(second, after, denoised(second, after))) / 2 * (after - hat)
            else:
                middle = math.exp((math.log(hat) + math.log(after)) / 2)
                second = x + d * (middle - hat)
                x = x + to_d(second, middle, denoised(second, middle)) * (after - hat)
        return x

    assert error(sampler, 7, by_hand, **options) < 1e-5


@pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.02), (0.7, 0.9)])
@pytest.mark.parametrize("sampler", ["euler_a", "dpm2_a", "dpmpp_2s_a"])
def test_ancestral_shares_are_those_of_k_diffusion(sampler: str, eta: float, s_noise: float) -> None:
    def by_hand(x: Any, sigmas: list[float], noises: Iterator[Any]) -> Any:
        for now, after in pairwise(sigmas):
            estimate = denoised(x, now)
            up = min(after, eta * (after**2 * (now**2 - after**2) / now**2) ** 0.5)
            down = (after**2 - up**2) ** 0.5
            d = to_d(x, now, estimate)
            if after == 0:
                return x + d * (down - now)
            if sampler == "euler_a":
                x = x + d * (down - now)
            elif sampler == "dpm2_a":
                middle = math.sqrt(now * down)
                second = x + d * (middle - now)
                x = x + to_d(second, middle, denoised(second, middle)) * (down - now)
            else:
                h = math.log(now / down)
                middle = now * math.exp(-h / 2)
                second = middle / now * x - math.expm1(-h / 2) * estimate
                x = down / now * x - math.expm1(-h) * denoised(second, middle)
            x = x + next(noises) * s_noise * up
        return x

    assert error(sampler, 7, by_hand, eta=eta, s_noise=s_noise) < 1e-5


@pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (0.4, 1.0), (1.0, 1.05)])
def test_the_shares_of_dpmpp_2m_sde_are_those_of_k_diffusion(eta: float, s_noise: float) -> None:
    """In sigma; the table's x is divided by sqrt(sigma² + 1), which is 1 at the end."""

    def by_hand(x: Any, sigmas: list[float], noises: Iterator[Any]) -> Any:
        x, old, h_last = x * math.hypot(sigmas[0], 1), None, 0.0
        for now, after in pairwise(sigmas):
            estimate, fresh = denoised(x, now), next(noises)
            if after == 0:
                return estimate
            h = math.log(now / after)
            both = h * (1 + eta)
            x = after / now * math.exp(-h * eta) * x - math.expm1(-both) * estimate
            if old is not None:
                x = x + 0.5 * -math.expm1(-both) * (h / h_last) * (estimate - old)
            x = x + fresh * after * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise
            old, h_last = estimate, h
        return x

    given = {"eta": eta, "s_noise": s_noise, "lower_order_final": False}
    assert error("dpmpp_2m_sde", 7, by_hand, **given) < 1e-5


@pytest.mark.parametrize("steps", [7, 20, 30, 40])
def test_restarts_are_those_of_the_web_ui(steps: int) -> None:
    def by_hand(x: Any, sigmas: list[float], noises: Iterator[Any]) -> Any:
        pairs: list[tuple[float, float]] = []
        length, times = (9, 1) if steps < 36 else (steps // 4, 2)
        if steps >= 20:
            sigmas = karras(steps - length * times, sigmas[-2], sigmas[0])
        reached = int(np.argmin(np.abs(np.array(sigmas) - 0.1)))
        back = int(np.argmin(np.abs(np.array(sigmas) - 2)))
        for i, pair in enumerate(pairwise(sigmas), start=1):
            pairs.append(pair)
            if steps >= 20 and i == reached:
                again = karras(length + 1, sigmas[reached], sigmas[back])[:-1]
                pairs += [pair for _ in range(times) for pair in pairwise(again)]
        assert len(pairs) == steps
        last = math.inf
        for now, after in pairs:
            if last < now:
                x = x + next(noises) * (now**2 - last**2) ** 0.5
            d = to_d(x, now, denoised(x, now))
            second = x + d * (after - now)
            x = second if after == 0 else x + (d + to_d(second, after, denoised(second, after))) / 2 * (after - now)
            last = after
        return x

    assert error("restart", steps, by_hand) < 1e-5
    table = compile_table(CONFIG, steps=steps, sampler="Restart Karras")
    assert table.draws.sum() == {7: 0, 20: 1, 30: 1, 40: 2}[steps]


def test_the_first_churn_is_a_number_of_the_table_and_of_its_json() -> None:
    table = compile_table(CONFIG, steps=5, schedule="karras", s_churn=1.0)
    assert table.churn == pytest.approx(sigmas_of(5)[0] * math.sqrt(1.2**2 - 1))
    assert table.levels[0, 1] == pytest.approx(sigmas_of(5)[0] * 1.2)
    assert Table.from_json(table.to_json()).churn == table.churn
    assert compile_table(CONFIG, steps=5).churn == 0


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("euler", {"eta": 0.5}, "option eta: euler has no such option .* samplers with it: ddim, euler_a"),
        ("euler_a", {"s_churn": 1.0}, "option s_churn: euler_a has no such option .* with it: euler, heun, dpm2, edm_euler"),
        ("dpmpp_2m", {"eta": 0.5}, "eta 0.5 with algorithm_type 'dpmsolver[+][+]'"),
        ("dpmpp_2m", {"s_noise": 1.1}, "s_noise 1.1 .* adds no noise"),
        ("dpmpp_2m_sde", {"eta": 1.5}, "eta 1.5: expected a number from 0 to 1"),
        ("euler", {"s_churn": -1}, "s_churn -1: expected a number from 0"),
        ("euler", {"s_tmin": "a"}, "s_tmin 'a': expected a number"),
    ],
)
def test_what_has_no_effect_is_refused(sampler: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        compile_table(CONFIG, steps=5, sampler=sampler, **options)
