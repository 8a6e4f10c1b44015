"""Convert the stored weights of a module to their precision and write them to a data file, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from sdexport.checkpoint.weights.safetensors import StoredTensor
from sdexport.errors import PrecisionError
from sdexport.precision.numbers import in_precision
from sdruntime.bundle.manifest import Precision

# tensors of a megabyte or more start on a page, so that they can be mapped; the others on a cache line
_LARGE, _PAGE, _LINE = 1 << 20, 4096, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The location of a weight in the data file, in bytes."""

    offset: int
    size: int


def write_data(
    file: BinaryIO, weights: Mapping[str, StoredTensor], precision_of: Mapping[str, Precision]
) -> Iterator[tuple[str, Placed, int]]:
    """Write each weight in its precision to the data file, equal data once; yield its name, place and the bytes read for it.

    Raises PrecisionError at the end, with every tensor that has numbers too large for its precision.
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
