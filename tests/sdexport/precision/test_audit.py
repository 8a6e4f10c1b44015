"""The audit: planted overflows and underflows are found, and mended with the fewest nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.errors import AuditError, ExportError
from sdexport.families.components import components
from sdexport.precision.activations import Activations, Feed, MeasuredGraph, likeness
from sdexport.precision.audit import audit, confirm, limit
from sdexport.precision.rewrite import apply_precision
from sdexport.precision.rounding import Rounding
from sdruntime.bundle.audit import Audit
from sdruntime.bundle.manifest import Precision

FLOAT = TensorProto.FLOAT
Array = np.ndarray
Node = tuple[str, str, list[str], dict[str, object]]  # name, operator, inputs, attributes; the output is called as the node


def written(path: Path, nodes: list[Node], shape: list[int | str], **constants: Array) -> Path:
    """A graph x -> the last node, in `path`."""
    made = [helper.make_node(op, inputs, [name], name=name, **more) for name, op, inputs, more in nodes]
    graph = helper.make_graph(
        made,
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1][0], FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def feeds_of(*arrays: Array) -> list[Feed]:
    return [Feed(label=f"prompt {index}", arrays={"x": array}, outputs=()) for index, array in enumerate(arrays)]


def activations(path: Path, feeds: list[Feed], where: str = "test") -> Activations:
    measuring = MeasuredGraph(path, where=where)
    for feed in feeds:
        measuring.run(feed.arrays, label=feed.label)
    return measuring.activations


def audited(path: Path, feeds: list[Feed], precision: Precision, *, where: str) -> Audit:
    return next(audit(path, activations(path, feeds, where), precision))


def confirmed(half: Path, path: Path, feeds: list[Feed], precision: Precision, *, where: str) -> None:
    confirm(half, activations(path, feeds).feeds, precision, where=where)


def names(found: Audit, reason: str | None = None) -> set[str]:
    return {kept.node for kept in found.kept if reason in (None, kept.reason)}


def mended(path: Path, found: Audit, feeds: list[Feed], precision: Precision = "fp16") -> bool:
    """Whether the limits hold with the kept nodes; asserts that they do not where any one of them is given up."""
    rounding, kept = Rounding(path, precision), names(found)
    results = {}
    for without in (None, *sorted(kept)):
        half = [name for name in rounding.names if name not in kept or name == without]
        pairs = [(feed.outputs, rounding.run(feed, half)) for feed in activations(path, feeds).feeds]
        results[without] = all(likeness(*pair).within(limit(precision)) for pair in pairs)
    good = results.pop(None)
    assert not any(results.values()), f"not needed: {[name for name, holds in results.items() if holds]}"
    return good


def as_half(path: Path, found: Audit) -> Path:
    """The graph in fp16, beside it."""
    model = ir.load(path)
    own = [str(value.name) for value in model.graph.inputs]
    apply_precision(model, "fp16", inputs=own, keep=frozenset(names(found)))
    out = path.with_name(f"half.{path.name}")
    ir.save(model, out)
    onnx.checker.check_model(out, full_check=True)
    return out


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def scaled(source: Path, folder: Path, change: Callable[[dict[str, Array]], None]) -> Path:
    """A component of a bundle with other weights, in a file of its own."""
    model = onnx.load(source)
    tensors = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    change(tensors)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    return folder / "model.onnx"


def test_a_vae_with_a_block_that_overflows(sd1_bundle: Path, sd1_checkpoint: Path, tmp_path: Path) -> None:
    """As SDXL's: the residual stream leaves fp16's range in a block, and the last normalisation brings it back."""

    def change(tensors: dict[str, Array]) -> None:
        name = next(name for name in tensors if name.endswith("decoder.up_blocks.3.resnets.1.conv2.weight"))
        tensors[name] *= 1e5

    path = scaled(sd1_bundle / "vae_decoder" / "model.onnx", tmp_path / "vae", change)
    decoder = next(each for each in components(read_checkpoint(sd1_checkpoint, name="tiny")) if each.name == "vae_decoder")
    feeds = [Feed(label=str(seed), arrays=decoder.example_feeds(seed=seed), outputs=()) for seed in (0, 1)]
    found = audited(path, feeds, "fp16", where="vae_decoder")
    assert found.all_cosine is None, "not finite without the audit"
    assert {kept.op for kept in found.kept if kept.reason == "overflow"} <= {"Conv", "Add", "Reshape", "Mul"}
    assert len(found.kept) <= 8
    assert mended(path, found, feeds)
    confirmed(as_half(path, found), path, feeds, "fp16", where="vae_decoder")


ATTENTION: list[Node] = [
    ("q", "MatMul", ["x", "wq"], {}),
    ("k", "MatMul", ["x", "wk"], {}),
    ("v", "MatMul", ["x", "wv"], {}),
    ("kt", "Transpose", ["k"], {"perm": [0, 2, 1]}),
    ("product", "MatMul", ["q", "kt"], {}),
    ("scale", "Mul", ["product", "s"], {}),
    ("softmax", "Softmax", ["scale"], {"axis": -1}),
    ("y", "MatMul", ["softmax", "v"], {}),
]


def test_attention_logits_as_large_as_sd21s(tmp_path: Path) -> None:
    wide = {"wq": 60 * np.eye(16, dtype=np.float32), "wk": 60 * np.eye(16, dtype=np.float32), "wv": normal(16, 16, seed=3)}
    path = written(tmp_path / "model.onnx", ATTENTION, ["batch", 8, 16], s=np.array(1e-4, np.float32), **wide)
    feeds = feeds_of(normal(1, 8, 16, scale=2.0), normal(1, 8, 16, seed=1, scale=2.0))
    found = audited(path, feeds, "fp16", where="unet")
    assert names(found) == {"product", "scale"}, "the softmax and its product are in half precision"
    assert names(found, "overflow") == {"product"}
    assert all(kept.splits_attention for kept in found.kept)
    assert max(kept.largest for kept in found.kept) > 65504
    assert mended(path, found, feeds)
    confirmed(as_half(path, found), path, feeds, "fp16", where="unet")


WEIGHTS = {"wq": normal(16, 16), "wk": normal(16, 16, seed=1), "wv": normal(16, 16, seed=2)}


@pytest.mark.parametrize("lowest", [-1e9, -np.inf, np.finfo(np.float32).min])
@pytest.mark.parametrize("filled", [False, True])
def test_a_mask_beyond_the_precision_becomes_its_lowest_and_stays_half(tmp_path: Path, lowest: float, filled: bool) -> None:
    nodes: list[Node] = [*ATTENTION[:6], ("masked", "Add", ["scale", "mask"], {})]
    mask = np.triu(np.full((8, 8), lowest, np.float32), 1)
    constants: dict[str, Array] = {"mask": mask}
    if filled:
        full = numpy_helper.from_array(np.array([lowest], np.float32))
        nodes = [
            ("fill", "ConstantOfShape", ["sides"], {"value": full}),
            ("mask", "Trilu", ["fill", "one"], {"upper": 1}),
            *nodes,
        ]
        constants = {"sides": np.array([8, 8]), "one": np.array(1)}
    nodes += [("softmax", "Softmax", ["masked"], {"axis": -1}), ATTENTION[7]]
    path = written(tmp_path / "model.onnx", nodes, ["batch", 8, 16], s=np.array(0.25, np.float32), **WEIGHTS, **constants)
    feeds = feeds_of(normal(2, 8, 16, scale=0.3))
    found = audited(path, feeds, "fp16", where="text_encoder")
    assert found.kept == ()
    confirmed(as_half(path, found), path, feeds, "fp16", where="text_encoder")


def test_a_large_negative_constant_that_is_no_mask_stays_in_float32(tmp_path: Path) -> None:
    nodes: list[Node] = [("far", "Add", ["x", "c"], {}), ("back", "Sub", ["far", "c"], {}), ("y", "Tanh", ["back"], {})]
    path = written(tmp_path / "model.onnx", nodes, ["batch", 4], c=np.array([-1e5], np.float32))
    feeds = feeds_of(normal(3, 4))
    found = audited(path, feeds, "fp16", where="text_encoder")
    assert names(found) == {"far", "back"}
    assert mended(path, found, feeds)
    confirmed(as_half(path, found), path, feeds, "fp16", where="text_encoder")


LAYER_NORM: list[Node] = [
    ("mean", "ReduceMean", ["x", "last"], {}),
    ("centred", "Sub", ["x", "mean"], {}),
    ("square", "Mul", ["centred", "centred"], {}),
    ("variance", "ReduceMean", ["square", "last"], {}),
    ("stable", "Add", ["variance", "eps"], {}),
    ("deviation", "Sqrt", ["stable"], {}),
    ("unit", "Div", ["centred", "deviation"], {}),
    ("y", "MatMul", ["unit", "w"], {}),
]


def test_a_layer_norm_whose_variance_underflows(tmp_path: Path) -> None:
    path = written(
        tmp_path / "model.onnx", LAYER_NORM, ["batch", 16], last=np.array([-1]), eps=np.array(6e-8, np.float32), w=normal(16, 16)
    )
    feeds = feeds_of(normal(4, 16, scale=1.5e-4), normal(4, 16, seed=1, scale=1.5e-4))
    found = audited(path, feeds, "fp16", where="text_encoder")
    assert names(found, "loss") == {"square", "variance", "stable", "deviation"}
    assert mended(path, found, feeds)
    confirmed(as_half(path, found), path, feeds, "fp16", where="text_encoder")


def test_an_epsilon_that_becomes_zero_stays_in_float32(tmp_path: Path) -> None:
    path = written(
        tmp_path / "model.onnx", LAYER_NORM, ["batch", 16], last=np.array([-1]), eps=np.array(1e-12, np.float32), w=normal(16, 16)
    )
    feeds = feeds_of(normal(4, 16))
    found = audited(path, feeds, "fp16", where="text_encoder")
    assert [(kept.node, kept.reason) for kept in found.kept] == [("stable", "constant")]
    confirmed(as_half(path, found), path, feeds, "fp16", where="text_encoder")


def test_what_is_outside_an_attention_is_preferred(tmp_path: Path) -> None:
    """Two sums that round away what matters, one before a softmax and one at the end: to give up either is enough."""
    nodes: list[Node] = [
        *ATTENTION[:6],
        ("shifted", "Add", ["scale", "shift"], {}),
        ("softmax", "Softmax", ["shifted"], {"axis": -1}),
        ("mix", "MatMul", ["softmax", "v"], {}),
        ("far", "Add", ["mix", "c"], {}),
        ("y", "Sub", ["far", "near_c"], {}),
    ]
    numbers = {"s": np.array(0.25), "shift": np.array([256.0]), "c": np.array([128.0]), "near_c": np.array([112.0])}
    constants = WEIGHTS | {name: array.astype(np.float32) for name, array in numbers.items()}
    path = written(tmp_path / "model.onnx", nodes, ["batch", 8, 16], **constants)
    feeds = feeds_of(normal(2, 8, 16, scale=0.3))
    inside, outside = {"scale", "shifted", "softmax"}, {"far", "y"}
    rounding = Rounding(path, "fp16")
    found = {
        name: likeness(rounding.run(feeds[0], ()), rounding.run(feeds[0], [each for each in rounding.names if each not in kept]))
        for name, kept in {"none": set[str](), "inside": inside, "outside": outside}.items()
    }
    assert not found["none"].within(limit("fp16"))
    assert found["inside"].within(limit("fp16"))
    assert found["inside"].psnr > found["outside"].psnr, "by the numbers alone it would be the attention"
    chosen = audited(path, feeds, "fp16", where="unet")
    assert names(chosen) == outside
    assert not any(kept.splits_attention for kept in chosen.kept)
    assert mended(path, chosen, feeds)


def test_an_attention_that_must_be_split_is_told(tmp_path: Path) -> None:
    """The sum before the softmax is the only place."""
    nodes: list[Node] = [
        *ATTENTION[:6],
        ("shifted", "Add", ["scale", "shift"], {}),
        ("softmax", "Softmax", ["shifted"], {"axis": -1}),
        ATTENTION[7],
    ]
    constants = WEIGHTS | {"s": np.array(0.25, np.float32), "shift": np.array([2048], np.float32)}
    path = written(tmp_path / "model.onnx", nodes, ["batch", 8, 16], **constants)
    feeds = feeds_of(normal(2, 8, 16, scale=0.3))
    found = audited(path, feeds, "fp16", where="unet")
    assert names(found) == {"shifted", "softmax"}
    assert all(kept.splits_attention and kept.reason == "loss" for kept in found.kept)
    assert mended(path, found, feeds)
    confirmed(as_half(path, found), path, feeds, "fp16", where="unet")


def test_numbers_that_are_not_finite_in_float32_are_told_by_node_and_prompt(tmp_path: Path) -> None:
    nodes: list[Node] = [("root", "Sqrt", ["x"], {}), ("y", "Tanh", ["root"], {})]
    path = written(tmp_path / "model.onnx", nodes, ["batch", 4])
    feeds = feeds_of(np.ones((1, 4), np.float32), np.array([[1, 2, -3, 4]], np.float32))
    with pytest.raises(ExportError, match=r"unet: node root \(Sqrt\) gives NaN in float32 already, at prompt 1: .*weights"):
        audited(path, feeds, "fp16", where="unet")
    nodes = [("large", "Exp", ["x"], {}), ("y", "Tanh", ["large"], {})]
    path = written(tmp_path / "other.onnx", nodes, ["batch", 4])
    with pytest.raises(ExportError, match=r"node large \(Exp\) gives infinity in float32 already, at prompt 0"):
        audited(path, feeds_of(np.full((1, 4), 100, np.float32)), "bf16", where="unet")


def test_a_graph_that_is_not_what_the_audit_promised_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "model.onnx", [("y", "Tanh", ["x"], {})], ["batch", 4])
    other = written(tmp_path / "other.onnx", [("y", "Sin", ["x"], {})], ["batch", 4])
    with pytest.raises(AuditError, match=r"unet: in fp16 cosine 0\.9\d+ and PSNR \d+\.\d dB .* 0\.9999 and 40 dB are the least"):
        confirmed(other, path, feeds_of(normal(2, 4)), "fp16", where="unet")


def test_a_component_that_cannot_bear_half_precision_stays_in_float32_and_says_so(tmp_path: Path) -> None:
    nodes: list[Node] = [("near", "Sub", ["x", "c"], {}), ("y", "Mul", ["near", "large"], {})]
    constants = {"c": np.array([1000], np.float32), "large": np.array([1000], np.float32)}
    path = written(tmp_path / "model.onnx", nodes, ["batch", 4], **constants)
    found = audited(path, feeds_of(1000 + normal(2, 4, scale=0.01)), "fp16", where="unet")
    assert found.all_psnr is not None
    assert found.all_psnr < 20
    assert found.whole == (names(found) == {"near", "y"})
    assert names(found) == {"near"}, "the product takes what is small already"
    found = audited(path, feeds_of(1000 + normal(2, 4, scale=100)), "fp16", where="unet")
    assert names(found) == {"y"}, "hundreds of thousands"


def test_bfloat16_has_the_range_and_its_own_limits(tmp_path: Path) -> None:
    wide = {"wq": 60 * np.eye(16, dtype=np.float32), "wk": 60 * np.eye(16, dtype=np.float32), "wv": normal(16, 16, seed=3)}
    path = written(tmp_path / "model.onnx", ATTENTION, ["batch", 8, 16], s=np.array(1e-5, np.float32), **wide)
    feeds = feeds_of(normal(1, 8, 16, scale=2.0))
    found = audited(path, feeds, "bf16", where="unet")
    assert found.kept == ()
    assert found.largest > 65504
    assert 22 <= found.psnr < 70


def test_the_same_audit_twice(sd1_bundle: Path, sd1_checkpoint: Path) -> None:
    unet = next(each for each in components(read_checkpoint(sd1_checkpoint, name="tiny")) if each.name == "unet")
    feeds = [Feed(label="", arrays=unet.example_feeds(), outputs=())]
    path = sd1_bundle / "unet" / "model.onnx"
    assert audited(path, feeds, "fp16", where="unet") == audited(path, feeds, "fp16", where="unet")
    assert sorted(each.name for each in path.parent.iterdir()) == ["config.json", "model.onnx", "model.onnx.data"]


def test_magnitudes_are_those_of_every_value(tmp_path: Path) -> None:
    path = written(tmp_path / "model.onnx", ATTENTION, ["batch", 8, 16], s=np.array(0.25, np.float32), **WEIGHTS)
    feeds = feeds_of(normal(2, 8, 16), normal(1, 8, 16, seed=5))
    found = activations(path, feeds).sizes
    model = onnx.load(path)
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == FLOAT:
            model.graph.output.append(value)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    outputs = [output.name for output in session.get_outputs()]
    runs = [dict(zip(outputs, session.run(None, dict(feed.arrays)), strict=True)) for feed in feeds]
    assert found.keys() == {"x", *outputs}
    for name in outputs:
        numbers = [run[name] if name in ("product", "scale") else np.abs(run[name]) for run in runs]
        np.testing.assert_allclose(found[name], max(each.max() for each in numbers), rtol=1e-5)


def test_memory_is_that_of_the_graph_not_of_all_its_values(tmp_path: Path) -> None:
    """Forty values of 16 MB each, of which two are needed at a time, and their rounded twins."""
    import subprocess
    import sys

    nodes: list[Node] = [(f"n{k}", "Tanh", [f"n{k - 1}" if k else "x"], {}) for k in range(40)]
    path = written(tmp_path / "model.onnx", nodes, ["batch", 4096])
    code = f"""
import numpy as np
from pathlib import Path
from sdexport.precision.activations import Feed, MeasuredGraph
from sdexport.precision.rounding import Rounding
from sdruntime.system.process import peak_memory
path = Path({str(path)!r})
small, large = (Feed(label="", arrays={{"x": np.ones((rows, 4096), np.float32)}}, outputs=()) for rows in (1, 1024))
def both(feed):
    MeasuredGraph(path, where="").run(feed.arrays, label="")
    rounding = Rounding(path, "fp16")
    rounding.run(feed, rounding.names)
both(small)
before = peak_memory()
both(large)
print(peak_memory() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 8 * 2**24
