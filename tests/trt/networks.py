"""Small ONNX models, and the shortest way from one to a fake engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CELLS = ["batch", 2, "height", "width"]
FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def value(name: str, shape: list[Any], dtype: str = "float32") -> Any:
    return helper.make_tensor_value_info(name, FLOATS[dtype], shape)


def write(
    path: Path,
    nodes: list[Any],
    inputs: list[Any],
    outputs: list[Any],
    *,
    external: bool = False,
    opset: int = 20,
    factor: float = 3,
) -> Path:
    dtype = np.dtype("float16" if inputs[0].type.tensor_type.elem_type == TensorProto.FLOAT16 else "float32")
    weight = numpy_helper.from_array(np.full((1, 2, 1, 1), factor, dtype), "weight")
    graph = helper.make_graph(nodes, "small", inputs, outputs, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


def scaled(path: Path, *, dtype: str = "float32", external: bool = False, factor: float = 3) -> Path:
    """out = factor sample + shift, all of them [batch, 2, height, width]."""
    nodes = [helper.make_node("Mul", ["sample", "weight"], ["m"], "mul"), helper.make_node("Add", ["m", "shift"], ["out"], "add")]
    inputs = [value("sample", CELLS, dtype), value("shift", CELLS, dtype)]
    return write(path, nodes, inputs, [value("out", CELLS, dtype)], external=external, factor=factor)


def upsampled(path: Path) -> Path:
    """out [batch, 2, image_height, image_width] = 3 sample, each cell twice along both axes: a shape that has to be inferred."""
    nodes = [
        helper.make_node("Mul", ["sample", "weight"], ["m"], "mul"),
        helper.make_node("Constant", [], ["twice"], "twice", value_floats=[1.0, 1.0, 2.0, 2.0]),
        helper.make_node("Resize", ["m", "", "twice"], ["out"], "resize", mode="nearest"),
    ]
    return write(path, nodes, [value("sample", CELLS)], [value("out", ["batch", 2, "image_height", "image_width"])])


def decoder(path: Path) -> Path:
    """sample = the sum of the four channels of latent_sample, in each of three, each cell 8 times along both axes."""
    latents, picture = ["batch", 4, "height", "width"], ["batch", 3, "image_height", "image_width"]
    nodes = [
        helper.make_node("ReduceSum", ["latent_sample", "axis"], ["sum"], "sum"),
        helper.make_node("Concat", ["sum", "sum", "sum"], ["three"], "three", axis=1),
        helper.make_node("Resize", ["three", "", "scales"], ["sample"], "resize", mode="nearest"),
    ]
    weights = [
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
        numpy_helper.from_array(np.array([1, 1, 8, 8], np.float32), "scales"),
    ]
    graph = helper.make_graph(nodes, "decoder", [value("latent_sample", latents)], [value("sample", picture)], weights)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def attention(path: Path) -> Path:
    """out = Attention(sample, sample, sample), an operator of opset 23; the weight is there to be carried."""
    nodes = [helper.make_node("Attention", ["sample", "sample", "sample"], ["out"], "attention")]
    return write(path, nodes, [value("sample", CELLS)], [value("out", CELLS)], opset=23)


def foreign(path: Path) -> Path:
    """A node of another domain."""
    nodes = [helper.make_node("Fused", ["sample"], ["out"], "fused", domain="com.microsoft")]
    return write(path, nodes, [value("sample", CELLS)], [value("out", CELLS)])


LOW, BEST, HIGH = (1, 2, 8, 8), (1, 2, 8, 16), (2, 2, 16, 16)


class Log:
    """The messages that a logger of the library got: `log.of(trt)` makes the logger."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def of(self, trt: Any) -> Any:
        log = self

        class Logger(trt.ILogger):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    log.errors.append(msg)

        return Logger()


class Draft:
    """Everything up to the build: logger, network, parser, configuration with one profile."""

    def __init__(self, trt: Any, path: Path, profiles: tuple[tuple[Any, Any, Any], ...] = ((LOW, BEST, HIGH),)) -> None:
        self.trt, self.log = trt, Log()
        self.logger = self.log.of(trt)
        self.builder = trt.Builder(self.logger)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.parsed = self.parser.parse_from_file(str(path))
        self.config = self.builder.create_builder_config()
        for shapes in profiles:
            profile = self.builder.create_optimization_profile()
            for k in range(self.network.num_inputs):
                profile.set_shape(self.network.get_input(k).name, *shapes)
            self.config.add_optimization_profile(profile)

    def build(self) -> Any:
        return self.builder.build_serialized_network(self.network, self.config)

    def open(self, data: Any = None) -> Any:
        """The engine from `data`, or from what `build` gives."""
        return self.trt.Runtime(self.logger).deserialize_cuda_engine(self.build() if data is None else data)
