"""What only an NVIDIA GPU can show: every backend that loads generates the CPU's images on it, and leaves nothing there.

`make gpu-test`. Each check runs in a process of its own, so that a library that crashes fails its own test. REQUIRE=tensorrt
makes its absence a failure. SHAPES=BUNDLE:BUNDLE (fp32 and fp16) stands in for the export where diffusers is missing.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted import SHAPES, proved_bundle, scale, walk_job

from benchmarks.gpu import gate, tasks
from benchmarks.gpu.check import cpu_pictures, faults
from benchmarks.gpu.report import PROMPT
from sdexport.bench import diffusers as reference
from sdexport.verification.walk import Finding
from sdruntime.backends import registry
from sdruntime.backends.base.engine import EngineOptions
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import SdruntimeError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.system.cuda import devices
from sdruntime.system.events import finish
from sdruntime.system.process import run_apart

pytestmark = pytest.mark.gpu
PRECISIONS = ("fp32", "fp16")


@pytest.fixture(scope="module")
def shapes(shapes_checkpoint: Path, export: Callable[..., Path]) -> dict[str, Path]:
    """The shapes example, by precision."""
    if named := os.environ.get("SHAPES"):
        bundles = [Path(each).resolve() for each in named.split(os.pathsep)]
        return {Bundle.open(each).manifest.precision: each for each in bundles}
    if why_not := reference.missing(device="cpu"):
        pytest.fail(f"{why_not}: export the shapes example elsewhere in fp32 and fp16, and name both: SHAPES=FOLDER:FOLDER")
    return {precision: export(shapes_checkpoint, precision=precision) for precision in PRECISIONS}


@pytest.fixture(scope="module")
def by_cpu(shapes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cpu_pictures(shapes["fp32"], tmp_path_factory.mktemp("cpu"), PROMPT)


@pytest.fixture(scope="module")
def by_diffusers(shapes_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """By diffusers on the same GPU; empty where it is not there."""
    if reference.missing():
        return ""
    out = str(tmp_path_factory.mktemp("diffusers") / "pictures.npz")
    job = {"checkpoint": str(shapes_checkpoint), "prompt": PROMPT, "device": "cuda", "out": out}
    told = tasks.run("diffusers_pictures", job)
    assert "error" not in told, told["error"]
    return out


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", gate.BACKENDS)
def test_a_backend_draws_the_cpus_pictures(
    backend: str,
    precision: str,
    shapes: dict[str, Path],
    by_cpu: Path,
    by_diffusers: str,
    record_property: Callable[[str, Any], None],
) -> None:
    job = {"bundle": str(shapes[precision]), "backend": backend, "prompt": PROMPT, "reference": str(by_cpu)}
    told = tasks.run("check", job | {"diffusers": by_diffusers})
    record_property("gpu", told)
    if told.get("missing") and backend not in gate.required():
        pytest.skip(told["missing"])
    found = faults(told) if "stage" in told else [told["error"]]
    if found and not told.get("listed", True) and backend not in gate.required():
        pytest.xfail(f"the library does not list this GPU; it was tried: {'; '.join(found)}")
    assert found == []


def test_a_device_that_is_not_there_is_refused(shapes: dict[str, Path]) -> None:
    with pytest.raises(SdruntimeError), Pipeline.open(shapes["fp32"], options=EngineOptions(device=len(devices()))):
        pass


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_layer_of_an_engine_that_differs_is_named(backend: str, tmp_path: Path) -> None:
    if (missing := registry.backend(backend).here().missing) and backend not in gate.required():
        pytest.skip(missing)
    bundle = proved_bundle(tmp_path / "bundle")
    unet = Path(shutil.copytree(bundle / "unet", tmp_path / "unet")) / "model.onnx"
    scale(bundle, "part", 1.5)
    finish(build_engines(bundle, BuildRequest(backend=backend, components=("unet",), **SHAPES)))  # type: ignore[arg-type]
    assert walked(bundle, bundle / "unet" / "model.onnx").output == ""
    assert walked(bundle, unet).output == "some"


def walked(bundle: Path, reference: Path) -> Finding:
    """In a process of its own, as `sdexport verify --bisect` has it."""
    job = dataclasses.asdict(walk_job(bundle, reference))
    stages = run_apart("sdexport.verification.walk", job, what="walk", failed=SdruntimeError, killed=SdruntimeError, advice="")
    return Finding(**finish(stages).result)
