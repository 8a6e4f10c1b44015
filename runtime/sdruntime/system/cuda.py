"""Call the CUDA driver (libcuda) with ctypes: devices, memory, streams, events, graphs.

The driver is installed wherever a GPU can be used, so no other library is needed, and its functions keep their ABI. Work happens
in the device's primary context, which the CUDA runtime inside TensorRT, ONNX Runtime and torch also uses, on streams that do not
wait for the legacy default stream. No function of this module synchronises or resets a whole device.

Reference: NVIDIA, CUDA Driver API. cuda.h maps the plain names to the functions with a suffix (_v2).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Callable, Iterator
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import DeviceMissing, OutOfSpace, SdruntimeError, SettingError
from sdruntime.system.memory import available_memory

DRIVERS = ("libcuda.so.1", "nvcuda.dll")
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute
_NON_BLOCKING, _NO_TIMING = 1, 2  # CU_STREAM_NON_BLOCKING, CU_EVENT_DISABLE_TIMING
_DEFAULT_STREAMS = (0, 1, 2)  # none, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_OUT_OF_MEMORY, _NOT_READY = 2, 600
ALIGNMENT = 256  # bytes: TensorRT requires it of every address


class CudaError(SdruntimeError):
    """A driver call failed. The message has the function's name, and the error's name and text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU. `memory`: total bytes; `integrated`: it shares the system's memory; `uuid`: 32 hexadecimal digits."""

    name: str
    capability: tuple[int, int]
    memory: int
    integrated: bool = False
    driver: str = ""  # the CUDA version that the driver supports, as "13.0"
    uuid: str = ""

    @property
    def target(self) -> str:
        """The compute capability as engines name it, such as "sm89"."""
        return f"sm{self.capability[0]}{self.capability[1]}"


@functools.cache
def load_driver() -> Any:
    """Return the driver's library, or None if it is missing or fails to initialise (then no GPU can be used)."""
    for name in DRIVERS:
        with contextlib.suppress(OSError):
            driver = ctypes.CDLL(name)
            return driver if driver.cuInit(0) == 0 else None
    return None


@functools.cache
def devices() -> tuple[Device, ...]:
    """Return the GPUs that this process sees, in the order of CUDA_VISIBLE_DEVICES. Allocates nothing and creates no context."""
    driver = load_driver()
    count = c_int()
    if driver is None or driver.cuDeviceGetCount(byref(count)):
        return ()
    return tuple(_device(driver, index) for index in range(count.value))


def check_device(index: int) -> None:
    """Check that this process sees a GPU with this number. Raises DeviceMissing if it does not."""
    if load_driver() is None:
        raise DeviceMissing(
            f"no NVIDIA driver: {' and '.join(DRIVERS)} cannot be loaded from the system's library path: "
            "install the driver (`nvidia-smi` must list the GPU), or use --backend onnxruntime on the CPU"
        )
    names = [device.name for device in devices()]
    if not 0 <= index < len(names):
        shown = f"{len(names)} ({', '.join(names)}), counted from 0" if names else "none"
        raise DeviceMissing(f"device {index}: the driver shows {shown}; CUDA_VISIBLE_DEVICES may hide some")


def device_index(device: int | str) -> int:
    """Return the number of a GPU, given as a number (1, "1", "cuda:1") or as a UUID ("GPU-…" as `nvidia-smi -L` prints it, or its
    beginning). Raises SettingError for any other form, DeviceMissing if there is no such GPU."""
    text = str(device).strip().lower()
    number = text.removeprefix("cuda:")
    if number.isdecimal():
        if number != text:
            check_device(int(number))
        return int(number)
    digits = text.removeprefix("gpu-").replace("-", "")
    if not re.fullmatch("[0-9a-f]{4,32}", digits):
        raise SettingError(f"device {device!r}: expected a number, cuda:NUMBER, or a UUID as `nvidia-smi -L` prints it")
    matches = [index for index, gpu in enumerate(devices()) if gpu.uuid.startswith(digits)]
    if len(matches) != 1:
        shown = ", ".join(f"GPU-{gpu.uuid}" for gpu in devices()) or "none"
        raise DeviceMissing(f"device {device!r}: {len(matches)} GPUs have a UUID that begins with it; available: {shown}")
    return matches[0]


def _device(driver: Any, index: int) -> Device:
    handle, name, memory, version = c_int(), ctypes.create_string_buffer(256), c_size_t(), c_int()
    uuid = ctypes.create_string_buffer(16)
    driver.cuDeviceGet(byref(handle), c_int(index))
    driver.cuDeviceGetName(name, c_int(len(name)), handle)
    driver.cuDeviceTotalMem_v2(byref(memory), handle)
    driver.cuDeviceGetUuid_v2(uuid, handle)
    driver.cuDriverGetVersion(byref(version))
    attributes = []
    for attribute in (_MAJOR, _MINOR, _INTEGRATED):
        value = c_int()
        driver.cuDeviceGetAttribute(byref(value), c_int(attribute), handle)
        attributes.append(value.value)
    return Device(
        name=name.value.decode(),
        capability=(attributes[0], attributes[1]),
        memory=memory.value,
        integrated=bool(attributes[2]),
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
        uuid=uuid.raw.hex(),
    )


