"""Write the component `step` (sdruntime.bundle.sampler_step) as ONNX: a few nodes, float32 in bundles of any precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sdruntime.bundle.manifest import ComponentSpec, TensorSpec
from sdruntime.bundle.sampler_step import INPUTS, NAME, OUTPUTS, SLOTS, TARGETS

_OPSET, _IR = 20, 10


def write_step(folder: Path) -> ComponentSpec:
    """Write step/model.onnx and its empty config below `folder`; return the manifest's entry."""
    import onnx

    model = step_to_onnx()
    onnx.checker.check_model(model, full_check=True)
    (folder / NAME).mkdir()
    (folder / NAME / "model.onnx").write_bytes(model.SerializeToString())
    (folder / NAME / "config.json").write_text("{}\n")
    return ComponentSpec(files=(f"{NAME}/model.onnx",), config=f"{NAME}/config.json", inputs=INPUTS, outputs=OUTPUTS)


def step_to_onnx() -> Any:
    """Return the model. Uses Mul and ReduceSum instead of MatMul: no library rounds them to TF32, and Turing has them in fp32."""
    from onnx import TensorProto, helper, numpy_helper

    def value(spec: TensorSpec) -> Any:
        return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape)

    def constant(name: str, *numbers: int) -> Any:
        return numpy_helper.from_array(np.array(numbers, np.int64), name)

    parts = ["uncond", "cond", "noise"]
    nodes = [helper.make_node("Unsqueeze", [part, "one"], [f"{part}_row"]) for part in parts]
    nodes += [
        helper.make_node("Concat", ["state", *(f"{part}_row" for part in parts)], ["sources"], axis=1),
        helper.make_node("Unsqueeze", ["sources", "one"], ["sources_row"]),  # [jobs, 1, sources, cells]
        helper.make_node("Unsqueeze", ["weights", "last"], ["weights_column"]),  # [jobs, targets, sources, 1]
        helper.make_node("Mul", ["weights_column", "sources_row"], ["terms"]),
        helper.make_node("ReduceSum", ["terms", "two"], ["targets"], keepdims=0),
        helper.make_node("Slice", ["targets", "zero", "slots", "one"], ["next_state"]),
        helper.make_node("Slice", ["targets", "slots", "count", "one"], ["sample_row"]),
        helper.make_node("Squeeze", ["sample_row", "one"], ["sample"]),
        helper.make_node("Identity", ["sample"], ["sample_again"]),
    ]
    numbers = {"zero": 0, "one": 1, "two": 2, "last": 3, "slots": SLOTS, "count": TARGETS}
    graph = helper.make_graph(
        nodes,
        NAME,
        [value(spec) for spec in INPUTS],
        [value(spec) for spec in OUTPUTS],
        [constant(name, number) for name, number in numbers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR, producer_name="sdexport")
