"""A strict libcudart over `streams.Gpus`: an object with the C functions as attributes, to be used as a `ctypes.CDLL`.

What stalls the whole device is not offered: cudaDeviceSynchronize, cudaDeviceReset, the copies without a stream. `fake_driver`
gives the same functions under the driver's names, which the runtime uses.

    gpus = Gpus(total=1 << 30)
    monkeypatch.setattr(ctypes, "CDLL", loader(Cudart(gpus)))
    ...
    assert gpus.leaks() == []
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

from trt.cfunction import Function
from trt.cuda_calls import CUDART, Body
from trt.streams import NOT_READY, CudaError, Gpus
from trt.strict import Strictness

ERRORS = {
    0: ("cudaSuccess", "no error"),
    1: ("cudaErrorInvalidValue", "invalid argument"),
    2: ("cudaErrorMemoryAllocation", "out of memory"),
    35: ("cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"),
    100: ("cudaErrorNoDevice", "no CUDA-capable device is detected"),
    101: ("cudaErrorInvalidDevice", "invalid device ordinal"),
    400: ("cudaErrorInvalidResourceHandle", "invalid resource handle"),
    600: ("cudaErrorNotReady", "device not ready"),
    700: ("cudaErrorIllegalAddress", "an illegal memory access was encountered"),
    719: ("cudaErrorLaunchFailure", "unspecified launch failure"),
    900: ("cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"),
    901: ("cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"),
    907: ("cudaErrorCapturedEvent", "operation not permitted on an event last recorded in a capturing stream"),
}
UNKNOWN = ("unrecognized error code", "unrecognized error code")
_STALLS = ("cudaDeviceSynchronize", "cudaDeviceReset", "cudaThreadSynchronize", "cudaMemcpy", "cudaMemset", "cudaStreamCreate")
_LAST = ("cudaGetLastError", "cudaPeekAtLastError")


class CLibrary:
    """C functions as attributes. `gpus.counts` counts the calls."""

    def __init__(self, soname: str, gpus: Gpus, table: Mapping[str, tuple[str, Body]]) -> None:
        self.soname, self.gpus = soname, gpus
        self._failures: dict[str, list[int]] = {}
        self._last = 0
        self._functions = {name: self._function(name, prototype, body) for name, (prototype, body) in table.items()}

    def __getattr__(self, name: str) -> Function:
        if name.startswith("_") or name not in self._functions:
            raise AttributeError(f"{self.soname}: undefined symbol: {name}")
        return self._functions[name]

    def __getitem__(self, name: str) -> Function:
        return getattr(self, name)  # type: ignore[no-any-return]

    def fail_next(self, name: str, code: int, *, after: int = 0) -> None:
        """The next call of `name`, or the one `after` that many more, does nothing and returns `code`."""
        if name not in self._functions:
            raise KeyError(name)
        self._failures.setdefault(name, []).extend([0] * after + [code])

    def _function(self, name: str, prototype: str, body: Body) -> Function:
        def call(*values: Any) -> int:
            with self.gpus.lock:
                self.gpus.counts[name] += 1
                if name in _LAST:
                    code, self._last = self._last, self._last if name == _LAST[1] else 0
                    return code
                code = self._run(name, body, values)
                self._last = self._last if code in (0, NOT_READY) else code
                return code

        return Function(name, prototype, call)

    def _run(self, name: str, body: Body, values: tuple[Any, ...]) -> int:
        planned = self._failures.get(name)
        if planned and (code := planned.pop(0)):
            return code
        try:
            return body(self.gpus, *values) or 0
        except CudaError as error:
            return error.code


class Cudart(CLibrary):
    """libcudart."""

    def __init__(self, gpus: Gpus) -> None:
        super().__init__(f"libcudart.so.{gpus.runtime_version // 1000}", gpus, CUDART)
        for column, name in enumerate(("cudaGetErrorName", "cudaGetErrorString")):
            self._functions[name] = Function(name, "int", _teller(column), returns_text=True)

    def __getattr__(self, name: str) -> Function:
        if name in _STALLS:
            raise Strictness(f"{name} stalls the device or uses the default stream: use the function that takes a stream")
        return super().__getattr__(name)


def _teller(column: int) -> Callable[[int], bytes]:
    return lambda code: ERRORS.get(code, UNKNOWN)[column].encode()


def loader(*libraries: CLibrary) -> Callable[..., Any]:
    """A stand-in for `ctypes.CDLL`: it knows these libraries by soname, in any folder; other CUDA libraries are not there."""
    real = ctypes.CDLL

    def load(name: str | None, *args: Any, **kwargs: Any) -> Any:
        for library in libraries:
            if name is not None and str(name).rsplit("/", 1)[-1] == library.soname:
                return library
        if name is not None and "libcuda" in str(name):
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return real(name, *args, **kwargs)

    return load