class Cuda:
    """One device's primary context, retained from `open` to `close`. Every method makes it the calling thread's."""

    def __init__(self, driver: Any, index: int) -> None:
        self._driver, self.index, self.device = driver, index, _device(driver, index)
        self._handle, self._context = c_int(), c_void_p()
        self.call("cuDeviceGet", byref(self._handle), c_int(index))
        self.call("cuDevicePrimaryCtxRetain", byref(self._context), self._handle)

    @classmethod
    def open(cls, index: int = 0) -> Cuda:
        """Open a device. Raises DeviceMissing if it does not exist."""
        check_device(index)
        return cls(load_driver(), index)

    def call(self, name: str, *arguments: Any, needs: str = "", free: Callable[[], int] | None = None) -> None:
        """Call a driver function.

        Raises OutOfSpace if memory is short, with the text `needs` and the free bytes: those that `free` returns, by default the
        device's. Raises CudaError for any other error code.
        """
        code = getattr(self._driver, name)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise OutOfSpace(
                f"{needs or f'{name} needs more memory'} on {self.device.name}, and {(free or self.free_memory)():,} are free: "
                "close other programs that use the GPU, generate smaller or fewer images at a time, or open the bundle with "
                "--low-memory"
            )
        if code:
            raise CudaError(f"{name} failed on device {self.index}: {self.error(code)}")

    def release(self, name: str, *arguments: Any) -> None:
        """Call a driver function that frees a resource, or waits for abandoned work. Never raises.

        An error code would report a failure of earlier work; it must not hide that failure or stop other resources from being
        released.
        """
        try:
            self._driver.cuCtxSetCurrent(self._context)
        finally:  # Ctrl-C may come in between
            getattr(self._driver, name)(*arguments)

    def error(self, code: int) -> str:
        """Return the name and the text of an error code."""
        texts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            getattr(self._driver, function)(c_int(code), byref(text))
            texts.append((text.value or b"?").decode())
        return f"{texts[0]} ({code}): {texts[1]}"

    def use(self) -> None:
        """Make the context current on the calling thread."""
        self.call("cuCtxSetCurrent", self._context)

    def free_memory(self) -> int:
        """Return the bytes that can still be allocated. An integrated GPU can also have memory of the system's caches."""
        self.use()
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return max(free.value, available_memory()) if self.device.integrated else free.value

    def allocate(self, size: int, what: str) -> Buffer:
        """Allocate `size` bytes of device memory for `what`. Raises OutOfSpace with the needed and the free bytes."""
        self.use()
        pointer = c_void_p()
        self.call("cuMemAlloc_v2", byref(pointer), c_size_t(max(size, 1)), needs=f"{what}: {size:,} bytes are needed")
        return Buffer(self, pointer.value or 0, size)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Pinned:
        """Allocate an array in page-locked host memory. Raises OutOfSpace."""
        return Pinned(self, shape, np.dtype(dtype))

    def stream(self) -> Stream:
        """Create a stream."""
        self.use()
        handle = c_void_p()
        self.call("cuStreamCreate", byref(handle), c_uint(_NON_BLOCKING))
        return Stream(self, handle.value or 0, owned=True)

    def close(self) -> None:
        if self._context:
            self.release("cuDevicePrimaryCtxRelease_v2", self._handle)
            self._context = c_void_p()

    def __enter__(self) -> Cuda:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Buffer:
    """`size` bytes of device memory at `pointer`, until `close`."""

    __slots__ = ("_cuda", "pointer", "size")

    def __init__(self, cuda: Cuda, pointer: int, size: int) -> None:
        self._cuda, self.pointer, self.size = cuda, pointer, size

    def close(self) -> None:
        if self.pointer:
            pointer, self.pointer = self.pointer, 0
            self._cuda.release("cuMemFree_v2", c_void_p(pointer))


