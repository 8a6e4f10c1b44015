"""The strict TensorRT from a serialised engine on: what it computes, and that each thing one can forget is caught."""

from __future__ import annotations

import json
from collections.abc import Mapping
from ctypes import byref, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt import networks
from trt.fake_cudart import Cudart
from trt.fake_tensorrt import fake_tensorrt
from trt.networks import BEST, HIGH, LOW, Draft
from trt.streams import Gpus
from trt.strict import Strictness
from trt.surface import Surface

SHAPE = (1, 2, 8, 12)


class Run:
    """An engine, open and ready to run at one shape; `ready=False`: nothing is set yet."""

    def __init__(self, surface: Surface, path: Path, shape: tuple[int, ...] = SHAPE, *, ready: bool = True, **draft: Any) -> None:
        self.gpus = Gpus()
        self.lib, self.trt = Cudart(self.gpus), fake_tensorrt(surface, self.gpus)
        self.draft = Draft(self.trt, path, **draft)
        if self.trt.rtx:
            self.draft.config.set_flag(self.trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return networks.scaled(tmp_path / "m.onnx")


@pytest.fixture
def run(surface: Surface, path: Path) -> Run:
    return Run(surface, path)


def test_an_engine_computes_once_its_stream_is_synchronised(run: Run) -> None:
    run.feed({"sample": 2, "shift": 1})
    assert run.execute()
    out = run.fetch()
    assert np.isnan(out).all()
    run.wait()
    assert out.shape == SHAPE
    assert (out == 7).all()
    assert run.gpus.counts["executions"] == 1


def test_halves_and_inferred_shapes(surface: Surface, tmp_path: Path) -> None:
    run = Run(surface, networks.scaled(tmp_path / "h.onnx", dtype="float16"))
    run.feed({"sample": 0.5, "shift": 1})
    assert run.execute()
    out = run.fetch()
    run.wait()
    assert out.dtype == np.float16
    assert (out == 2.5).all()
    larger = Run(surface, networks.upsampled(tmp_path / "u.onnx"))
    larger.feed({"sample": 1})
    assert larger.execute()
    out = larger.fetch()
    larger.wait()
    assert out.shape == (1, 2, 16, 24)
    assert (out == 3).all()


def test_what_was_never_copied_in_is_poison(run: Run) -> None:
    run.feed({"sample": 2})
    assert run.execute()
    out = run.fetch()
    run.wait()
    assert np.isnan(out).all()


def test_an_engine_tells_of_itself(run: Run) -> None:
    engine, trt = run.engine, run.trt
    assert tuple(engine.get_tensor_shape("sample")) == (-1, 2, -1, -1)
    assert [tuple(shape) for shape in engine.get_tensor_profile_shape("shift", 0)] == [LOW, BEST, HIGH]
    assert engine.get_tensor_mode("nothing") == trt.TensorIOMode.NONE
    assert (engine.num_optimization_profiles, engine.num_layers, engine.refittable) == (1, 2, False)
    inspector = engine.create_engine_inspector()
    told = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    assert told["Layers"] == ["mul", "add"]
    assert engine.device_memory_size_v2 > run.context.update_device_memory_size_for_shapes() > 0


def test_a_smaller_shape_needs_less_memory(surface: Surface, path: Path) -> None:
    run = Run(surface, path, ready=False)
    run.shape(SHAPE)
    needed = run.context.update_device_memory_size_for_shapes()
    run.scratch(needed)
    run.feed({"sample": 1, "shift": 1})
    assert run.execute()
    run.wait()
    run.shape((2, 2, 16, 16))
    run.feed({"sample": 1, "shift": 1})
    with pytest.raises(Strictness, match="are needed"):
        run.execute()


# -- what one can forget


def test_an_input_without_a_shape(surface: Surface, path: Path) -> None:
    run = Run(surface, path, ready=False)
    run.scratch(run.engine.device_memory_size_v2)
    assert run.context.infer_shapes() == ["sample", "shift"]
    assert tuple(run.context.get_tensor_shape("out")) == (-1, 2, -1, -1)
    with pytest.raises(Strictness, match="no shape is set of sample, shift"):
        run.execute()


def test_a_shape_outside_the_profile(run: Run) -> None:
    for shape in ((1, 2, 8, 17), (1, 2, 7, 8), (1, 3, 8, 8), (2, 8, 8)):
        assert not run.context.set_input_shape("sample", shape)
    assert "not within profile 0" in run.draft.log.errors[-1]
    assert not run.context.set_input_shape("nothing", SHAPE)


def test_shapes_that_do_not_agree(run: Run) -> None:
    run.context.set_input_shape("shift", (1, 2, 8, 16))
    with pytest.raises(Strictness, match="dimension width is 16 in shift and 12 elsewhere"):
        run.execute()


def test_device_memory_that_is_not_set_too_small_or_unaligned(surface: Surface, path: Path) -> None:
    run = Run(surface, path, ready=False)
    run.shape(SHAPE)
    with pytest.raises(Strictness, match="no device memory is set"):
        run.execute()
    size = run.engine.device_memory_size_v2
    run.scratch(size - 256)
    with pytest.raises(Strictness, match="are needed"):
        run.execute()
    with pytest.raises(Strictness, match="256-byte aligned"):
        run.context.set_device_memory(run.malloc(size + 256) + 128, size)
    with pytest.raises(Strictness, match="end beyond"):
        run.context.set_device_memory(run.malloc(size), 2 * size)


def test_addresses_that_are_not_set_freed_or_too_small(run: Run) -> None:
    small = run.malloc(run.host["out"].nbytes - 1)
    run.context.set_tensor_address("out", small)
    with pytest.raises(Strictness, match=r"out: .* end beyond"):
        run.execute()
    run.context.set_tensor_address("out", run.device["sample"])
    with pytest.raises(Strictness, match="lies where something else does"):
        run.execute()
    run.lib.cudaFree(c_void_p(small))
    run.context.set_tensor_address("out", small)
    with pytest.raises(Strictness, match="use after free"):
        run.execute()
    run.context.set_tensor_address("out", run.host["out"].ctypes.data)
    with pytest.raises(Strictness, match="no device memory"):
        run.execute()
    run.context.set_tensor_address("out", 0)
    with pytest.raises(Strictness, match="no address is set of out"):
        run.execute()
    assert not run.context.set_tensor_address("nothing", small)


def test_memory_freed_while_it_is_needed(run: Run) -> None:
    run.feed({"sample": 1, "shift": 1})
    run.execute()
    with pytest.raises(Strictness, match="queued and still needs"):
        run.lib.cudaFree(c_void_p(run.device["out"]))


def test_a_context_deleted_while_it_is_needed(run: Run) -> None:
    run.feed({"sample": 1, "shift": 1})
    run.execute()
    run.context = None
    with pytest.raises(Strictness, match="what queued or captured it was deleted"):
        run.wait()


@pytest.mark.parametrize("handle", [0, 1, 2])
def test_the_default_streams(run: Run, handle: int) -> None:
    with pytest.raises(Strictness, match="default stream"):
        run.context.execute_async_v3(handle)


def test_inputs_copied_on_another_stream(run: Run) -> None:
    run.feed({"sample": 1, "shift": 1})
    with pytest.raises(Strictness, match="race"):
        run.context.execute_async_v3(run.new_stream().value)


def test_a_profile_that_is_not_chosen(surface: Surface, path: Path) -> None:
    profiles = ((LOW, BEST, BEST), (LOW, HIGH, HIGH))
    run = Run(surface, path, ready=False, profiles=profiles)
    assert run.context.active_optimization_profile == -1
    with pytest.raises(Strictness, match="no profile is chosen"):
        run.context.set_input_shape("sample", SHAPE)
    assert not run.context.set_optimization_profile_async(2, run.stream.value)
    assert run.context.set_optimization_profile_async(1, run.stream.value)
    run.scratch(run.engine.get_device_memory_size_for_profile_v2(1))
    run.shape((2, 2, 16, 16))
    with pytest.raises(Strictness, match="still being switched on another stream"):
        run.context.execute_async_v3(run.new_stream().value)
    run.feed({"sample": 1, "shift": 0})
    assert run.execute()
    out = run.fetch()
    run.wait()
    assert (out == 3).all()
    assert run.context.set_optimization_profile_async(0, run.stream.value)
    assert run.context.infer_shapes() == ["sample", "shift"]  # a switch forgets the shapes
    again = run.engine.create_execution_context(run.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert again.active_optimization_profile == -1


# -- graphs


def captured(run: Run) -> tuple[int, int, c_void_p]:
    """(whether the execution was queued, the code of the end, the graph)."""
    graph = c_void_p()
    assert run.lib.cudaStreamBeginCapture(run.stream, c_int(1)) == 0
    queued = run.execute()
    return queued, run.lib.cudaStreamEndCapture(run.stream, byref(graph)), graph


def test_a_graph_of_an_execution_replays(run: Run) -> None:
    assert captured(run)[:2] == (False, 901)  # it must have run so once before
    run.feed({"sample": 1, "shift": 1})
    run.execute()
    run.wait()
    queued, code, graph = captured(run)
    assert (queued, code) == (True, 0)
    executable = c_void_p()
    assert run.lib.cudaGraphInstantiateWithFlags(byref(executable), graph, c_ulonglong(0)) == 0
    for value in (3, 5):
        run.feed({"sample": value, "shift": 1})
        assert run.lib.cudaGraphLaunch(executable, run.stream) == 0
        out = run.fetch()
        run.wait()
        assert (out == 3 * value + 1).all()
    assert run.gpus.counts["launches"] == 2
    run.context = None
    with pytest.raises(Strictness, match="deleted"):
        run.lib.cudaGraphLaunch(executable, run.stream)


def test_a_new_shape_must_run_before_it_is_captured(run: Run) -> None:
    run.feed({"sample": 1, "shift": 1})
    run.execute()
    run.wait()
    run.shape((1, 2, 8, 8))
    assert captured(run)[:2] == (False, 901)


# -- opening and closing


def test_a_plan_of_something_else_is_none(surface: Surface, path: Path) -> None:
    draft = Draft(fake_tensorrt(surface, Gpus()), path)
    data = bytes(draft.build())
    for wrong in (b"", b"unet" * 50, data[:-1], data.replace(surface.version.encode(), b"9" * len(surface.version))):
        assert draft.open(wrong) is None
    assert "IRuntime::deserializeCudaEngine" in draft.log.errors[-1]
    assert draft.open(memoryview(data)) is not None


def test_a_plan_runs_where_it_was_built_for(surface: Surface, path: Path) -> None:
    def opened(built_on: tuple[int, int], run_on: tuple[int, int], *, portable: bool = False) -> bool:
        draft = Draft(fake_tensorrt(surface, Gpus(capability=built_on)), path)
        if portable:
            draft.config.hardware_compatibility_level = draft.trt.HardwareCompatibilityLevel.AMPERE_PLUS
        other = Draft(fake_tensorrt(surface, Gpus(capability=run_on)), path)
        return other.open(bytes(draft.build())) is not None

    rtx = surface.module == "tensorrt_rtx"
    assert opened((8, 6), (8, 6))
    assert opened((8, 6), (8, 9)) is rtx
    assert opened((8, 6), (8, 9), portable=True)
    assert not opened((8, 6), (7, 5), portable=True)


def test_weights_and_contexts_take_memory_and_give_it_back(surface: Surface, path: Path) -> None:
    run = Run(surface, path, ready=False)
    labels = [allocation.label for allocation in run.gpus.memory.live()]
    assert labels == ["engine weights"]
    static = run.engine.create_execution_context()
    assert "context memory" in [allocation.label for allocation in run.gpus.memory.live()]
    with pytest.raises(Strictness, match="USER_MANAGED"):
        static.set_device_memory(run.malloc(1 << 20), 1 << 20)
    run.gpus.memory.taken[0] = run.gpus.memory.total
    assert run.engine.create_execution_context() is None
    assert run.draft.open() is None
    del static
    run.context = run.engine = None
    assert [leak.split(":")[0] for leak in run.gpus.leaks()] == ["cudaMalloc", f"stream {run.stream.value:#x}"]


def test_host_code_is_never_allowed(run: Run) -> None:
    runtime = run.trt.Runtime(run.draft.logger)
    assert not runtime.engine_host_code_allowed
    with pytest.raises(Strictness, match="runs code"):
        runtime.engine_host_code_allowed = True


def test_weight_streaming_has_a_budget(surface: Surface, path: Path) -> None:
    draft = Draft(fake_tensorrt(surface, Gpus()), path)
    plain = draft.open()
    plain.weight_streaming_budget_v2 = 0
    assert "API Usage Error" in draft.log.errors[-1]
    draft.config.set_flag(draft.trt.BuilderFlag.WEIGHT_STREAMING)
    engine = draft.open()
    free, need = draft.trt.gpus_.memory.free_bytes(0), engine.device_memory_size_v2
    assert engine.weight_streaming_budget_v2 == engine.streamable_weights_size > 0
    engine.weight_streaming_budget_v2 = 0
    assert draft.trt.gpus_.memory.free_bytes(0) == free + engine.streamable_weights_size
    assert engine.device_memory_size_v2 > need
    context = engine.create_execution_context()
    engine.weight_streaming_budget_v2 = 100  # too late
    assert (engine.weight_streaming_budget_v2, context is None) == (0, False)


# -- TensorRT-RTX alone


def test_a_runtime_cache_remembers_shapes_and_must_be_kept(rtx: Surface, path: Path) -> None:
    run = Run(rtx, path, ready=False)
    config = run.engine.create_runtime_config()
    cache = config.create_runtime_cache()
    assert config.set_runtime_cache(cache)
    config.set_execution_context_allocation_strategy(run.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    run.context = run.engine.create_execution_context(config)
    run.context.set_optimization_profile_async(0, run.stream.value)
    run.scratch(run.engine.device_memory_size_v2)
    run.shape(SHAPE)
    before = bytes(cache.serialize())
    run.feed({"sample": 1, "shift": 1})
    run.execute()
    run.wait()
    after = bytes(cache.serialize())
    assert len(after) > len(before)
    assert config.create_runtime_cache().deserialize(after)
    assert not config.create_runtime_cache().deserialize(after.replace(b"3060", b"4090"))
    assert not config.create_runtime_cache().deserialize(b"")
    del cache
    with pytest.raises(Strictness, match="runtime cache was deleted"):
        run.execute()


def test_an_engine_has_a_validity(rtx: Surface, path: Path) -> None:
    run = Run(rtx, path, ready=False)
    runtime, data = run.trt.Runtime(run.draft.logger), bytes(run.draft.build())
    validity = run.trt.EngineValidity
    assert runtime.get_engine_validity(data[: runtime.engine_header_size]) == (validity.VALID, 0)
    assert runtime.get_engine_validity(b"x" * 64)[0] == validity.INVALID


def test_weights_are_loaded_later(rtx: Surface, path: Path) -> None:
    run = Run(rtx, path, ready=False)
    data = bytes(run.draft.build())
    runtime = run.trt.Runtime(run.draft.logger)
    runtime.defer_weights_loading = True
    run.engine = runtime.deserialize_cuda_engine(data)
    run.context = run.engine.create_execution_context(run.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    run.scratch(run.engine.device_memory_size_v2)
    run.shape(SHAPE)
    run.feed({"sample": 1, "shift": 1})
    with pytest.raises(Strictness, match="without its weights"):
        run.execute()
    assert run.engine.load_weights(data)
    assert run.execute()
    with pytest.raises(Strictness, match="while the engine is running"):
        run.engine.unload_weights()
    run.wait()
    assert run.engine.unload_weights()
    assert not run.engine.unload_weights()


def test_a_capture_wants_user_allocation(rtx: Surface, path: Path) -> None:
    run = Run(rtx, path)
    assert run.context.is_stream_capturable(run.stream.value)
    plain = Draft(run.trt, path).open().create_execution_context(run.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert not plain.is_stream_capturable(run.stream.value)
