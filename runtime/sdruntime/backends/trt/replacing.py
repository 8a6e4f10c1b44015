"""Replace weights of a TensorRT engine that was built with lora=true, right after it was deserialized."""

from __future__ import annotations

import math
from typing import Any

from sdruntime.arrays import Array
from sdruntime.backends.base.weights import REBUILD, Weights
from sdruntime.backends.onnx_file.stored import lending_weights, stored_as, weight_tensors
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.errors import EngineError

_TYPES = {1: "FLOAT", 10: "HALF", 16: "BF16"}  # TensorProto.DataType -> trt.DataType


def replace_weights(trt: Any, log: Any, engine: Any, bundle: Bundle, spec: EngineSpec, weights: Weights) -> None:
    """Refit an engine with new weights, and with those of the bundle for weights that TensorRT merged with them.

    Raises EngineError with TensorRT's reasons, and for numbers that the engine's precision cannot hold.
    """
    refitter, stored = trt.Refitter(engine, log), weight_tensors(bundle, spec.component)
    kept: list[Array] = []  # the refitter reads them when it refits

    def fault(what: str) -> EngineError:
        return EngineError(f"engine {spec.name}: its weights cannot be replaced: {what} {log.reasons()}: {REBUILD}")

    def give(name: str, values: Array) -> None:
        tensor = stored[name]
        try:
            array = stored_as(values, tensor.kind, tensor.dtype)
        except ValueError as error:
            raise fault(f"{name}: {error}") from error
        kept.append(array)
        values = trt.Weights(getattr(trt.DataType, _TYPES[tensor.kind]), array.ctypes.data, math.prod(array.shape))
        if not refitter.set_named_weights(name, values):
            raise fault(f"TensorRT does not take {name}")

    with weights.lending() as lent:
        for name in sorted(weights.names):
            give(name, lent[name])
    missing = list(refitter.get_missing_weights())
    if unknown := [name for name in missing if name not in stored]:
        raise fault(f"TensorRT also needs {', '.join(unknown[:3])}, which are no weights of the component")
    if missing:
        with lending_weights(bundle, spec.component) as read:
            for name in missing:
                give(name, read(name))
    if not refitter.refit_cuda_engine():
        raise fault("refitting failed")
