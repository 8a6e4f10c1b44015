"""A strict libcuda.so.1 over `streams.Gpus`: the driver's functions as attributes, to be used as a `ctypes.CDLL`.

Memory, streams, events and graphs want a current context, which is the calling thread's own. What stalls the whole device
(cuCtxSynchronize, cuDevicePrimaryCtxReset, copies without a stream) is not offered.

    gpus = Gpus(total=1 << 30)
    monkeypatch.setattr(ctypes, "CDLL", loader(Driver(gpus)))
    ...
    assert gpus.leaks() == []
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from trt.cfunction import Function
from trt.cuda_calls import DEVICES, IN_CONTEXT, Body
from trt.streams import CudaError, Gpus
from trt.strict import Strictness

SONAME = "libcuda.so.1"
_INVALID_CONTEXT, _NOT_INITIALIZED = 201, 3
ERRORS = {
    0: ("CUDA_SUCCESS", "no error"),
    1: ("CUDA_ERROR_INVALID_VALUE", "invalid argument"),
    2: ("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"),
    3: ("CUDA_ERROR_NOT_INITIALIZED", "initialization error"),
    100: ("CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"),
    101: ("CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"),
    201: ("CUDA_ERROR_INVALID_CONTEXT", "invalid device context"),
    400: ("CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"),
    600: ("CUDA_ERROR_NOT_READY", "device not ready"),
    700: ("CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"),
    719: ("CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"),
    900: ("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"),
    901: ("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"),
    907: ("CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"),
}
_UNKNOWN = ("unrecognized error code", "unrecognized error code")
_STALLS = ("cuCtxSynchronize", "cuDevicePrimaryCtxReset_v2", "cuMemcpy", "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2", "cuMemsetD8_v2")
_RELEASES = (
    *("cuMemFree_v2", "cuMemFreeHost", "cuStreamDestroy_v2", "cuEventDestroy_v2", "cuGraphExecDestroy", "cuGraphDestroy"),
    *("cuStreamEndCapture", "cuDevicePrimaryCtxRelease_v2"),
)


class Driver:
    """libcuda. `gpus.counts` counts the calls; `retained`, how often each device's primary context is held."""

    def __init__(self, gpus: Gpus) -> None:
        self.soname, self.gpus = SONAME, gpus
        self.retained = [0] * gpus.devices
        self._ready, self._context = False, threading.local()
        self._failures: dict[str, list[int]] = {}
        self._breaks: dict[str, list[int]] = {}
        ready = {
            **DEVICES,
            "cuDevicePrimaryCtxRetain": ("*pointer int", self._retain),
            "cuDevicePrimaryCtxRelease_v2": ("int", self._release),
            "cuCtxSetCurrent": ("pointer", self._set_current),
        }
        table: dict[str, tuple[str, Body]] = {"cuInit": ("int", self._init)}
        table |= {name: (words, self._initialised(body)) for name, (words, body) in ready.items()}
        table |= {name: (words, self._in_context(body)) for name, (words, body) in IN_CONTEXT.items()}
        self._functions = {name: self._function(name, prototype, body) for name, (prototype, body) in table.items()}
        for column, name in enumerate(("cuGetErrorName", "cuGetErrorString")):
            self._functions[name] = Function(name, "int *pointer", _teller(column))

    def __getattr__(self, name: str) -> Function:
        if name in _STALLS:
            raise Strictness(f"{name} stalls the device or uses the default stream: use the function that takes a stream")
        if name.startswith("_") or name not in self._functions:
            raise AttributeError(f"{self.soname}: undefined symbol: {name}")
        return self._functions[name]

    def __getitem__(self, name: str) -> Function:
        return getattr(self, name)

    def fail_next(self, name: str, code: int, *, after: int = 0) -> None:
        """The next call of `name`, or the one `after` that many more, does nothing and returns `code`."""
        self._plan(self._failures, name, code, after)

    def break_next(self, name: str, code: int, *, after: int = 0) -> None:
        """As `fail_next`, and what was queued is lost, and every later call in a context returns `code`: what gives something
        back does so, the others do nothing. So it is on a device after an illegal access."""
        self._plan(self._breaks, name, code, after)

    def _plan(self, planned: dict[str, list[int]], name: str, code: int, after: int) -> None:
        if name not in self._functions:
            raise KeyError(name)
        planned.setdefault(name, []).extend([0] * after + [code])

    def _function(self, name: str, prototype: str, body: Body) -> Function:
        def call(*values: Any) -> int:
            with self.gpus.lock:
                self.gpus.counts[name] += 1
                breaks, failures = self._breaks.get(name), self._failures.get(name)
                if breaks and (code := breaks.pop(0)):
                    self.gpus.break_down(code)
                    if name in _RELEASES:
                        self._run(body, values)
                    return code
                if self.gpus.broken and name not in ("cuInit", "cuCtxSetCurrent", *DEVICES):
                    if name in _RELEASES:
                        self._run(body, values)
                    return self.gpus.broken
                if failures and (code := failures.pop(0)):
                    return code
                return self._run(body, values)

        return Function(name, prototype, call)

    def _run(self, body: Body, values: tuple[Any, ...]) -> int:
        try:
            return body(self.gpus, *values) or 0
        except CudaError as error:
            return error.code

    def _init(self, gpus: Gpus, flags: int) -> int:
        self._ready = True
        return 0 if gpus.devices else 100

    def _initialised(self, body: Body) -> Body:
        return lambda *values: body(*values) if self._ready else _NOT_INITIALIZED

    def _in_context(self, body: Body) -> Body:
        def call(gpus: Gpus, *values: Any) -> int | None:
            device = getattr(self._context, "device", None)
            if not self._ready or device is None or not self.retained[device]:
                return _INVALID_CONTEXT if self._ready else _NOT_INITIALIZED
            gpus.device = device
            return body(gpus, *values)

        return call

    def _retain(self, gpus: Gpus, context: Any, device: int) -> int:
        self.retained[device] += 1
        context.value = 0x700000 + device
        return 0

    def _release(self, gpus: Gpus, device: int) -> int:
        if not self.retained[device]:
            raise Strictness(f"the primary context of device {device} is released once too often")
        self.retained[device] -= 1
        return 0

    def _set_current(self, gpus: Gpus, context: int) -> int:
        device = context - 0x700000
        if not 0 <= device < gpus.devices or not self.retained[device]:
            raise Strictness(f"{context:#x} is no context that is held")
        self._context.device = gpus.device = device
        return 0


def _teller(column: int) -> Any:
    def tell(code: int, text: Any) -> int:
        text.value = ERRORS.get(code, _UNKNOWN)[column].encode()
        return 0

    return tell


def loader(*drivers: Driver) -> Callable[..., Any]:
    """A stand-in for `ctypes.CDLL`: it knows the fake driver by its soname, in any folder; other CUDA libraries are not there."""
    real = ctypes.CDLL

    def load(name: str | None, *args: Any, **kwargs: Any) -> Any:
        for driver in drivers:
            if name is not None and str(name).rsplit("/", 1)[-1] == driver.soname:
                return driver
        if name is not None and "libcuda" in str(name):
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return real(name, *args, **kwargs)

    return load
