"""What the driver's C functions do, over `streams.Gpus`, and the tables of their prototypes (`cfunction`).

A body gets the fake GPUs and its arguments, and returns an error code or None; CudaError is a code too.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from trt.memory import DEVICE_MEMORY, PINNED, Allocation, Region
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
_INVALID_DEVICE = 101
_MAPPED = 2  # CU_MEMHOSTALLOC_DEVICEMAP
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING


# -- devices


def _get_device_count(gpus: Gpus, count: Any) -> int:
    count.value = gpus.devices
    return 0 if gpus.devices else 100


def _get_device(gpus: Gpus, device: Any, ordinal: int) -> int:
    device.value = ordinal
    return _known(gpus, ordinal)


def _get_name(gpus: Gpus, text: Any, length: int, device: int) -> int:
    text.value = gpus.name.encode()[: length - 1]
    return _known(gpus, device)


def _total_memory(gpus: Gpus, size: Any, device: int) -> int:
    size.value = gpus.memory.total
    return _known(gpus, device)


def _uuid(gpus: Gpus, text: Any, device: int) -> int:
    text.raw = bytes([device]) * 16
    return _known(gpus, device)


def _known(gpus: Gpus, device: int) -> int:
    return 0 if 0 <= device < gpus.devices else _INVALID_DEVICE


def _attribute(gpus: Gpus, value: Any, attribute: int, index: int) -> int:
    known = {16: 28, 18: int(gpus.integrated), 19: 1, 41: 1, 75: gpus.capability[0], 76: gpus.capability[1], 115: 1}
    if attribute not in known:
        raise Strictness(f"device attribute {attribute} is not modelled")
    value.value = known[attribute]
    return _known(gpus, index)


def _mem_info(gpus: Gpus, free: Any, total: Any) -> None:
    free.value, total.value = max(0, gpus.memory.free_bytes(gpus.device)), gpus.memory.total


def _driver_version(gpus: Gpus, version: Any) -> None:
    version.value = gpus.driver_version


# -- memory


def _malloc(gpus: Gpus, pointer: Any, size: int) -> int:
    gpus.unsafe()
    pointer.value = None
    if not size:
        return INVALID_VALUE
    allocation = gpus.memory.allocate(size, gpus.device, DEVICE_MEMORY)
    if allocation is None:
        return OUT_OF_MEMORY
    pointer.value = allocation.address
    return 0


def _host_alloc(gpus: Gpus, pointer: Any, size: int, flags: int) -> int:
    gpus.unsafe()
    pointer.value = gpus.memory.pin(size, mapped=bool(flags & _MAPPED) or gpus.integrated).address if size else None
    return 0 if size else INVALID_VALUE


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
    return allocation.label not in (DEVICE_MEMORY, PINNED)


def _copier(function: str, kind: str) -> Callable[[Gpus, int, int, int, int], int]:
    """`kind`: "in", "out", or "within" the device."""

    def copy(gpus: Gpus, to: int, source: int, size: int, stream: int) -> int:
        memory, (on, off) = gpus.memory, (gpus.memory.on_device(to), gpus.memory.on_device(source))
        actual = {(True, False): "in", (False, True): "out", (True, True): "within"}.get((on, off), "none")
        if kind != actual:
            raise Strictness(f"{function}: a copy from {source:#x} to {to:#x}, which is {actual}, not {kind}")
        if not size:
            return 0
        target, origin = Region(to, size), Region(source, size)
        label = f"copy of {size} bytes from {source:#x} to {to:#x}"

        def run() -> None:
            memory.view(target, label)[:] = memory.view(origin, label)

        work = Work(label=label, run=run, reads=(origin,), writes=(target,))
        if kind == "out" and memory.at(to) is None:
            raise Strictness(f"{label}: the host memory is pageable, so this would block: use cuMemHostAlloc")
        if kind == "in" and memory.at(source) is None:  # pageable: the driver takes a copy now
            gpus.counts["pageable copies"] += 1
            data = ctypes.string_at(source, size)
            work = Work(label=label, run=lambda: _write(gpus, target, data), writes=(target,), pageable=True)
        gpus.enqueue(stream, work)
        gpus.counts[f"bytes {kind}"] += size
        return 0

    return copy


def _write(gpus: Gpus, target: Region, data: bytes) -> None:
    gpus.memory.view(target, "copy")[:] = memoryview(data)


# -- streams and events


def _stream_create(gpus: Gpus, pointer: Any, flags: int) -> None:
    if flags != _NON_BLOCKING:
        raise Strictness("a stream without CU_STREAM_NON_BLOCKING waits for the default stream")
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
    if capture.broken or gpus.broken:
        return CAPTURE_INVALIDATED
    graph.value = gpus.new_handle(Graph(capture.nodes))
    return 0


def _graph(gpus: Gpus, handle: int, *, executable: bool) -> Graph:
    found = gpus.handles.get(handle)
    if not isinstance(found, Graph) or isinstance(found, _Executable) is not executable:
        raise Strictness(f"{handle:#x} is no {'executable ' if executable else ''}graph, or was destroyed")
    return found


class _Executable(Graph):
    """A graph after cuGraphInstantiateWithFlags."""


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


# what wants no context, and what wants a current one
DEVICES: dict[str, tuple[str, Body]] = {
    "cuDeviceGetCount": ("*int", _get_device_count),
    "cuDeviceGet": ("*int int", _get_device),
    "cuDeviceGetName": ("text int int", _get_name),
    "cuDeviceTotalMem_v2": ("*size int", _total_memory),
    "cuDeviceGetAttribute": ("*int int int", _attribute),
    "cuDeviceGetUuid_v2": ("text int", _uuid),
    "cuDriverGetVersion": ("*int", _driver_version),
}
IN_CONTEXT: dict[str, tuple[str, Body]] = {
    "cuMemGetInfo_v2": ("*size *size", _mem_info),
    "cuMemAlloc_v2": ("*pointer size", _malloc),
    "cuMemFree_v2": ("pointer", _freer("cuMemFree_v2", pinned=False)),
    "cuMemHostAlloc": ("*pointer size int", _host_alloc),
    "cuMemFreeHost": ("pointer", _freer("cuMemFreeHost", pinned=True)),
    "cuMemcpyHtoDAsync_v2": ("pointer pointer size pointer", _copier("cuMemcpyHtoDAsync_v2", "in")),
    "cuMemcpyDtoHAsync_v2": ("pointer pointer size pointer", _copier("cuMemcpyDtoHAsync_v2", "out")),
    "cuMemcpyDtoDAsync_v2": ("pointer pointer size pointer", _copier("cuMemcpyDtoDAsync_v2", "within")),
    "cuStreamCreate": ("*pointer int", _stream_create),
    "cuStreamDestroy_v2": ("pointer", _stream_destroy),
    "cuStreamSynchronize": ("pointer", _stream_synchronize),
    "cuStreamQuery": ("pointer", _stream_query),
    "cuStreamWaitEvent": ("pointer pointer int", _stream_wait),
    "cuEventCreate": ("*pointer int", _event_create),
    "cuEventRecord": ("pointer pointer", _event_record),
    "cuEventQuery": ("pointer", _event_query),
    "cuEventSynchronize": ("pointer", _event_synchronize),
    "cuEventDestroy_v2": ("pointer", _event_destroy),
    "cuEventElapsedTime": ("*float pointer pointer", _event_elapsed),
    "cuStreamBeginCapture_v2": ("pointer int", _begin_capture),
    "cuStreamEndCapture": ("pointer *pointer", _end_capture),
    "cuGraphInstantiateWithFlags": ("*pointer pointer long", _instantiate),
    "cuGraphLaunch": ("pointer pointer", _graph_launch),
    "cuGraphExecDestroy": ("pointer", _graph_destroyer(executable=True)),
    "cuGraphDestroy": ("pointer", _graph_destroyer(executable=False)),
}
