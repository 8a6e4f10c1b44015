"""Some 2,400 generated settings, each table as read off diffusers (tests/golden/make_grid.py says how they are made and read).

Error = difference ÷ largest magnitude of the row, at most 1e-5 beside diffusers' arithmetic done in float64; WORSE lists what is
more. A case's `rounding` is how far diffusers' own float32 is from that. REFUSED lists what diffusers cannot do, with our answer.
`make test` takes a sample, `make test-full` all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from golden.layout import kept_columns, kept_rows
from places import GOLDEN

from sdruntime.errors import SettingError
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.table import Table

STORED = np.load(GOLDEN / "grid.npz")
CASES: list[dict[str, Any]] = json.loads(str(STORED["cases"]))
TOLERANCE = 1e-5
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SCHEDULES = ("karras", "exponential", "beta")
Case = Mapping[str, Any]

# (class, what its config, options and steps hold, the largest error, why)
UPCAST = "DPM-Solver's sample is float32 in any case, which cancels or adds up"
WORSE: list[tuple[str, Mapping[str, Any], float, str]] = [
    ("KDPM2", COSINE, 1.2e-4, "the middle sigma is exp of a mean of logarithms in float32, of up to 20,291"),
    ("DPMSolverMultistep", {**COSINE, "timestep_spacing": "trailing", "solver_order": 3}, 3e-4, UPCAST),
    ("DPMSolverMultistep", {"rescale_betas_zero_snr": True, "final_sigmas_type": "sigma_min"}, 3e-5, UPCAST),
    ("DPMSolverSinglestep", {"steps": 999}, 2e-5, UPCAST),
]
# (class, what its config, options and steps hold, how diffusers fails, what happens here: a table, or a part of the error)
NO_FLOW = "ValueError: prediction_type given as flow_prediction"
REFUSED: list[tuple[str, Mapping[str, Any], str, str]] = [
    ("DDIM", {"eta": 1.0}, "not finite", "table"),
    ("DDPM", {"variance_type": "fixed_large_log"}, "not finite", "table"),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver", "solver_order": 3}, "UnboundLocalError", "table"),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver", "sigma_min": 0.002}, "UnboundLocalError", "cannot step back"),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver", "use_flow_sigmas": True}, NO_FLOW, "cannot step back"),
    ("DPMSolverMultistep", {"lower_order_final": False, "solver_type": "heun"}, "not finite", "table"),
    ("DPMSolver", {"algorithm_type": "dpmsolver"}, "ValueError: `final_sigmas_type` zero", "cannot step to sigma 0"),
    ("DPMSolver", {"final_sigmas_type": "sigma_min"}, "not finite", "cannot step back"),
    ("DPMSolverSinglestep", {"final_sigmas_type": "sigma_min", "sigma_min": 0.002}, "IndexError", "cannot step back"),
    ("DPMSolver", {"use_flow_sigmas": True}, NO_FLOW, "table"),
    ("FlowMatchEuler", {"steps": 1, "shift_terminal": 0.1}, "IndexError", "use at least 2 steps"),
    ("KDPM2", {}, "not finite", "table"),
    ("SASolver", {"algorithm_type": "noise_prediction", "use_flow_sigmas": True}, NO_FLOW, "table"),
    ("UniPC", {"predict_x0": False, "use_flow_sigmas": True}, NO_FLOW, "table"),
    ("UniPC", {"steps": 1, "shift_terminal": 0.1}, NO_FLOW, "use at least 2 steps"),
    ("UniPC", {"predict_x0": False}, "not finite", "cannot step to sigma 0"),
    ("UniPC", {"lower_order_final": False, "solver_order": 3}, "_LinAlgError", "table"),
    ("UniPC", {}, "not finite", "table"),
    ("UniPC", {"solver_type": "bh1", "use_flow_sigmas": True}, "IndexError", "table"),
    ("UniPC", {"timestep_spacing": "leading", "steps_offset": 1}, "not finite", "begins at timestep"),
    ("", {"timestep_spacing": "trailing"}, "not finite", "table"),  # with a call at timestep -1
    ("DPMSolverSDE", {"timestep_spacing": "trailing"}, "ZeroDivisionError", "table"),  # the same
    *(("", {f"use_{kind}_sigmas": True, "use_flow_sigmas": True}, "not finite", "true together") for kind in SCHEDULES),
]
# What diffusers can do and we do not, with a part of the error.
REFUSED_HERE: list[tuple[str, Mapping[str, Any], str]] = [
    ("FlowMatchEuler", {"steps": 1, "shift_terminal": 0.1}, "use at least 2 steps"),
    ("", {"timestep_spacing": "leading", "steps_offset": 1}, "begins at timestep"),  # beyond the trained ones
]


def holds(case: Case, name: str, told: Mapping[str, Any]) -> bool:
    values = {**case["config"], **case["options"], "steps": case["steps"]}
    return case["sampler"].startswith(name) and all(values.get(key) == value for key, value in told.items())


def compiled(case: Case) -> Table:
    return compile_table(
        case["config"], sampler=case["sampler"], steps=case["steps"], strength=case["strength"], **case["options"]
    )


def read() -> list[tuple[Case, dict[str, Any]]]:
    """The cases that diffusers has a table of, with start, t, scale, draws, and rows as {i: (columns, values)}."""
    numbers, at = STORED["numbers"].astype(np.float64), 0
    found = []

    def take(count: int) -> np.ndarray:
        nonlocal at
        at += count
        return numbers[at - count : at]

    for case in CASES:
        if "calls" not in case:
            continue
        calls = case["calls"]
        table: dict[str, Any] = {"start": take(2), "t": take(calls), "scale": take(calls), "draws": take(calls).astype(int)}
        columns = {row: kept_columns(row, table["draws"]) for row in kept_rows(calls)}
        table["rows"] = {row: (places, take(len(places))) for row, places in columns.items()}
        found.append((case, table))
    assert at == len(numbers)
    return found


GRID = read()
NAMES = sorted({case["sampler"] for case in CASES})


def error_of(table: Table, golden: Mapping[str, Any]) -> float:
    """The largest error of rows, scale and start, and a thousandth of the error of a timestep."""
    if table.draws.tolist() != golden["draws"].tolist():
        return np.inf
    mine = table.unrolled()
    rows = [np.abs(mine[i][columns] - values).max() / np.abs(mine[i]).max() for i, (columns, values) in golden["rows"].items()]
    scale, start = np.abs(table.scale / golden["scale"] - 1).max(), np.abs(np.subtract(table.start, golden["start"])).max()
    return float(max(*rows, scale, start / max(golden["start"]), np.abs(table.t - golden["t"]).max() * 1e-3))


def limit(case: Case) -> float:
    return max([TOLERANCE, *(figure for name, told, figure, _ in WORSE if holds(case, name, told))])


def outcome(case: Case) -> Table | str:
    """The table, or why there is none."""
    try:
        return compiled(case)
    except SettingError as problem:
        return str(problem)


def faults(cases: list[tuple[Case, dict[str, Any]]]) -> list[str]:
    found = []
    for case, golden in cases:
        table = outcome(case)
        if isinstance(table, str):
            if not any(holds(case, name, told) and answer in table for name, told, answer in REFUSED_HERE):
                found.append(f"{table}: {case}")
        elif golden["t"].min() < 0:  # trailing: np.arange rounds up, and diffusers makes a call more, at timestep -1
            if not table.steps < len(golden["t"]):
                found.append(f"as many calls as diffusers: {case}")
        elif (error := error_of(table, golden)) > limit(case):
            found.append(f"{error:.1e} > {limit(case):.0e}: {case}")
    return found


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_the_grid_gives_the_table_of_diffusers(name: str) -> None:
    assert faults([(case, golden) for case, golden in GRID if case["sampler"] == name]) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_the_grid_gives_the_tables_of_diffusers(name: str) -> None:
    few = [(case, golden) for case, golden in GRID if case["sampler"] == name and case["steps"] <= 30]
    assert faults(few[::8]) == []


@pytest.mark.slow  # NumPy 1.26 rounds one of them away
@pytest.mark.parametrize(("name", "told", "figure", "why"), WORSE)
def test_each_exception_is_needed(name: str, told: Mapping[str, Any], figure: float, why: str) -> None:
    fitting = [(case, golden) for case, golden in GRID if holds(case, name, told) and golden["t"].min() >= 0]
    errors = [error_of(compiled(case), golden) for case, golden in fitting]
    assert TOLERANCE < max(errors) <= figure, why


def test_what_diffusers_cannot_do_is_listed_and_has_an_answer_here() -> None:
    failed = [case for case in CASES if "calls" not in case]
    assert failed
    used = set()
    missing = []
    for case in failed:
        answered = outcome(case)
        happened = answered if isinstance(answered, str) else "table"
        fitting = [
            place
            for place, (name, told, why, answer) in enumerate(REFUSED)
            if holds(case, name, told) and case["why"].startswith(why) and answer in happened
        ]
        used |= set(fitting[:1])
        if not fitting:
            missing.append(f"{happened}: {case}")
    assert missing == []
    assert used == set(range(len(REFUSED))), "an entry of the list is not needed"


def test_the_grid_is_as_wide_as_said() -> None:
    assert len(GRID) >= 1_900
    steps = Counter(case["steps"] for case, _ in GRID)
    assert {1, 2, 3, 4, 5, 7, 999} <= set(steps)
    assert len(NAMES) == 19
    for name in NAMES:
        count = sum(case["sampler"] == name for case, _ in GRID)
        assert count >= 70, f"{name}: {count}"
