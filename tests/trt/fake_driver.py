"""A strict libcuda.so.1 over `streams.Gpus`: the driver's functions as attributes, to be used as a `ctypes.CDLL`.

Memory, streams, events and graphs want a current context, which is the calling thread's own. What stalls the whole device
(cuCtxSynchronize, cuDevicePrimaryCtxReset, copies without a stream) is not offered.
"""

from __future__ import annotations

import threading
from typing import Any

from trt.cfunction import Function
from trt.cuda_calls import CUDART, Body
from trt.fake_cudart import ERRORS, UNKNOWN, CLibrary
from trt.streams import Gpus
from trt.strict import Strictness

_INVALID_CONTEXT, _NOT_INITIALIZED = 201, 3
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _ON_DEVICE = 1, 2, 3
_STALLS = ("cuCtxSynchronize", "cuDevicePrimaryCtxReset_v2", "cuMemcpy", "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2", "cuMemsetD8_v2")
_SAME = {
    "cuMemGetInfo_v2": "cudaMemGetInfo",
    "cuMemAlloc_v2": "cudaMalloc",
    "cuMemFree_v2": "cudaFree",
    "cuMemHostAlloc": "cudaHostAlloc",
    "cuMemFreeHost": "cudaFreeHost",
    "cuStreamCreate": "cudaStreamCreateWithFlags",
    "cuStreamDestroy_v2": "cudaStreamDestroy",
    "cuStreamSynchronize": "cudaStreamSynchronize",
    "cuStreamQuery": "cudaStreamQuery",
    "cuStreamWaitEvent": "cudaStreamWaitEvent",
    "cuEventCreate": "cudaEventCreateWithFlags",
    "cuEventRecord": "cudaEventRecord",
    "cuEventQuery": "cudaEventQuery",
    "cuEventSynchronize": "cudaEventSynchronize",
    "cuEventDestroy_v2": "cudaEventDestroy",
    "cuStreamBeginCapture_v2": "cudaStreamBeginCapture",
    "cuStreamEndCapture": "cudaStreamEndCapture",
    "cuGraphInstantiateWithFlags": "cudaGraphInstantiateWithFlags",
    "cuGraphLaunch": "cudaGraphLaunch",
    "cuGraphExecDestroy": "cudaGraphExecDestroy",
    "cuGraphDestroy": "cudaGraphDestroy",
}


def _get_device(gpus: Gpus, device: Any, ordinal: int) -> int:
    device.value = ordinal
    return 0 if 0 <= ordinal < gpus.devices else 101


def _get_name(gpus: Gpus, text: Any, length: int, device: int) -> int:
    text.value = gpus.name.encode()[: length - 1]
    return 0 if 0 <= device < gpus.devices else 101


def _total_memory(gpus: Gpus, size: Any, device: int) -> int:
    size.value = gpus.memory.total
    return 0 if 0 <= device < gpus.devices else 101


def _uuid(gpus: Gpus, text: Any, device: int) -> int:
    text.raw = bytes([device]) * 16
    return 0


_DEVICES: dict[str, tuple[str, Body]] = {
    "cuDeviceGetCount": CUDART["cudaGetDeviceCount"],
    "cuDeviceGet": ("*int int", _get_device),
    "cuDeviceGetName": ("text int int", _get_name),
    "cuDeviceTotalMem_v2": ("*size int", _total_memory),
    "cuDeviceGetAttribute": CUDART["cudaDeviceGetAttribute"],
    "cuDeviceGetUuid_v2": ("text int", _uuid),
    "cuDriverGetVersion": CUDART["cudaDriverGetVersion"],
}


def _copier(kind: int) -> Body:
    copy = CUDART["cudaMemcpyAsync"][1]
    return lambda gpus, to, source, size, stream: copy(gpus, to, source, size, kind, stream)


class Driver(CLibrary):
    """libcuda. `retained` counts how often each device's primary context is held."""

    def __init__(self, gpus: Gpus) -> None:
        self._ready, self._context = False, threading.local()
        self.retained = [0] * gpus.devices
        table: dict[str, tuple[str, Body]] = {name: (words, self._initialised(body)) for name, (words, body) in _DEVICES.items()}
        table["cuDevicePrimaryCtxRetain"] = ("*pointer int", self._initialised(self._retain))
        table["cuDevicePrimaryCtxRelease_v2"] = ("int", self._initialised(self._release))
        table["cuCtxSetCurrent"] = ("pointer", self._initialised(self._set_current))
        for name, twin in _SAME.items():
            words, body = CUDART[twin]
            table[name] = (words, self._in_context(body))
        for name, kind in (
            ("cuMemcpyHtoDAsync_v2", _HOST_TO_DEVICE),
            ("cuMemcpyDtoHAsync_v2", _DEVICE_TO_HOST),
            ("cuMemcpyDtoDAsync_v2", _ON_DEVICE),
        ):
            table[name] = ("pointer pointer size pointer", self._in_context(_copier(kind)))
        super().__init__("libcuda.so.1", gpus, table)
        self._functions["cuInit"] = self._function("cuInit", "int", self._init)
        for column, name in enumerate(("cuGetErrorName", "cuGetErrorString")):
            self._functions[name] = Function(name, "int *pointer", _teller(column))

    def __getattr__(self, name: str) -> Function:
        if name in _STALLS:
            raise Strictness(f"{name} stalls the device or uses the default stream: use the function that takes a stream")
        return super().__getattr__(name)

    def _init(self, gpus: Gpus, flags: int) -> int:
        self._ready = True
        return 0 if gpus.devices else 100

    def _initialised(self, body: Body) -> Body:
        return lambda *values: body(*values) if self._ready else _NOT_INITIALIZED

    def _in_context(self, body: Body) -> Body:
        def call(gpus: Gpus, *values: Any) -> int | None:
            device = getattr(self._context, "device", None)
            if device is None or not self.retained[device]:
                return _INVALID_CONTEXT
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
        name = ERRORS.get(code, UNKNOWN)[column]
        text.value = name.encode()
        return 0

    return tell
