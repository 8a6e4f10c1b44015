"""A row of the registry of samplers, and how it reads a checkpoint's scheduler_config.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdruntime.errors import SettingError, UnknownName, shown
from sdruntime.sampling.grids import FAMILY, Path
from sdruntime.sampling.noise_schedule import Settings, Space
from sdruntime.sampling.prediction import PREDICTIONS
from sdruntime.sampling.samplers.keys import OPTIONS
from sdruntime.sampling.samplers.protocol import Solver
from sdruntime.sampling.schedules import SCHEDULES

# The key that lists which keys of a scheduler_config.json are defaults of its class: from_config does not pass those on to
# another class.
DEFAULTED = "_use_default_values"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A sampler: a row of the registry.

    `order`: the order of convergence of the result's variance on a smooth problem, including a start of lower order; 0 if it
    does not converge (distilled models). `reads`: every key of scheduler_config.json that matters, with the default of the
    diffusers class. `options`: those of them that are passed to `solve`. `implied`: settings that the name itself fixes
    ("dpmpp_2m": solver_order 2). `choices`: the values of keys whose values differ between classes. `takes_schedule`: the path
    may go through any decreasing sigmas, those of a named schedule or of the caller (own_sigmas.py).
    """

    name: str
    solve: Callable[..., Solver]
    grid: Callable[[Settings, int, int], Path]
    space: Space
    order: int
    reads: Mapping[str, Any]
    options: tuple[str, ...] = ()
    implied: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    takes_schedule: bool = False
    diffusers: str | None = None
    a1111: tuple[str, ...] = ()
    about: str

    def __post_init__(self) -> None:
        stray = [key for key in (*self.options, *self.implied, *self.choices) if key not in self.reads]
        if stray:
            raise TypeError(f"{self.name}: {', '.join(stray)} must be among the keys that it reads")

    def settings(self, config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of every key in `reads`: from `options`, else from `config`, else the default.

        Raises SettingError with the key and the value if it is out of range or cannot be expressed in a table.
        """
        unknown = [key for key in options if key not in self.reads]
        if unknown:
            raise self._refused(unknown[0])
        other = self.diffusers != config.get("_class_name")
        unwritten = config.get(DEFAULTED, ()) if other else ()
        written = {key: config[key] for key in self.reads if config.get(key) is not None and key not in unwritten}
        written = {key: value for key, value in written.items() if not self._of_another_class(key, value)}
        # the diffusers classes treat null as false, whatever the default
        off = {key: False for key, default in self.reads.items() if default is True and config.get(key, ...) is None}
        settings = {**self.reads, **off, **written, **options}
        for key, value in settings.items():
            if type(value) is not type(self.reads[key]) or value != self.reads[key]:  # 2.0 is no solver_order
                self._check(key, value)
        return settings

    def _refused(self, key: str) -> SettingError:
        """Return the error for an option that this sampler does not have; it lists samplers that do."""
        own = sorted(OPTIONS.intersection(self.reads))
        if key not in OPTIONS:
            return UnknownName(f"option of {self.name}", key, own)
        from sdruntime.sampling.samplers import SAMPLERS

        others = [name for name, row in SAMPLERS.items() if key in row.reads]
        with_it = f"; samplers with it: {', '.join(others)}" if others else ""
        return SettingError(f"option {key}: {self.name} has no such option (it has: {', '.join(own) or 'none'}){with_it}")

    def _of_another_class(self, key: str, value: Any) -> bool:
        """Whether a value of solver_type or algorithm_type is that of a sibling class, which from_config ignores."""
        return key in self.choices and value not in self.choices[key] and value in SIBLING_CHOICES.get(key, ())

    def _check(self, key: str, value: Any) -> None:
        choices = {**CHOICES, **self.choices}
        if key in choices:
            if value not in choices[key]:
                if value in CHOICES.get(key, ()):
                    raise SettingError(f"{key} {shown(value)}: {self.name} takes {', '.join(choices[key])}")
                raise UnknownName(key, str(value), [choice for choice in choices[key] if choice])
        elif key in INEXPRESSIBLE:
            if value != INEXPRESSIBLE[key]:
                raise SettingError(
                    f"{key} {shown(value)} in scheduler_config.json: a table of coefficients cannot express it; "
                    f"use a sampler that does not read it, or {INEXPRESSIBLE[key]!r}"
                )
        elif key in RANGES:
            kind, low, high = RANGES[key]
            number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                expected = "a whole number" if kind is int else "a number"
                raise SettingError(f"{key} {shown(value)}: expected {expected} from {low:g} to {high:g}")
        elif key == FAMILY:
            if not isinstance(value, str):
                raise SettingError(f"{key} {shown(value)}: expected the name of a family")
        elif isinstance(self.reads[key], bool):
            if not isinstance(value, bool):
                raise SettingError(f"{key} {shown(value)}: expected true or false")
        elif not isinstance(value, (list, tuple)) or not all(type(item) in (int, float) for item in value):
            raise SettingError(f"{key} {shown(value)}: expected a list of numbers")


CHOICES: Mapping[str, tuple[Any, ...]] = {
    "prediction_type": PREDICTIONS,
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "schedule": SCHEDULES,
    "third_order": ("diffusers", "exact"),
    "sigma_schedule": ("karras", "exponential"),
}
SIBLING_CHOICES: Mapping[str, tuple[str, ...]] = {
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "algorithm_type": (
        *("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        *("deis", "data_prediction", "noise_prediction"),
    ),
}
# Keys that no linear update can express, each with the one value that is supported.
INEXPRESSIBLE: Mapping[str, Any] = {
    "thresholding": False,
    "clip_sample": False,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "solver_p": None,
}
RANGES: Mapping[str, tuple[type, float, float]] = {
    "num_train_timesteps": (int, 1, 100_000),
    "beta_start": (float, 1e-7, 0.999),
    "beta_end": (float, 1e-7, 0.999),
    "steps_offset": (int, 0, 100_000),
    "original_inference_steps": (int, 1, 100_000),
    "timestep_scaling": (float, 1e-3, 1e6),
    "solver_order": (int, 1, 3),
    "predictor_order": (int, 1, 4),
    "corrector_order": (int, 1, 4),
    "order": (int, 1, 4),
    "eta": (float, 0.0, 1.0),
    "s_churn": (float, 0.0, 1000.0),
    "s_tmin": (float, 0.0, math.inf),
    "s_tmax": (float, 0.0, math.inf),
    "s_noise": (float, 0.0, 2.0),
    "sigma_min": (float, 1e-6, 1e6),
    "sigma_max": (float, 1e-6, 1e6),
    "sigma_data": (float, 1e-3, 1e3),
    "rho": (float, 1.0, 100.0),
    "lambda_min_clipped": (float, -math.inf, math.inf),
    "flow_shift": (float, 1e-2, 100.0),
    "shift": (float, 1e-2, 100.0),
    "shift_terminal": (float, 0.0, 0.99),
}
