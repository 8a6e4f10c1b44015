"""What the strict TensorRT does about weights that a plan was stripped of (STRIP_PLAN), and that come back from the ONNX."""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trt.fake_network import ParserError, report
from trt.fake_plan import Model
from trt.strict import Strictness

_TYPES = {1: "FLOAT", 10: "HALF", 16: "BF16"}  # TensorProto.data_type
Weights = Mapping[str, Any]  # TensorProto by name


def stripped(onnx: bytes) -> bytes:
    """A model whose initialisers have a type and a shape, and no values."""
    proto = _parsed(onnx)
    for tensor in proto.graph.initializer:
        for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
            tensor.ClearField(field)
    return proto.SerializeToString(deterministic=True)  # type: ignore[no-any-return]


def weights_of(onnx: bytes) -> Weights:
    return {tensor.name: tensor for tensor in _parsed(onnx).graph.initializer}


def digest(weights: Weights) -> str:
    """Of all values, by name."""
    made = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        made.update(name.encode() + tensor.SerializeToString(deterministic=True))
    return made.hexdigest()


def _parsed(onnx: bytes) -> Any:
    import onnx as onnx_

    return onnx_.load_model_from_string(onnx)


class Refitter:
    """Collects weights for an engine that was built for it; `refit_cuda_engine` puts them in."""

    def __init__(self, trt: Any, engine: Any, logger: Any) -> None:
        self._trt, self.engine, self.logger = trt, engine._behaviour, logger
        self.weights: dict[str, Any] = {}
        self.named: dict[str, Weight] = {}
        if not any(flag == "STRIP_PLAN" or flag.startswith("REFIT") for flag in self.engine.plan.flags):
            report(trt, logger, "ERROR", "The engine is not refittable")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def set_named_weights(self, name: str, weights: Any, location: Any = None) -> bool:
        """The values are read when the engine is refitted, from memory that must still be there."""
        known, given = weights_of(self.engine.plan.onnx), weights._behaviour
        allowed = self.engine.plan.refittable if "REFIT_INDIVIDUAL" in self.engine.plan.flags else known
        if name not in known or name not in allowed:
            report(self._trt, self.logger, "ERROR", f"{name} is not refittable")
            return False
        tensor = known[name]
        if _TYPES[tensor.data_type] != given.dtype.name or math.prod(tensor.dims) != given.size:
            report(self._trt, self.logger, "ERROR", f"{name}: another type or size")
            return False
        self.named[name] = given
        return True

    def get_missing_weights(self) -> list[str]:
        if "STRIP_PLAN" not in self.engine.plan.flags:  # the fake merges the weights whose names begin alike
            known = weights_of(self.engine.plan.onnx)
            starts = {name.partition(".")[0] for name in self.named}
            return sorted(name for name in known if name.partition(".")[0] in starts and name not in self.named)
        return sorted(weights_of(self.engine.plan.onnx).keys() - self.weights.keys())

    def refit_cuda_engine(self) -> bool:
        if missing := self.get_missing_weights():
            report(self._trt, self.logger, "ERROR", f"missing weights: {', '.join(missing)}")
            return False
        plan = self.engine.plan
        if "STRIP_PLAN" not in plan.flags:
            return self._put(plan.onnx)
        if digest(self.weights) != plan.weights and "REFIT_IDENTICAL" in plan.flags:
            raise Strictness("REFIT_IDENTICAL with other weights than the engine was built with")
        if any(context.pending() for context in self.engine.contexts):
            raise Strictness("the weights are changed while the engine is running")
        proto = _parsed(plan.onnx)
        for tensor in proto.graph.initializer:
            tensor.CopyFrom(self.weights[tensor.name])
        full = proto.SerializeToString(deterministic=True)
        self.engine.model, self.engine.complete = Model(full), True
        return self.engine.reserve(len(full))  # type: ignore[no-any-return]

    def _put(self, onnx: bytes) -> bool:
        """Replace the named weights in an engine that has all of them."""
        if any(context.pending() for context in self.engine.contexts):
            raise Strictness("the weights are changed while the engine is running")
        proto = _parsed(onnx)
        for tensor in proto.graph.initializer:
            if tensor.name in self.named:
                tensor.ClearField("float_data")
                tensor.raw_data = self.named[tensor.name].read()
        if self.engine.plan.flags and "REFIT_IDENTICAL" in self.engine.plan.flags and proto != _parsed(onnx):
            raise Strictness("REFIT_IDENTICAL with other weights than the engine was built with")
        self.engine.model = Model(proto.SerializeToString(deterministic=True))
        return True


class Weight:
    """`trt.Weights`: a type, an address and a count."""

    def __init__(self, trt: Any, type: Any, ptr: int, count: int) -> None:
        self.dtype, self.size, self._address = type, count, ptr

    def read(self) -> bytes:
        return ctypes.string_at(self._address, self.size * {"FLOAT": 4, "HALF": 2, "BF16": 2}[self.dtype.name])


class OnnxParserRefitter:
    """Takes weights from an ONNX file, by name."""

    def __init__(self, trt: Any, refitter: Any, logger: Any) -> None:
        self._trt, self._refitter, self._logger = trt, refitter._behaviour, logger
        self._errors: list[ParserError] = []

    def refit_from_file(self, model: str) -> bool:
        import onnx

        try:
            proto = onnx.load_model(Path(model))
        except Exception as error:  # protobuf's own errors
            return self._fail("MODEL_DESERIALIZE_FAILED", f"Failed to parse the ONNX model: {error}")
        given = {tensor.name: tensor for tensor in proto.graph.initializer}
        for name, wanted in weights_of(self._refitter.engine.plan.onnx).items():
            tensor = given.get(name)
            if tensor is None or (tensor.data_type, list(tensor.dims)) != (wanted.data_type, list(wanted.dims)):
                return self._fail("REFIT_FAILED", f"no weight {name} of this type and shape")
            self._refitter.weights[name] = tensor
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._trt.make("ParserError", self._errors[index])

    def clear_errors(self) -> None:
        self._errors.clear()

    def _fail(self, code: str, desc: str) -> bool:
        self._errors.append(ParserError(self._trt, code, desc))
        report(self._trt, self._logger, "ERROR", desc)
        return False


REFIT: dict[str, type] = {"Weights": Weight, "Refitter": Refitter, "OnnxParserRefitter": OnnxParserRefitter}
