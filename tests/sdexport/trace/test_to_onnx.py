"""A component's ONNX gives what torch gives, at sizes that it was not traced at; an unsound graph is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch_side
from onnx import TensorProto, helper

from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.checkpoint.weights.safetensors import read_header
from sdexport.errors import ExportError
from sdexport.families.components import Component, components
from sdexport.trace import to_onnx

TOLERANCE = 1e-4  # of the reference's largest value
KINDS = ("sd1", "sd2_v", "sdxl")


def table(checkpoint: Path) -> tuple[Component, ...]:
    return components(read_checkpoint(checkpoint, name="tiny"))


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """(checkpoint, bundle) of each kind."""
    return request.getfixturevalue(f"{request.param}_checkpoint"), request.getfixturevalue(f"{request.param}_bundle")


def test_outputs_are_those_of_torch(exported: tuple[Path, Path]) -> None:
    checkpoint, bundle = exported
    for component in table(checkpoint):
        session = onnxruntime.InferenceSession(bundle / component.name / "model.onnx")
        cells = component.sides.get("height", 0) // 2
        wide, odd = {"height": 3 * cells, "width": 5 * cells}, {"height": 4 * cells + 3, "width": 3 * cells - 1}
        sizes_of = ({}, {"batch": 1}, {"batch": 5, "sequence": 154, **wide}, *([odd] if component.name == "unet" else []))
        for sizes in sizes_of:
            feeds = component.example_feeds(seed=1, **sizes)
            found = dict(zip([spec.name for spec in component.outputs], session.run(None, feeds), strict=True))
            reference = torch_side.outputs(checkpoint, component.name, feeds)
            assert found.keys() == reference.keys()
            for name, expected in reference.items():
                error = np.abs(found[name] - expected).max() / np.abs(expected).max()
                assert error < TOLERANCE, f"{component.name}.{name} at {sizes}: {error:.1e}"
                assert expected.std() > 0.01 * np.abs(expected).max(), "an output that is flat shows nothing"


def test_graphs_are_plain_and_named_as_the_manifest_says(exported: tuple[Path, Path]) -> None:
    checkpoint, bundle = exported
    for component in table(checkpoint):
        model = onnx.load(bundle / component.name / "model.onnx", load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
        assert {node.domain for node in model.graph.node} == {""}
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
        inputs, own = model.graph.input, len(component.inputs)
        assert [value.name for value in inputs[own:]] == [spec.name for spec in component.optional_inputs]
        for values, specs in ((inputs[:own], component.inputs), (model.graph.output, component.outputs)):
            found = [
                (value.name, tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim))
                for value in values
            ]
            assert found == [(spec.name, spec.shape) for spec in specs]


def test_weights_keep_their_names_and_begin_on_cache_lines(exported: tuple[Path, Path]) -> None:
    checkpoint, bundle = exported
    stored = read_header(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    model = onnx.load(bundle / "unet" / "model.onnx", load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert {tensor.name for tensor in outside} == set(stored)
    offsets = [int(entry.value) for tensor in outside for entry in tensor.external_data if entry.key == "offset"]
    assert len(offsets) == len(outside)
    assert all(offset % 64 == 0 for offset in offsets)


def test_one_timestep_for_all_rows_is_taken_too(sd1_checkpoint: Path, sd1_bundle: Path) -> None:
    """Readers that are not ours send the timestep as [1]."""
    component = table(sd1_checkpoint)[-1]
    feeds = component.example_feeds(batch=3)
    session = onnxruntime.InferenceSession(sd1_bundle / "unet" / "model.onnx")
    one = session.run(None, feeds | {"timestep": feeds["timestep"][:1]})[0]
    each = session.run(None, feeds | {"timestep": np.repeat(feeds["timestep"][:1], 3)})[0]
    np.testing.assert_allclose(one, each, atol=1e-5)


def model_of(*nodes: onnx.NodeProto, opsets: tuple[tuple[str, int], ...] = (("", 20),)) -> ir.Model:
    inputs = [
        helper.make_tensor_value_info("half", TensorProto.FLOAT16, ["batch"]),
        helper.make_tensor_value_info("full", TensorProto.FLOAT, ["batch"]),
    ]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    graph = helper.make_graph(list(nodes), "graph", inputs, outputs)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid(*each) for each in opsets]))


def test_an_ill_typed_graph_is_refused() -> None:
    with pytest.raises(ExportError, match="unet: the graph is ill-typed"):
        to_onnx.check(model_of(helper.make_node("Concat", ["half", "full"], ["out"], axis=0)), where="unet")


def test_a_foreign_operator_is_refused() -> None:
    node = helper.make_node("QuickGelu", ["full"], ["out"], domain="com.microsoft")
    with pytest.raises(ExportError, match=r"com\.microsoft::QuickGelu"):
        to_onnx.check(model_of(node, opsets=(("", 20), ("com.microsoft", 1))), where="text_encoder")


def test_a_sound_graph_passes() -> None:
    to_onnx.check(model_of(helper.make_node("Neg", ["full"], ["out"])), where="unet")
