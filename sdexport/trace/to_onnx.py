"""Trace a component to a float32 ONNX graph without data: its weights are graph inputs, after the component's own.

A module created under fake tensors has shapes but no data, so a trace takes only the memory of the graph. It depends on the
config and never on the weights: checkpoints of one architecture share it. `attach_weights` turns the weights into initialisers
again, with their data in a file beside the model.

Each pass is a function that changes the model by one rule. The result has only ONNX's own operators, opset 20.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from sdexport.errors import ExportError
from sdexport.families.components import Component
from sdexport.trace.data_file import Placed
from sdexport.trace.optional_inputs import constant
from sdruntime.bundle.manifest import TensorSpec

OPSET = 20
_PREFIX = "weights."  # the wrappers of sdexport.families.modules prepend it to the checkpoint's names
# the rewrite rules of onnxscript that change these networks. Its full set includes slice_split_rule, which searches the whole
# graph for each node: three quarters of the optimiser's time for SD1.5, and more for SDXL
_RULES = (
    "mul_by_1_rule",
    "div_by_1_rule",
    "collapse_slice_rule",
    "materialize_reshape_shape_rule",  # since onnxscript 0.7.2
    "no_op_transpose_rule",
    "transpose_transpose_rule",
    "unsqueeze_unsqueeze_rule",
    "squeeze_reshape_1d_rule",
    "normalize_pad_format_conv_rule",
    "fuse_pad_into_conv_rule",
)


def onnx_from_component(component: Component) -> ir.Model:
    """Trace a component and apply the passes. Raises ExportError if the exporter or the checker refuses it."""
    model = _trace(component)
    for apply in PASSES:
        apply(model, component)
    check(model, where=component.name)
    return model


def weight_shapes(model: ir.Model, component: Component) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that a graph takes as inputs, by the checkpoint's names."""
    own = {spec.name for spec in component.engine_inputs}
    return {_name(value): _static(value) for value in model.graph.inputs if value.name not in own}


def module_shapes(component: Component) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of the component's module, by the checkpoint's names. Loads torch."""
    import torch

    with torch.device("meta"):
        return {name.removeprefix(_PREFIX): tuple(tensor.shape) for name, tensor in _module(component).state_dict().items()}


def _module(component: Component) -> Any:
    from sdexport.families.modules import WRAPPERS

    try:
        return WRAPPERS[component.wrapper](component.config).eval()
    except ExportError:
        raise
    except Exception as error:  # diffusers and transformers raise many kinds of errors for a bad config
        raise ExportError(
            f"{component.name}: cannot create the network of {component.part}/config.json: {_cause(error)}"
        ) from error


def _trace(component: Component) -> ir.Model:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    names = [spec.name for spec in component.inputs]
    # a name with an operator, such as height*8, is none to the exporter; name_dimensions puts it back
    shapes = {
        spec.name: {axis: re.sub(r"\W", "_", dim) for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in component.inputs
    }
    # the exporter prints its progress, and its own calls cause deprecation warnings
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), FakeTensorMode():
        warnings.simplefilter("ignore")
        module = _module(component)
        feeds = component.example_feeds().items()
        try:
            program = torch.onnx.export(
                module,
                kwargs={name: torch.zeros(feed.shape, dtype=getattr(torch, str(feed.dtype))) for name, feed in feeds},
                input_names=names,
                output_names=[spec.name for spec in component.outputs],
                opset_version=OPSET,
                dynamic_shapes=shapes,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"{component.name}: torch.onnx.export failed: {_cause(error)}") from error
    assert program is not None
    return program.model


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().split("\n", 1)
    return f"{type(error).__name__}: {lines[0]}"


def weights_as_inputs(model: ir.Model, component: Component) -> None:
    """Turn the initialisers into inputs named as in the checkpoint, so that no optimiser needs their data."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        graph.initializers.pop(name)
        value.const_value = None
        value.name = name.removeprefix(_PREFIX)
        graph.inputs.append(value)


def fold_constants(model: ir.Model, component: Component) -> None:
    """Compute everything that follows from constants and static shapes; merge equal constants and equal nodes."""
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as available

    rules = [getattr(available, name) for name in _RULES if hasattr(available, name)]
    for _ in range(2):  # rules leave new constants, and folded constants let more rules match
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, rules)
    for merge in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    ):
        merge(model)


