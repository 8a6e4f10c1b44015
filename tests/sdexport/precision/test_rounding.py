"""Rounding to half precision: what an optional input is fed counts, not its default."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sdexport.precision.activations import Feed
from sdexport.precision.rounding import Rounding


def test_an_optional_input_is_rounded_as_fed(tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "columns"]) for name in ("x", "added")]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "added"], ["z"], name="product")],
        "small",
        inputs,
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["rows", "columns"])],
        [numpy_helper.from_array(np.zeros((1, 1), np.float32), "added")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "model.onnx")
    x, added = np.full((2, 3), 1.5, np.float32), np.arange(1, 7, dtype=np.float32).reshape(2, 3) / 3
    rounding = Rounding(tmp_path / "model.onnx", "fp16")
    assert rounding.names == ["product"]
    (half,) = rounding.run(Feed(label="", arrays={"x": x, "added": added}, outputs=()), {"product"})
    np.testing.assert_array_equal(half, (x.astype(np.float16) * added.astype(np.float16)).astype(np.float32))
