"""Polygraphy on a fake machine: its TensorRT is the machine's, and its CUDA a runtime over the fake GPUs.

with polygraphy_on(here):
    Comparator.run([TrtRunner(engine)], data_loader=[feeds])
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_size_t, c_uint, c_void_p
from typing import Any

import pytest
from trt.machine import Machine
from trt.memory import Region


class Cudart:
    """What `polygraphy.cuda.Cuda` offers. As in the CUDA runtime, a copy to memory that is not pinned waits for its stream."""

    def __init__(self, machine: Machine) -> None:
        self._gpus, self._lib = machine.gpus, machine.driver
        context = c_void_p()
        self._done(self._lib.cuInit(c_uint(0)))
        self._done(self._lib.cuDevicePrimaryCtxRetain(byref(context), ctypes.c_int(0)))
        self._done(self._lib.cuCtxSetCurrent(context))

    def close(self) -> None:
        self._done(self._lib.cuDevicePrimaryCtxRelease_v2(ctypes.c_int(0)))

    def create_stream(self) -> int | None:
        stream = c_void_p()
        self._done(self._lib.cuStreamCreate(byref(stream), c_uint(1)))
        return stream.value

    def stream_synchronize(self, ptr: int) -> None:
        self._done(self._lib.cuStreamSynchronize(c_void_p(ptr)))

    def destroy_stream(self, ptr: int) -> None:
        self._done(self._lib.cuStreamDestroy_v2(c_void_p(ptr)))

    def malloc(self, nbytes: int) -> int | None:
        place = c_void_p()
        self._done(self._lib.cuMemAlloc_v2(byref(place), c_size_t(nbytes)))
        return place.value

    def free(self, ptr: int) -> None:
        if ptr:
            self._done(self._lib.cuMemFree_v2(c_void_p(ptr)))

    def memcpy(self, dst: int, src: int, nbytes: int, kind: Any, stream_ptr: int) -> None:
        from polygraphy.cuda import MemcpyKind

        if kind is MemcpyKind.HostToDevice:
            self._done(self._lib.cuMemcpyHtoDAsync_v2(c_void_p(dst), c_void_p(src), c_size_t(nbytes), c_void_p(stream_ptr)))
        else:
            self.stream_synchronize(stream_ptr)
            ctypes.memmove(dst, self._gpus.memory.view(Region(src, nbytes), "copy to the host").tobytes(), nbytes)

    def _done(self, code: int) -> None:
        assert code == 0, f"CUDA error {code}"


class Lazy:
    """A module as Polygraphy's lazy imports have it."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def is_installed(self) -> bool:
        return True

    is_importable = is_installed


@contextmanager
def polygraphy_on(machine: Machine) -> Iterator[None]:
    import polygraphy.backend.trt.loader
    import polygraphy.backend.trt.runner
    import polygraphy.backend.trt.util
    import polygraphy.cuda.cuda
    import polygraphy.datatype.tensorrt
    from polygraphy import config

    cudart = Cudart(machine)
    backend = polygraphy.backend.trt
    with pytest.MonkeyPatch.context() as patch:
        for module in (backend.loader, backend.runner, backend.util, polygraphy.datatype.tensorrt):
            patch.setattr(module, "trt", Lazy(machine.trt))
        patch.setattr(polygraphy.cuda.cuda, "G_CUDA", cudart)
        patch.setattr(config, "USE_TENSORRT_RTX", machine.trt.rtx)
        try:
            yield
        finally:
            cudart.close()
