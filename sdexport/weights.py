"""The weights of a module: found among the stored tensors, brought to a precision and written to a data file, one by one.

No more than one tensor is ever in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from sdexport.errors import ExportError, PrecisionError
from sdexport.stored import Array, StoredTensor
from sdruntime.manifest import Precision

# old and new names of one weight: transformers 5 dropped a prefix, diffusers 0.18 renamed the attention of the VAE
_OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
_PREFIX = "text_model."

_LARGE, _PAGE, _LINE = (
    1 << 20,
    4096,
    64,
)  # data over a megabyte begins on a page, so that it can be mapped; the rest on a cache line


def match_weights(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], *, where: str
) -> dict[str, StoredTensor]:
    """For each weight of a module the tensor that the checkpoint stores for it, under its name or a former one.

    Raises ExportError with every missing weight and every wrong shape.
    """
    matched, faults = {}, []
    for name, shape in shapes.items():
        tensor = next((stored[other] for other in _spellings(name) if other in stored), None)
        if tensor is None:
            faults.append(f"{name} is missing")
        elif tensor.shape != shape:
            faults.append(f"{name} is {list(tensor.shape)}, but config.json makes it {list(shape)}")
        elif not tensor.readable:
            faults.append(
                f"{name} is stored as {tensor.dtype}: quantised weights are not supported; use a checkpoint in float16 or float32"
            )
        else:
            matched[name] = tensor
    if faults:
        shown = [*faults[:20], *([f"… and {len(faults) - 20} more"] if len(faults) > 20 else [])]
        listed = "\n".join(f"  - {fault}" for fault in shown)
        raise ExportError(f"{where}: the weights do not fit the config\n{listed}")
    return matched


def _spellings(name: str) -> Iterator[str]:
    yield name
    yield name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else _PREFIX + name
    for new, old in _OLD_NAMES.items():
        if new in name:
            yield name.replace(new, old)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where a weight lies in the data file."""

    offset: int
    size: int


def write_data(
    file: BinaryIO, weights: Mapping[str, StoredTensor], precision_of: Mapping[str, Precision]
) -> Iterator[tuple[str, Placed, int]]:
    """Write each weight in its precision to the data file, equal bytes once: yields name, place and the bytes read for it.

    Raises PrecisionError, at the end, with every tensor that holds numbers too large for its precision.
    """
    known: dict[bytes, Placed] = {}
    faults = []
    for name, tensor in weights.items():
        numbers, fault = in_precision(tensor.read(), precision_of[name])
        if fault:
            faults.append(f"{name}: {fault}")
            continue
        data = numbers.reshape(-1).view(np.uint8).data
        digest = hashlib.sha256(data).digest()
        if digest not in known:
            step = _PAGE if len(data) >= _LARGE else _LINE
            file.seek(-(-file.tell() // step) * step)
            known[digest] = Placed(offset=file.tell(), size=len(data))
            file.write(data)
        yield name, known[digest], tensor.size
    if faults:
        raise PrecisionError("weights beyond the precision", faults)


def in_precision(numbers: Array, precision: Precision) -> tuple[Array, str | None]:
    """The numbers rounded to a precision, C-contiguous; and what is wrong with them there, if something is."""
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
    """The largest finite number of a precision."""
    return {"fp32": float(np.finfo(np.float32).max), "fp16": 65504.0, "bf16": (2 - 2**-7) * 2.0**127}[precision]
