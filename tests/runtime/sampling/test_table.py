"""The Table checks itself, goes through JSON, and is compiled from what a checkpoint writes."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from solvers import STABLE

from sdruntime.errors import SettingError, UnknownName
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.samplers import SAMPLERS
from sdruntime.sampling.table import Table

# scheduler_config.json of Stable Diffusion 1.5, of SDXL base and of a distilled LCM model, as their authors wrote them.
WRITTEN = {
    **STABLE,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD15 = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", **WRITTEN}
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    **WRITTEN,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
LCM = {"_class_name": "LCMScheduler", **STABLE, "original_inference_steps": 50, "thresholding": False}


def small(**changes: Any) -> Table:
    """Two calls: x[1] = x + 2 m, x[2] = 3 x[1] - x[0] + m[1] + n."""
    parts: dict[str, Any] = {
        "start": (0.0, 1.0),
        "t": np.array([9, 4], np.float32),
        "scale": np.ones(2),
        "X": np.array([[1.0, 0.0], [3.0, -1.0]]),
        "M": np.array([[2.0], [1.0]]),
        "N": np.array([[0.0], [1.0]]),
        "draws": np.array([0, 1]),
        "levels": np.array([[0.6, 0.8], [0.8, 0.6]]),
        "clean": np.array([[1.25, -0.75], [0.8, -0.6]]),
    }
    return Table(**{**parts, **changes})


def test_unrolled_rows_are_over_the_first_x_all_m_and_all_n() -> None:
    assert small().steps == 2
    assert small().unrolled().tolist() == [[1, 0, 0, 0], [1, 2, 0, 0], [2, 6, 1, 1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t": np.array([9], np.float32)}, "one entry per call"),
        ({"X": np.array([[1.0, 0.5], [3.0, -1.0]])}, "X refers to entries before"),
        ({"N": np.array([[1.0], [1.0]])}, "N refers to entries before"),
        ({"M": np.array([[2.0]])}, "expected 2 rows"),
        ({"M": np.array([[math.nan], [1.0]])}, "M holds a number that is not finite"),
        ({"start": (0.0, math.inf)}, "start holds a number that is not finite"),
        ({"draws": np.array([0, -1])}, "one entry per call"),
        ({"clean": np.ones((2, 3))}, r"clean has shape \(2, 3\); expected 2 rows of 2"),
        (
            {name: np.zeros((0, 1)) for name in "XMN"}
            | {name: np.zeros(0, int) for name in ("t", "scale", "draws")}
            | {"levels": np.zeros((0, 2)), "clean": np.zeros((0, 2))},
            "no model call",
        ),
    ],
)
def test_a_table_that_is_none_cannot_be_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        small(**changes)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(SettingError) as caught:
        small(start=(math.nan, 1.0), M=np.ones((3, 1)), scale=np.ones(1))
    assert all(word in str(caught.value) for word in ("start holds", "M has shape (3, 1)", "scale (1,)"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_json_gives_the_same_table_back(name: str) -> None:
    table = compile_table(STABLE, steps=5, sampler=name)
    text = table.to_json()
    assert json.loads(text)["format"] == "sdruntime.sampling.table"
    back = Table.from_json(text)
    for field in fields(Table):
        assert np.array_equal(getattr(back, field.name), getattr(table, field.name)), field.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(revision=1), "revision 1"),
        (lambda data: data.update(format="other"), "'other'"),
        (lambda data: data.pop("X"), "expected the fields"),
        (lambda data: data.update(more=1), "expected the fields"),
        (lambda data: data.pop("format"), "not a table in JSON"),
        (lambda data: data.update(start=[1]), "not a table in JSON"),
        (lambda data: data.update(start="ab"), "not a table in JSON"),
        (lambda data: data.update(M=[[1.0], [2.0, 3.0]]), "not a table in JSON"),
        (lambda data: data.update(t=[9.0]), "not a table"),
        (lambda data: data["M"].__setitem__(0, [math.nan]), "not finite"),
    ],
)
def test_json_of_something_else_is_refused(change: Any, message: str) -> None:
    data = json.loads(small().to_json())
    change(data)
    with pytest.raises(SettingError, match=message):
        Table.from_json(json.dumps(data))
    with pytest.raises(SettingError):
        Table.from_json("[1]")
    with pytest.raises(SettingError):
        Table.from_json("{")


def test_a_checkpoint_is_sampled_as_it_says() -> None:
    plms = compile_table(SD15, steps=20)
    assert plms.t.tolist() == [951.0, 901.0, 901.0, *range(851, 0, -50)]
    assert (plms.start, plms.draws.sum(), plms.N.shape[1]) == ((0.0, 1.0), 0, 0)
    euler = compile_table(SDXL, steps=20)
    assert euler.t.tolist() == list(range(951, 0, -50))
    sigma = 11.0294  # at timestep 951
    assert euler.start == pytest.approx((0.0, math.hypot(sigma, 1)), rel=1e-4)
    assert euler.scale[0] == pytest.approx(1 / math.hypot(sigma, 1), rel=1e-4)
    assert compile_table(LCM, steps=4).t.tolist() == [999.0, 759.0, 499.0, 259.0]


def test_another_sampler_takes_the_keys_of_the_file_and_its_own_defaults() -> None:
    """from_config: PNDM's file has no spacing, so that Euler's own default holds; its steps_offset is read where it counts."""
    assert compile_table(SD15, steps=4, sampler="euler").t.tolist() == [999.0, 666.0, 333.0, 0.0]
    assert compile_table(SD15, steps=4, sampler="ddim").t.tolist() == [751.0, 501.0, 251.0, 1.0]
    logrho = {**SD15, "_class_name": "DEISMultistepScheduler", "solver_type": "logrho", "algorithm_type": "deis"}
    assert compile_table(logrho, steps=4, sampler="dpmpp_2m").steps == 4


def test_a_schedule_can_be_named_beside_the_sampler_or_in_its_name() -> None:
    by_name = compile_table(SD15, steps=7, sampler="DPM++ 2M Karras")
    beside = compile_table(SD15, steps=7, sampler="dpmpp_2m", schedule="karras")
    written = compile_table({**SD15, "use_karras_sigmas": True}, steps=7, sampler="dpmpp_2m")
    plain = compile_table(SD15, steps=7, sampler="dpmpp_2m")
    assert np.array_equal(by_name.X, beside.X)
    assert np.array_equal(by_name.X, written.X)
    assert not np.array_equal(by_name.X, plain.X)


@pytest.mark.parametrize("schedule", ["karras", "exponential", "polyexponential", "beta", "lu", "simple", "sgm_uniform"])
@pytest.mark.parametrize("name", ["euler", "euler_a", "heun", "dpm2_a", "dpmpp_2m", "unipc"])
def test_every_schedule_falls_from_the_noisiest_level(name: str, schedule: str) -> None:
    table = compile_table(SD15, steps=9, sampler=name, schedule=schedule)
    assert table.t[0] >= 998  # diffusers' DPM-Solver grids cut 998.99… to a whole timestep
    assert np.all(np.diff(table.t) <= 0.5)  # and dpm2's rounds every second one


def test_image_to_image_begins_where_diffusers_begins() -> None:
    whole, half = compile_table(SDXL, steps=20), compile_table(SDXL, steps=20, strength=0.5)
    assert half.t.tolist() == whole.t[10:].tolist()
    assert half.start[0] == 1.0  # variance exploding: the image as it is, and sigma of noise
    bar = np.prod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000)[:452] ** 2)
    assert compile_table(SD15, steps=20, strength=0.5, sampler="ddim").t[0] == 451
    assert compile_table(SD15, steps=20, strength=0.5, sampler="ddim").start == pytest.approx(
        (bar**0.5, (1 - bar) ** 0.5), rel=1e-5
    )
    assert compile_table(SDXL, steps=20, strength=1.0).steps == 20
    heun = compile_table(SDXL, steps=10, strength=0.3, sampler="heun")
    assert heun.steps == 5  # three steps, two calls each but the last


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, math.nan, 0.04])
def test_a_strength_that_leaves_nothing_is_refused(strength: float) -> None:
    with pytest.raises(SettingError, match="strength"):
        compile_table(SDXL, steps=20, strength=strength)


@pytest.mark.parametrize("steps", [0, -1, 1001, 10**9, 2.5, True])
def test_steps_out_of_range_are_refused_before_anything_is_allocated(steps: Any) -> None:
    compile_table(SD15, steps=1)
    tracemalloc.start()
    with pytest.raises(SettingError, match=f"steps {steps!r}.*from 1 to 1000"):
        compile_table(SD15, steps=steps)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("written", "sampler", "message"),
    [
        ({"clip_sample": True}, "ddim", "clip_sample True"),
        ({"thresholding": True}, "dpmpp_2m", "thresholding True"),
        ({"use_dynamic_shifting": True}, "flow_euler", "use_dynamic_shifting True"),
        ({"stochastic_sampling": True}, "flow_euler", "stochastic_sampling True"),
        ({"interpolation_type": "log_linear"}, "euler", "interpolation_type 'log_linear'"),
        ({"timestep_type": "continuous"}, "euler", "timestep_type 'continuous'"),
        ({"solver_p": {"_class_name": "DDIM"}}, "unipc", "solver_p"),
        ({"timestep_spacing": "golden"}, "euler", "timestep_spacing 'golden'"),
        ({"beta_schedule": "sigmoid"}, "ddpm", "beta_schedule 'sigmoid'"),
        ({"prediction_type": "noise"}, "ddim", "prediction_type 'noise'"),
        ({"prediction_type": "epsilon"}, "flow_euler", "prediction_type 'epsilon': flow_euler takes flow_prediction"),
        ({"prediction_type": "flow_prediction"}, "ddim", "use a flow sampler"),
        ({"variance_type": "learned_range"}, "ddpm", "variance_type 'learned_range'"),
        ({"solver_type": "rk4"}, "dpmpp_2m", "solver_type 'rk4'"),
        ({"final_sigmas_type": "one"}, "euler", "final_sigmas_type 'one'"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "euler", "true together"),
        ({"use_karras_sigmas": "yes"}, "euler", "use_karras_sigmas 'yes'"),
        ({"num_train_timesteps": 10**12}, "euler", "num_train_timesteps 1000000000000"),
        ({"beta_end": 2.0}, "euler", "beta_end 2.0"),
        ({"beta_end": math.nan}, "euler", "beta_end nan"),
        ({"beta_start": "small"}, "euler", "beta_start 'small'"),
        ({"trained_betas": [0.1, 0.2]}, "euler", "trained_betas holds 2"),
        ({"trained_betas": "abc"}, "euler", "list of numbers"),
        ({"trained_betas": [0.1, 1.5], "num_train_timesteps": 2}, "euler", "between 0 and 1"),
        ({"sigma_min": 2.0, "sigma_max": 1.0, "use_karras_sigmas": True}, "euler", "sigma_min 2 and sigma_max 1"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "ddim", "'epsilon' at timestep 999, where alpha is 0"),
        ({"steps_offset": 900}, "ddim", "trained on 0 to 999"),
        ({"steps_offset": 900, "timestep_spacing": "leading"}, "euler", "steps_offset 900 with 10 steps"),
        ({"steps_offset": 900, "timestep_spacing": "leading"}, "unipc", "steps_offset 900 with 10 steps"),
        (
            {"num_train_timesteps": 2, "beta_schedule": "squaredcos_cap_v2", "final_sigmas_type": "sigma_min"},
            "flow_dpmpp_2m",
            "a flow's must be below 1",
        ),
        ({"original_inference_steps": 4}, "lcm", "as the model was distilled on"),
        ({"original_inference_steps": 2000}, "lcm", "num_train_timesteps 1000"),
        ({"skip_prk_steps": False}, "pndm", "Runge-Kutta"),
    ],
)
def test_what_a_file_asks_and_no_table_can_give_is_refused_by_name(written: dict[str, Any], sampler: str, message: str) -> None:
    steps = 3 if sampler == "pndm" else 2 if "num_train_timesteps" in written else 10
    with pytest.raises(SettingError, match=message):
        compile_table({**STABLE, **written}, steps=steps, sampler=sampler)


def test_what_a_sampler_does_not_read_does_not_disturb_it() -> None:
    odd = {"clip_sample": True, "thresholding": True, "solver_p": 3, "timestep_type": "continuous", "whatever": [1]}
    assert compile_table({**STABLE, **odd}, steps=5, sampler="lms").steps == 5


def test_an_unknown_option_a_missing_class_and_a_schedule_out_of_place_are_refused() -> None:
    with pytest.raises(UnknownName, match="option of ddim 'etta': did you mean eta"):
        compile_table(STABLE, steps=5, sampler="ddim", etta=1.0)
    with pytest.raises(SettingError, match=r"eta 1\.5: expected a number from 0 to 1"):
        compile_table(STABLE, steps=5, sampler="ddim", eta=1.5)
    with pytest.raises(SettingError, match="_class_name"):
        compile_table(STABLE, steps=5)
    with pytest.raises(SettingError, match="expected an object, got list"):
        compile_table([1], steps=5)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="ddim uses the trained timesteps"):
        compile_table(STABLE, steps=5, sampler="ddim", schedule="karras")
    with pytest.raises(UnknownName, match="schedule"):
        compile_table(STABLE, steps=5, sampler="euler", schedule="kerras")
    with pytest.raises(SettingError, match="visit timestep"):
        compile_table(STABLE, steps=1000, sampler="dpmpp_2m")


def test_a_table_is_not_changed_by_its_copy() -> None:
    table = small()
    assert replace(table, start=(1.0, 2.0)).start == (1.0, 2.0)
    assert table.start == (0.0, 1.0)


def test_the_arrays_of_a_table_are_its_own_and_read_only() -> None:
    table = compile_table(SD15, steps=4, sampler="ddim")
    scale = np.ones(4)
    own = replace(table, scale=scale)
    scale[:] = 7
    assert own.scale.tolist() == [1] * 4
    for name in ("t", "scale", "X", "M", "N", "draws"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(own, name)[0] = 0
