"""Pass an ONNX model of a bundle and its weights to an engine library.

ONNX Runtime gets the weights in memory and opens no file. Unless `DIRECTLY` is set, it copies the weights it keeps while it opens
the model; afterwards nothing refers to the file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.onnx_file.external import ExternalTensor, external_tensors, locations
from sdruntime.bundle.bundle import Bundle
from sdruntime.errors import BundleError
from sdruntime.system.memory import return_freed_memory

NOTHING: Mapping[str, Array] = MappingProxyType({})
DIRECTLY = "session.use_external_initializer_file_buffers_directly"


def open_session(
    ort: Any,
    bundle: Bundle,
    model: bytes,
    files: Sequence[str],
    options: Any,
    providers: Sequence[Any],
    replaced: Mapping[str, Array] = NOTHING,
) -> Any:
    """Return an InferenceSession of `model`, with weights from `files`: the model's path in the bundle, then those of its data.

    `replaced`: other values for some of the weights in the data, as they are stored. Raises BundleError and the errors of ONNX
    Runtime.
    """
    names, tensors = locations(files), _external(bundle, files, memoryview(model))
    with bundle.lending(files[1:]) as lent:
        arrays = {tensor.name: _array(bundle, files[0], tensor, lent[names[tensor.location]]) for tensor in tensors}
        arrays |= replaced
        ort_value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
        values = [ort_value(arrays[tensor.name], tensor.kind) for tensor in tensors]  # they refer to the arrays
        options.add_external_initializers(list(arrays), values)
        # its own fallback prints on standard output, and opens the model again
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
        # constant folding and the layouts of convolutions hold a second copy of the weights until here
        return_freed_memory()
        return session


@contextlib.contextmanager
def lending_onnx(bundle: Bundle, files: Sequence[str]) -> Iterator[str]:
    """Yield the path of an ONNX model, for a library that opens the model and its data files by name.

    Raises BundleError as `Bundle.lending_names` does, and before the block if the model refers to other files.
    """
    _external(bundle, files, bundle.read(files[0]))
    with bundle.lending_names(files):
        yield str(bundle.folder / files[0])


def _external(bundle: Bundle, files: Sequence[str], model: memoryview) -> list[ExternalTensor]:
    try:
        return external_tensors(model, locations(files))
    except ValueError as error:
        raise BundleError(bundle.folder, [f"{files[0]}: {error}"]) from error


def _array(bundle: Bundle, path: str, tensor: ExternalTensor, data: memoryview) -> Array:
    data = data[tensor.offset : tensor.offset + tensor.length]
    if len(data) != tensor.length:
        raise BundleError(bundle.folder, [f"{path}: tensor {tensor.name} extends beyond the end of {tensor.location}"])
    array = np.frombuffer(data, tensor.dtype).reshape(tensor.shape)
    return array if array.flags.aligned else array.copy()
