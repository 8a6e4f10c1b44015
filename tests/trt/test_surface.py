"""What each version of TensorRT has, read off its own binding, and that the reading is right."""

from __future__ import annotations

import pytest
from trt.signature import Parameter, Signature, bind, signatures
from trt.surface import VERSIONS, Surface, Version

_10_3, _10_16, _11_4, _RTX = (str(version) for version in VERSIONS)

# name -> the versions that have it
HAS = {
    "BuilderFlag.FP16": (_10_3, _10_16),
    "BuilderFlag.BF16": (_10_3, _10_16),
    "BuilderFlag.TF32": (_10_3, _10_16, _11_4, _RTX),
    "BuilderFlag.STRIP_PLAN": (_10_3, _10_16, _11_4, _RTX),
    "BuilderFlag.WEIGHT_STREAMING": (_10_3, _10_16, _11_4, _RTX),
    "BuilderFlag.REQUIRE_USER_ALLOCATION": (_RTX,),
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": (_10_3, _10_16, _11_4, _RTX),
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": (_10_3, _10_16),
    "Builder.platform_has_fast_fp16": (_10_3, _10_16),
    "Builder.build_engine_with_config": (_10_16, _11_4),
    "HardwareCompatibilityLevel.AMPERE_PLUS": (_10_3, _10_16, _11_4, _RTX),
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": (_10_16, _11_4, _RTX),
    "IBuilderConfig.tiling_optimization_level": (_10_16, _11_4, _RTX),
    "IBuilderConfig.set_compute_capability": (_RTX,),
    "IBuilderConfig.progress_monitor": (_10_3, _10_16, _11_4, _RTX),
    "ICudaEngine.device_memory_size": (_10_3, _10_16),
    "ICudaEngine.device_memory_size_v2": (_10_3, _10_16, _11_4, _RTX),
    "ICudaEngine.create_execution_context_without_device_memory": (_10_3, _10_16),
    "ICudaEngine.create_runtime_config": (_10_16, _11_4, _RTX),
    "IExecutionContext.execute_async_v3": (_10_3, _10_16, _11_4, _RTX),
    "IExecutionContext.is_stream_capturable": (_RTX,),
    "IAttention.decomposable": (_10_16, _11_4, _RTX),
    "IRuntimeCache": (_RTX,),
    "IInt8Calibrator": (_10_3, _10_16),
    "DataType.FP4": (_10_16, _11_4, _RTX),
    "float32": (_10_3, _10_16, _11_4, _RTX),
    "volume": (_10_3, _10_16, _11_4, _RTX),
}


@pytest.mark.parametrize("name", HAS)
def test_each_version_has_what_it_is_known_to_have(name: str, surfaces: dict[str, Surface]) -> None:
    assert tuple(version for version, surface in surfaces.items() if surface.has(name)) == HAS[name]


def test_versions_are_what_was_asked_for(version: Version, surface: Surface) -> None:
    assert (surface.module, surface.version) == (version.module, version.version)
    assert len(surface.classes) > 150


def test_every_function_has_a_signature(surface: Surface) -> None:
    without = [
        f"{name}.{key}"
        for name, described in surface.classes.items()
        for key, member in described.members.items()
        if member.kind in ("method", "static") and not member.signatures
    ]
    assert without == []


def test_signatures_are_the_real_ones(surface: Surface) -> None:
    def read(name: str, key: str) -> list[str]:
        found = surface.find(name, key)
        assert found is not None
        return [str(signature).replace("typing.SupportsInt", "int") for signature in found[1].signatures]

    assert read("Builder", "create_network") == ["(flags: int = 0) -> INetworkDefinition"]
    assert read("IOptimizationProfile", "set_shape") == ["(input: str, min: Dims, opt: Dims, max: Dims) -> None"]
    assert read("IExecutionContext", "execute_async_v3") == ["(stream_handle: int) -> bool"]
    assert read("IExecutionContext", "set_device_memory") == ["(memory: int, size: int) -> None"]
    assert read("IExecutionContext", "set_input_shape") == [
        f"(name: str, shape: {kind}) -> bool" for kind in ("tuple", "list", "Dims")
    ]
    strategy = "<ExecutionContextAllocationStrategy.STATIC: 0>"
    first = f"(strategy: ExecutionContextAllocationStrategy = {strategy}) -> IExecutionContext"
    assert read("ICudaEngine", "create_execution_context")[0] == first


