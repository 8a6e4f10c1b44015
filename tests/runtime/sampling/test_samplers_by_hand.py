"""Samplers that diffusers lacks, or draws noise for from a Brownian tree, against straight lines written by hand.

Each follows k-diffusion's sampling.py (or the paper) for one model and one list of noises, without tables or generators.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from solvers import STABLE

from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.executor import run

STEPS = 6
NOISE = np.random.default_rng(3).standard_normal((20, 4, 6))


def sigma_of(t: float) -> float:
    """Noise-to-signal ratio of Stable Diffusion at a trained timestep, in float64."""
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    bar = np.cumprod(1 - betas)[int(t)]
    return math.sqrt((1 - bar) / bar)


def karras(steps: int) -> list[float]:
    high, low = sigma_of(999), sigma_of(0)
    return [(high ** (1 / 7) + i / (steps - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(steps)] + [0.0]


def epsilon(x: Any, t: float = 0.0) -> Any:
    """A model of noise that looks at x alone, so that the hand need not know timesteps."""
    return np.sin(2 * x) + 0.5 * x


def denoised(x: Any, sigma: float) -> Any:
    return x - sigma * epsilon(x / math.sqrt(sigma**2 + 1))


def found(name: str, start: Any, noises: Any, **more: Any) -> Any:
    config = {**STABLE, "timestep_spacing": "linspace"}
    table = compile_table(config, steps=STEPS, sampler=name, **more)
    drawn = iter(noises.astype(np.float32))
    return run(table, start.astype(np.float32), epsilon, lambda: next(drawn))


def test_dpmpp_2s_ancestral() -> None:
    sigmas, drawn = karras(STEPS), iter(NOISE[1:])
    x = start = NOISE[0] * sigmas[0]
    for now, after in pairwise(sigmas):
        estimate = denoised(x, now)
        if after == 0:
            x = estimate
            break
        up = math.sqrt(after**2 * (now**2 - after**2) / now**2)
        down = math.sqrt(after**2 - up**2)
        t, t_next = -math.log(now), -math.log(down)
        h = t_next - t
        between = math.exp(-(t + h / 2))
        second = denoised(between / now * x - math.expm1(-h / 2) * estimate, between)
        x = down / now * x - math.expm1(-h) * second + up * next(drawn)
    assert np.abs(found("dpmpp_2s_a", start, NOISE[1:], schedule="karras") - x).max() < 2e-5 * np.abs(x).max()


def test_dpmpp_sde_with_noises_of_one_brownian_motion() -> None:
    sigmas, drawn = karras(STEPS), iter(NOISE[1:])
    x = start = NOISE[0] * sigmas[0]
    for now, after in pairwise(sigmas):
        estimate = denoised(x, now)
        if after == 0:
            x = estimate
            break
        between = math.sqrt(now * after)
        inner = next(drawn) * math.sqrt(now - between)  # the motion from `now` to `between`, and on to `after`
        whole = inner + next(drawn) * math.sqrt(between - after)
        up = between * math.sqrt(1 - between**2 / now**2)
        down = math.sqrt(between**2 - up**2)
        half = down / now * x + (1 - down / now) * estimate + up * inner / math.sqrt(now - between)
        second = denoised(half, between)
        up = after * math.sqrt(1 - after**2 / now**2)
        down = math.sqrt(after**2 - up**2)
        x = down / now * x + (1 - down / now) * second + up * whole / math.sqrt(now - after)
    assert np.abs(found("dpmpp_sde", start, NOISE[1:], schedule="karras") - x).max() < 2e-5 * np.abs(x).max()


def test_dpmpp_3m_sde() -> None:
    """k-diffusion's, in sigma; the table's runs on x / sqrt(sigma² + 1). eta and s_noise are 1."""
    sigmas, drawn = karras(STEPS), iter(NOISE[1:])
    x = NOISE[0] * math.hypot(sigmas[0], 1)
    start = NOISE[0]
    first = second = None
    h_1 = h_2 = math.nan
    for now, after in pairwise(sigmas):
        estimate = denoised(x, now)
        if after == 0:
            x = estimate
            break
        h = math.log(now / after)
        doubled = 2 * h
        x = math.exp(-doubled) * x - math.expm1(-doubled) * estimate
        phi_2 = math.expm1(-doubled) / doubled + 1
        if second is not None:
            slope, older = (estimate - first) / (h_1 / h), (first - second) / (h_2 / h)
            bend = (slope - older) / (h_1 / h + h_2 / h)
            x = x + phi_2 * (slope + bend * (h_1 / h)) - (phi_2 / doubled - 0.5) * bend
        elif first is not None:
            x = x + phi_2 * (estimate - first) / (h_1 / h)
        x = x + next(drawn) * after * math.sqrt(-math.expm1(-2 * h))
        first, second, h_1, h_2 = estimate, first, h, h_1
    # Its heun rule is k-diffusion's phi_2; under 15 steps the table would lower its last steps.
    told = {"schedule": "karras", "solver_type": "heun", "lower_order_final": False}
    assert np.abs(found("dpmpp_3m_sde", start, NOISE[1:], **told) - x).max() < 1e-4 * np.abs(x).max()


@pytest.mark.parametrize("clean_end", [True, False])
def test_ipndm_on_the_schedule_of_stable_diffusion(clean_end: bool) -> None:
    times = [1 + 166 * i for i in range(STEPS)][::-1]
    levels = [(1 / math.hypot(1, sigma_of(t)), sigma_of(t) / math.hypot(1, sigma_of(t))) for t in times]
    last = (1.0, 0.0) if clean_end else (1 / math.hypot(1, sigma_of(0)), sigma_of(0) / math.hypot(1, sigma_of(0)))
    x = start = NOISE[0]
    past: list[Any] = []
    for (alpha, sigma), (alpha_next, sigma_next) in zip(levels, [*levels[1:], last], strict=True):
        past = [epsilon(x), *past][:4]
        e = past[0]
        if len(past) == 2:
            e = (3 * past[0] - past[1]) / 2
        elif len(past) == 3:
            e = (23 * past[0] - 16 * past[1] + 5 * past[2]) / 12
        elif len(past) == 4:
            e = (55 * past[0] - 59 * past[1] + 37 * past[2] - 9 * past[3]) / 24
        x = alpha_next * (x - sigma * e) / alpha + sigma_next * e
    config = {**STABLE, "steps_offset": 1, "set_alpha_to_one": clean_end}
    table = compile_table(config, steps=STEPS, sampler="ipndm")
    end = run(table, start.astype(np.float32), epsilon, lambda: NOISE[0])
    assert table.draws.sum() == 0
    assert np.abs(end - x).max() < 2e-5 * np.abs(x).max()
