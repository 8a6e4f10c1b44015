"""The first node that differs, without torch: of an ONNX, of engines on fake GPUs, and of a real TensorRT-RTX as far as a GPU."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from planted import NODES, SHAPES, proved_bundle, scale, walk_job
from trt import fake_context
from trt.conftest import machine, read, with_engines
from trt.cudart import polygraphy_on
from trt.machine import Machine
from trt.surface import VERSIONS

from sdexport.verification import layers
from sdexport.verification.layers import EngineLayers
from sdexport.verification.walk import walk
from sdruntime.backends.base.building import Stage
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import EngineError
from sdruntime.system.events import finish
from sdruntime.system.process import run_apart

__all__ = ["machine"]  # a fixture


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return proved_bundle(tmp_path / "small")


@pytest.fixture
def reference(bundle: Path, tmp_path: Path) -> Path:
    """The UNet as it is before anything is done to the bundle."""
    return Path(shutil.copytree(bundle / "unet", tmp_path / "reference")) / "model.onnx"


def test_the_node_of_a_changed_weight_is_named(bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdexport.verification.walk.AT_ONCE", 2)
    told: list[Stage] = []
    assert finish(walk(walk_job(bundle, reference)), told.append).line() == "unet small: all 7 nodes match"
    assert told == [Stage(name="unet", done=done, total=7) for done in (0, 2, 4, 6)]
    scale(bundle, "part", 1.01)
    found = finish(walk(walk_job(bundle, reference)))
    assert (found.output, found.op, found.place, found.count) == ("some", "Mul", 3, 7)
    assert found.line().startswith(
        "unet small: node 3 of 7 is the first to leave the tolerance: Mul some -> some: largest error 1.00e-02 of the largest"
    )


@pytest.fixture(params=VERSIONS, ids=lambda version: str(version).replace(" ", "-"))
def gpu(request: pytest.FixtureRequest, machine: Callable[..., Machine]) -> Iterator[Machine]:
    """A fake GPU with each supported TensorRT. Nothing may be left on it."""
    here = machine(read(request.param))
    with polygraphy_on(here):
        yield here


def test_a_layer_that_an_engine_computes_wrongly_is_named(
    gpu: Machine, bundle: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = with_engines(bundle, tmp_path / "built", gpu, components=("unet",), **SHAPES)
    (engine,) = Bundle.open(built).manifest.engines
    monkeypatch.setattr("sdexport.verification.walk.AT_ONCE", 3)
    sound = finish(walk(walk_job(built, reference)))
    assert (sound.output, sound.count) == ("", 7)
    assert sound.line().startswith(f"unet {engine.name} small: all 7 nodes match as outputs, which TensorRT does")

    compute = fake_context.compute

    def miscompute(*arguments: Any) -> dict[str, np.ndarray]:
        return {name: array * np.float32(1.5 if name == "noise" else 1) for name, array in compute(*arguments).items()}

    monkeypatch.setattr(fake_context, "compute", miscompute)
    found = finish(walk(walk_job(built, reference)))
    assert (found.engine, found.output, found.op, found.place) == (engine.name, "noise", "Add", 4)
    assert finish(walk(dataclasses.replace(walk_job(built, reference), engine="", backend=""))).output == ""


@pytest.fixture
def rtx(bundle: Path) -> Path:
    """The bundle with a real engine of its UNet for a GPU that is not here."""
    pytest.importorskip("tensorrt_rtx")
    for _ in build_engines(bundle, BuildRequest(backend="tensorrt-rtx", target="sm86", components=("unet",), **SHAPES)):  # type: ignore[arg-type]
        pass
    return bundle


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tensorrt_rtx_builds_with_layers_as_outputs(rtx: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(rtx)
    path = rtx / "unet" / "model.onnx"
    if precision == "bf16":
        to_bf16(path)
    marked: list[dict[str, str]] = []
    build = layers.plan_from_network

    def watched(job: Any, trt: Any, log: Any, builder: Any, network: Any, progress: Any) -> Any:
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        marked.append({tensor.name: tensor.dtype.name for tensor in outputs})
        return build(job, trt, log, builder, network, progress)

    monkeypatch.setattr(layers, "plan_from_network", watched)
    made = EngineLayers(opened, opened.manifest.engines[0], str(path))
    assert set(NODES) <= made.nodes
    plan = made.plan(NODES[2:4])
    assert marked == [{"some": "FLOAT", "noise": "FLOAT"}]
    assert plan.nbytes > 1000


def to_bf16(path: Path) -> None:
    """The product `some` in bfloat16."""
    model, bf16 = onnx.load(str(path)), onnx.TensorProto.BFLOAT16
    product, added = (next(node for node in model.graph.node if node.output[0] == name) for name in ("some", "noise"))
    product.input[:], added.input[0] = ["sample16", "part16"], "wide"
    others = [node for node in model.graph.node if node not in (product, added)]
    narrow = [onnx.helper.make_node("Cast", [name], [f"{name}16"], to=bf16) for name in ("sample", "part")]
    wide = onnx.helper.make_node("Cast", ["some"], ["wide"], to=onnx.TensorProto.FLOAT)
    del model.graph.node[:]
    model.graph.node.extend([*narrow, product, wide, *others[:2], added, *others[2:]])
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def test_an_engine_is_walked_in_a_process_of_its_own_as_far_as_its_gpu(rtx: Path, reference: Path) -> None:
    """Polygraphy for TensorRT-RTX, beside one for TensorRT in this process, builds the engine; it then needs a GPU."""
    kinds = {"failed": RuntimeError, "killed": RuntimeError, "what": "walk", "advice": ""}
    messages = run_apart("sdexport.verification.walk", dataclasses.asdict(walk_job(rtx, reference)), **kinds)  # type: ignore[arg-type]
    assert next(messages) == {"name": f"unet {walk_job(rtx, reference).engine}", "done": 0, "total": 7}
    with pytest.raises(EngineError, match=r"the engine that was just built cannot be opened here: .*CUDA"):
        list(messages)


@pytest.mark.parametrize(("backend", "module"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_polygraphy_drives_the_tensorrt_of_the_engine_and_finds_the_cuda_of_its_wheel(
    backend: str, module: str, tmp_path: Path
) -> None:
    library = tmp_path / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    code = """
import sys
from sdexport.verification.walk import prepare_polygraphy
sys.path.insert(0, sys.argv[2])
prepare_polygraphy(sys.argv[1])
import polygraphy.cuda, polygraphy.mod.trt_importer
print(polygraphy.mod.trt_importer.tensorrt_module_and_version_string())
try:
    polygraphy.cuda.wrapper()
except OSError as error:  # an empty file is no library
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    command = [sys.executable, "-c", code, backend, str(tmp_path)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[0].split(">")[0] == module
    assert told[-1].startswith(str(library))
