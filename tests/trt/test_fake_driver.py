"""The strict driver: devices, contexts, planted failures. `test_cuda_calls` tests what is done in a context."""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p

import pytest
from trt.fake_driver import Driver, loader
from trt.streams import Gpus
from trt.strict import Strictness

INVALID_CONTEXT, NOT_INITIALIZED = 201, 3


@pytest.fixture
def driver() -> Driver:
    made = Driver(Gpus(devices=2))
    assert made.cuInit(c_uint(0)) == 0
    return made


def current(driver: Driver, device: int = 0) -> None:
    context = c_void_p()
    assert driver.cuDevicePrimaryCtxRetain(byref(context), c_int(device)) == 0
    assert driver.cuCtxSetCurrent(context) == 0


def test_it_must_be_initialised_first() -> None:
    driver, count = Driver(Gpus()), c_int()
    assert driver.cuDeviceGetCount(byref(count)) == NOT_INITIALIZED
    driver.cuInit(c_uint(0))
    assert driver.cuDeviceGetCount(byref(count)) == 0
    assert count.value == 1
    assert Driver(Gpus(devices=0)).cuInit(c_uint(0)) == 100


def test_memory_wants_a_context_that_is_current_and_held(driver: Driver) -> None:
    pointer = c_void_p()
    assert driver.cuMemAlloc_v2(byref(pointer), c_size_t(8)) == INVALID_CONTEXT
    current(driver)
    assert driver.cuMemAlloc_v2(byref(pointer), c_size_t(8)) == 0
    assert driver.cuDevicePrimaryCtxRelease_v2(c_int(0)) == 0
    assert driver.cuMemFree_v2(pointer) == INVALID_CONTEXT
    with pytest.raises(Strictness, match="once too often"):
        driver.cuDevicePrimaryCtxRelease_v2(c_int(0))
    with pytest.raises(Strictness, match="no context"):
        driver.cuCtxSetCurrent(c_void_p(0x1234))


def test_the_current_context_is_the_threads_own(driver: Driver) -> None:
    current(driver, 1)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(driver.cuMemAlloc_v2(byref(c_void_p()), c_size_t(8))))
    thread.start()
    thread.join()
    assert codes == [INVALID_CONTEXT]
    assert driver.gpus.device == 1


def test_copies_go_one_way_each_and_on_a_stream(driver: Driver) -> None:
    current(driver)
    host, device, stream = c_void_p(), c_void_p(), c_void_p()
    driver.cuMemHostAlloc(byref(host), c_size_t(8), c_uint(0))
    driver.cuMemAlloc_v2(byref(device), c_size_t(8))
    driver.cuStreamCreate(byref(stream), c_uint(1))
    array = (ctypes.c_uint8 * 8).from_address(host.value or 0)
    array[:] = range(8)
    assert driver.cuMemcpyHtoDAsync_v2(device, host, c_size_t(8), stream) == 0
    assert driver.cuStreamSynchronize(stream) == 0
    assert driver.cuMemcpyDtoHAsync_v2(host, device, c_size_t(8), stream) == 0
    assert list(array) == [255] * 8
    assert driver.cuStreamSynchronize(stream) == 0
    assert list(array) == list(range(8))
    with pytest.raises(Strictness, match="which is out, not in"):
        driver.cuMemcpyHtoDAsync_v2(host, device, c_size_t(8), stream)
    with pytest.raises(Strictness, match="default stream"):
        driver.cuMemcpyHtoDAsync_v2(device, host, c_size_t(8), c_void_p(0))


def test_what_stalls_the_device_is_not_offered(driver: Driver) -> None:
    for name in ("cuCtxSynchronize", "cuDevicePrimaryCtxReset_v2", "cuMemcpyDtoH_v2"):
        with pytest.raises(Strictness, match="stalls"):
            getattr(driver, name)
    with pytest.raises(AttributeError):
        _ = driver.cuMemAlloc  # the name of the first revision


def test_a_stream_belongs_to_one_device(driver: Driver) -> None:
    current(driver)
    pointer, host, stream = c_void_p(), c_void_p(), c_void_p()
    driver.cuMemAlloc_v2(byref(pointer), c_size_t(8))
    driver.cuMemHostAlloc(byref(host), c_size_t(8), c_uint(0))
    driver.cuStreamCreate(byref(stream), c_uint(1))
    assert driver.cuDeviceGet(byref(c_int()), c_int(2)) == 101
    current(driver, 1)
    with pytest.raises(Strictness, match="device 0 while device 1 is current"):
        driver.cuMemcpyHtoDAsync_v2(pointer, host, c_size_t(8), stream)


def test_a_broken_context_gives_back_what_it_has_and_does_nothing_else(driver: Driver) -> None:
    current(driver)
    pointer, host, stream = c_void_p(), c_void_p(), c_void_p()
    driver.cuMemAlloc_v2(byref(pointer), c_size_t(8))
    driver.cuMemHostAlloc(byref(host), c_size_t(8), c_uint(0))
    driver.cuStreamCreate(byref(stream), c_uint(1))
    assert driver.cuMemcpyHtoDAsync_v2(pointer, host, c_size_t(8), stream) == 0
    driver.break_next("cuStreamSynchronize", 700)
    assert driver.cuStreamSynchronize(stream) == 700
    assert driver.cuMemAlloc_v2(byref(c_void_p()), c_size_t(8)) == 700
    assert [driver.cuMemFree_v2(pointer), driver.cuMemFreeHost(host), driver.cuStreamDestroy_v2(stream)] == [700] * 3
    assert driver.cuDevicePrimaryCtxRelease_v2(c_int(0)) == 700
    assert driver.gpus.leaks() == []
    assert driver.retained == [0, 0]


def test_it_stands_for_the_driver_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(Gpus())
    monkeypatch.setattr(ctypes, "CDLL", loader(driver))
    assert ctypes.CDLL("/somewhere/libcuda.so.1") is driver
    for name in ("libcudart.so.12", "libcuda.so"):
        with pytest.raises(OSError, match=name):
            ctypes.CDLL(name)


def test_errors_have_names(driver: Driver) -> None:
    text = c_char_p()
    assert driver.cuGetErrorString(c_int(2), byref(text)) == 0
    assert text.value == b"out of memory"


def test_the_runtime_lists_the_fake_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdruntime.system import cuda

    gpus = Gpus(devices=2, name="Fake", capability=(8, 9), total=1 << 30, driver_version=13000)
    monkeypatch.setattr(ctypes, "CDLL", loader(Driver(gpus)))
    cuda.load_driver.cache_clear()
    cuda.devices.cache_clear()
    try:
        found = cuda.devices()
    finally:
        cuda.load_driver.cache_clear()
        cuda.devices.cache_clear()
    assert [(each.name, each.target, each.memory, each.driver) for each in found] == [("Fake", "sm89", 1 << 30, "13.0")] * 2
    assert found[0].uuid != found[1].uuid
