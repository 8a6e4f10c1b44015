"""One component as a float32 ONNX graph without numbers: its weights are inputs of the graph, after the component's own.

A module made under fake tensors has shapes and no data, so a trace takes the memory of the graph alone, and depends on the
config and never on the weights: two checkpoints of one architecture share it. `attach_weights` makes the weights initialisers
again, with their data in a file beside the model.

A pass is a plain function that changes a model by one rule. What leaves here is ONNX's own operators only, opset 20.
"""

from __future__ import annotations

import io
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
from sdruntime.bundle.manifest import TensorSpec

OPSET = 20
_OWN = "weights."  # what the wrappers of sdexport.families.modules put before the names of the checkpoint
# those of onnxscript's rewritings that change something in these networks. Its full set holds slice_split_rule too, which looks
# through the whole graph for each of its nodes: three quarters of the optimiser's time for SD1.5, and more for SDXL
_REWRITINGS = (
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
    """Trace a component. Raises ExportError when the exporter or the checker refuses it."""
    model = _traced(component)
    for apply in PASSES:
        apply(model, component)
    check(model, where=component.name)
    return model


def weight_shapes(model: ir.Model, component: Component) -> dict[str, tuple[int, ...]]:
    """The weights that a graph takes as inputs, by the checkpoint's names."""
    own = {spec.name for spec in component.inputs}
    return {_name(value): _static(value) for value in model.graph.inputs if value.name not in own}


def module_shapes(component: Component) -> dict[str, tuple[int, ...]]:
    """The weights of the component's module, by the checkpoint's names. Loads torch."""
    import torch

    with torch.device("meta"):
        return {name.removeprefix(_OWN): tuple(tensor.shape) for name, tensor in _module(component).state_dict().items()}


def _module(component: Component) -> Any:
    from sdexport.families.modules import WRAPPERS

    try:
        return WRAPPERS[component.wrapper](component.config).eval()
    except ExportError:
        raise
    except Exception as error:  # diffusers and transformers raise what they like for a config that they cannot build
        raise ExportError(f"{component.name}: no network can be made of {component.part}/config.json: {_cause(error)}") from error


def _traced(component: Component) -> ir.Model:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    names = [spec.name for spec in component.inputs]
    shapes = {spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in component.inputs}
    # the exporter prints its progress, and warns of its own deprecated calls
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
    """Initialisers become inputs, named as in the checkpoint: then no optimiser looks for their numbers."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        graph.initializers.pop(name)
        value.const_value = None
        value.name = name.removeprefix(_OWN)
        graph.inputs.append(value)


def fold_constants(model: ir.Model, component: Component) -> None:
    """What follows from constants and static shapes is computed now; equal constants and equal nodes are merged."""
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as known

    rules = [getattr(known, name) for name in _REWRITINGS if hasattr(known, name)]
    for _ in range(2):  # a rewriting leaves new constants, and a constant lets a rewriting match
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, rules)
    for merge in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    ):
        merge(model)


def drop_unused(model: ir.Model, component: Component) -> None:
    """Nodes and weights that no output needs go."""
    common.RemoveUnusedNodesPass()(model)
    graph, own = model.graph, len(component.inputs)
    kept = [value for value in graph.inputs[own:] if value.uses()]
    del graph.inputs[own:]
    graph.inputs.extend(kept)


def drop_metadata(model: ir.Model, component: Component) -> None:
    """The exporter's notes on every node (stack traces with this machine's paths) go."""
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.name = component.name
    model.producer_name, model.producer_version = "sdexport", None


def name_dimensions(model: ir.Model, component: Component) -> None:
    """Inputs and outputs get the names that the table gives their dimensions; the tracer leaves formulas on the outputs."""
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
    drop_unused,
    drop_metadata,
    name_dimensions,
)


def check(model: ir.Model, *, where: str) -> None:
    """Refuse a graph that is not sound: the checker's rules, every type of every node inferred, and foreign operators.

    Raises ExportError. The model must hold no large initialisers.
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
    """Weights become initialisers, each at its place in the file `data` beside the model."""
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
    """Write the graph; data that lies in a file beside it is referred to, not read."""
    onnx.save(ir.to_proto(model), str(path))


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _static(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape.numpy())


def _check_static(value: ir.Value, spec: TensorSpec, where: str) -> None:
    found = tuple(value.shape or ())
    for size, dim in zip(found, spec.shape, strict=False):
        if len(found) != len(spec.shape) or (isinstance(dim, int) and isinstance(size, int) and size != dim):
            raise ExportError(f"{where}.{spec.name}: traced as {found}, but the config makes it {spec.shape}")
