"""The samplers by name: `SAMPLERS` is the registry, `register` adds to it, `resolve` finds a row by any name that users know."""

from sdruntime.sampling.samplers.registry import (
    A1111_SCHEDULES,
    SAMPLERS,
    identified,
    meaning,
    register,
    resolve,
    resolve_schedule,
    settled,
)
from sdruntime.sampling.samplers.sampler import Sampler

__all__ = [
    "A1111_SCHEDULES",
    "SAMPLERS",
    "Sampler",
    "identified",
    "meaning",
    "register",
    "resolve",
    "resolve_schedule",
    "settled",
]
