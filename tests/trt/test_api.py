"""The TensorRT backend's sources, held against the surface of each version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trt import networks
from trt.calls import absent, unexercised, uses, uses_in
from trt.fake_tensorrt import fake_tensorrt
from trt.networks import Draft
from trt.streams import Gpus
from trt.surface import VERSIONS, Surface, Version

BACKEND = Path(__file__).resolve().parents[2] / "runtime" / "sdruntime" / "backends" / "trt"
_10_3, _10_16, _11_4, _RTX = (str(version) for version in VERSIONS)

SAMPLE = """
import numpy as np
TABLE = {"ICudaEngine.get_engine_stat": (10, 13)}

def library():
    import tensorrt as trt
    return trt

class Progress(trt.IProgressMonitor):
    def step_complete(self, phase_name, step):
        return self.log(step)

def build(trt, network, engine):
    config = trt.Builder(None).create_builder_config()
    config.builder_optimization_level = 3
    if hasattr(config, "tiling_optimization_level"):
        config.tiling_optimization_level = trt.TilingOptimizationLevel.FAST
    flag = getattr(trt.BuilderFlag, "FP16", None)
    engine.get_engine_stat()
    return np.float32(network.num_inputs)
"""


def lines(source: str, surfaces: dict[str, Surface]) -> list[str]:
    return [str(use).partition(":")[2] for use in uses(source, "sample.py", list(surfaces.values()))]


def test_uses_are_found(surfaces: dict[str, Surface]) -> None:
    assert lines(SAMPLE, surfaces) == [
        "9: IProgressMonitor (get)",
        "10: step_complete (override)",
        "14: Builder (call)",
        "14: create_builder_config (call)",
        "15: builder_optimization_level (set)",
        "16: tiling_optimization_level (get)",
        "17: FAST (get)",
        "17: TilingOptimizationLevel (get)",
        "17: tiling_optimization_level (set)",
        "18: BuilderFlag (get)",
        "18: FP16 (get)",
        "19: get_engine_stat (call)",
        "20: num_inputs (get)",
    ]


@pytest.mark.parametrize(
    ("planted", "lacking"),
    [
        ("trt.BuilderFlag.FP16", (_11_4, _RTX)),
        ("engine.device_memory_size", (_11_4, _RTX)),
        ("config.set_compute_capability(1, 2)", (_10_3, _10_16, _11_4)),
        ("builder.build_engine_with_config(network, config)", (_10_3, _RTX)),
        ("config.l2_limit_for_tiling = 1", (_10_3,)),
        ("engine.device_memory_size_v2", ()),
    ],
)
def test_a_planted_use_is_absent_where_it_is(planted: str, lacking: tuple[str, ...], surfaces: dict[str, Surface]) -> None:
    found = uses(f"def planted(trt, builder, engine, network, config):\n    {planted}\n", "planted.py", list(surfaces.values()))
    assert tuple(version for version, surface in surfaces.items() if absent(found, surface)) == lacking


def test_a_guarded_use_may_be_absent(surfaces: dict[str, Surface]) -> None:
    found = uses(SAMPLE, "sample.py", list(surfaces.values()))
    assert absent(found, surfaces[_10_16]) == []
    assert absent(found, surfaces[_10_3]) == []
    bare = SAMPLE.replace('if hasattr(config, "tiling_optimization_level"):', "if config:")
    found = uses(bare, "sample.py", list(surfaces.values()))
    assert [fault.split()[4] for fault in absent(found, surfaces[_10_3])] == [
        "FAST",
        "TilingOptimizationLevel",
        "tiling_optimization_level",
    ]


def test_what_no_test_runs_is_told(surface: Surface, surfaces: dict[str, Surface], tmp_path: Path) -> None:
    source = "def build(builder, network, config):\n    network.num_layers, network.shape\n    builder.create_network(0)\n"
    found = uses(source, "sample.py", list(surfaces.values()))
    trt: Any = fake_tensorrt(surface, Gpus())
    Draft(trt, networks.scaled(tmp_path / "m.onnx"))
    told = unexercised(found, surface, trt.used, apart=("shape", "name"))
    where = f"{surface.module} {surface.version}: "
    assert told == [f"{where}no test runs sample.py:2: num_layers (get)", f"{where}name need not be set apart"]
    assert unexercised(found, surface, trt.used | {("INetworkDefinition", "num_layers")}, apart=("shape",)) == []


def test_the_backend_uses_nothing_that_a_version_lacks(version: Version, surfaces: dict[str, Surface]) -> None:
    found = uses_in(sorted(BACKEND.glob("*.py")), list(surfaces.values()))
    assert absent(found, surfaces[str(version)]) == []
