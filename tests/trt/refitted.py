"""A bundle whose VAE decoder has weights that can be replaced, and the ways to build, open and run it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import bundles
import numpy as np
import onnx
from onnx import helper, numpy_helper
from trt import networks
from trt.machine import Machine

from sdruntime.backends.base.engine import EngineOptions, Shared
from sdruntime.backends.trt.engine import open_engine
from sdruntime.bundle.bundle import Bundle, write_bundle
from sdruntime.engines.building import BuildRequest, build_engines

LATENTS, IMAGE = ["batch", 4, "height", "width"], ["batch", 3, "image_height", "image_width"]


def bundle_of(folder: Path) -> Bundle:
    """A VAE decoder: the sum of the channels, times layer.weight plus layer.bias, each cell 8 times along both axes."""
    made = bundles.make_bundle(folder)
    component = made.manifest.components["vae_decoder"]
    nodes = [
        helper.make_node("ReduceSum", ["latent_sample", "axis"], ["sum"], "sum"),
        helper.make_node("Mul", ["sum", "layer.weight"], ["product"], "mul"),
        helper.make_node("Add", ["product", "layer.bias"], ["one"], "add"),
        helper.make_node("Concat", ["one", "one", "one"], ["three"], "three", axis=1),
        helper.make_node("Constant", [], ["times"], "times", value_floats=[1.0, 1.0, 8.0, 8.0]),
        helper.make_node("Resize", ["three", "", "times"], ["sample"], "resize", mode="nearest"),
    ]
    weights = {"layer.weight": np.full((1, 1, 1, 1), 2, np.float32), "layer.bias": np.full((1, 1, 1, 1), 1, np.float32)}
    constants = [*(numpy_helper.from_array(array, name) for name, array in weights.items())]
    constants.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    inputs, outputs = [networks.value("latent_sample", LATENTS)], [networks.value("sample", IMAGE)]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / component.onnx
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=4)
    files = (component.onnx, f"{component.onnx}.data")
    components = {**made.manifest.components, "vae_decoder": dataclasses.replace(component, files=files)}
    write_bundle(folder, model=made.manifest.model, precision="fp32", components=components, provenance={"made": "by hand"})
    return Bundle.open(folder)


@dataclasses.dataclass
class New:
    """New weights."""

    values: Mapping[str, np.ndarray]

    @property
    def names(self) -> list[str]:
        return list(self.values)

    @contextlib.contextmanager
    def lending(self) -> Iterator[Mapping[str, np.ndarray]]:
        yield self.values


def built(here: Machine, folder: Path, **options: str) -> Bundle:
    request = BuildRequest(backend=here.backend, components=("vae_decoder",), size="64x64", options=options)
    for _ in build_engines(folder, request):
        pass
    return Bundle.open(folder)


def run(bundle: Bundle, values: Mapping[str, np.ndarray] | None) -> float:
    options = EngineOptions(weights=None if values is None else New(values))
    with contextlib.closing(Shared()) as shared, open_engine(bundle, bundle.manifest.engines[-1], options, shared) as engine:
        out = engine({"latent_sample": np.ones((1, 4, 8, 8), np.float32)})["sample"]
    assert out.min() == out.max()
    return float(out.min())


def one(number: float) -> np.ndarray:
    return np.full((1, 1, 1, 1), number, np.float32)
