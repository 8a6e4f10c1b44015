"""The schedules that users name, beside their published definitions: ComfyUI's and A1111's, NVIDIA's and GITS' lists."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sdruntime.errors import SettingError
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.grids import FAMILY

SD15 = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    FAMILY: "sd1",
}
BARS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SIGMAS = np.sqrt((1 - BARS) / BARS)  # of the trained timesteps
AYS = {"schedule": "align_your_steps"}
AYS_SD = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152]
AYS_SDXL = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113]


def levels(schedule: str, steps: int, sampler: str = "euler", family: str = "sd1") -> np.ndarray:
    """The sigmas of the model calls of a table: its noise-to-signal ratios."""
    table = compile_table({**SD15, FAMILY: family}, steps=steps, sampler=sampler, schedule=schedule)
    alpha, sigma = table.levels.T
    return sigma / alpha


def at(times: Any) -> np.ndarray:
    """The sigma of a fractional timestep, interpolated in its logarithm, as ComfyUI's and k-diffusion's models do."""
    return np.exp(np.interp(times, np.arange(1000), np.log(SIGMAS)))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 4, 7, 20])
def test_time_schedules_are_those_of_comfyui(sampler: str, steps: int) -> None:
    simple = [SIGMAS[-(1 + int(step * (1000 / steps)))] for step in range(steps)]
    stride = 1000 // steps
    uniform = [SIGMAS[1 + step * stride] for step in range(steps)][::-1]
    expected = {
        "simple": simple,
        "sgm_uniform": at(np.linspace(999, 0, steps + 1)[:-1]),
        "normal": at(np.linspace(999, 0, steps)),
        "ddim_uniform": uniform,
    }
    for schedule, sigmas in expected.items():
        np.testing.assert_allclose(levels(schedule, steps, sampler), sigmas, rtol=2e-5, err_msg=schedule)


def test_ddim_uniform_has_as_many_steps_as_requested() -> None:
    comfyui = [SIGMAS[t] for t in range(1, 1000, 1000 // 30)][::-1]  # one more than requested: the levels from the lowest on
    assert len(comfyui) == 31
    np.testing.assert_allclose(levels("ddim_uniform", 30), comfyui[1:], rtol=2e-5)
    with pytest.raises(SettingError, match="at most 999 steps"):
        levels("ddim_uniform", 1000)


@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_turbo_is_the_first_of_ten_levels(steps: int) -> None:
    table = compile_table(SD15, steps=steps, schedule="turbo")
    assert table.t.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99][:steps]
    np.testing.assert_allclose(levels("turbo", steps), SIGMAS[table.t.astype(int)], rtol=2e-5)
    with pytest.raises(SettingError, match="'turbo': at most 10 steps"):
        levels("turbo", 11)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_kl_optimal_is_even_in_the_arctangent(steps: int) -> None:
    share = np.arange(steps) / (steps - 1)
    sigmas = np.tan(share * math.atan(SIGMAS[0]) + (1 - share) * math.atan(SIGMAS[-1]))
    np.testing.assert_allclose(levels("kl_optimal", steps, "dpmpp_2m"), sigmas, rtol=2e-5)


@pytest.mark.parametrize(("family", "sigmas"), [("sd1", AYS_SD), ("sd2", AYS_SD), ("sdxl", AYS_SDXL)])
def test_align_your_steps_is_the_list_of_the_family(family: str, sigmas: list[float]) -> None:
    np.testing.assert_allclose(levels("align_your_steps", 10, family=family), sigmas, rtol=1e-6)
    np.testing.assert_allclose(levels("AYS", 5, "dpmpp_2m", family), sigmas[::2], rtol=1e-5)
    whole = np.array([*sigmas, 0.029])
    between = np.exp(np.interp(np.linspace(0, 1, 26), np.linspace(0, 1, 11), np.log(whole)))  # NVIDIA's interpolation
    np.testing.assert_allclose(levels("align_your_steps", 25, family=family), between[:-1], rtol=1e-6)
    own, named = (
        compile_table({**SD15, FAMILY: family}, **given) for given in ({"sigmas": [*sigmas, 0.0]}, {"steps": 10, **AYS})
    )
    np.testing.assert_allclose(own.unrolled(), named.unrolled(), rtol=1e-6)
    np.testing.assert_allclose(own.t, named.t, atol=1e-3)


def test_the_timesteps_of_align_your_steps_are_about_those_of_diffusers() -> None:
    utils = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    for family, name in (("sd1", "StableDiffusion"), ("sdxl", "StableDiffusionXL")):
        table = compile_table({**SD15, FAMILY: family}, steps=10, schedule="align_your_steps")
        listed = utils.AysSchedules[f"{name}Timesteps"]
        assert np.abs(table.t - listed).max() < 4  # the lists are rounded separately
        np.testing.assert_allclose(table.levels[:, 1], utils.AysSchedules[f"{name}Sigmas"][:-1], rtol=1e-6)


def test_align_your_steps_needs_a_family_that_has_a_list() -> None:
    with pytest.raises(SettingError, match="there is no list for flux; the authors list noise levels for sd1, sd2, sdxl"):
        levels("align_your_steps", 10, family="flux")
    with pytest.raises(SettingError, match="the family of the model is not known: use a bundle"):
        compile_table({key: value for key, value in SD15.items() if key != FAMILY}, steps=10, schedule="align_your_steps")


def test_gits_is_the_authors_list_of_each_number_of_steps() -> None:
    four = [14.61464119, 2.36326075, 0.92192322, 0.36617002]
    eight = [14.61464119, 5.85520077, 2.45070267, 1.36964464, 0.803307, 0.45573691, 0.25053367, 0.09824532]
    np.testing.assert_allclose(levels("gits", 4), four, rtol=1e-6)
    np.testing.assert_allclose(levels("Align Your Steps GITS", 8, "dpmpp_2m"), eight, rtol=1e-5)
    for steps in range(1, 21):
        found = levels("gits", steps)
        assert found[0] == pytest.approx(14.61464119)
        assert np.all(np.diff(found) < 0)
        assert found[-1] > 0.0291
    twenty = np.log([*levels("gits", 20), 0.02916753])
    between = np.exp(np.interp(np.linspace(0, 1, 31), np.linspace(0, 1, 21), twenty))
    np.testing.assert_allclose(levels("gits", 30), between[:-1], rtol=1e-6)
