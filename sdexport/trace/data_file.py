"""The weights of a module: found among the stored tensors, brought to a precision and written to a data file, one by one.

No more than one tensor is ever in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from sdexport.checkpoint.safetensors import StoredTensor
from sdexport.errors import PrecisionError
from sdexport.precision.numbers import in_precision
from sdruntime.bundle.manifest import Precision

_LARGE, _PAGE, _LINE = (
    1 << 20,
    4096,
    64,
)  # data over a megabyte begins on a page, so that it can be mapped; the rest on a cache line


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
