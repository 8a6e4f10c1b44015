"""The samplers by name: `SAMPLERS` is the registry, `resolve` finds a row by any name that users know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdruntime.errors import UnknownName
from sdruntime.path import SCHEDULES
from sdruntime.samplers.rows import ROWS
from sdruntime.samplers.sampler import Sampler

__all__ = ["SAMPLERS", "Sampler", "resolve"]


def _flow_form(name: str, base: Sampler) -> Sampler:
    return replace(
        base,
        name=name,
        reads={**base.reads, "prediction_type": "flow_prediction"},
        implied={**base.implied, "use_flow_sigmas": True},
        choices={**base.choices, "prediction_type": ("flow_prediction",)},
        takes_schedule=False,
        a1111=(),
        about=f"{base.about}, on a rectified flow",
    )


ALL = (*ROWS, *(_flow_form(f"flow_{row.name}", row) for row in ROWS if row.name in ("dpmpp_2m", "unipc")))
SAMPLERS: Mapping[str, Sampler] = {row.name: row for row in ALL}


def _folded(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


NAMES: dict[str, tuple[Sampler, Mapping[str, Any]]] = {}
for _row in ALL:
    for _name in (_row.name, *_row.a1111):
        NAMES.setdefault(_folded(_name), (_row, _row.implied))
    if _row.diffusers:
        NAMES.setdefault(_folded(_row.diffusers), (_row, {}))
SUFFIXES: Mapping[str, str | None] = {"": None} | {f" {_folded(schedule)}": schedule for schedule in SCHEDULES}


def resolve(name: str) -> tuple[Sampler, dict[str, Any]]:
    """The sampler of a name, and the settings that the name fixes ("DPM++ 2M Karras": order, algorithm, schedule).

    Takes names of the registry, diffusers class names (which fix nothing: the file says), and A1111's names with or
    without a schedule behind; upper and lower case are the same. Raises UnknownName with the near ones.
    """
    wanted = _folded(name)
    for suffix, schedule in SUFFIXES.items():
        stem = wanted.removesuffix(suffix)
        if wanted.endswith(suffix) and stem in NAMES:
            sampler, implied = NAMES[stem]
            return sampler, dict(implied) if schedule is None else {**implied, "schedule": schedule}
    raise UnknownName("sampler", name, {name for row in ALL for name in (row.name, *row.a1111, row.diffusers) if name})