def test_properties_know_whether_they_can_be_written(surface: Surface) -> None:
    def writable(name: str, key: str) -> bool:
        return surface.classes[name].members[key].writable

    assert not writable("ICudaEngine", "device_memory_size_v2")
    assert writable("ICudaEngine", "weight_streaming_budget_v2")
    assert writable("IBuilderConfig", "builder_optimization_level")
    assert writable("ITensor", "dtype") is (surface.module == "tensorrt" and surface.release < (11,))


def test_enumerations_and_their_other_names(surface: Surface) -> None:
    assert surface.constants["float16"] == ("DataType", "HALF")
    assert surface.classes["ILogger.Severity"].values["ERROR"] == 1
    assert surface.classes["Logger"].members["Severity"].target == "ILogger.Severity"
    assert surface.find("Logger", "WARNING") is not None


# -- reading and binding, on signatures made up

DOC = """go(*args, **kwargs)
Overloaded function.

1. go(self: tensorrt_bindings.tensorrt.A, sizes: Dict[str, List[int]], kind: tensorrt_bindings.tensorrt.K = <K.X: 0>) -> None

    Something (with: brackets) -> and an arrow.

2. go(self: tensorrt_rtx_bindings.tensorrt_rtx.A, work: Callable[[int], str], arg1: typing.SupportsInt) -> nvinfer1::v_1_0::B
"""


def test_a_docstring_is_read() -> None:
    first, second = signatures(DOC, method=True)
    assert str(first) == "(sizes: Dict[str, List[int]], kind: K = <K.X: 0>) -> None"
    assert str(second) == "(work: Callable[[int], str], arg1: typing.SupportsInt) -> B"
    assert signatures("volume(iterable, start=1)", method=False) == (
        Signature(
            parameters=(Parameter(name="iterable", type="object"), Parameter(name="start", type="object", default="1")),
            returns="object",
        ),
    )


@pytest.mark.parametrize(
    ("kind", "fit", "misfit"),
    [
        ("int", (1, True), (1.0, "1", None)),
        ("typing.SupportsInt", (1,), (1.5, b"1")),
        ("float", (1, 1.5), ("1", None)),
        ("str", ("a",), (b"a", 1, None)),
        ("bool", (True,), (1, None)),
        ("buffer", (b"a", bytearray(2), memoryview(b"")), ("a", [1], 1)),
        ("List[int]", ([1, 2], (1,), range(3), []), (["a"], "12", 5)),
        ("tuple", ((1,),), ([1],)),
        ("Tuple[int, str]", ((1, "a"),), ((1,), (1, 2))),
        ("Optional[str]", ("a", None), (1,)),
        ("str | None", ("a", None), (1,)),
        ("Dims", ((1, 2), [3], range(2)), ((1.5,), "ab", 3)),
        ("Callable[[int], str]", (len,), (1,)),
        ("Known", (KeyError("an instance"),), (1, None)),
        ("std::vector<unknown>", (1, None), ()),
    ],
)
def test_arguments_are_held_against_their_types(kind: str, fit: tuple[object, ...], misfit: tuple[object, ...]) -> None:
    def instance(value: object, name: str) -> bool | None:
        return {"Known": isinstance(value, KeyError), "Dims": False}.get(name)

    signature = Signature(parameters=(Parameter(name="x", type=kind),), returns="None")
    for value in fit:
        assert bind(signature, (value,), {}, instance) == {"x": value}
    for value in misfit:
        assert isinstance(bind(signature, (value,), {}, instance), str)


def test_arguments_are_bound_by_place_and_name() -> None:
    def nothing(value: object, name: str) -> None:
        return None

    signature = signatures("go(self: A, a: int, b: str = 'x', arg2: int = 0) -> None", method=True)[0]
    assert bind(signature, (1,), {"b": "y"}, nothing) == {"a": 1, "b": "y"}
    assert bind(signature, (), {"b": "y"}, nothing) == "a is missing"
    assert bind(signature, (1,), {"a": 1}, nothing) == "keyword a"
    assert bind(signature, (1,), {"c": 1}, nothing) == "keyword c"
    assert bind(signature, (1,), {"arg2": 1}, nothing) == "keyword arg2"  # a positional one has no name in the real one
    assert bind(signature, (1, "a", 2, 3), {}, nothing) == "4 arguments are too many"
