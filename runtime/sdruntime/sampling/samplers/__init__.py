"""The samplers by name, as users know them: ours, diffusers' classes, AUTOMATIC1111's, k-diffusion's, ComfyUI's.

`SAMPLERS` is the registry, `register` adds to it, `resolve` finds a row by any of its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sdruntime.errors import SettingError, UnknownName
from sdruntime.sampling.grids import SCHEDULES, chosen_schedule
from sdruntime.sampling.samplers import consistency, ddim, deis, dpm, dpm_ancestral, flow, kdiffusion, pndm, sa, unipc
from sdruntime.sampling.samplers.sampler import Sampler

__all__ = [
    "A1111_SCHEDULES",
    "SAMPLERS",
    "Sampler",
    "folded",
    "identified",
    "meaning",
    "register",
    "resolve",
    "resolve_schedule",
    "settled",
]

# AUTOMATIC1111's name ("Schedule type") of each schedule; None is the plain spacing of timesteps. "lu" spaces log sigma
# evenly, which AUTOMATIC1111 calls exponential.
A1111_SCHEDULES: Mapping[str | None, str] = {
    None: "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "lu": "Exponential",
    "polyexponential": "Polyexponential",
    "beta": "Beta",
    "simple": "Simple",
    "sgm_uniform": "SGM Uniform",
    "normal": "Normal",
}


def folded(name: str) -> str:
    """A name reduced to what tells it from others: "DPM++ 2S Ancestral", "dpmpp_2s_a" and "dpm++2s a" are one."""
    text = name.casefold().replace("++", "pp").replace("ancestral", "a")
    return "".join(letter for letter in text if letter.isalnum())


_SCHEDULES = {folded(name): name for name in SCHEDULES} | {"uniform": "normal"}  # AUTOMATIC1111's word for the same levels
# AUTOMATIC1111's and ComfyUI's words for what is no schedule here
_NO_SCHEDULES = {
    "automatic": "omit the schedule for the checkpoint's own timesteps; the web UI takes Karras for most DPM++ samplers",
    "ddim": "omit the schedule, with the sampler option timestep_spacing leading",
    "ddimuniform": "omit the schedule, with the sampler option timestep_spacing leading",
}
_FAMILIES = (ddim, pndm, kdiffusion, dpm_ancestral, dpm, unipc, deis, sa, consistency, flow)
_ROWS: dict[str, Sampler] = {}
_NAMES: dict[str, tuple[Sampler, Mapping[str, Any]]] = {}  # by each folded name the row, and what that name fixes
SAMPLERS: Mapping[str, Sampler] = MappingProxyType(_ROWS)


def register(row: Sampler) -> None:
    """Make a sampler known by its name, its diffusers class and its other names; a name that is taken stays with its first row.

    A diffusers class fixes nothing, for the file says the rest. Raises SettingError where the row's own name is taken.
    """
    if (taken := _NAMES.get(folded(row.name))) is not None:
        raise SettingError(f"sampler {row.name}: {taken[0].name} has this name already; use another")
    _ROWS[row.name] = row
    for name in (row.name, *row.a1111):
        _NAMES.setdefault(folded(name), (row, row.implied))
    if row.diffusers:
        for name in (row.diffusers, row.diffusers.removesuffix("Scheduler")):
            _NAMES.setdefault(folded(name), (row, {}))


for _family in _FAMILIES:
    for _row in _family.ROWS:
        register(_row)


def resolve(name: str) -> tuple[Sampler, dict[str, Any]]:
    """Return the sampler of a name, and the settings that the name fixes ("DPM++ 2M Karras": order, algorithm, schedule).

    Takes names of the registry, diffusers class names, and the names of AUTOMATIC1111, k-diffusion and ComfyUI with or
    without a schedule at the end. Case, spaces and punctuation do not count. Raises UnknownName with similar names.
    """
    wanted = folded(name)
    for text in (wanted, wanted.removeprefix("k")):  # k_euler_a is k-diffusion's Euler a
        for suffix, schedule in {"": None, **_SCHEDULES}.items():
            stem = text.removesuffix(suffix)
            if text.endswith(suffix) and stem in _NAMES:
                sampler, implied = _NAMES[stem]
                return sampler, dict(implied) if schedule is None else {**implied, "schedule": schedule}
    known = {name for row in SAMPLERS.values() for name in (row.name, *row.a1111, row.diffusers) if name}
    raise UnknownName("sampler", name, known, listed_by="`sdruntime samplers` lists them")


def resolve_schedule(name: str) -> str:
    """Return our name of a schedule ("Karras", "SGM Uniform"). Raises UnknownName with similar names."""
    found = _SCHEDULES.get(folded(name))
    if found is None and (instead := _NO_SCHEDULES.get(folded(name))):
        raise SettingError(f"schedule {name!r}: {instead}")
    if found is None:
        raise UnknownName("schedule", name, SCHEDULES)
    return found


def identified(
    config: Mapping[str, Any], *, sampler: str | None = None, schedule: str | None = None, **options: Any
) -> tuple[Sampler | None, str | None]:
    """Return the row whose name says exactly what these arguments of `compile_table` do, and the schedule in use.

    Several rows share a diffusers class: a file of DPMSolverMultistepScheduler means dpmpp_2m, dpmpp_2m_sde or another,
    as its solver_order and algorithm_type say. None stands for a combination that has no row. Raises SettingError.
    """
    row, settings = settled(config, sampler=sampler, schedule=schedule, **options)
    rows = [row] if row.diffusers is None else [each for each in SAMPLERS.values() if each.diffusers == row.diffusers]
    fitting = [each for each in rows if all(settings[key] == value for key, value in each.implied.items())]
    kind = chosen_schedule(settings)
    return max(fitting, key=lambda each: len(each.implied), default=None), None if kind == "flow" else kind


def meaning(config: Mapping[str, Any], *, sampler: str | None = None, schedule: str | None = None, **options: Any) -> str:
    """Return a line that says which sampler is meant by a diffusers class that several have; else "".

    Raises SettingError.
    """
    named = None if sampler is None else resolve(sampler)[0].diffusers
    if named is None or folded(str(sampler)) not in (folded(named), folded(named.removesuffix("Scheduler"))):
        return ""
    if sum(row.diffusers == named for row in SAMPLERS.values()) < 2:
        return ""
    row, _ = identified(config, sampler=sampler, schedule=schedule, **options)
    return f"{named} with these settings is {row.name}" if row else f"{named} with these settings has no name of its own"


def settled(
    config: Mapping[str, Any], *, sampler: str | None = None, schedule: str | None = None, **options: Any
) -> tuple[Sampler, dict[str, Any]]:
    """Return the sampler that these arguments of `compile_table` name, with the value of every key that it reads.

    Raises SettingError, UnknownName.
    """
    if not isinstance(config, Mapping):
        raise SettingError(f"scheduler_config.json holds a {type(config).__name__}: it must be an object with keys")
    name = sampler if sampler is not None else config.get("_class_name")
    if sampler is not None and not isinstance(sampler, str):
        raise SettingError(f"sampler: expected a name, got {type(sampler).__name__}")
    if not isinstance(name, str):
        raise SettingError("scheduler_config.json has no _class_name: name a sampler")
    found, implied = resolve(name)
    given = {**implied, **options, **({} if schedule is None else {"schedule": schedule})}
    if isinstance(given.get("schedule"), str):
        given["schedule"] = resolve_schedule(given["schedule"])
    if schedule is not None and (other := implied.get("schedule", given["schedule"])) != given["schedule"]:
        raise SettingError(f"schedule {schedule!r}: sampler {name!r} names the schedule {other} already: give one of them")
    if given.get("schedule") and not found.takes_schedule:
        raise SettingError(f"schedule {given['schedule']!r}: {found.name} keeps to the trained timesteps and takes none")
    return found, found.settings(config, given)
