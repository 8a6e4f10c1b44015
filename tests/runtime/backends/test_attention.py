"""Attention as ONNX Runtime's own node: the same numbers, found where it is and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

from sdruntime.arrays import Array
from sdruntime.backends.base.feeds import shape_of
from sdruntime.backends.ort.attention import fuse_attention
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines

pytestmark = pytest.mark.slow

ort = pytest.importorskip("onnxruntime")
HEADS, WIDTH, TOKENS = 2, 8, 6
FUSED = b"MultiHeadAttention"


def session(model: bytes | str) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("component", "fused"), [("unet", True), ("vae_decoder", True), ("text_encoder", False)])
@pytest.mark.parametrize("exported", ["sd1_bundle", "sd2_bundle", "sdxl_bundle"])
def test_a_built_engine_has_it_and_the_numbers_of_the_bundle(
    exported: str, component: str, fused: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A text encoder's attention has a mask, which is left to the plain nodes."""
    folder = Path(copytree(request.getfixturevalue(exported), tmp_path / "bundle"))
    for _ in build_engines(folder, BuildRequest(backend="onnxruntime", components=(component,))):
        pass
    bundle = Bundle.open(folder)
    spec = bundle.manifest.components[component]
    (engine,) = bundle.manifest.engines
    model = (folder / engine.files[0]).read_bytes()
    assert (FUSED in model) == fused
    assert (b"Softmax" in model) != fused
    assert (
        b"DepthToSpace" in model or component != "unet"
    )  # an upsampling and its convolution are four small convolutions (test_subpixel.py)
    assert (b"DepthToSpace" in model) == fused
    dims = {name: {"batch": 3, "sequence": 77}.get(name, 8) for name in spec.dimensions}
    random = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for tensor in spec.engine_inputs:
        values = random.standard_normal(shape_of(tensor, dims, bundle.manifest.model.vae_factor))
        feeds[tensor.name] = (np.abs(9 * values) if tensor.dtype != "float32" else values).astype(tensor.dtype)
    ours = session(str(folder / engine.files[0])).run(None, feeds)
    plain = session(str(folder / spec.onnx)).run(None, feeds)
    for one, other in zip(ours, plain, strict=True):
        assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()
        assert np.std(other) > 0


Nodes = list[Any]


def attention_model(change: Callable[[Nodes], None] = lambda nodes: None, outputs: tuple[str, ...] = ("y",)) -> bytes:
    """As ONNX Runtime saves an exported attention: k [batch, tokens, heads, width] turned by way of three dimensions."""
    onnx = pytest.importorskip("onnx")
    node, wide = onnx.helper.make_node, HEADS * WIDTH
    nodes = [node("Reshape", [name, "split"], [f"{name}4"]) for name in "qkv"]
    nodes += [node("Transpose", [f"{name}4"], [f"{name}h"], perm=[0, 2, 1, 3]) for name in "qkv"]
    nodes += [
        node("Reshape", ["kh", "three"], ["k3"]),
        node("Transpose", ["k3"], ["kt3"], perm=[0, 2, 1]),
        node("Reshape", ["kt3", "four"], ["kt"]),
        node("FusedMatMul", ["qh", "kt"], ["scores"], domain="com.microsoft", alpha=0.3, name="scores"),
        node("Softmax", ["scores"], ["weights"], axis=-1, name="softmax"),
        node("MatMul", ["weights", "vh"], ["heads"], name="weigh"),
        node("Transpose", ["heads"], ["joined"], perm=[0, 2, 1, 3], name="join"),
        node("Reshape", ["joined", "flat"], ["y"]),
    ]
    change(nodes)
    shapes = {
        "split": [0, -1, HEADS, WIDTH],
        "three": [-1, TOKENS, WIDTH],
        "four": [-1, HEADS, WIDTH, TOKENS],
        "flat": [0, 0, wide],
    }
    graph = onnx.helper.make_graph(
        nodes,
        "attention",
        [onnx.helper.make_tensor_value_info(name, 1, ["batch", TOKENS, wide]) for name in "qkv"],
        [onnx.helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [onnx.numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in shapes.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model: bytes = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def found(nodes: Nodes, name: str) -> Any:
    return next(node for node in nodes if node.name == name)


def test_the_scale_heads_and_layout_are_those_of_the_graph() -> None:
    plain = attention_model()
    fused = fuse_attention(memoryview(plain))
    assert FUSED in fused
    for leftover in (b"Softmax", b"FusedMatMul", b"kt3", b"three"):  # nor what nothing reads any more
        assert leftover not in fused
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal((3, TOKENS, HEADS * WIDTH)).astype(np.float32) for name in "qkv"}
    ours, theirs = session(fused).run(None, feeds)[0], session(plain).run(None, feeds)[0]
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-6
    assert fuse_attention(memoryview(fused)) == fused


def _mask(nodes: Nodes) -> None:
    onnx = pytest.importorskip("onnx")
    found(nodes, "softmax").input[0] = "masked"
    nodes.insert(nodes.index(found(nodes, "softmax")), onnx.helper.make_node("Add", ["scores", "scores"], ["masked"]))


def _axis(nodes: Nodes) -> None:
    found(nodes, "softmax").attribute[0].i = -2


def _turned(nodes: Nodes) -> None:
    onnx = pytest.importorskip("onnx")
    found(nodes, "scores").attribute.append(onnx.helper.make_attribute("transA", 1))


def _joined_otherwise(nodes: Nodes) -> None:
    found(nodes, "join").attribute[0].ints[:] = [1, 2, 0, 3]


def _nested(nodes: Nodes) -> None:
    onnx = pytest.importorskip("onnx")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["weights"], ["inner"])], "inner", [], [])
    nodes.append(onnx.helper.make_node("If", ["q"], ["never"], then_branch=inner, else_branch=inner))


@pytest.mark.parametrize("change", [_mask, _axis, _turned, _joined_otherwise, _nested])
def test_what_is_no_such_attention_stays_as_it_was(change: Callable[[Nodes], None]) -> None:
    plain = attention_model(change)
    assert fuse_attention(memoryview(plain)) == plain


@pytest.mark.parametrize("output", ["weights", "heads"])
def test_what_is_read_elsewhere_stays(output: str) -> None:
    plain = attention_model(outputs=("y", output))
    assert fuse_attention(memoryview(plain)) == plain


def test_a_model_that_is_cut_short_is_refused() -> None:
    plain = attention_model()
    with pytest.raises(ValueError, match=r"cut short|not a protobuf"):
        fuse_attention(memoryview(plain[: len(plain) // 2]))
