"""Generators of events, as tests look at them."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from sdruntime.system.events import finish


def whole(events: Generator[Any, None, Any]) -> list[Any]:
    """Every event, and after them what the generator returned."""
    seen: list[Any] = []
    result = finish(events, seen.append)
    return [*seen, result]


def job_here(job: Any) -> Generator[Any, None, int]:
    """`sdexport.trace.process.run_job` without a process of its own, which takes seconds to load torch."""
    from sdexport.trace.component import run

    yield from run(job)
    return 0
