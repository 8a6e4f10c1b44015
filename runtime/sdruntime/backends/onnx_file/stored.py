"""The weights of a component as its ONNX model stores them, by the names of the checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.onnx_file.external import ExternalTensor, external_tensors, locations
from sdruntime.bundle.bundle import Bundle
from sdruntime.errors import BundleError

BFLOAT16 = 16  # TensorProto.DataType
_FLOATS = (1, 10, BFLOAT16)


def weight_tensors(bundle: Bundle, component: str) -> dict[str, ExternalTensor]:
    """Return the locations of a component's weights, floats only, by their names. Raises BundleError."""
    files = bundle.manifest.components[component].files
    try:
        tensors = external_tensors(bundle.read(files[0]), locations(files))
    except ValueError as error:
        raise BundleError(bundle.folder, [f"{files[0]}: {error}"]) from error
    return {tensor.name: tensor for tensor in tensors if tensor.kind in _FLOATS}


@contextlib.contextmanager
def lending_weights(bundle: Bundle, component: str) -> Iterator[Callable[[str], Array]]:
    """Lend a function that returns a weight of a component as float32. Raises BundleError, after the block for a wrong hash."""
    files, tensors = bundle.manifest.components[component].files, weight_tensors(bundle, component)
    names = locations(files)
    with bundle.lending(files[1:]) as lent:

        def read(name: str) -> Array:
            tensor = tensors[name]
            data = lent[names[tensor.location]][tensor.offset : tensor.offset + tensor.length]
            if len(data) != tensor.length:
                raise BundleError(bundle.folder, [f"{files[0]}: tensor {name} extends beyond the end of {tensor.location}"])
            return float32_of(np.frombuffer(data, tensor.dtype).reshape(tensor.shape), tensor.kind)

        yield read


def float32_of(values: Array, kind: int) -> Array:
    """Return stored floats as float32; bfloat16 is stored as uint16, its raw bits."""
    return (values.astype(np.uint32) << 16).view(np.float32) if kind == BFLOAT16 else values.astype(np.float32)


def stored_as(values: Array, kind: int, dtype: np.dtype[np.generic]) -> Array:
    """Return float32 values as they are stored, rounded to the nearest. Raises ValueError for numbers beyond the type."""
    if kind == BFLOAT16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(values, dtype)
    if not np.isfinite(rounded).all():
        raise ValueError(f"numbers beyond {np.finfo(rounded.dtype).max:g}, the largest of {rounded.dtype}")
    return rounded
