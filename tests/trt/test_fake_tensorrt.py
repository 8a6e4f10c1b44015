"""The strict TensorRT up to a serialised engine: it has what its version has, and takes what its version takes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trt import networks
from trt.fake_tensorrt import fake_tensorrt
from trt.machine import Machine
from trt.networks import Draft
from trt.streams import Gpus
from trt.strict import BadCall, NotModelled, Strictness
from trt.surface import Surface

Make = Callable[..., Machine]


@pytest.fixture
def trt(surface: Surface) -> Any:
    return fake_tensorrt(surface, Gpus())


@pytest.fixture
def draft(trt: Any, tmp_path: Path) -> Draft:
    return Draft(trt, networks.scaled(tmp_path / "m.onnx"))


# -- members and calls


def test_what_a_version_lacks_is_an_attribute_error(trt: Any, surface: Surface) -> None:
    assert hasattr(trt.BuilderFlag, "FP16") is surface.has("BuilderFlag.FP16")
    assert hasattr(trt, "IRuntimeCache") is surface.has("IRuntimeCache")
    with pytest.raises(AttributeError, match="has no attribute 'Bilder'"):
        _ = trt.Bilder
    with pytest.raises(AttributeError, match="has no attribute 'FP17'"):
        _ = trt.BuilderFlag.FP17
    with pytest.raises(AttributeError, match="has no attribute 'build'"):
        _ = trt.Builder.build


def test_nothing_can_be_set_that_is_not_there(draft: Draft) -> None:
    with pytest.raises(AttributeError):
        draft.config.max_workspace_size = 1
    with pytest.raises(AttributeError):
        draft.network.num_layers = 1


def test_wrong_calls_are_caught_in_each_version(draft: Draft) -> None:
    trt, config, builder = draft.trt, draft.config, draft.builder
    profile = builder.create_optimization_profile()
    for call in (
        lambda: builder.create_network(1, 2),  # too many
        lambda: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),  # too few
        lambda: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size=1),  # another name
        lambda: config.set_memory_pool_limit(trt.BuilderFlag.TF32, 1),  # another enumeration
        lambda: config.set_memory_pool_limit(0, 1),  # an int is no enumeration
        lambda: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1.5),
        lambda: config.set_flag("TF32"),
        lambda: draft.parser.parse_from_file(Path("m.onnx")),  # a path is no str
        lambda: profile.set_shape("sample", "min", (1,), (1,)),
        lambda: builder.build_serialized_network(config, draft.network),  # swapped
        lambda: trt.OnnxParser(draft.network),
        lambda: trt.Runtime(trt),
        lambda: setattr(config, "builder_optimization_level", "3"),
    ):
        with pytest.raises(BadCall, match="was called wrongly"):
            call()
    with pytest.raises(TypeError):  # as the real one
        builder.create_network("flags")


def test_what_is_not_modelled_says_so(draft: Draft) -> None:
    with pytest.raises(NotModelled, match=r"IBuilderConfig.reset\(\) is not modelled"):
        draft.config.reset()
    with pytest.raises(NotModelled, match=r"volume\(\)"):
        draft.trt.volume((1, 2))
    with pytest.raises(TypeError, match="No constructor"):
        draft.trt.ICudaEngine()


def test_uses_are_recorded(draft: Draft) -> None:
    draft.build()
    used = draft.trt.used
    assert {
        ("Builder", "create_network"),
        ("ITensor", "name"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ("Builder", "build_serialized_network"),
    } <= used
    assert ("BuilderFlag", "TF32") not in used
    assert draft.trt.BuilderFlag.TF32.name == "TF32"
    assert ("BuilderFlag", "TF32") in used


def test_a_subclass_must_call_the_constructor(trt: Any) -> None:
    class Logger(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called when overriding"):
        Logger()


def test_enumerations_are_as_pybind_makes_them(trt: Any) -> None:
    flag = trt.DataType.HALF
    assert (int(flag), flag.name, str(flag), repr(flag)) == (1, "HALF", "DataType.HALF", "<DataType.HALF: 1>")
    assert flag == trt.float16
    assert flag != 1
    assert flag.itemsize == 2
    assert {flag: "half"}[trt.float16] == "half"
    assert trt.Logger.ERROR == trt.ILogger.Severity.ERROR
    assert list(trt.TensorIOMode.__members__) == ["NONE", "INPUT", "OUTPUT"]


def test_dims_are_no_tuple(draft: Draft) -> None:
    shape = draft.network.get_input(0).shape
    assert tuple(shape) == (-1, 2, -1, -1)
    assert shape == (-1, 2, -1, -1)
    assert (len(shape), shape[-1], shape[1:3]) == (4, -1, (2, -1))
    with pytest.raises(BadCall):  # two Dims cannot be compared
        _ = shape == draft.network.get_input(1).shape


# -- parser and network


def test_a_network_is_read(draft: Draft) -> None:
    network = draft.network
    assert draft.parsed
    assert [network.get_input(k).name for k in range(network.num_inputs)] == ["sample", "shift"]
    assert network.get_output(0).dtype == draft.trt.float32
    assert [network.get_input(0).get_dimension_name(k) for k in range(4)] == ["batch", None, "height", "width"]
    assert [network.get_layer(k).name for k in range(network.num_layers)] == ["mul", "add"]
    assert network.get_input(2) is None
    assert len(draft.log.errors) == 1


@pytest.mark.parametrize("fault", ["missing", "garbage", "foreign", "external"])
def test_what_cannot_be_parsed_leaves_errors(trt: Any, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "m.onnx"
    if fault == "garbage":
        path.write_bytes(b"unet")
    elif fault == "foreign":
        networks.foreign(path)
    elif fault == "external":
        networks.scaled(path, external=True)
        (tmp_path / "m.onnx.data").unlink()
    draft = Draft(trt, path, profiles=())
    assert not draft.parsed
    assert draft.parser.num_errors == 1
    error = draft.parser.get_error(0)
    code = {"missing": "INVALID_VALUE", "garbage": "MODEL_DESERIALIZE_FAILED", "foreign": "INVALID_NODE"}
    assert error.code() == getattr(trt.ErrorCode, code.get(fault, "INVALID_GRAPH"))
    if fault == "foreign":
        assert (error.node(), error.node_name(), error.node_operator()) == (0, "fused", "Fused")
    assert draft.build() is None
    draft.parser.clear_errors()
    assert draft.parser.num_errors == 0


def test_a_parser_needs_its_network(trt: Any, draft: Draft) -> None:
    parser = trt.OnnxParser(
        draft.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)), draft.logger
    )
    with pytest.raises(Strictness, match="deleted before its parser"):
        parser.parse(b"")


def test_tensorrt_10_is_asked_for_strong_typing(trt: Any, surface: Surface, draft: Draft) -> None:
    if surface.module == "tensorrt" and surface.release < (11,):
        with pytest.raises(Strictness, match="STRONGLY_TYPED"):
            draft.builder.create_network()
    else:
        assert draft.builder.create_network() is not None
    assert draft.builder.create_network(1 << 30) is None


def test_attention_must_be_decomposable(trt: Any, surface: Surface, tmp_path: Path) -> None:
    draft = Draft(trt, networks.attention(tmp_path / "m.onnx"))
    assert draft.parsed is surface.has("IAttention")
    assert draft.build() is None
    if not draft.parsed:
        assert draft.parser.get_error(0).node_operator() == "Attention"
        return
    assert "is_decomposable" in draft.log.errors[-1]
    for k in range(draft.network.num_layers):
        layer = draft.network.get_layer(k)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    assert draft.build() is not None


# -- profiles and building


def test_an_engine_is_bytes_that_hold_the_weights_and_no_path(trt: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = Draft(trt, networks.scaled(tmp_path / "m.onnx")).build()
    other = Draft(trt, networks.scaled(tmp_path / "a" / "n.onnx", external=True)).build()
    assert first.nbytes == len(bytes(first)) > 500
    assert len(bytes(other)) == other.nbytes
    assert str(tmp_path).encode() not in bytes(other)
    assert io.BytesIO().write(memoryview(first)) == first.nbytes
    for call in (lambda: len(first), lambda: first[0], lambda: list(first)):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(AttributeError):
        first.hex()


def test_a_dynamic_network_needs_a_profile_that_fits(trt: Any, tmp_path: Path) -> None:
    path = networks.scaled(tmp_path / "m.onnx")
    assert Draft(trt, path, profiles=()).build() is None
    assert Draft(trt, path, profiles=(((1, 2, 8),) * 3,)).build() is None  # another rank
    assert Draft(trt, path, profiles=(((1, 3, 8, 8),) * 3,)).build() is None  # another channel
    draft = Draft(trt, path, profiles=())
    profile = draft.builder.create_optimization_profile()
    profile.set_shape("sample", (1, 2, 8, 8), (1, 2, 8, 8), (1, 2, 8, 8))
    assert draft.config.add_optimization_profile(profile) == 0
    assert draft.build() is None
    assert "shift is missing dimensions in profile 0" in draft.log.errors[-1]
    profile.set_shape("shift", (1, 2, 8, 8), (1, 2, 8, 8), (1, 2, 8, 16))
    with pytest.raises(Strictness, match=r"dimension width is \(8, 8, 16\) in shift and \(8, 8, 8\) elsewhere"):
        draft.build()


def test_a_profile_out_of_order_is_refused_when_it_is_added(draft: Draft) -> None:
    profile = draft.builder.create_optimization_profile()
    profile.set_shape("sample", (2, 2, 8, 8), (1, 2, 8, 8), (2, 2, 8, 8))
    assert not profile
    assert draft.config.add_optimization_profile(profile) == -1
    assert [tuple(shape) for shape in profile.get_shape("sample")] == [(2, 2, 8, 8), (1, 2, 8, 8), (2, 2, 8, 8)]


class Progress:
    """Events of a build; answers False at the step `stop`, or raises."""

    def __init__(self, stop: int = 99, error: type[BaseException] | None = None) -> None:
        self.events: list[Any] = []
        self.stop, self.error = stop, error

    def of(self, trt: Any) -> Any:
        progress = self

        class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                progress.events.append(("start", phase_name, parent_phase, num_steps))

            def step_complete(self, phase_name: str, step: int) -> bool:
                progress.events.append(("step", phase_name, step))
                steps = sum(event[0] == "step" for event in progress.events)
                if steps == progress.stop and progress.error is not None:
                    raise progress.error
                return steps < progress.stop

            def phase_finish(self, phase_name: str) -> None:
                progress.events.append(("finish", phase_name))

        return Monitor()


def test_a_monitor_sees_phases_and_their_steps(draft: Draft) -> None:
    progress = Progress()
    draft.config.progress_monitor = progress.of(draft.trt)
    assert draft.build() is not None
    assert progress.events[0] == ("start", "Building engine", None, 3)
    assert progress.events[1] == ("start", "Cloning network graph", "Building engine", 2)
    assert progress.events[-1] == ("finish", "Building engine")
    counts = {word: sum(event[0] == word for event in progress.events) for word in ("start", "step", "finish")}
    assert counts == {"start": 4, "step": 10, "finish": 4}


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_monitor_cancels_and_what_it_raises_is_lost(
    draft: Draft, error: type[BaseException] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(4, error)
    draft.config.progress_monitor = progress.of(draft.trt)
    assert draft.build() is None
    assert "BuildCanceled" in draft.log.errors[-1]
    assert [event[0] for event in progress.events[-2:]] == ["finish", "finish"]
    assert ("Exception caught in step_complete()" in capsys.readouterr().err) is (error is not None)


def test_a_timing_cache_learns_and_knows_its_gpu(draft: Draft, surface: Surface, tmp_path: Path) -> None:
    if surface.module == "tensorrt_rtx":
        with pytest.warns(DeprecationWarning, match="no-ops"):
            draft.config.set_timing_cache(draft.config.create_timing_cache(b""), False)
        return
    cache = draft.config.create_timing_cache(b"")
    assert draft.config.set_timing_cache(cache, False)
    before = bytes(cache.serialize())
    draft.build()
    after = bytes(draft.config.get_timing_cache().serialize())
    assert len(after) > len(before)
    other = Draft(fake_tensorrt(surface, Gpus(name="Another")), networks.scaled(tmp_path / "o.onnx"))
    foreign = other.config.create_timing_cache(after)
    assert not other.config.set_timing_cache(foreign, False)
    assert other.config.set_timing_cache(foreign, ignore_mismatch=True)
    empty = bytes(other.config.create_timing_cache(b"").serialize())
    assert bytes(other.config.create_timing_cache(b"garbage").serialize()) == empty


def test_settings_are_kept(draft: Draft) -> None:
    trt, config = draft.trt, draft.config
    config.builder_optimization_level = 7
    assert config.builder_optimization_level == 5
    config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    assert config.get_flag(trt.BuilderFlag.STRIP_PLAN)
    config.clear_flag(trt.BuilderFlag.STRIP_PLAN)
    assert not config.get_flag(trt.BuilderFlag.STRIP_PLAN)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 20)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 20
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED


def test_failures_are_planted(draft: Draft) -> None:
    draft.trt.fail_next("Builder.build_serialized_network")
    assert draft.build() is None
    assert draft.build() is not None
    with pytest.raises(KeyError):
        draft.trt.fail_next("Builder.build")


def test_tensorrt_needs_a_gpu_and_tensorrt_rtx_does_not(surface: Surface, tmp_path: Path) -> None:
    trt = fake_tensorrt(surface, Gpus(devices=0))
    path = networks.scaled(tmp_path / "m.onnx")
    if surface.module == "tensorrt":
        with pytest.raises(TypeError, match="nullptr"):
            Draft(trt, path)
        return
    draft = Draft(trt, path)
    assert draft.build() is not None
    assert draft.open() is None  # but nothing runs


@pytest.mark.parametrize(
    ("flags", "devices", "built"),
    [
        (("REQUIRE_USER_ALLOCATION",), 0, True),
        (("WEIGHT_STREAMING",), 0, True),
        (("REQUIRE_USER_ALLOCATION", "WEIGHT_STREAMING"), 1, False),
        (("STRIP_PLAN", "REFIT_IDENTICAL"), 0, False),
        (("STRIP_PLAN", "REFIT_IDENTICAL"), 1, True),
        (("VERSION_COMPATIBLE",), 1, False),
    ],
)
def test_flags_that_tensorrt_rtx_refuses(rtx: Surface, tmp_path: Path, flags: tuple[str, ...], devices: int, built: bool) -> None:
    draft = Draft(fake_tensorrt(rtx, Gpus(devices=devices)), networks.scaled(tmp_path / "m.onnx"))
    for flag in flags:
        draft.config.set_flag(getattr(draft.trt.BuilderFlag, flag))
    assert (draft.build() is not None) is built


def test_compute_capabilities_are_counted_first(draft: Draft, surface: Surface) -> None:
    if surface.module == "tensorrt":
        assert not hasattr(draft.config, "num_compute_capabilities")
        return
    config, capability = draft.config, draft.trt.ComputeCapability
    assert not config.set_compute_capability(capability.SM86, 0)
    config.num_compute_capabilities = 2
    assert config.set_compute_capability(capability.SM86, 0)
    assert draft.build() is None  # the second one is NONE
    assert config.set_compute_capability(capability.SM89, 1)
    assert b'"capabilities": [86, 89]' in bytes(draft.build())


def test_a_machine_is_what_the_code_under_test_sees(machine: Make, surface: Surface) -> None:
    import ctypes
    import importlib

    from sdruntime.system import cuda

    here = machine(surface, name="Fake", devices=2)
    assert importlib.import_module(surface.module).__version__ == surface.version
    other = {"tensorrt": "tensorrt_rtx", "tensorrt_rtx": "tensorrt"}[surface.module]
    with pytest.raises(ImportError):
        importlib.import_module(other)
    assert [device.name for device in cuda.devices()] == ["Fake", "Fake"]
    assert ctypes.CDLL("libcuda.so.1") is here.driver
    assert sys.modules[surface.module] is here.trt
    assert json.loads(json.dumps(here.gpus.leaks())) == []
