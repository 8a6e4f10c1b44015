"""The strict TensorRT's execution context: what it computes, and that each thing one can forget is caught."""

from __future__ import annotations

import json
from ctypes import byref, c_int, c_ulonglong, c_void_p
from pathlib import Path

import numpy as np
import pytest
from trt import networks
from trt.networks import BEST, HIGH, LOW
from trt.rig import SHAPE, Run
from trt.strict import Strictness
from trt.surface import Surface


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
