"""A float32 graph in fp16 and bf16: right types, right numbers, and no cast where it would keep an engine from fusing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.errors import PrecisionError
from sdexport.families.components import components
from sdexport.precision.rewrite import apply_precision, logits
from sdexport.trace import to_onnx

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def graph_of(nodes: list[onnx.NodeProto], *, weight: bool = False, **constants: np.ndarray) -> ir.Model:
    """x -> y, float32 [batch, 4], with a weight w [4, 4] as an input where asked."""
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["batch", 4])]
    if weight:
        inputs.append(helper.make_tensor_value_info("w", FLOAT, [4, 4]))
    outputs = [helper.make_tensor_value_info("y", FLOAT, ["batch", 4])]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, tensors)
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )
    return ir.from_proto(model)


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    to_onnx.check(model, where="test")
    return np.asarray(onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0])


def types_of(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {str(node.name): node.outputs[0].dtype for node in model.graph}


@pytest.fixture(scope="module", params=("sd1", "sdxl"))
def bundles(request: pytest.FixtureRequest) -> tuple[Path, Path, Path]:
    """(checkpoint, fp32 bundle, fp16 bundle)."""
    kind = request.param
    return tuple(request.getfixturevalue(f"{kind}_{each}") for each in ("checkpoint", "bundle", "fp16_bundle"))


def test_fp16_agrees_with_fp32(bundles: tuple[Path, Path, Path]) -> None:
    checkpoint, full, half = bundles
    for component in components(read_checkpoint(checkpoint, name="tiny")):
        feeds = component.example_feeds(seed=2)
        outputs = [onnxruntime.InferenceSession(each / component.name / "model.onnx").run(None, feeds) for each in (full, half)]
        for expected, found in zip(*outputs, strict=True):
            error = np.abs(found - expected).max() / np.abs(expected).max()
            assert found.dtype == np.float32
            assert 0 < error < 1e-2, f"{component.name}: {error:.1e}"


def test_fp16_casts_at_the_edges_and_nowhere_inside(bundles: tuple[Path, Path, Path]) -> None:
    checkpoint, _, half = bundles
    for component in components(read_checkpoint(checkpoint, name="tiny")):
        model = ir.load(half / component.name / "model.onnx")
        casts = [node for node in model.graph if node.op_type == "Cast"]
        for cast in casts:
            source = cast.inputs[0]
            assert source is not None
            producer = source.producer()
            assert producer is None or producer.op_type != "Cast", f"{cast.name} follows a cast"
        floats = sum(spec.dtype == "float32" for spec in (*component.engine_inputs, *component.outputs))
        assert len(casts) <= floats, [cast.name for cast in casts]
        assert not any("Cast" in chain for chain in chains_before_softmax(model))
        assert (
            sum(1 for weight in model.graph.initializers.values() if weight.dtype == ir.DataType.FLOAT and weight.shape != ())
            <= 4
        )


def chains_before_softmax(model: ir.Model) -> list[list[str]]:
    """From each Softmax up the graph to the product that it follows."""
    chains = []
    for node in model.graph:
        if node.op_type == "Softmax":
            chain, above = [], node.inputs[0].producer() if node.inputs[0] is not None else None
            while above is not None and above.op_type != "MatMul":
                chain.append(above.op_type)
                above = above.inputs[0].producer() if above.inputs[0] is not None else None
            chains.append(chain)
    return chains


def test_the_sinusoid_of_the_timestep_stays_in_float32(sd1_fp16_bundle: Path) -> None:
    model = ir.load(sd1_fp16_bundle / "unet" / "model.onnx")
    periodic = [node for node in model.graph if node.op_type in ("Sin", "Cos")]
    assert periodic
    assert {node.outputs[0].dtype for node in periodic} == {ir.DataType.FLOAT}


def test_weights_take_half_the_room(sd1_bundle: Path, sd1_fp16_bundle: Path) -> None:
    full, half = ((each / "unet" / "model.onnx.data").stat().st_size for each in (sd1_bundle, sd1_fp16_bundle))
    assert half < 0.55 * full


def test_kept_nodes_stay_in_float32() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Exp", ["a"], ["b"], name="exp"),
        helper.make_node("Neg", ["b"], ["y"], name="neg"),
    ]
    model = graph_of(nodes, weight=True)
    precisions = apply_precision(model, "fp16", inputs=["x"], keep=frozenset({"exp"}))
    types = types_of(model)
    assert precisions == {"w": "fp16"}
    assert (types["product"], types["exp"], types["neg"]) == (ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.FLOAT16)
    to_onnx.check(model, where="test")


def test_a_weight_of_a_kept_node_stays_in_float32() -> None:
    model = graph_of([helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], weight=True)
    assert apply_precision(model, "fp16", inputs=["x"], keep=frozenset({"product"})) == {"w": "fp32"}
    assert [node.op_type for node in model.graph] == ["MatMul"]


def test_masks_become_the_lowest_number_or_stay_infinite() -> None:
    mask = np.array([0, np.finfo(np.float32).min, -np.inf, 1], np.float32)
    model = graph_of([helper.make_node("Add", ["x", "mask"], ["y"], name="add")], mask=mask)
    apply_precision(model, "fp16", inputs=["x"], keep=frozenset())
    np.testing.assert_array_equal(run(model, x=np.zeros((1, 4), np.float32))[0], [0, -65504, -np.inf, 1])


def test_what_is_below_the_precision_becomes_its_lowest_in_a_mask_alone() -> None:
    nodes = [helper.make_node("Add", ["x", "mask"], ["a"], name="add"), helper.make_node("Softmax", ["a"], ["y"], name="softmax")]
    mask = np.array([0, -1e9, 0, -1e9], np.float32)
    model = graph_of(nodes, mask=mask)
    apply_precision(model, "fp16", inputs=["x"], keep=frozenset())
    lowest = next(value.const_value for value in model.graph.initializers.values())
    assert lowest is not None
    np.testing.assert_array_equal(lowest.numpy(), [0, -65504, 0, -65504])
    np.testing.assert_allclose(run(model, x=np.zeros((1, 4), np.float32))[0], [0.5, 0, 0.5, 0])
    nodes[1].op_type = "Tanh"
    with pytest.raises(PrecisionError, match="beyond 65504"):
        apply_precision(graph_of(nodes, mask=mask), "fp16", inputs=["x"], keep=frozenset())


def test_logits_are_what_ends_in_a_softmax_alone() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
        helper.make_node("Mul", ["product", "s"], ["scaled"], name="scale"),
        helper.make_node("Add", ["scaled", "mask"], ["masked"], name="add"),
        helper.make_node("Softmax", ["masked"], ["weights"], name="softmax"),
        helper.make_node("Mul", ["weights", "s"], ["y"], name="last"),
    ]
    constants = {"s": np.array([2], np.float32), "mask": np.zeros(4, np.float32)}
    assert {value.name for value in logits(graph_of(nodes, weight=True, **constants).graph)} == {
        "product",
        "scaled",
        "mask",
        "masked",
    }


@pytest.mark.parametrize(("number", "fault"), [(1e6, "beyond 65504"), (1e-12, "becomes zero")])
def test_constants_that_fp16_cannot_hold_are_refused(number: float, fault: str) -> None:
    model = graph_of([helper.make_node("Add", ["x", "c"], ["y"], name="add")], c=np.array([number], np.float32))
    with pytest.raises(PrecisionError, match=fault) as caught:
        apply_precision(model, "fp16", inputs=["x"], keep=frozenset())
    assert caught.value.faults[0].startswith("c: ")


def test_inputs_that_have_no_half_type_stay_float32() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["image"], name="image"),
        helper.make_node("Resize", ["image", "", "scales"], ["large"], name="resize", mode="nearest"),
        helper.make_node("Resize", ["large", "", "back"], ["small"], name="back", mode="nearest"),
        helper.make_node("Reshape", ["small", "flat"], ["y"], name="flat"),
    ]
    model = graph_of(
        nodes,
        shape=np.array([-1, 1, 2, 2]),
        flat=np.array([-1, 4]),
        scales=np.array([1, 1, 2, 2], np.float32),
        back=np.array([1, 1, 0.5, 0.5], np.float32),
    )
    apply_precision(model, "fp16", inputs=["x"], keep=frozenset())
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert types_of(model)["resize"] == ir.DataType.FLOAT16
    np.testing.assert_array_equal(run(model, x=x), x)


def test_bf16_is_well_typed_by_the_standard(sd1_checkpoint: Path, export: object) -> None:
    bundle = export(sd1_checkpoint, precision="bf16")  # type: ignore[operator]
    for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        model = ir.load(bundle / name / "model.onnx")
        assert model.opset_imports == {"": 22}, "convolutions take bfloat16 since opset 22"
        assert all(node.outputs[0].dtype == ir.DataType.BFLOAT16 for node in model.graph if node.op_type in ("Conv", "MatMul"))
        onnx.checker.check_model(bundle / name / "model.onnx", full_check=True)
