"""The registry and its samplers, against what needs no reference: constants, Gaussian data, and their own tables."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from solvers import STABLE, clean_by, smooth_path, solve

from sdruntime.errors import SettingError, UnknownName
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.executor import Run, run
from sdruntime.sampling.noise_schedule import Point, Space
from sdruntime.sampling.samplers import A1111_SCHEDULES, SAMPLERS, Sampler, folded, identified, resolve
from sdruntime.sampling.schedules import SCHEDULES

NAMES = list(SAMPLERS)
DISTILLED = ("lcm", "tcd")


def told(sampler: Sampler, **more: Any) -> dict[str, Any]:
    """Settings with the schedule of Stable Diffusion."""
    return sampler.settings({**STABLE, **more}, sampler.implied)


def options(sampler: Sampler, settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in sampler.options}


def predictions(sampler: Sampler) -> tuple[str, ...]:
    return sampler.choices.get("prediction_type", ("epsilon", "v_prediction", "sample"))


@pytest.mark.parametrize(("name", "prediction"), [(name, one) for name in NAMES for one in predictions(SAMPLERS[name])])
def test_a_generator_run_directly_gives_what_its_table_gives(name: str, prediction: str) -> None:
    sampler = SAMPLERS[name]
    settings = told(sampler, prediction_type=prediction)
    path = sampler.grid(settings, 8, 0)
    noises = np.random.default_rng(0).standard_normal((40, 3, 5))

    def model(x: Any, t: float) -> Any:
        return np.tanh(x + 0.3 * np.roll(x, 1)) * math.cos(t / 300)

    drawn = iter(noises[1:])
    x = noises[0] * path.start_sigma
    clean = clean_by(model, prediction, sampler.space)
    expected = solve(sampler, path, x, clean, lambda: next(drawn), options(sampler, settings))

    table = compile_table({**STABLE, "prediction_type": prediction}, steps=8, sampler=name)
    drawn = iter(noises[1:].astype(np.float32))
    found = run(table, x.astype(np.float32), model, lambda: next(drawn))
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def raw(name: str, prediction: str, image: Any, noise: Any, alpha: float, sigma: float) -> Any:
    """What a model was trained to return for alpha·image + sigma·noise."""
    if SAMPLERS[name].space == "edm":  # table 1 of arXiv 2206.00364, with data of deviation 0.5
        outward = (sigma * image - 0.25 * noise) / (0.5 * math.hypot(0.5, sigma))
        return outward if prediction == "epsilon" else -outward
    return {
        "epsilon": noise,
        "v_prediction": (alpha * noise - sigma * image) / math.hypot(alpha, sigma),
        "sample": image,
        "flow_prediction": noise - image,
    }[prediction]


@pytest.mark.parametrize(("name", "prediction"), [(name, one) for name in NAMES for one in predictions(SAMPLERS[name])])
def test_the_estimate_of_a_model_that_knows_the_image_is_the_image(name: str, prediction: str) -> None:
    """At every step of every sampler: x is alpha·image + sigma·noise, and the model returns what it was trained to for that."""
    table = compile_table({**STABLE, "prediction_type": prediction}, steps=8, sampler=name)
    image, start, *noises = np.random.default_rng(0).standard_normal((40, 3, 5)).astype(np.float32)
    state = Run(table, start * np.float32(table.start[1]), iter(noises).__next__)
    assert state.clean is None
    while not state.done:
        alpha, sigma = table.levels[state.step]
        state.advance(raw(name, prediction, image, (state.x - alpha * image) / sigma, alpha, sigma))
        assert state.clean is not None
        assert np.abs(state.clean - image).max() < 2e-3


ENDING_CLEAN = [name for name in NAMES if name not in ("deis", "sa_solver", "tcd") and not name.startswith("dpm_")]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("name", ENDING_CLEAN)
def test_a_model_that_always_says_c_is_believed(name: str, steps: int) -> None:
    """With final sigma 0 the end is c from any start, whatever noise came between."""
    sampler = SAMPLERS[name]
    settings = told(sampler, set_alpha_to_one=True)
    if name == "pndm" and steps < 4:
        with pytest.raises(SettingError, match="Runge-Kutta"):
            sampler.grid(settings, steps, 0)
        return
    path = sampler.grid(settings, steps, 0)
    noise = np.random.default_rng(1)
    end = solve(sampler, path, 7.0, lambda x, point: 3.0, lambda: noise.standard_normal(), options(sampler, settings))
    # LCM keeps (sigma_data / scaled t)² of x, and the Adams sums of PNDM cancel at sigma 14.
    assert end == pytest.approx(3.0, abs=2e-5 if name == "lcm" else 1e-9)


@pytest.mark.parametrize("name", ["deis", "sa_solver", "tcd", "dpm_2m", "dpm_3s"])
def test_the_others_end_on_the_line_through_c(name: str) -> None:
    """They stop above zero: started at alpha·c + sigma·n without further noise, they end at alpha·c + sigma·n."""
    sampler = SAMPLERS[name]
    settings = told(sampler)
    path = sampler.grid(settings, 20, 0)
    s, t = path.pairs[0][0], path.pairs[-1][1]
    start = np.array([s.alpha * 3.0, s.sigma])  # over (clean, noise)
    chosen = {**options(sampler, settings), **({"eta": 0.0} if name == "tcd" else {})}
    spread = 0.0

    def noise() -> Any:
        nonlocal spread
        spread += 1
        return np.zeros(2)

    end = solve(sampler, path, start, lambda x, point: np.array([3.0, 0.0]), noise, chosen)
    assert end[0] == pytest.approx(t.alpha * 3.0, rel=1e-9)
    if not spread:
        assert end[1] == pytest.approx(t.sigma, rel=1e-9)


DEVIATION = 0.5


def variance_error(sampler: Sampler, space: Space, steps: int, chosen: dict[str, Any]) -> float:
    """|variance of the result - true| for data N(0, DEVIATION²), whose best clean estimate is linear in x."""
    path = smooth_path(sampler, space, steps)
    room, drawn = 1 + 2 * len(path), 0

    def unit(place: int) -> Any:
        return np.eye(1, room, place)[0]

    def noise() -> Any:
        nonlocal drawn
        drawn += 1
        return unit(drawn)

    def deviation(point: Point) -> float:
        return math.hypot(point.alpha * DEVIATION, point.sigma)

    def clean(x: Any, point: Point) -> Any:
        return point.alpha * DEVIATION**2 / deviation(point) ** 2 * x

    end = solve(sampler, path, deviation(path.pairs[0][0]) * unit(0), clean, noise, chosen)
    return abs(float(end @ end) - deviation(path.pairs[-1][1]) ** 2)


ORDERS = [
    *((name, {}, SAMPLERS[name].order) for name in NAMES if name not in DISTILLED),
    ("ddim", {"eta": 1.0}, 1),
    ("ddpm", {"variance_type": "fixed_small"}, 1),
    ("dpmpp_2m", {"solver_type": "heun"}, 2),
    ("dpmpp_2m_sde", {"solver_type": "heun"}, 2),
    ("dpmpp_2s", {"solver_type": "heun"}, 2),
    ("dpmpp_3s", {"solver_type": "heun"}, 3),
    ("dpm_3s", {"solver_type": "heun"}, 3),
    ("unipc", {"solver_order": 1}, 2),  # the corrector lifts it by one
    ("unipc", {"solver_order": 3}, 2),  # held back by its first steps
    ("unipc", {"solver_type": "bh1"}, 2),
    ("deis", {"solver_order": 1}, 1),
    ("deis", {"solver_order": 3}, 2),
    ("sa_solver", {"algorithm_type": "noise_prediction"}, 2),
    ("lms", {"order": 2}, 2),
]


@pytest.mark.parametrize(("name", "chosen", "order"), ORDERS)
def test_the_variance_converges_with_the_order_that_is_stated(name: str, chosen: dict[str, Any], order: int) -> None:
    sampler = SAMPLERS[name]
    space: Space = "flow" if sampler.implied.get("use_flow_sigmas") else sampler.space
    steps = [96, 192, 384]  # whole blocks of two and of three
    picked = {**options(sampler, told(sampler)), **chosen}
    errors = [variance_error(sampler, space, count, picked) for count in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2)


def test_every_row_has_its_names() -> None:
    for name, sampler in SAMPLERS.items():
        assert sampler.name == name
        assert sampler.about
        assert resolve(name)[0] is sampler
        assert resolve(name.upper())[0] is sampler
        for other in sampler.a1111:
            assert resolve(other)[0] is sampler
        if sampler.diffusers:
            found, implied = resolve(sampler.diffusers)
            assert found.diffusers == sampler.diffusers
            assert implied == {}, "the checkpoint's file says the rest"


@pytest.mark.parametrize(
    ("name", "sampler", "implied"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m", {"solver_order": 2, "algorithm_type": "dpmsolver++", "schedule": "karras"}),
        (
            "dpm++ 3m sde exponential",
            "dpmpp_3m_sde",
            {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "third_order": "exact", "schedule": "exponential"},
        ),
        ("Euler a", "euler_a", {}),
        ("DPM2 a Karras", "dpm2_a", {"schedule": "karras"}),
        ("DPM++ SDE Karras", "dpmpp_sde", {"schedule": "karras"}),
        ("Euler SGM Uniform", "euler", {"schedule": "sgm_uniform"}),
        ("euler polyexponential", "euler", {"schedule": "polyexponential"}),
        ("PLMS", "plms", {"skip_prk_steps": True}),
        ("UniPCMultistepScheduler", "unipc", {}),
        ("flow_unipc", "flow_unipc", {"use_flow_sigmas": True}),
        ("uni_pc", "unipc", {}),
        ("dpm_2", "dpm2", {}),
        ("dpm_2_ancestral", "dpm2_a", {}),
        ("dpm++2m", "dpmpp_2m", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
        ("k_euler_a", "euler_a", {}),
        ("k_dpmpp_2s_a", "dpmpp_2s_a", {}),
        ("euler_ancestral_normal", "euler_a", {"schedule": "normal"}),
        ("Euler a Uniform", "euler_a", {"schedule": "normal"}),
        ("DPMSolverMultistep", "dpmpp_2m", {}),
    ],
)
def test_names_that_users_know_resolve(name: str, sampler: str, implied: dict[str, Any]) -> None:
    found, fixed = resolve(name)
    assert (found.name, fixed) == (sampler, implied)


def test_no_two_rows_have_one_name() -> None:
    counts = Counter(name for row in SAMPLERS.values() for name in {folded(each) for each in (row.name, *row.a1111)})
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("Karras", "karras"), ("SGM Uniform", "sgm_uniform"), ("Normal", "normal"), ("Uniform", "normal"), ("BETA", "beta")],
)
def test_schedule_names_that_users_know_resolve(name: str, schedule: str) -> None:
    tables = [compile_table(STABLE, steps=7, sampler="euler", schedule=each).to_json() for each in (name, schedule)]
    assert tables[0] == tables[1]


def test_an_unknown_schedule_comes_with_the_near_ones() -> None:
    with pytest.raises(UnknownName, match="did you mean karras"):
        compile_table(STABLE, steps=7, sampler="euler", schedule="Karas")


def test_normal_is_what_k_diffusion_spaces() -> None:
    table = compile_table(STABLE, steps=4, sampler="euler", schedule="normal")
    assert table.t == pytest.approx([999, 666, 333, 0])


MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"


@pytest.mark.parametrize(
    ("config", "sampler", "schedule"),
    [
        ({"_class_name": MULTISTEP}, "dpmpp_2m", None),
        ({"_class_name": MULTISTEP, "use_karras_sigmas": True}, "dpmpp_2m", "karras"),
        ({"_class_name": MULTISTEP, "algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde", None),
        ({"_class_name": MULTISTEP, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, "dpmpp_2m_sde_heun", None),
        (
            {"_class_name": MULTISTEP, "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            None,
            None,
        ),  # its D2 is diffusers' own
        ({"_class_name": MULTISTEP, "algorithm_type": "sde-dpmsolver++", "solver_order": 1}, None, None),
        ({"_class_name": MULTISTEP, "use_flow_sigmas": True}, "flow_dpmpp_2m", None),
        ({"_class_name": SINGLESTEP, "solver_order": 3}, "dpmpp_3s", None),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "plms", None),
        ({"_class_name": "PNDMScheduler"}, "pndm", None),
        ({"_class_name": "UniPCMultistepScheduler"}, "unipc", None),
    ],
)
def test_a_class_that_samplers_share_is_told_by_its_settings(
    config: dict[str, Any], sampler: str | None, schedule: str | None
) -> None:
    row, kind = identified({**STABLE, **config})
    assert (row and row.name, kind) == (sampler, schedule)


def test_a_named_sampler_is_identified_as_itself() -> None:
    for name, row in SAMPLERS.items():
        config = {"_class_name": "EDMEulerScheduler" if row.space == "edm" else "PNDMScheduler", **STABLE}
        assert identified(config, sampler=name)[0] is row


def test_every_schedule_has_its_a1111_name() -> None:
    assert set(A1111_SCHEDULES) == {None, *SCHEDULES}


@pytest.mark.parametrize("name", ["dpmpp_2n", "DPM++ 2M Karas", "EulerScheduler"])
def test_an_unknown_name_comes_with_the_near_ones(name: str) -> None:
    with pytest.raises(UnknownName, match="did you mean") as caught:
        resolve(name)
    assert caught.value.near


def test_a_row_cannot_name_a_key_that_it_does_not_read() -> None:
    row = SAMPLERS["ddim"]
    with pytest.raises(TypeError, match="must be among the keys"):
        Sampler(
            name="odd", solve=row.solve, grid=row.grid, space="vp", order=1, reads=row.reads, options=("gamma",), about="a slip"
        )


def test_a_sampler_from_outside_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered, it has a table, answers to its names, and takes no name of another."""
    from sdruntime.sampling import samplers as registry
    from sdruntime.sampling.samplers import register

    monkeypatch.setattr(registry, "_ROWS", dict(SAMPLERS))
    monkeypatch.setattr(registry, "_NAMES", dict(registry._NAMES))
    monkeypatch.setattr(registry, "SAMPLERS", registry._ROWS)

    def own_ddim(x, path, noise):  # type: ignore[no-untyped-def]
        for s, t in path:
            x, m = yield x, s
            x = t.alpha * m + t.sigma * (x - s.alpha * m) / s.sigma
        return x

    register(replace(SAMPLERS["ddim"], name="mine", solve=own_ddim, options=(), diffusers=None, a1111=("My Own",)))
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
    ours, theirs = (compile_table(config, steps=7, sampler=name) for name in ("My Own", "ddim"))
    np.testing.assert_allclose(ours.X, theirs.X, rtol=1e-12)
    with pytest.raises(SettingError, match="sampler DDIM!: ddim already has this name"):
        register(replace(SAMPLERS["ddim"], name="DDIM!"))
