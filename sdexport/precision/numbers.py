"""Round numbers to a precision, and check that it can represent them."""

from __future__ import annotations

import numpy as np

from sdexport.checkpoint.weights.safetensors import Array
from sdruntime.bundle.manifest import Precision


def in_precision(numbers: Array, precision: Precision) -> tuple[Array, str | None]:
    """Return the numbers rounded to a precision, C-contiguous; and a fault if the result is not finite, else None."""
    import ml_dtypes

    kind = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}[precision]
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.ascontiguousarray(numbers.astype(kind, copy=False))
    if np.isfinite(rounded).all():
        return rounded, None
    beyond = ~np.isfinite(rounded)
    if not np.isfinite(numbers).all():
        return (
            rounded,
            f"{np.count_nonzero(~np.isfinite(numbers)):,} of {numbers.size:,} numbers are not finite in the checkpoint",
        )
    worst = np.abs(numbers).max()
    limit = largest(precision)
    return rounded, (
        f"{np.count_nonzero(beyond):,} of {numbers.size:,} numbers are beyond {limit:g} (the largest is {worst:g}): "
        f"{precision} cannot hold them; build with --precision bf16 or fp32"
    )


def largest(precision: Precision) -> float:
    """Return the largest finite number of a precision."""
    return {"fp32": float(np.finfo(np.float32).max), "fp16": 65504.0, "bf16": (2 - 2**-7) * 2.0**127}[precision]
