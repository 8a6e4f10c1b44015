"""The strict libcudart itself: what it computes, and that it catches each kind of misuse."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p

import numpy as np
import pytest
from trt.fake_cudart import Cudart, loader
from trt.streams import Gpus
from trt.strict import Strictness

H2D, D2H = 1, 2
COUNT = 6


class Bench:
    """One device with a stream, a pinned array and device memory for it."""

    def __init__(self, **settings: object) -> None:
        self.gpus = Gpus(**settings)  # type: ignore[arg-type]
        self.lib = Cudart(self.gpus)
        self.stream = c_void_p()
        assert self.lib.cudaStreamCreateWithFlags(byref(self.stream), c_uint(1)) == 0
        self.host, self.pinned = self.pin()
        self.target, self.back = self.pin()
        self.device = self.malloc()

    @property
    def size(self) -> c_size_t:
        return c_size_t(4 * COUNT)

    def malloc(self) -> c_void_p:
        pointer = c_void_p()
        assert self.lib.cudaMalloc(byref(pointer), self.size) == 0
        return pointer

    def pin(self) -> tuple[c_void_p, np.ndarray]:
        pointer = c_void_p()
        assert self.lib.cudaHostAlloc(byref(pointer), self.size, c_uint(0)) == 0
        return pointer, np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(c_float)), (COUNT,))

    def copy(self, to: c_void_p, source: c_void_p, kind: int, stream: c_void_p | None = None) -> int:
        return self.lib.cudaMemcpyAsync(to, source, self.size, c_int(kind), stream or self.stream)

    def event(self, flags: int = 2) -> c_void_p:
        event = c_void_p()
        assert self.lib.cudaEventCreateWithFlags(byref(event), c_uint(flags)) == 0
        return event

    def there_and_back(self) -> np.ndarray:
        """Ones to the device; the pinned array that is asked for, not yet synchronised."""
        self.pinned[:] = 1
        assert self.copy(self.device, self.host, H2D) == 0
        assert self.copy(self.target, self.device, D2H) == 0
        return self.back


def test_a_copy_arrives_when_the_stream_is_synchronised_and_not_before() -> None:
    bench = Bench()
    back = bench.there_and_back()
    assert np.isnan(back).all()
    assert bench.lib.cudaStreamSynchronize(bench.stream) == 0
    assert back.tolist() == [1] * COUNT
    assert (bench.gpus.counts["bytes in"], bench.gpus.counts["bytes out"]) == (4 * COUNT, 4 * COUNT)
    assert bench.gpus.counts["cudaStreamSynchronize"] == 1


def test_an_older_result_is_gone_once_the_next_copy_is_queued() -> None:
    bench = Bench()
    bench.pinned[:] = 3
    assert bench.copy(bench.host, bench.device, D2H) == 0
    assert np.isnan(bench.pinned).all()


def test_fresh_memory_is_poison() -> None:
    bench = Bench()
    bench.copy(bench.host, bench.malloc(), D2H)
    bench.lib.cudaStreamSynchronize(bench.stream)
    assert np.isnan(bench.pinned).all()


def test_an_event_is_not_ready_for_some_queries_and_then_all_before_it_ran() -> None:
    bench = Bench()
    back = bench.there_and_back()
    event = bench.event()
    assert bench.lib.cudaEventRecord(event, bench.stream) == 0
    codes = []
    while not codes or codes[-1]:
        codes.append(bench.lib.cudaEventQuery(event))
    assert codes[:-1] == [600] * (len(codes) - 1)
    assert len(codes) > 2
    assert back.tolist() == [1] * COUNT
    assert bench.lib.cudaGetLastError() == 0  # not ready is no error


def test_an_event_waits_for_what_was_queued_before_it_only() -> None:
    bench = Bench()
    back = bench.there_and_back()
    event = bench.event()
    bench.lib.cudaEventRecord(event, bench.stream)
    pointer, later = bench.pin()
    bench.copy(pointer, bench.device, D2H)
    assert bench.lib.cudaEventSynchronize(event) == 0
    assert back.tolist() == [1] * COUNT
    assert np.isnan(later).all()


def test_elapsed_time_needs_events_that_time() -> None:
    bench = Bench()
    first, last, untimed = bench.event(0), bench.event(0), bench.event(2)
    milliseconds = c_float()
    bench.lib.cudaEventRecord(first, bench.stream)
    bench.there_and_back()
    bench.lib.cudaEventRecord(last, bench.stream)
    assert bench.lib.cudaEventElapsedTime(byref(milliseconds), first, last) == 600
    bench.lib.cudaStreamSynchronize(bench.stream)
    assert bench.lib.cudaEventElapsedTime(byref(milliseconds), first, last) == 0
    assert milliseconds.value == 3
    assert bench.lib.cudaEventElapsedTime(byref(milliseconds), untimed, last) == 400


def test_a_graph_replays_with_the_addresses_of_its_capture() -> None:
    bench = Bench()
    graph, executable = c_void_p(), c_void_p()
    assert bench.lib.cudaStreamBeginCapture(bench.stream, c_int(1)) == 0
    back = bench.there_and_back()
    assert bench.lib.cudaStreamEndCapture(bench.stream, byref(graph)) == 0
    assert bench.lib.cudaGraphInstantiateWithFlags(byref(executable), graph, c_ulonglong(0)) == 0
    assert bench.lib.cudaGraphDestroy(graph) == 0
    for value in (5, 7):
        bench.pinned[:] = value
        assert bench.lib.cudaGraphLaunch(executable, bench.stream) == 0
        assert np.isnan(back).all()
        bench.lib.cudaStreamSynchronize(bench.stream)
        assert back.tolist() == [value] * COUNT
    bench.lib.cudaFree(bench.device)
    with pytest.raises(Strictness, match="use after free"):
        bench.lib.cudaGraphLaunch(executable, bench.stream)


@pytest.mark.parametrize("what", ["malloc", "free", "synchronise", "pageable"])
def test_what_a_capture_forbids_breaks_it(what: str) -> None:
    bench, graph, pointer = Bench(), c_void_p(1), c_void_p()
    bench.lib.cudaStreamBeginCapture(bench.stream, c_int(0))
    code = {
        "malloc": lambda: bench.lib.cudaMalloc(byref(pointer), bench.size),
        "free": lambda: bench.lib.cudaFree(bench.device),
        "synchronise": lambda: bench.lib.cudaStreamSynchronize(bench.stream),
        "pageable": lambda: bench.copy(bench.device, c_void_p(np.zeros(COUNT, np.float32).ctypes.data), H2D),
    }[what]()
    assert code == 900
    assert bench.lib.cudaGetLastError() == 900
    assert bench.lib.cudaStreamEndCapture(bench.stream, byref(graph)) == 901
    assert graph.value is None


def test_use_after_free_and_overruns_and_double_free() -> None:
    bench = Bench()
    with pytest.raises(Strictness, match="end beyond"):
        bench.lib.cudaMemsetAsync(bench.device, c_int(0), c_size_t(4 * COUNT + 1), bench.stream)
    inside = c_void_p(int(bench.device.value or 0) + 4)
    with pytest.raises(Strictness, match="not allocated by its twin"):
        bench.lib.cudaFree(inside)
    bench.lib.cudaFree(bench.device)
    with pytest.raises(Strictness, match="use after free"):
        bench.copy(bench.device, bench.host, H2D)
    with pytest.raises(Strictness, match="freed twice"):
        bench.lib.cudaFree(bench.device)


def test_memory_that_queued_work_needs_cannot_be_freed() -> None:
    bench = Bench()
    bench.copy(bench.device, bench.host, H2D)
    with pytest.raises(Strictness, match="queued and still needs"):
        bench.lib.cudaFree(bench.device)
    with pytest.raises(Strictness, match="queued and still needs"):
        bench.lib.cudaFreeHost(bench.host)
    with pytest.raises(Strictness, match="work left"):
        bench.lib.cudaStreamDestroy(bench.stream)


def test_freed_pinned_memory_is_poison() -> None:
    bench = Bench()
    bench.pinned[:] = 1
    bench.lib.cudaFreeHost(bench.host)
    assert np.isnan(bench.pinned).all()


def test_a_copy_out_wants_pinned_memory_and_a_copy_in_counts_pageable_memory() -> None:
    bench, array = Bench(), np.ones(COUNT, np.float32)
    with pytest.raises(Strictness, match="pageable"):
        bench.copy(c_void_p(array.ctypes.data), bench.device, D2H)
    bench.copy(bench.device, c_void_p(array.ctypes.data), H2D)
    array[:] = 2  # the driver has taken its copy
    bench.copy(bench.host, bench.device, D2H)
    bench.lib.cudaStreamSynchronize(bench.stream)
    assert bench.pinned.tolist() == [1] * COUNT
    assert bench.gpus.counts["pageable copies"] == 1


def test_the_host_may_not_write_what_a_queued_copy_reads() -> None:
    bench = Bench()
    bench.copy(bench.device, bench.host, H2D)
    bench.pinned[0] = 9
    with pytest.raises(Strictness, match="the host wrote"):
        bench.lib.cudaStreamSynchronize(bench.stream)


def test_two_streams_race_unless_an_event_orders_them() -> None:
    bench, other = Bench(), c_void_p()
    bench.lib.cudaStreamCreateWithFlags(byref(other), c_uint(1))
    bench.pinned[:] = 4
    bench.copy(bench.device, bench.host, H2D)
    pointer, back = bench.pin()
    with pytest.raises(Strictness, match="race"):
        bench.copy(pointer, bench.device, D2H, other)
    event = bench.event()
    bench.lib.cudaEventRecord(event, bench.stream)
    assert bench.lib.cudaStreamWaitEvent(other, event, c_uint(0)) == 0
    bench.copy(pointer, bench.device, D2H, other)
    bench.lib.cudaStreamSynchronize(other)
    assert back.tolist() == [4] * COUNT


@pytest.mark.parametrize("handle", [0, 1, 2, 0x12345])
def test_default_and_unknown_streams_are_refused(handle: int) -> None:
    bench = Bench()
    with pytest.raises(Strictness, match=r"default stream|no stream"):
        bench.lib.cudaMemsetAsync(bench.device, c_int(0), bench.size, c_void_p(handle))


def test_what_stalls_the_device_is_not_offered() -> None:
    bench = Bench()
    for name in ("cudaDeviceSynchronize", "cudaDeviceReset", "cudaMemcpy"):
        with pytest.raises(Strictness, match="stalls"):
            getattr(bench.lib, name)
    with pytest.raises(Strictness, match="NonBlocking"):
        bench.lib.cudaStreamCreateWithFlags(byref(c_void_p()), c_uint(0))
    with pytest.raises(AttributeError, match="undefined symbol"):
        _ = bench.lib.cudaSomethingElse


def test_arguments_that_ctypes_would_cut_are_refused() -> None:
    bench = Bench()
    with pytest.raises(Strictness, match="as a C int"):
        bench.lib.cudaFree(bench.device.value)
    with pytest.raises(Strictness, match="32 bits"):
        bench.lib.cudaMalloc(byref(c_void_p()), c_uint(8))
    with pytest.raises(Strictness, match="4 bytes"):
        bench.lib.cudaMalloc(byref(c_int()), c_size_t(8))
    with pytest.raises(Strictness, match="not the address"):
        bench.lib.cudaMalloc(c_void_p(), c_size_t(8))
    with pytest.raises(Strictness, match="called with 1"):
        bench.lib.cudaMalloc(byref(c_void_p()))
    with pytest.raises(Strictness, match="restype"):
        bench.lib.cudaGetErrorName(c_int(2))


def test_argtypes_restype_and_errcheck_work_as_in_ctypes() -> None:
    bench = Bench()
    free, name = bench.lib.cudaFree, bench.lib.cudaGetErrorName
    free.argtypes = [c_void_p]
    name.restype, name.argtypes = c_char_p, [c_int]
    assert free(bench.device.value) == 0
    assert name(2) == b"cudaErrorMemoryAllocation"
    with pytest.raises(TypeError, match="takes 1 argument"):
        free(None, None)
    with pytest.raises(ctypes.ArgumentError):
        free(1.5)
    malloc = bench.lib.cudaMalloc
    malloc.argtypes = [ctypes.POINTER(c_void_p), c_size_t]
    malloc.errcheck = lambda result, function, args: (result, function.__name__, len(args))
    pointer = c_void_p()
    assert malloc(byref(pointer), 8) == (0, "cudaMalloc", 2)
    free.argtypes = [c_int]
    with pytest.raises(Strictness, match="32 bits"):
        free(0)
    bench.lib.cudaSetDevice.restype = None
    with pytest.raises(Strictness, match="loses"):
        bench.lib.cudaSetDevice(c_int(0))


def test_memory_runs_out_and_is_counted() -> None:
    bench = Bench(total=4096)
    free, total = c_size_t(), c_size_t()
    bench.lib.cudaMemGetInfo(byref(free), byref(total))
    assert (free.value, total.value) == (4096 - 4 * COUNT, 4096)
    assert bench.lib.cudaMalloc(byref(c_void_p()), c_size_t(4096)) == 2


def test_failures_are_planted() -> None:
    bench = Bench()
    bench.lib.fail_next("cudaMalloc", 2, after=1)
    codes = [bench.lib.cudaMalloc(byref(c_void_p()), bench.size) for _ in range(3)]
    assert codes == [0, 2, 0]


def test_leaks_are_listed() -> None:
    bench = Bench()
    kinds = [leak.replace(":", " ").split()[0] for leak in sorted(bench.gpus.leaks())]
    assert kinds == ["cudaMalloc", "pinned", "pinned", "stream"]
    bench.lib.cudaFree(bench.device)
    bench.lib.cudaFreeHost(bench.host)
    bench.lib.cudaFreeHost(bench.target)
    bench.lib.cudaStreamDestroy(bench.stream)
    assert bench.gpus.leaks() == []


def test_each_thread_has_its_own_current_device_and_streams_belong_to_one() -> None:
    bench = Bench(devices=2)
    assert bench.lib.cudaSetDevice(c_int(2)) == 101
    assert bench.lib.cudaSetDevice(c_int(1)) == 0
    with pytest.raises(Strictness, match="device 0 while device 1 is current"):
        bench.lib.cudaMemsetAsync(bench.device, c_int(0), bench.size, bench.stream)


def test_it_stands_for_the_library_of_its_version_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart(Gpus(runtime_version=12060))
    monkeypatch.setattr(ctypes, "CDLL", loader(cudart))
    assert ctypes.CDLL("/somewhere/libcudart.so.12") is cudart
    for name in ("libcudart.so.11.0", "libcuda.so.1"):
        with pytest.raises(OSError, match=name):
            ctypes.CDLL(name)