def crop_at_once(model: ir.Model, component: Component) -> None:
    """Merge the crop of an image's height and the crop of its width to one Slice."""
    graph = model.graph
    known = {"starts": [0, 0], "axes": [2, 3], "steps": [1, 1]}
    starts, axes, steps = (constant(graph, f"crop_{name}", numbers) for name, numbers in known.items())
    for last in list(graph):
        first = last.inputs[0].producer() if last.op_type == "Slice" and last.inputs[0] is not None else None
        if first is None or first.op_type != "Slice" or (_crop_axis(first), _crop_axis(last)) != (2, 3):
            continue
        if len(first.outputs[0].uses()) != 1:
            continue
        ends = ir.node("Concat", [first.inputs[2], last.inputs[2]], attributes={"axis": 0})
        crop = ir.node("Slice", [first.inputs[0], starts, ends.outputs[0], axes, steps])
        crop.outputs[0].type, crop.outputs[0].shape = last.outputs[0].type, last.outputs[0].shape
        graph.insert_before(last, [ends, crop])
        ir.convenience.replace_all_uses_with(last.outputs[0], crop.outputs[0])
        graph.remove([last, first], safe=True)
    common.NameFixPass()(model)


def _crop_axis(node: ir.Node) -> int | None:
    """Return the axis of a Slice that removes the end of one axis only."""
    starts, _, axes, *steps = (_numbers(value) for value in node.inputs[1:])
    return axes[0] if starts == [0] and axes is not None and len(axes) == 1 and steps in ([], [[1]]) else None


def _numbers(value: ir.Value | None) -> list[int] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy().tolist()


def drop_unused(model: ir.Model, component: Component) -> None:
    """Remove the nodes and weights that no output needs."""
    common.RemoveUnusedNodesPass()(model)
    graph, own = model.graph, len(component.inputs)
    kept = [value for value in graph.inputs[own:] if value.uses()]
    del graph.inputs[own:]
    graph.inputs.extend(kept)


def drop_metadata(model: ir.Model, component: Component) -> None:
    """Remove the exporter's metadata of every node (stack traces with this machine's paths)."""
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.name = component.name
    model.producer_name, model.producer_version = "sdexport", None


def name_dimensions(model: ir.Model, component: Component) -> None:
    """Give the dimensions of inputs and outputs the component's names; the tracer leaves formulas on the outputs."""
    graph, own = model.graph, len(component.inputs)
    for values, specs in ((graph.inputs[:own], component.inputs), (graph.outputs, component.outputs)):
        if [value.name for value in values] != [spec.name for spec in specs]:
            raise ExportError(
                f"{component.name}: the graph has {[value.name for value in values]}, not {[spec.name for spec in specs]}"
            )
        for value, spec in zip(values, specs, strict=True):
            _check_static(value, spec, component.name)
            value.shape = ir.Shape(spec.shape)


PASSES: tuple[Callable[[ir.Model, Component], None], ...] = (
    weights_as_inputs,
    fold_constants,
    crop_at_once,
    drop_unused,
    drop_metadata,
    name_dimensions,
)


def check(model: ir.Model, *, where: str) -> None:
    """Raise ExportError for an invalid graph: by the checker's rules, by type inference, or with operators foreign to ONNX.

    The model must not have large initialisers.
    """
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes() if node.domain})
    if foreign or model.functions:
        raise ExportError(f"{where}: operators that ONNX does not define: {', '.join(foreign) or 'functions'}")
    proto = ir.to_proto(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
        onnx.checker.check_model(inferred, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{where}: the graph is ill-typed: {error}") from error


def attach_weights(model: ir.Model, places: Mapping[str, Placed], *, data: str) -> None:
    """Turn the weights into initialisers, each at its place in the file `data` beside the model."""
    graph = model.graph
    weights = [value for value in graph.inputs if value.name in places]
    kept = [value for value in graph.inputs if value.name not in places]
    graph.inputs.clear()
    graph.inputs.extend(kept)
    for value in weights:
        name, place = _name(value), places[_name(value)]
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            data, place.offset, place.size, value.dtype, shape=value.shape, name=name, base_dir=""
        )
        graph.register_initializer(value)


def save(model: ir.Model, path: Path) -> None:
    """Write the graph, which refers to the data file beside it; the data is not read."""
    onnx.save(ir.to_proto(model), str(path))


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _static(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape.numpy())


def _check_static(value: ir.Value, spec: TensorSpec, where: str) -> None:
    shape = tuple(value.shape or ())
    for size, dim in zip(shape, spec.shape, strict=False):
        if len(shape) != len(spec.shape) or (isinstance(dim, int) and isinstance(size, int) and size != dim):
            raise ExportError(f"{where}.{spec.name}: traced as {shape}, but the config requires {spec.shape}")
