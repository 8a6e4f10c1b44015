"""The tables of the passes of requests, the most recent of which are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdruntime.errors import SettingError
from sdruntime.pipeline.requests.ranges import steps_beside
from sdruntime.pipeline.tasks.passes import Pass
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.table import Table

KEPT = 64


class Tables:
    """The tables of a model with this scheduler's config."""

    def __init__(self, schedule: Mapping[str, Any]) -> None:
        self._schedule = schedule
        self._tables: dict[tuple[Any, ...], Table] = {}

    def of(self, step: Pass) -> Table:
        """Return the table of a pass of a completed request. Raises SettingError, UnknownName."""
        request, strength = step.request, step.strength
        options = repr(sorted(request.options.items()))
        key = (request.steps, request.sigmas, request.sampler, request.schedule, strength, step.part, options)
        if key not in self._tables:
            if len(self._tables) >= KEPT:
                self._tables.clear()
            try:
                self._tables[key] = compile_table(
                    self._schedule,
                    steps=steps_beside(request.sigmas, request.steps),
                    sigmas=request.sigmas,
                    sampler=request.sampler,
                    schedule=request.schedule,
                    strength=strength,
                    part=step.part,
                    **request.options,
                )
            except SettingError as error:
                if step.resize is None and step.part is None:
                    raise
                where = "hires" if step.part is None else f"refiner_at {request.refiner_at:g}"
                raise type(error)(f"{where}: {error}") from error
        return self._tables[key]
