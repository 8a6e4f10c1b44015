"""Every exported attention has the shape that TensorRT fuses: MatMul, scale (and mask), Softmax, MatMul, with no cast between."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

HALF = {"fp16": 10, "bf16": 16}  # TensorProto.FLOAT16, BFLOAT16
QUERIES = (".to_q.weight", ".q_proj.weight")


class Graph:
    def __init__(self, path: Path) -> None:
        import onnx

        graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
        self.nodes = list(graph.node)
        self.made_by = {name: node for node in graph.node for name in node.output}
        self.used_by: dict[str, list[Any]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.used_by[name].append(node)
        self.types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
        self.weights = [tensor.name for tensor in graph.initializer]


def attentions(graph: Graph, kind: int) -> int:
    """How many softmaxes there are, each one of them between two products, all in the half type `kind`."""
    found = [node for node in graph.nodes if node.op_type == "Softmax"]
    for softmax in found:
        name, between = softmax.input[0], []
        while (node := graph.made_by[name]).op_type != "MatMul":
            between.append(node.op_type)
            name = node.input[0]
        assert set(between) <= {"Mul", "Div", "Add"}, between  # the scale, and the mask
        assert [node.op_type for node in graph.used_by[softmax.output[0]]] == ["MatMul"]
        assert {graph.types[each] for each in (name, softmax.input[0], softmax.output[0])} == {kind}
    return len(found)


@pytest.mark.parametrize("name", ["sd1_fp16", "sd1_bf16", "sd2_fp16", "sdxl_fp16"])
def test_every_attention_can_be_fused(request: pytest.FixtureRequest, name: str) -> None:
    bundle: Path = request.getfixturevalue(f"{name}_bundle")
    for component in ("unet", "vae_decoder", "vae_encoder", "text_encoder"):
        graph = Graph(bundle / component / "model.onnx")
        queries = sum(weight.endswith(QUERIES) for weight in graph.weights)
        assert queries >= 1
        assert attentions(graph, HALF[name.partition("_")[2]]) == queries


def test_a_cast_inside_an_attention_is_found(sd1_fp16_bundle: Path) -> None:
    graph = Graph(sd1_fp16_bundle / "unet" / "model.onnx")
    softmax = next(node for node in graph.nodes if node.op_type == "Softmax")
    product = graph.made_by[softmax.input[0]]
    cast = type(product)(op_type="Cast", input=[softmax.input[0]], output=["cast"])
    softmax.input[0] = "cast"
    graph.made_by["cast"] = cast
    with pytest.raises(AssertionError, match="Cast"):
        attentions(graph, HALF["fp16"])
