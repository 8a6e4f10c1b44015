"""A fake engine from an ONNX file to its results, call by call, as the tests of the fakes need it."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from trt.fake_cudart import Cudart
from trt.fake_tensorrt import fake_tensorrt
from trt.networks import Draft
from trt.streams import Gpus
from trt.surface import Surface

SHAPE = (1, 2, 8, 12)


class Run:
    """An engine, open and ready to run at one shape; `ready=False`: nothing is set yet."""

    def __init__(
        self,
        surface: Surface,
        path: Path,
        shape: tuple[int, ...] = SHAPE,
        *,
        ready: bool = True,
        flags: tuple[str, ...] = (),
        **draft: Any,
    ) -> None:
        self.gpus = Gpus()
        self.lib, self.trt = Cudart(self.gpus), fake_tensorrt(surface, self.gpus)
        self.draft = Draft(self.trt, path, **draft)
        if self.trt.rtx:
            self.draft.config.set_flag(self.trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        for flag in flags:
            self.draft.config.set_flag(getattr(self.trt.BuilderFlag, flag))
        self.engine = self.draft.open()
        self.context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.stream = self.new_stream()
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, int] = {}
        if ready:
            self.scratch(self.engine.device_memory_size_v2)
            self.shape(shape)

    def new_stream(self) -> c_void_p:
        stream = c_void_p()
        assert self.lib.cudaStreamCreateWithFlags(byref(stream), c_uint(1)) == 0
        return stream

    def malloc(self, size: int) -> int:
        pointer = c_void_p()
        assert self.lib.cudaMalloc(byref(pointer), c_size_t(size)) == 0
        return int(pointer.value or 0)

    def pin(self, shape: tuple[int, ...], dtype: str = "f4") -> np.ndarray:
        pointer, size = c_void_p(), int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert self.lib.cudaMallocHost(byref(pointer), c_size_t(size)) == 0
        data = (c_uint * (size // 4)).from_address(int(pointer.value or 0))
        return np.frombuffer(data, dtype).reshape(shape)

    def scratch(self, size: int) -> None:
        self.context.set_device_memory(self.malloc(size), size)

    def shape(self, shape: tuple[int, ...]) -> None:
        names = [self.engine.get_tensor_name(k) for k in range(self.engine.num_io_tensors)]
        inputs = [name for name in names if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT]
        for name in inputs:
            assert self.context.set_input_shape(name, shape)
        assert self.context.infer_shapes() == []
        for name in names:
            dtype = "f2" if self.engine.get_tensor_dtype(name) == self.trt.float16 else "f4"
            self.host[name] = self.pin(tuple(self.context.get_tensor_shape(name)), dtype)
            self.device[name] = self.malloc(self.host[name].nbytes)
            assert self.context.set_tensor_address(name, self.device[name])

    def copy(self, name: str, kind: int) -> None:
        here, there, size = c_void_p(self.host[name].ctypes.data), c_void_p(self.device[name]), c_size_t(self.host[name].nbytes)
        to, source = (there, here) if kind == 1 else (here, there)
        assert self.lib.cudaMemcpyAsync(to, source, size, c_int(kind), self.stream) == 0

    def feed(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.host[name][...] = value
            self.copy(name, 1)

    def execute(self) -> bool:
        return self.context.execute_async_v3(self.stream.value)  # type: ignore[no-any-return]

    def fetch(self, name: str = "out") -> np.ndarray:
        self.copy(name, 2)
        return self.host[name]

    def wait(self) -> None:
        assert self.lib.cudaStreamSynchronize(self.stream) == 0
