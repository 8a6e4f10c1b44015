"""No legal setting gives a coefficient that is not finite; what is not legal is refused in words (Hypothesis)."""

from __future__ import annotations

from typing import Any

import pytest
from solvers import STABLE

from sdruntime.errors import SettingError
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.samplers import SAMPLERS
from sdruntime.sampling.schedules import SCHEDULES
from sdruntime.sampling.table import Table

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

# The reasons for which a setting from below may be refused; a table with NaN would say "not a table".
REASONS = (
    "visit timestep",
    "where alpha is 0",
    "Runge-Kutta",
    "as the model was distilled on",
    "leaves no steps to run",
    "the model was trained on",
    "true together",
    "takes only flow_shift",
    "use a flow sampler",
    "takes flow_prediction",
    "a flow grid takes",
    "takes none",
    "'turbo': at most 10 steps",
    "has a share of noise to choose",
    "the family of the model is not known",
    "a model in EDM's preconditioning takes",
    "cannot step to sigma 0",
    "the first sigma cannot also be the last",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample", "flow_prediction"]),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
    "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    "steps_offset": st.integers(0, 2),
    "num_train_timesteps": st.sampled_from([100, 1000]),
    "solver_order": st.integers(1, 3),
    "predictor_order": st.integers(1, 4),
    "corrector_order": st.integers(1, 4),
    "order": st.integers(1, 4),
    "eta": st.floats(0, 1),
    "original_inference_steps": st.integers(1, 100),
    "flow_shift": st.floats(0.1, 10),
    "shift": st.floats(0.1, 10),
    "shift_terminal": st.one_of(st.none(), st.floats(0.01, 0.5)),
    "lambda_min_clipped": st.sampled_from([-5.1, -float("inf")]),
    "disable_corrector": st.lists(st.integers(0, 5), max_size=3),
    "variance_type": st.sampled_from([None, "fixed_small", "fixed_large"]),
    "schedule": st.one_of(st.none(), st.sampled_from(SCHEDULES)),
}


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    sampler = SAMPLERS[draw(st.sampled_from(list(SAMPLERS)))]
    config: dict[str, Any] = dict(STABLE)
    for key, default in sampler.reads.items():
        if key in sampler.implied or not draw(st.booleans()):
            continue
        if key in sampler.choices:
            config[key] = draw(st.sampled_from(sampler.choices[key]))
        elif key in VALUES:
            config[key] = draw(VALUES[key])
        elif isinstance(default, bool) and key.startswith(("use_", "lower_", "euler_", "set_", "skip_", "predict_", "rescale_")):
            config[key] = draw(st.booleans()) and key != "use_dynamic_shifting"
    schedule = config.pop("schedule", None)
    if sampler.name == "ddpm" and config.get("variance_type", "") is None:
        del config["variance_type"]
    strength = draw(st.one_of(st.none(), st.floats(0.01, 1)))
    return {
        "config": config,
        "steps": draw(st.integers(1, 60)),
        "sampler": sampler.name,
        "schedule": schedule,
        "strength": strength,
    }


def answer(config: dict[str, Any], **told: Any) -> tuple[Table | None, str]:
    """The table, which checks itself, or the words with which it is refused."""
    try:
        return compile_table(config, **told), ""
    except SettingError as problem:
        return None, str(problem)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(requests())
def test_no_legal_setting_gives_a_coefficient_that_is_not_finite(told: dict[str, Any]) -> None:
    table, problem = answer(**told)
    if table is None:
        assert any(reason in problem for reason in REASONS), problem
    else:
        assert 1 <= table.steps <= 2 * told["steps"] + 9


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(list(SAMPLERS)),
    st.dictionaries(st.sampled_from(sorted({key for row in SAMPLERS.values() for key in row.reads})), JSON),
    st.one_of(st.integers(), st.floats(), st.none(), st.text()),
)
def test_nonsense_is_a_setting_error_and_nothing_else(name: str, config: dict[str, Any], steps: Any) -> None:
    assert "not a table" not in answer(config=config, steps=steps, sampler=name)[1]
