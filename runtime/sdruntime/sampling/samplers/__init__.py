"""The registry of samplers, by our names and those of diffusers, AUTOMATIC1111, k-diffusion and ComfyUI.

`SAMPLERS` is the registry, `register` adds to it, `resolve` finds a row by any of its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sdruntime.errors import SettingError, UnknownName
from sdruntime.sampling.grids import chosen_schedule
from sdruntime.sampling.samplers import consistency, ddim, deis, dpm, pndm, sa, unipc
from sdruntime.sampling.samplers.forms import edm, flow
from sdruntime.sampling.samplers.kdiffusion import dpm_ancestral, restart, slopes
from sdruntime.sampling.samplers.sampler import Sampler
from sdruntime.sampling.schedules import SCHEDULES

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

# AUTOMATIC1111's name ("Schedule type") of each schedule; None is plain timestep_spacing. "lu" spaces log sigma evenly, which
# AUTOMATIC1111 also calls exponential.
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
    "ddim_uniform": "DDIM",
    "turbo": "Turbo",  # Forge's name, like the last
    "kl_optimal": "KL Optimal",
    "align_your_steps": "Align Your Steps",
    "gits": "Align Your Steps GITS",
}


def folded(name: str) -> str:
    """Return a name normalized for comparison: "DPM++ 2S Ancestral", "dpmpp_2s_a" and "dpm++2s a" are equal."""
    text = name.casefold().replace("++", "pp").replace("ancestral", "a")
    return "".join(letter for letter in text if letter.isalnum())


_ALIASES = {  # names of AUTOMATIC1111, Forge and ComfyUI
    "uniform": "normal",
    "ddim": "ddim_uniform",
    "ays": "align_your_steps",
    "alignyourstepsgits": "gits",
}
_SCHEDULES = _ALIASES | {folded(name): name for name in SCHEDULES}
# names that are not schedules here, with what to use instead
_NO_SCHEDULES = {
    "automatic": "omit the schedule for the checkpoint's own timesteps; the web UI uses Karras for most DPM++ samplers",
}
_FAMILIES = (ddim, pndm, slopes, dpm_ancestral, restart, dpm, unipc, deis, sa, consistency, flow, edm)
_ROWS: dict[str, Sampler] = {}
_NAMES: dict[str, tuple[Sampler, Mapping[str, Any]]] = {}  # folded name -> row, and the settings that the name implies
SAMPLERS: Mapping[str, Sampler] = MappingProxyType(_ROWS)


def register(row: Sampler) -> None:
    """Register a sampler under its name, its diffusers class and its other names; the first row keeps a shared name.

    A diffusers class implies no settings: the checkpoint's config has them. Raises SettingError if the row's own name is taken.
    """
    if (taken := _NAMES.get(folded(row.name))) is not None:
        raise SettingError(f"sampler {row.name}: {taken[0].name} already has this name; use another")
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
    """Return the sampler of a name, and the settings that the name implies ("DPM++ 2M Karras": order, algorithm, schedule).

    Accepts registered names, diffusers class names, and names of AUTOMATIC1111, k-diffusion and ComfyUI, with or without a
    schedule at the end. Case, spaces and punctuation are ignored. Raises UnknownName with similar names.
    """
    key = folded(name)
    for text in (key, key.removeprefix("k")):  # k_euler_a is k-diffusion's Euler a
        for suffix, schedule in {"": None, **_SCHEDULES}.items():
            stem = text.removesuffix(suffix)
            if text.endswith(suffix) and stem in _NAMES:
                sampler, implied = _NAMES[stem]
                return sampler, dict(implied) if schedule is None else {**implied, "schedule": schedule}
    known = {name for row in SAMPLERS.values() for name in (row.name, *row.a1111, row.diffusers) if name}
    raise UnknownName("sampler", name, known, listed_by="`sdruntime samplers` lists them")


def resolve_schedule(name: str) -> str:
    """Return our name of a schedule ("Karras", "SGM Uniform"). Raises UnknownName with similar names.

    Raises SettingError for "automatic", which is not a schedule here.
    """
    schedule = _SCHEDULES.get(folded(name))
    if schedule is None and (fix := _NO_SCHEDULES.get(folded(name))):
        raise SettingError(f"schedule {name!r}: {fix}")
    if schedule is None:
        raise UnknownName("schedule", name, SCHEDULES)
    return schedule


def identified(
    config: Mapping[str, Any], *, sampler: str | None = None, schedule: str | None = None, **options: Any
) -> tuple[Sampler | None, str | None]:
    """Return the row that matches these arguments of `compile_table` exactly, and the schedule in use.

    Several rows share a diffusers class: a config of DPMSolverMultistepScheduler means dpmpp_2m, dpmpp_2m_sde or another,
    depending on its solver_order and algorithm_type. The row is None if no row has this combination. Raises SettingError.
    """
    row, settings = settled(config, sampler=sampler, schedule=schedule, **options)
    rows = [row] if row.diffusers is None else [other for other in SAMPLERS.values() if other.diffusers == row.diffusers]
    matches = [row for row in rows if all(settings[key] == value for key, value in row.implied.items())]
    kind = chosen_schedule(settings)
    return max(matches, key=lambda row: len(row.implied), default=None), None if kind == "flow" else kind


def meaning(config: Mapping[str, Any], *, sampler: str | None = None, schedule: str | None = None, **options: Any) -> str:
    """Return a note on which sampler the diffusers class `sampler` means, if several samplers share it; else "".

    Raises SettingError.
    """
    shared = None if sampler is None else resolve(sampler)[0].diffusers
    if shared is None or folded(str(sampler)) not in (folded(shared), folded(shared.removesuffix("Scheduler"))):
        return ""
    if sum(row.diffusers == shared for row in SAMPLERS.values()) < 2:
        return ""
    row, _ = identified(config, sampler=sampler, schedule=schedule, **options)
    return f"{shared} with these settings is {row.name}" if row else f"{shared} with these settings has no name of its own"


def settled(
    config: Mapping[str, Any], *, sampler: str | None = None, schedule: str | None = None, **options: Any
) -> tuple[Sampler, dict[str, Any]]:
    """Return the sampler of these arguments of `compile_table`, and the value of every key that it reads.

    Raises SettingError, UnknownName.
    """
    if not isinstance(config, Mapping):
        raise SettingError(f"scheduler_config.json: expected an object, got {type(config).__name__}")
    name = sampler if sampler is not None else config.get("_class_name")
    if sampler is not None and not isinstance(sampler, str):
        raise SettingError(f"sampler: expected a name, got {type(sampler).__name__}")
    if not isinstance(name, str):
        raise SettingError("scheduler_config.json has no _class_name: choose a sampler")
    row, implied = resolve(name)
    trained, _ = _NAMES.get(folded(str(config.get("_class_name", ""))), (row, None))
    if (trained.space == "edm") != (row.space == "edm"):
        fitting = ", ".join(other.name for other in SAMPLERS.values() if (other.space == "edm") == (trained.space == "edm"))
        raise SettingError(
            f"sampler {name!r}: the model was trained {'in' if trained.space == 'edm' else 'without'} EDM's preconditioning "
            f"({trained.diffusers} in its scheduler_config.json); samplers for it: {fitting}"
        )
    chosen = {**implied, **options, **({} if schedule is None else {"schedule": schedule})}
    if isinstance(chosen.get("schedule"), str):
        chosen["schedule"] = resolve_schedule(chosen["schedule"])
    if schedule is not None and (other := implied.get("schedule", chosen["schedule"])) != chosen["schedule"]:
        raise SettingError(f"schedule {schedule!r}: sampler {name!r} already names the schedule {other}: give only one")
    if chosen.get("schedule") and not row.takes_schedule:
        raise SettingError(f"schedule {chosen['schedule']!r}: {row.name} uses the trained timesteps and takes none")
    return row, row.settings(config, chosen)
