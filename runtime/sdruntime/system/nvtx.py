"""Named ranges for NVIDIA's profilers (Nsight Systems), if the package nvtx is installed."""

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
    """Return a context that marks its block as the range `name`: a component of a pipeline, or a step of a sampler."""
    nvtx = _nvtx()
    marked: contextlib.AbstractContextManager[Any] = (
        contextlib.nullcontext() if nvtx is None else nvtx.annotate(name, domain="sdruntime")
    )
    return marked
