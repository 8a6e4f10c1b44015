"""What the C functions of libcudart do, over `streams.Gpus`, and the table of their prototypes (`cfunction`).

A body gets the fake GPUs and its arguments, and returns an error code or None; CudaError is a code too.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from trt.memory import Allocation, Region
from trt.streams import (
    CAPTURE_INVALIDATED,
    CAPTURED_EVENT,
    INVALID_HANDLE,
    INVALID_VALUE,
    NOT_READY,
    OUT_OF_MEMORY,
    Capture,
    Event,
    Gpus,
    Graph,
    Work,
)
from trt.strict import Strictness

Body = Callable[..., "int | None"]
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _ON_DEVICE, _DEFAULT = 1, 2, 3, 4
_MAPPED = 2  # cudaHostAllocMapped
_NON_BLOCKING = 1  # cudaStreamNonBlocking
_NO_TIMING = 2  # cudaEventDisableTiming


# -- devices


def _get_device_count(gpus: Gpus, count: Any) -> int:
    count.value = gpus.devices
    return 0 if gpus.devices else 100


def _set_device(gpus: Gpus, index: int) -> int:
    if not 0 <= index < gpus.devices:
        return 101
    gpus.device = index
    return 0


def _get_device(gpus: Gpus, index: Any) -> None:
    index.value = gpus.device


def _attribute(gpus: Gpus, value: Any, attribute: int, index: int) -> int:
    known = {16: 28, 18: int(gpus.integrated), 19: 1, 41: 1, 75: gpus.capability[0], 76: gpus.capability[1], 115: 1}
    if attribute not in known:
        raise Strictness(f"device attribute {attribute} is not modelled")
    value.value = known[attribute]
    return 0 if 0 <= index < gpus.devices else 101


def _bus_id(gpus: Gpus, text: Any, length: int, index: int) -> int:
    if length > len(text):
        raise Strictness(f"cudaDeviceGetPCIBusId: length {length} of a buffer of {len(text)}")
    text.value = f"0000:{index + 1:02X}:00.0".encode()[: length - 1]
    return 0 if 0 <= index < gpus.devices else 101


def _mem_info(gpus: Gpus, free: Any, total: Any) -> None:
    free.value, total.value = max(0, gpus.memory.free_bytes(gpus.device)), gpus.memory.total


def _runtime_version(gpus: Gpus, version: Any) -> None:
    version.value = gpus.runtime_version


def _driver_version(gpus: Gpus, version: Any) -> None:
    version.value = gpus.driver_version


# -- memory


def _malloc(gpus: Gpus, pointer: Any, size: int) -> int:
    gpus.unsafe()
    pointer.value = None
    if not size:
        return 0
    allocation = gpus.memory.allocate(size, gpus.device, "cudaMalloc")
    if allocation is None:
        return OUT_OF_MEMORY
    pointer.value = allocation.address
    return 0


def _host_alloc(gpus: Gpus, pointer: Any, size: int, flags: int = 0) -> None:
    gpus.unsafe()
    pointer.value = gpus.memory.pin(size, mapped=bool(flags & _MAPPED) or gpus.integrated).address if size else None


def _host_device_pointer(gpus: Gpus, device: Any, host: int, flags: int) -> int:
    found = gpus.memory.at(host)
    if found is None or not found.mapped or flags:
        return INVALID_VALUE
    device.value = host
    return 0


def _freer(name: str, *, pinned: bool) -> Callable[[Gpus, int], int]:
    def free(gpus: Gpus, address: int) -> int:
        gpus.unsafe()
        if not address:
            return 0
        found = gpus.memory.at(address)
        if found is None or found.address != address or (found.device is None) is not pinned or _owned(found):
            raise Strictness(f"{name}: {address:#x} was not allocated by its twin")
        if found.live and (label := gpus.pending(Region(found.address, found.size))):
            raise Strictness(f"{name}: {label} is queued and still needs {found}")
        gpus.memory.release(found)
        return 0

    return free


def _owned(allocation: Allocation) -> bool:
    return allocation.label not in ("cudaMalloc", "pinned")


def _memcpy(gpus: Gpus, to: int, source: int, size: int, kind: int, stream: int) -> int:
    memory, (on, off) = gpus.memory, (gpus.memory.on_device(to), gpus.memory.on_device(source))
    actual = {(True, False): _HOST_TO_DEVICE, (False, True): _DEVICE_TO_HOST, (True, True): _ON_DEVICE}.get((on, off))
    if actual is None or kind not in (actual, _DEFAULT):
        raise Strictness(f"cudaMemcpyAsync: kind {kind} from {source:#x} to {to:#x}, which is kind {actual}")
    if not size:
        return 0
    target, origin = Region(to, size), Region(source, size)
    label = f"copy of {size} bytes from {source:#x} to {to:#x}"

    def run() -> None:
        memory.view(target, label)[:] = memory.view(origin, label)

    if actual == _DEVICE_TO_HOST:
        if memory.at(to) is None:
            raise Strictness(f"{label}: the host memory is pageable, so this would block: use cudaHostAlloc")
        gpus.enqueue(stream, Work(label=label, run=run, reads=(origin,), writes=(target,)))
        gpus.counts["bytes out"] += size
        return 0
    if actual == _HOST_TO_DEVICE:
        gpus.counts["bytes in"] += size
        if memory.at(source) is None:  # pageable: the driver takes a copy now
            gpus.counts["pageable copies"] += 1
            data = ctypes.string_at(source, size)
            write = Work(label=label, run=lambda: _write(gpus, target, data), writes=(target,), pageable=True)
            gpus.enqueue(stream, write)
            return 0
    gpus.enqueue(stream, Work(label=label, run=run, reads=(origin,), writes=(target,)))
    return 0


def _write(gpus: Gpus, target: Region, data: bytes) -> None:
    gpus.memory.view(target, "copy")[:] = memoryview(data)


def _memset(gpus: Gpus, to: int, value: int, size: int, stream: int) -> int:
    target = Region(to, size)

    def run() -> None:
        gpus.memory.view(target, "cudaMemsetAsync")[:] = value & 0xFF

    gpus.enqueue(stream, Work(label="cudaMemsetAsync", run=run, writes=(target,)))
    return 0


# -- streams and events


def _stream_create(gpus: Gpus, pointer: Any, flags: int) -> None:
    if flags != _NON_BLOCKING:
        raise Strictness("a stream without cudaStreamNonBlocking waits for the default stream")
    pointer.value = gpus.new_handle()


def _stream_destroy(gpus: Gpus, handle: int) -> None:
    stream = gpus.stream(handle)
    if stream.capture is not None or any(work.label != "record" for work in stream.queue):
        raise Strictness("a stream is destroyed that is being captured or has work left")
    gpus.drain(stream)
    del gpus.handles[handle]


def _stream_synchronize(gpus: Gpus, handle: int) -> None:
    stream = gpus.stream(handle)
    gpus.unsafe(stream)
    gpus.drain(stream)


def _stream_query(gpus: Gpus, handle: int) -> int:
    stream = gpus.stream(handle)
    gpus.unsafe(stream)
    ready = not stream.queue
    gpus.step(stream)
    return 0 if ready else NOT_READY


def _stream_wait(gpus: Gpus, handle: int, event: int, flags: int) -> None:
    gpus.wait(gpus.stream(handle), _event(gpus, event))


def _event(gpus: Gpus, handle: int) -> Event:
    found = gpus.handles.get(handle)
    if not isinstance(found, Event):
        raise Strictness(f"{handle:#x} is no event, or was destroyed")
    return found


def _event_create(gpus: Gpus, pointer: Any, flags: int) -> None:
    pointer.value = gpus.new_handle(Event(timing=not flags & _NO_TIMING))


def _event_record(gpus: Gpus, event: int, stream: int) -> None:
    gpus.record(_event(gpus, event), gpus.stream(stream))


def _event_query(gpus: Gpus, handle: int) -> int:
    event = _event(gpus, handle)
    if event.captured:
        return CAPTURED_EVENT
    return 0 if gpus.poll(event) else NOT_READY


def _event_synchronize(gpus: Gpus, handle: int) -> int:
    event = _event(gpus, handle)
    if event.captured:
        return CAPTURED_EVENT
    gpus.unsafe()
    if event.marker is not None:
        event.marker.patience = 0
        gpus.drain(event.marker.stream, event.marker)
    return 0


def _event_destroy(gpus: Gpus, handle: int) -> None:
    _event(gpus, handle)
    del gpus.handles[handle]


def _event_elapsed(gpus: Gpus, milliseconds: Any, start: int, end: int) -> int:
    markers = []
    for event in (_event(gpus, start), _event(gpus, end)):
        if event.marker is None or not event.timing:
            return INVALID_HANDLE
        if not event.marker.reached:
            return NOT_READY
        markers.append(event.marker)
    milliseconds.value = markers[1].time - markers[0].time
    return 0


# -- graphs


def _begin_capture(gpus: Gpus, handle: int, mode: int) -> int:
    stream = gpus.stream(handle)
    if stream.capture is not None or mode not in (0, 1, 2):
        return INVALID_VALUE
    stream.capture = Capture(mode, threading.get_ident())
    return 0


def _end_capture(gpus: Gpus, handle: int, graph: Any) -> int:
    stream = gpus.stream(handle)
    graph.value, capture, stream.capture = None, stream.capture, None
    if capture is None:
        return INVALID_VALUE
    if capture.broken:
        return CAPTURE_INVALIDATED
    graph.value = gpus.new_handle(Graph(capture.nodes))
    return 0


def _graph(gpus: Gpus, handle: int, *, executable: bool) -> Graph:
    found = gpus.handles.get(handle)
    if not isinstance(found, Graph) or isinstance(found, _Executable) is not executable:
        raise Strictness(f"{handle:#x} is no {'executable ' if executable else ''}graph, or was destroyed")
    return found


class _Executable(Graph):
    """A graph after cudaGraphInstantiate."""


def _instantiate(gpus: Gpus, executable: Any, graph: int, flags: int) -> None:
    executable.value = gpus.new_handle(_Executable(list(_graph(gpus, graph, executable=False).nodes)))


def _graph_launch(gpus: Gpus, executable: int, stream: int) -> None:
    if gpus.stream(stream).capture is not None:
        raise Strictness("launching a graph during a capture is not modelled")
    gpus.launch(_graph(gpus, executable, executable=True), stream)
    gpus.counts["launches"] += 1


def _graph_destroyer(*, executable: bool) -> Callable[[Gpus, int], None]:
    def destroy(gpus: Gpus, handle: int) -> None:
        _graph(gpus, handle, executable=executable)
        del gpus.handles[handle]

    return destroy


CUDART: dict[str, tuple[str, Body]] = {
    "cudaGetDeviceCount": ("*int", _get_device_count),
    "cudaSetDevice": ("int", _set_device),
    "cudaGetDevice": ("*int", _get_device),
    "cudaDeviceGetAttribute": ("*int int int", _attribute),
    "cudaDeviceGetPCIBusId": ("text int int", _bus_id),
    "cudaMemGetInfo": ("*size *size", _mem_info),
    "cudaRuntimeGetVersion": ("*int", _runtime_version),
    "cudaDriverGetVersion": ("*int", _driver_version),
    "cudaMalloc": ("*pointer size", _malloc),
    "cudaFree": ("pointer", _freer("cudaFree", pinned=False)),
    "cudaMallocHost": ("*pointer size", _host_alloc),
    "cudaHostAlloc": ("*pointer size int", _host_alloc),
    "cudaHostGetDevicePointer": ("*pointer pointer int", _host_device_pointer),
    "cudaFreeHost": ("pointer", _freer("cudaFreeHost", pinned=True)),
    "cudaMemcpyAsync": ("pointer pointer size int pointer", _memcpy),
    "cudaMemsetAsync": ("pointer int size pointer", _memset),
    "cudaStreamCreateWithFlags": ("*pointer int", _stream_create),
    "cudaStreamDestroy": ("pointer", _stream_destroy),
    "cudaStreamSynchronize": ("pointer", _stream_synchronize),
    "cudaStreamQuery": ("pointer", _stream_query),
    "cudaStreamWaitEvent": ("pointer pointer int", _stream_wait),
    "cudaEventCreateWithFlags": ("*pointer int", _event_create),
    "cudaEventRecord": ("pointer pointer", _event_record),
    "cudaEventQuery": ("pointer", _event_query),
    "cudaEventSynchronize": ("pointer", _event_synchronize),
    "cudaEventDestroy": ("pointer", _event_destroy),
    "cudaEventElapsedTime": ("*float pointer pointer", _event_elapsed),
    "cudaStreamBeginCapture": ("pointer int", _begin_capture),
    "cudaStreamEndCapture": ("pointer *pointer", _end_capture),
    "cudaGraphInstantiateWithFlags": ("*pointer pointer long", _instantiate),
    "cudaGraphLaunch": ("pointer pointer", _graph_launch),
    "cudaGraphExecDestroy": ("pointer", _graph_destroyer(executable=True)),
    "cudaGraphDestroy": ("pointer", _graph_destroyer(executable=False)),
    "cudaGetLastError": ("", lambda gpus: 0),
    "cudaPeekAtLastError": ("", lambda gpus: 0),
}
