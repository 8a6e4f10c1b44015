"""Samplers of rectified flows: Euler, Heun, and the flow forms of other solvers."""

from __future__ import annotations

from dataclasses import replace

from sdruntime.sampling.grids import flow_grid
from sdruntime.sampling.samplers import dpm, unipc
from sdruntime.sampling.samplers.kdiffusion.slopes import euler, heun
from sdruntime.sampling.samplers.keys import (
    BY_NAME,
    FLOW_MATCH,
    FLOW_ONLY,
    SCHEDULED,
)
from sdruntime.sampling.samplers.sampler import Sampler


def flow_form(base: Sampler) -> Sampler:
    """Return the row of the same solver on a rectified flow."""
    return replace(
        base,
        name=f"flow_{base.name}",
        reads={**base.reads, "prediction_type": "flow_prediction"},
        implied={**base.implied, "use_flow_sigmas": True},
        choices={**base.choices, "prediction_type": ("flow_prediction",)},
        takes_schedule=False,
        a1111=(),
        about=f"{base.about}, on a rectified flow",
    )


ROWS = (
    Sampler(
        name="flow_euler",
        solve=euler,
        grid=flow_grid,
        space="flow",
        order=1,
        takes_schedule=True,
        reads={
            **FLOW_MATCH,
            **SCHEDULED,
            **BY_NAME,
            "shift_terminal": None,
            "use_dynamic_shifting": False,
            "invert_sigmas": False,
            "stochastic_sampling": False,
        },
        choices=FLOW_ONLY,
        diffusers="FlowMatchEulerDiscreteScheduler",
        about="Euler's method on a rectified flow (arXiv 2403.03206)",
    ),
    Sampler(
        name="flow_heun",
        solve=heun,
        grid=flow_grid,
        space="flow",
        order=2,
        takes_schedule=True,
        reads={**FLOW_MATCH, **BY_NAME},
        choices=FLOW_ONLY,
        diffusers="FlowMatchHeunDiscreteScheduler",
        about="Heun's method on a rectified flow, two model calls per step (arXiv 2403.03206)",
    ),
    *(flow_form(row) for row in (*dpm.ROWS, *unipc.ROWS) if row.name in ("dpmpp_2m", "unipc")),
)
