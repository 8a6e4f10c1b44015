"""The strict TensorRT's engines: which plans open where, what they take of the memory, and what TensorRT-RTX adds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from trt import networks
from trt.fake_tensorrt import fake_tensorrt
from trt.networks import Draft
from trt.rig import SHAPE, Run
from trt.streams import Gpus
from trt.strict import Strictness
from trt.surface import Surface


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return networks.scaled(tmp_path / "m.onnx")


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


def test_host_code_is_allowed_for_what_needs_it_alone(surface: Surface, path: Path) -> None:
    def opened(*flags: str, allowed: bool, version: str = surface.version) -> bool:
        draft = Draft(fake_tensorrt(surface, Gpus()), path)
        for flag in flags:
            draft.config.set_flag(getattr(draft.trt.BuilderFlag, flag))
        data = draft.build()
        if data is None:
            return False
        runtime = fake_tensorrt(dataclasses.replace(surface, version=version), Gpus()).Runtime
        reader = runtime(draft.log.of(runtime._fake))
        reader.engine_host_code_allowed = allowed
        return reader.deserialize_cuda_engine(data) is not None

    with pytest.raises(Strictness, match="needs none"):
        opened(allowed=True)
    if surface.module == "tensorrt_rtx":
        assert not opened("VERSION_COMPATIBLE", allowed=True)
        return
    assert opened("VERSION_COMPATIBLE", allowed=True)
    assert not opened("VERSION_COMPATIBLE", allowed=False)
    assert opened("VERSION_COMPATIBLE", allowed=True, version="99.0")
    assert not opened("VERSION_COMPATIBLE", allowed=True, version="9.0")
    assert not opened(allowed=False, version="99.0")
    assert opened("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", allowed=False)


def test_a_stripped_plan_gets_its_weights_back(surface: Surface, tmp_path: Path) -> None:
    path = networks.scaled(tmp_path / "m.onnx", external=True)
    whole = Draft(fake_tensorrt(surface, Gpus()), path)
    with pytest.raises(TypeError, match="nullptr"):
        whole.trt.Refitter(whole.open(), whole.logger)
    run = Run(surface, path, flags=("STRIP_PLAN", "REFIT_IDENTICAL"))
    run.feed({"sample": 1, "shift": 1})
    with pytest.raises(Strictness, match="refit it"):
        run.execute()
    refitter = run.trt.Refitter(run.engine, run.draft.logger)
    parser = run.trt.OnnxParserRefitter(refitter, run.draft.logger)
    assert not refitter.refit_cuda_engine()
    assert refitter.get_missing_weights() == ["weight"]
    assert not parser.refit_from_file(str(tmp_path / "none.onnx"))
    assert parser.num_errors == 1
    assert parser.refit_from_file(str(path))
    assert refitter.refit_cuda_engine()
    assert run.execute()
    out = run.fetch()
    run.wait()
    assert (out == 4).all()


def test_refitting_with_other_weights_is_caught(surface: Surface, path: Path, tmp_path: Path) -> None:
    run = Run(surface, path, ready=False, flags=("STRIP_PLAN", "REFIT_IDENTICAL"))
    refitter = run.trt.Refitter(run.engine, run.draft.logger)
    parser = run.trt.OnnxParserRefitter(refitter, run.draft.logger)
    assert parser.refit_from_file(str(networks.scaled(tmp_path / "o.onnx", factor=4)))
    with pytest.raises(Strictness, match="other weights"):
        refitter.refit_cuda_engine()


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
