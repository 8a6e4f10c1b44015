"""The strict driver's memory, streams, events and graphs: what they compute, and that each kind of misuse is caught."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p

import numpy as np
import pytest
from trt.rig import driver_with_context
from trt.streams import Gpus
from trt.strict import Strictness

COUNT = 6


class Bench:
    """One device with a stream, a pinned array and device memory for it."""

    def __init__(self, **settings: object) -> None:
        self.gpus = Gpus(**settings)  # type: ignore[arg-type]
        self.lib = driver_with_context(self.gpus)
        self.stream = c_void_p()
        assert self.lib.cuStreamCreate(byref(self.stream), c_uint(1)) == 0
        self.host, self.pinned = self.pin()
        self.target, self.back = self.pin()
        self.device = self.malloc()

    @property
    def size(self) -> c_size_t:
        return c_size_t(4 * COUNT)

    def malloc(self) -> c_void_p:
        pointer = c_void_p()
        assert self.lib.cuMemAlloc_v2(byref(pointer), self.size) == 0
        return pointer

    def pin(self) -> tuple[c_void_p, np.ndarray]:
        pointer = c_void_p()
        assert self.lib.cuMemHostAlloc(byref(pointer), self.size, c_uint(0)) == 0
        return pointer, np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(c_float)), (COUNT,))

    def upload(self, to: c_void_p, source: c_void_p, size: int = 4 * COUNT) -> int:
        return self.lib.cuMemcpyHtoDAsync_v2(to, source, c_size_t(size), self.stream)

    def download(self, to: c_void_p, source: c_void_p, stream: c_void_p | None = None) -> int:
        return self.lib.cuMemcpyDtoHAsync_v2(to, source, self.size, self.stream if stream is None else stream)

    def event(self, flags: int = 2) -> c_void_p:
        event = c_void_p()
        assert self.lib.cuEventCreate(byref(event), c_uint(flags)) == 0
        return event

    def there_and_back(self) -> np.ndarray:
        """Ones to the device; the pinned array that is requested, not yet synchronised."""
        self.pinned[:] = 1
        assert self.upload(self.device, self.host) == 0
        assert self.download(self.target, self.device) == 0
        return self.back


def test_a_copy_arrives_when_the_stream_is_synchronised_and_not_before() -> None:
    bench = Bench()
    back = bench.there_and_back()
    assert np.isnan(back).all()
    assert bench.lib.cuStreamSynchronize(bench.stream) == 0
    assert back.tolist() == [1] * COUNT
    assert (bench.gpus.counts["bytes in"], bench.gpus.counts["bytes out"]) == (4 * COUNT, 4 * COUNT)
    assert bench.gpus.counts["cuStreamSynchronize"] == 1


def test_an_older_result_is_gone_once_the_next_copy_is_queued() -> None:
    bench = Bench()
    bench.pinned[:] = 3
    assert bench.download(bench.host, bench.device) == 0
    assert np.isnan(bench.pinned).all()


def test_fresh_memory_is_poison() -> None:
    bench = Bench()
    bench.download(bench.host, bench.malloc())
    bench.lib.cuStreamSynchronize(bench.stream)
    assert np.isnan(bench.pinned).all()


def test_an_event_is_not_ready_for_some_queries_and_then_all_before_it_ran() -> None:
    bench = Bench()
    back = bench.there_and_back()
    event = bench.event()
    assert bench.lib.cuEventRecord(event, bench.stream) == 0
    codes = []
    while not codes or codes[-1]:
        codes.append(bench.lib.cuEventQuery(event))
    assert codes[:-1] == [600] * (len(codes) - 1)
    assert len(codes) > 2
    assert back.tolist() == [1] * COUNT


def test_an_event_waits_for_what_was_queued_before_it_only() -> None:
    bench = Bench()
    back = bench.there_and_back()
    event = bench.event()
    bench.lib.cuEventRecord(event, bench.stream)
    pointer, later = bench.pin()
    bench.download(pointer, bench.device)
    assert bench.lib.cuEventSynchronize(event) == 0
    assert back.tolist() == [1] * COUNT
    assert np.isnan(later).all()


def test_elapsed_time_needs_events_that_time() -> None:
    bench = Bench()
    first, last, untimed = bench.event(0), bench.event(0), bench.event(2)
    milliseconds = c_float()
    bench.lib.cuEventRecord(first, bench.stream)
    bench.there_and_back()
    bench.lib.cuEventRecord(last, bench.stream)
    assert bench.lib.cuEventElapsedTime(byref(milliseconds), first, last) == 600
    bench.lib.cuStreamSynchronize(bench.stream)
    assert bench.lib.cuEventElapsedTime(byref(milliseconds), first, last) == 0
    assert milliseconds.value == 3
    assert bench.lib.cuEventElapsedTime(byref(milliseconds), untimed, last) == 400


def test_a_graph_replays_with_the_addresses_of_its_capture() -> None:
    bench = Bench()
    graph, executable = c_void_p(), c_void_p()
    assert bench.lib.cuStreamBeginCapture_v2(bench.stream, c_int(1)) == 0
    back = bench.there_and_back()
    assert bench.lib.cuStreamEndCapture(bench.stream, byref(graph)) == 0
    assert bench.lib.cuGraphInstantiateWithFlags(byref(executable), graph, c_ulonglong(0)) == 0
    assert bench.lib.cuGraphDestroy(graph) == 0
    for value in (5, 7):
        bench.pinned[:] = value
        assert bench.lib.cuGraphLaunch(executable, bench.stream) == 0
        assert np.isnan(back).all()
        bench.lib.cuStreamSynchronize(bench.stream)
        assert back.tolist() == [value] * COUNT
    bench.lib.cuMemFree_v2(bench.device)
    with pytest.raises(Strictness, match="use after free"):
        bench.lib.cuGraphLaunch(executable, bench.stream)


@pytest.mark.parametrize("what", ["malloc", "free", "synchronise", "pageable"])
def test_what_a_capture_forbids_breaks_it(what: str) -> None:
    bench, graph, pointer = Bench(), c_void_p(1), c_void_p()
    bench.lib.cuStreamBeginCapture_v2(bench.stream, c_int(0))
    code = {
        "malloc": lambda: bench.lib.cuMemAlloc_v2(byref(pointer), bench.size),
        "free": lambda: bench.lib.cuMemFree_v2(bench.device),
        "synchronise": lambda: bench.lib.cuStreamSynchronize(bench.stream),
        "pageable": lambda: bench.upload(bench.device, c_void_p(np.zeros(COUNT, np.float32).ctypes.data)),
    }[what]()
    assert code == 900
    assert bench.lib.cuStreamEndCapture(bench.stream, byref(graph)) == 901
    assert graph.value is None


def test_use_after_free_and_overruns_and_double_free() -> None:
    bench = Bench()
    with pytest.raises(Strictness, match="end beyond"):
        bench.upload(bench.device, bench.host, 4 * COUNT + 1)
    inside = c_void_p(int(bench.device.value or 0) + 4)
    with pytest.raises(Strictness, match="not allocated by its twin"):
        bench.lib.cuMemFree_v2(inside)
    bench.lib.cuMemFree_v2(bench.device)
    with pytest.raises(Strictness, match="use after free"):
        bench.upload(bench.device, bench.host)
    with pytest.raises(Strictness, match="freed twice"):
        bench.lib.cuMemFree_v2(bench.device)


def test_memory_that_queued_work_needs_cannot_be_freed() -> None:
    bench = Bench()
    bench.upload(bench.device, bench.host)
    with pytest.raises(Strictness, match="queued and still needs"):
        bench.lib.cuMemFree_v2(bench.device)
    with pytest.raises(Strictness, match="queued and still needs"):
        bench.lib.cuMemFreeHost(bench.host)
    with pytest.raises(Strictness, match="work left"):
        bench.lib.cuStreamDestroy_v2(bench.stream)


def test_freed_pinned_memory_is_poison() -> None:
    bench = Bench()
    bench.pinned[:] = 1
    bench.lib.cuMemFreeHost(bench.host)
    assert np.isnan(bench.pinned).all()


def test_a_copy_out_wants_pinned_memory_and_a_copy_in_counts_pageable_memory() -> None:
    bench, array = Bench(), np.ones(COUNT, np.float32)
    with pytest.raises(Strictness, match="pageable"):
        bench.download(c_void_p(array.ctypes.data), bench.device)
    bench.upload(bench.device, c_void_p(array.ctypes.data))
    array[:] = 2  # the driver has taken its copy
    bench.download(bench.host, bench.device)
    bench.lib.cuStreamSynchronize(bench.stream)
    assert bench.pinned.tolist() == [1] * COUNT
    assert bench.gpus.counts["pageable copies"] == 1


def test_the_host_may_not_write_what_a_queued_copy_reads() -> None:
    bench = Bench()
    bench.upload(bench.device, bench.host)
    bench.pinned[0] = 9
    with pytest.raises(Strictness, match="the host wrote"):
        bench.lib.cuStreamSynchronize(bench.stream)


def test_two_streams_race_unless_an_event_orders_them() -> None:
    bench, other = Bench(), c_void_p()
    bench.lib.cuStreamCreate(byref(other), c_uint(1))
    bench.pinned[:] = 4
    bench.upload(bench.device, bench.host)
    pointer, back = bench.pin()
    with pytest.raises(Strictness, match="race"):
        bench.download(pointer, bench.device, other)
    event = bench.event()
    bench.lib.cuEventRecord(event, bench.stream)
    assert bench.lib.cuStreamWaitEvent(other, event, c_uint(0)) == 0
    bench.download(pointer, bench.device, other)
    bench.lib.cuStreamSynchronize(other)
    assert back.tolist() == [4] * COUNT


@pytest.mark.parametrize("handle", [0, 1, 2, 0x12345])
def test_default_and_unknown_streams_are_refused(handle: int) -> None:
    bench = Bench()
    with pytest.raises(Strictness, match=r"default stream|no stream"):
        bench.download(bench.host, bench.device, c_void_p(handle))


def test_a_stream_that_waits_for_the_default_stream_is_refused() -> None:
    bench = Bench()
    with pytest.raises(Strictness, match="NON_BLOCKING"):
        bench.lib.cuStreamCreate(byref(c_void_p()), c_uint(0))


def test_arguments_that_ctypes_would_cut_are_refused() -> None:
    bench = Bench()
    with pytest.raises(Strictness, match="as a C int"):
        bench.lib.cuMemFree_v2(bench.device.value)
    with pytest.raises(Strictness, match="32 bits"):
        bench.lib.cuMemAlloc_v2(byref(c_void_p()), c_uint(8))
    with pytest.raises(Strictness, match="4 bytes"):
        bench.lib.cuMemAlloc_v2(byref(c_int()), c_size_t(8))
    with pytest.raises(Strictness, match="not the address"):
        bench.lib.cuMemAlloc_v2(c_void_p(), c_size_t(8))
    with pytest.raises(Strictness, match="called with 1"):
        bench.lib.cuMemAlloc_v2(byref(c_void_p()))


def test_argtypes_restype_and_errcheck_work_as_in_ctypes() -> None:
    bench = Bench()
    free, name, text = bench.lib.cuMemFree_v2, bench.lib.cuGetErrorName, c_char_p()
    free.argtypes = [c_void_p]
    name.argtypes = [c_int, ctypes.POINTER(c_char_p)]
    assert free(bench.device.value) == 0
    assert name(2, byref(text)) == 0
    assert text.value == b"CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(TypeError, match="takes 1 argument"):
        free(None, None)
    with pytest.raises(ctypes.ArgumentError):
        free(1.5)
    malloc = bench.lib.cuMemAlloc_v2
    malloc.argtypes = [ctypes.POINTER(c_void_p), c_size_t]
    malloc.errcheck = lambda result, function, args: (result, function.__name__, len(args))
    pointer = c_void_p()
    assert malloc(byref(pointer), 8) == (0, "cuMemAlloc_v2", 2)
    free.argtypes = [c_int]
    with pytest.raises(Strictness, match="32 bits"):
        free(0)
    bench.lib.cuInit.restype = None
    with pytest.raises(Strictness, match="loses"):
        bench.lib.cuInit(c_uint(0))


def test_memory_runs_out_and_is_counted() -> None:
    bench = Bench(total=4096)
    free, total = c_size_t(), c_size_t()
    bench.lib.cuMemGetInfo_v2(byref(free), byref(total))
    assert (free.value, total.value) == (4096 - 4 * COUNT, 4096)
    assert bench.lib.cuMemAlloc_v2(byref(c_void_p()), c_size_t(4096)) == 2


def test_failures_are_planted() -> None:
    bench = Bench()
    bench.lib.fail_next("cuMemAlloc_v2", 2, after=1)
    codes = [bench.lib.cuMemAlloc_v2(byref(c_void_p()), bench.size) for _ in range(3)]
    assert codes == [0, 2, 0]


def test_leaks_are_listed() -> None:
    bench = Bench()
    kinds = [leak.replace(":", " ").split()[0] for leak in sorted(bench.gpus.leaks())]
    assert kinds == ["cuMemAlloc", "pinned", "pinned", "stream"]
    bench.lib.cuMemFree_v2(bench.device)
    bench.lib.cuMemFreeHost(bench.host)
    bench.lib.cuMemFreeHost(bench.target)
    bench.lib.cuStreamDestroy_v2(bench.stream)
    assert bench.gpus.leaks() == []