class Pinned:
    """An array in page-locked host memory, which the device reads and writes directly, until `close`."""

    __slots__ = ("_cuda", "_pointer", "array")

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        size = max(1, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        self._cuda, pointer = cuda, c_void_p()
        cuda.use()
        needs = f"an array in the system's memory: {size:,} page-locked bytes are needed"
        cuda.call("cuMemHostAlloc", byref(pointer), c_size_t(size), c_uint(0), needs=needs, free=available_memory)
        self._pointer = pointer.value or 0
        memory: Any = (ctypes.c_char * size).from_address(self._pointer)
        self.array: NDArray[Any] = np.frombuffer(memory, dtype, count=int(np.prod(shape, dtype=np.int64))).reshape(shape)

    @property
    def pointer(self) -> int:
        return self._pointer

    def close(self) -> None:
        if self._pointer:
            pointer, self._pointer = self._pointer, 0
            self.array = np.empty(0, self.array.dtype)
            self._cuda.release("cuMemFreeHost", c_void_p(pointer))


class Stream:
    """A CUDA stream. With `owned` false, `handle` is a stream of the caller's, which `close` does not destroy."""

    def __init__(self, cuda: Cuda, handle: int, *, owned: bool) -> None:
        if handle in _DEFAULT_STREAMS:
            raise SettingError(f"stream {handle} is a default stream, which other streams or threads also use: create a stream")
        self.cuda, self.handle, self._owned = cuda, handle, owned

    def upload(self, target: int, source: Pinned, size: int) -> None:
        self._copy("cuMemcpyHtoDAsync_v2", target, source.pointer, size)

    def download(self, target: Pinned, source: int, size: int) -> None:
        self._copy("cuMemcpyDtoHAsync_v2", target.pointer, source, size)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy within the device."""
        self._copy("cuMemcpyDtoDAsync_v2", target, source, size)

    def _copy(self, function: str, target: int, source: int, size: int) -> None:
        self.cuda.use()
        self.cuda.call(function, c_void_p(target), c_void_p(source), c_size_t(size), c_void_p(self.handle))

    def synchronize(self) -> None:
        """Wait for this stream only."""
        self.cuda.use()
        self.cuda.call("cuStreamSynchronize", c_void_p(self.handle))

    def settle(self) -> None:
        """Wait until this stream is idle, so that its resources can be released. Never raises."""
        self.cuda.release("cuStreamSynchronize", c_void_p(self.handle))

    def event(self) -> Event:
        """Record an event after the work queued so far."""
        self.cuda.use()
        handle = c_void_p()
        self.cuda.call("cuEventCreate", byref(handle), c_uint(_NO_TIMING))
        event = Event(self.cuda, handle.value or 0)
        try:
            self.cuda.call("cuEventRecord", handle, c_void_p(self.handle))
        except BaseException:
            event.close()
            raise
        return event

    def wait(self, event: Event) -> None:
        """Make later work of this stream wait for `event` of another stream. The host does not wait."""
        self.cuda.use()
        self.cuda.call("cuStreamWaitEvent", c_void_p(self.handle), c_void_p(event.handle), c_uint(0))

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record the block's work without running it. The Graph can be launched after the block."""
        self.cuda.use()
        graph = Graph(self.cuda)
        self.cuda.call("cuStreamBeginCapture_v2", c_void_p(self.handle), c_int(_THREAD_LOCAL))
        recorded = c_void_p()
        try:
            yield graph
        except BaseException:
            self.cuda.release("cuStreamEndCapture", c_void_p(self.handle), byref(recorded))
            if recorded:
                self.cuda.release("cuGraphDestroy", recorded)
            raise
        self.cuda.call("cuStreamEndCapture", c_void_p(self.handle), byref(recorded))
        graph.instantiate(recorded)

    def close(self) -> None:
        if self._owned and self.handle:
            handle, self.handle = self.handle, 0
            self.cuda.release("cuStreamDestroy_v2", c_void_p(handle))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Event:
    """A point in a stream's work."""

    __slots__ = ("_cuda", "handle")

    def __init__(self, cuda: Cuda, handle: int) -> None:
        self._cuda, self.handle = cuda, handle

    def reached(self) -> bool:
        """Return whether the device has reached the event. Does not wait."""
        self._cuda.use()
        code = self._cuda._driver.cuEventQuery(c_void_p(self.handle))
        if code not in (0, _NOT_READY):
            raise CudaError(f"cuEventQuery failed on device {self._cuda.index}: {self._cuda.error(code)}")
        return bool(code == 0)

    def synchronize(self) -> None:
        self._cuda.use()
        self._cuda.call("cuEventSynchronize", c_void_p(self.handle))

    def close(self) -> None:
        if self.handle:
            handle, self.handle = self.handle, 0
            self._cuda.release("cuEventDestroy_v2", c_void_p(handle))


class Graph:
    """Recorded work that is launched as a whole."""

    __slots__ = ("_cuda", "_executable")

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._executable = cuda, c_void_p()

    def instantiate(self, recorded: c_void_p) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            try:
                self._cuda.call("cuGraphInstantiateWithFlags", byref(self._executable), recorded, c_ulonglong(0))
            finally:
                self._cuda.release("cuGraphDestroy", recorded)
            stack.pop_all()

    def launch(self, stream: Stream) -> None:
        self._cuda.use()
        self._cuda.call("cuGraphLaunch", self._executable, c_void_p(stream.handle))

    def close(self) -> None:
        if self._executable:
            executable, self._executable = self._executable, c_void_p()
            self._cuda.release("cuGraphExecDestroy", executable)
