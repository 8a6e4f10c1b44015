"""Write a safetensors file tensor by tensor, so that one is in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from sdexport.checkpoint.weights.safetensors import Array
from sdruntime.adapters.safetensors import BITS

Described = tuple[str, tuple[int, ...]]  # safetensors' type, and the shape


def write_safetensors(
    path: Path, tensors: Mapping[str, Described], values: Callable[[str], Array], metadata: Mapping[str, str]
) -> Iterator[int]:
    """Write the tensors in their order; yield the bytes of each when it is written. `values` returns one as it is stored."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in tensors.items():
            array = np.ascontiguousarray(values(name))
            assert (array.nbytes * 8, array.shape) == (math.prod(shape) * BITS[dtype], shape), name
            file.write(array.reshape(-1).view(np.uint8).data)
            yield array.nbytes
