"""Named ranges for NVIDIA's profilers (Nsight Systems), where the package nvtx is installed; else nothing."""

from __future__ import annotations

import contextlib
import functools
from typing import Any


@functools.cache
def _nvtx() -> Any:
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx


def annotate(name: str) -> contextlib.AbstractContextManager[Any]:
    """A range called `name` around a block: a component of a pipeline, or a step of a sampler."""
    nvtx = _nvtx()
    found: contextlib.AbstractContextManager[Any] = (
        contextlib.nullcontext() if nvtx is None else nvtx.annotate(name, domain="sdruntime")
    )
    return found
