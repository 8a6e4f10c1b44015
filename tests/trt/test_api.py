"""The TensorRT backend's sources, held against the surface of each version: nothing that it lacks, and all of the rest run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
from places import ROOT
from trt import networks, refitted
from trt.calls import Use, absent, unexercised, uses_in
from trt.fake_tensorrt import fake_tensorrt
from trt.machine import Machine
from trt.networks import Draft
from trt.streams import Gpus
from trt.surface import VERSIONS, Surface

from sdruntime.backends.base.engine import EngineOptions, Shared
from sdruntime.backends.trt.engine import open_engine
from sdruntime.backends.trt.worker import plan_from_onnx
from sdruntime.bundle.bundle import Bundle, write_bundle
from sdruntime.bundle.manifest import Precision
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import EngineError

BACKEND = ROOT / "runtime" / "sdruntime" / "backends" / "trt"
_10_3, _10_16, _11_4, _RTX = (str(version) for version in VERSIONS)

# What some version lacks, and what the backend asks before it uses it.
CONDITIONAL = {
    **dict.fromkeys(
        ("ComputeCapability", "num_compute_capabilities", "set_compute_capability"),
        "Flavour.ahead: TensorRT-RTX",
    ),
    **dict.fromkeys(
        ("create_runtime_config", "set_execution_context_allocation_strategy", "create_runtime_cache", "deserialize"),
        "Flavour.ahead: TensorRT-RTX, whose kernels are kept",
    ),
    "set_runtime_cache": "the same",
    **dict.fromkeys(("IAttentionInputLayer", "attention", "decomposable"), "LayerType.ATTENTION_INPUT is there"),
    **dict.fromkeys(
        ("SAME_COMPUTE_CAPABILITY", "TilingOptimizationLevel", "tiling_optimization_level"),
        "build.read_options lets the option pass",
    ),
}
# What a version has too, and the backend does not use with it.
_FOR_RTX = {"create_runtime_config", "set_execution_context_allocation_strategy"}
RUN_ELSEWHERE = {
    _10_3: set(),
    _10_16: _FOR_RTX,
    _11_4: _FOR_RTX,
    _RTX: {
        *("HardwareCompatibilityLevel", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY", "hardware_compatibility_level"),
        *("VERSION_COMPATIBLE", "engine_host_code_allowed"),
        *("create_timing_cache", "set_timing_cache"),
        *("REFIT", "Weights", "get_missing_weights", "mark_weights_refittable", "set_named_weights"),
    },
}
# Names that the backend uses of something else, whose attributes happen to be TensorRT's too.
OTHERS = {"precision", "dtype", "itemsize", "name", "read", "engine", "size"}

SAMPLE = """
import numpy as np
TABLE = {"ICudaEngine.get_engine_stat": (10, 13)}

class Progress(trt.IProgressMonitor):
    def step_complete(self, phase_name, step):
        return self.log(step)

def build(trt, network, stream):
    config = trt.Builder(None).create_builder_config()
    config.builder_optimization_level = 3
    if hasattr(config, "tiling_optimization_level"):
        config.tiling_optimization_level = trt.TilingOptimizationLevel.FAST
    flag = getattr(trt.BuilderFlag, "FP16", None)
    engine = trt.Runtime(None).deserialize_cuda_engine(b"")
    engine.get_engine_stat()
    stream.read(), np.float32(network.num_inputs)
    return trt.INetworkDefinition
