"""The part of Triton's `triton_python_backend_utils` that our model uses, for tests without a server.

It is as strict as the server's: no response after the final one, STRING tensors are arrays of bytes objects.
"""

from __future__ import annotations

import queue
import types
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
WAIT = 60.0


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        assert array.dtype != np.object_ or all(type(item) is bytes for item in array.flat)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    INTERNAL, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, CANCELLED = "internal", "invalid", "unavailable", "unsupported", "cancelled"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class TritonModelException(Exception):
    pass


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.outputs = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}
        self.error = error


class Sender:
    def __init__(self) -> None:
        self.responses: queue.Queue[InferenceResponse] = queue.Queue()
        self.cancelled = self.final = False

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        assert not self.final
        self.final = bool(flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self.responses.put(response)

    def is_cancelled(self) -> bool:
        return self.cancelled

    def all(self) -> list[InferenceResponse]:
        """Every response; waits for the final one."""
        received = []
        while not (self.final and self.responses.empty()):
            received.append(self.responses.get(timeout=WAIT))
        return received

    def last(self) -> InferenceResponse:
        return self.all()[-1]


class InferenceRequest:
    """`tensors`: text, bytes, numbers, or lists of them."""

    def __init__(self, **tensors: Any) -> None:
        self.sender, self.tensors = Sender(), {name: Tensor(name, _array(value)) for name, value in tensors.items()}

    def get_response_sender(self) -> Sender:
        return self.sender


def _array(value: Any) -> np.ndarray:
    value = value.encode() if isinstance(value, str) else value
    return np.array([value], np.object_) if isinstance(value, bytes) else np.atleast_1d(np.asarray(value))


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request.tensors.get(name)


class Logger:
    lines: list[str] = []  # noqa: RUF012  of the test

    @classmethod
    def log_warn(cls, text: str) -> None:
        cls.lines.append(text)

    log_error = log_warn


class Metric:
    def __init__(self, labels: dict[str, str]) -> None:
        self.labels, self.number = labels, 0.0

    def increment(self, by: float) -> None:
        assert by >= 0
        self.number += by

    def set(self, value: float) -> None:
        self.number = value


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"
    families: list[MetricFamily] = []  # noqa: RUF012  of the test

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name, self.kind = name, kind
        self.metrics: list[Metric] = []
        self.families.append(self)

    def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802  the server's name
        self.metrics.append(Metric(labels))
        return self.metrics[-1]


def numbers(name: str) -> dict[str, float]:
    """The numbers of a metric by the label that is its own."""
    [family] = [family for family in MetricFamily.families if family.name == name]
    return {
        "".join(value for key, value in metric.labels.items() if key not in ("model", "instance")): metric.number
        for metric in family.metrics
    }


def fresh() -> types.ModuleType:
    """The module, as Triton makes it available, without what earlier tests left."""
    Logger.lines.clear()
    MetricFamily.families.clear()
    module = types.ModuleType("triton_python_backend_utils")
    vars(module).update({name: value for name, value in globals().items() if not name.startswith("__")})
    return module