"""


def lines(found: list[Use]) -> list[str]:
    return [str(use).partition(":")[2].strip() for use in found]


def test_uses_are_found(surfaces: dict[str, Surface]) -> None:
    """`read` is one that might be: deserialize_cuda_engine also takes an IStreamReader, which has it."""
    assert lines(uses_in({"sample.py": SAMPLE}, list(surfaces.values()))) == [
        "5: IProgressMonitor (get)",
        "6: step_complete (override)",
        "10: Builder (call)",
        "10: create_builder_config (call)",
        "11: builder_optimization_level (set)",
        "12: tiling_optimization_level (get)",
        "13: FAST (get)",
        "13: TilingOptimizationLevel (get)",
        "13: tiling_optimization_level (set)",
        "14: BuilderFlag (get)",
        "14: FP16 (get)",
        "15: Runtime (call)",
        "15: deserialize_cuda_engine (call)",
        "16: get_engine_stat (call)",
        "17: num_inputs (get)",
        "17: read (call)",
        "18: INetworkDefinition (get)",
    ]


@pytest.mark.parametrize(
    ("planted", "lacking"),
    [
        ("trt.BuilderFlag.FP16", (_11_4, _RTX)),
        ("trt.Runtime(None).deserialize_cuda_engine(b'').device_memory_size", (_11_4, _RTX)),
        ("trt.IBuilderConfig.set_compute_capability(1, 2)", (_10_3, _10_16, _11_4)),
        ("trt.Builder(None).build_engine_with_config(network, config)", (_10_3, _RTX)),
        ("trt.Builder(None).create_builder_config().l2_limit_for_tiling = 1", (_10_3,)),
        ("trt.ICudaEngine.device_memory_size_v2", ()),
        ("json.float32", ()),  # of another module
    ],
)
def test_a_planted_use_is_absent_where_it_is(planted: str, lacking: tuple[str, ...], surfaces: dict[str, Surface]) -> None:
    found = uses_in({"planted.py": f"import json\n{planted}\n"}, list(surfaces.values()))
    assert tuple(version for version, surface in surfaces.items() if absent(found, surface)) == lacking


def test_a_guarded_use_may_be_absent(surfaces: dict[str, Surface]) -> None:
    oldest = surfaces[_10_3]
    assert absent(uses_in({"sample.py": SAMPLE}, list(surfaces.values())), oldest) == []
    bare = SAMPLE.replace('if hasattr(config, "tiling_optimization_level"):', "if config:")
    names = [use.name for use in absent(uses_in({"sample.py": bare}, list(surfaces.values())), oldest)]
    assert names == ["FAST", "TilingOptimizationLevel", "tiling_optimization_level"]


def test_what_no_test_runs_is_told(surface: Surface, surfaces: dict[str, Surface], tmp_path: Path) -> None:
    source = "def build(trt, network):\n    network.num_layers\n    trt.Builder(None).create_network(0)\n"
    found = uses_in({"sample.py": source}, list(surfaces.values()))
    trt: Any = fake_tensorrt(surface, Gpus())
    Draft(trt, networks.scaled(tmp_path / "m.onnx"))
    assert lines(unexercised(found, surface, trt.used)) == ["2: num_layers (get)"]
    assert unexercised(found, surface, trt.used | {("INetworkDefinition", "num_layers")}) == []


# -- the backend


@pytest.fixture(scope="module")
def backend(surfaces: dict[str, Surface]) -> list[Use]:
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(BACKEND.glob("*.py"))}
    found = uses_in(sources, list(surfaces.values()))
    assert len(found) > 50
    return [use for use in found if use.name not in OTHERS]


def test_the_backend_uses_nothing_that_a_version_lacks(backend: list[Use], surface: Surface) -> None:
    assert [str(use) for use in absent(backend, surface) if use.name not in CONDITIONAL] == []


def test_every_condition_is_needed(backend: list[Use], surfaces: dict[str, Surface]) -> None:
    lacking = {use.name for surface in surfaces.values() for use in absent(backend, surface)}
    assert set(CONDITIONAL) - lacking == set()


def small_bundle(folder: Path, precision: Precision = "fp32") -> Bundle:
    """`bundles.make_bundle` with a VAE decoder that TensorRT can parse: three channels, each cell twice along both axes."""
    made = bundles.make_bundle(folder)
    component = made.manifest.components["vae_decoder"]
    networks.decoder(folder / component.onnx)
    write_bundle(
        folder,
        model=made.manifest.model,
        precision=precision,
        components=made.manifest.components,
        provenance={"made": "by hand"},
    )
    return Bundle.open(folder)


def built_and_run(here: Machine, folder: Path, target: str | None = None, session: str = "", **options: str) -> None:
    """Build the decoder with these options, open it and run it once."""
    asked = BuildRequest(
        backend=here.backend, components=("vae_decoder",), size="64x64:64x64:128x128", target=target, options=options
    )
    for _ in build_engines(folder, asked):
        pass
    bundle, shared = Bundle.open(folder), Shared()
    spec = bundle.manifest.engines[-1]
    with contextlib.closing(shared):
        settings = EngineOptions(session={session: "true"} if session else {}, memory=1 << 28)
        with open_engine(bundle, spec, settings, shared) as engine:
            out = engine({"latent_sample": np.ones((1, 4, 8, 8), np.float32)})["sample"]
    assert (out == 4).all()


def test_every_use_of_the_backend_is_run(
    backend: list[Use], machine: Callable[..., Machine], surface: Surface, tmp_path: Path
) -> None:
    here = machine(surface)
    rtx = surface.module == "tensorrt_rtx"
    folder = small_bundle(tmp_path / "bundle").folder
    built_and_run(here, folder, optimization_level="4", workspace="64M")
    built_and_run(here, small_bundle(tmp_path / "half", "fp16").folder)  # which is looked into
    built_and_run(here, folder, strip="true")
    built_and_run(here, folder, weight_streaming="true")
    if not rtx:
        refittable = refitted.built(here, refitted.bundle_of(tmp_path / "refittable").folder, lora="true")
        assert refitted.run(refittable, {"layer.weight": refitted.one(5)}) == 4 * 5 + 1
        built_and_run(here, folder, "ampere+")
        built_and_run(here, folder, "current", "engine_host_code", version_compatible="true")
    if surface.has("HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY") and not rtx:
        built_and_run(here, folder, same_compute_capability="true")
    if surface.has("TilingOptimizationLevel"):
        built_and_run(here, folder, tiling="fast")

    job = {
        "backend": here.backend,
        "component": "vae_decoder",
        "target": "sm86",
        "precision": "fp32",
        "options": {},
        "optional_inputs": [],
        "profiles": [{}],
    }
    job["onnx"] = str(networks.foreign(tmp_path / "foreign.onnx"))
    with pytest.raises(EngineError, match=r"node fused \(Fused\)"):
        plan_from_onnx(job, here.trt, lambda stage: True)
    job["profiles"] = [{"batch": (1, 1, 1), "height": (8, 8, 8), "width": (8, 8, 8)}]
    latents = {"inputs": {"latent_sample": ["batch", 4, "height", "width"]}, "optional_inputs": ["latent_sample"]}
    decoder = networks.decoder(tmp_path / "decoder.onnx")
    assert plan_from_onnx(job | latents | {"onnx": str(decoder)}, here.trt, lambda stage: True)[0] is not None
    if surface.has("IAttention"):
        job |= {"onnx": str(networks.attention(tmp_path / "attention.onnx")), "inputs": {"sample": networks.CELLS}}
        assert plan_from_onnx(job, here.trt, lambda stage: True)[0] is not None
    assert {use.name for use in unexercised(backend, surface, here.trt.used)} == RUN_ELSEWHERE[
        f"{surface.module} {surface.version}"
    ]
