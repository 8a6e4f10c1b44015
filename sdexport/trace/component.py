"""Export one component: trace it (or load the cached trace), rewrite its precision, and write its ONNX with the weights.

A job is plain data, so that it can be sent to another process.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdexport.checkpoint.checkpoint import Checkpoint, read_checkpoint
from sdexport.checkpoint.overrides import NO_OVERRIDES, Overrides
from sdexport.checkpoint.weights.bounds import at_most
from sdexport.checkpoint.weights.names import match_weights
from sdexport.checkpoint.weights.safetensors import StoredTensor
from sdexport.errors import ExportError
from sdexport.families.components import Component, components
from sdexport.trace.cache import load_trace, store_trace, trace_key
from sdruntime.backends.base.building import Stage
from sdruntime.bundle.bundle import disk_full_as_error
from sdruntime.bundle.manifest import Precision
from sdruntime.bundle.records import json_from_record

if TYPE_CHECKING:
    import onnx_ir as ir

MODEL, DATA = "model.onnx", "model.onnx.data"

PROBE = "probe"  # instead of a component: generate with the float32 bundle, to record the inputs of its components
AUDIT = "audit.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentJob:
    """Export `component` of the checkpoint `checkpoint` to the existing folder `out`.

    With `full`, write float32 from the weight files of `precision` (a checkpoint may have others for fp16). `reference` is the
    probed bundle of such components against which half precision is audited; "" means no audit.
    """

    checkpoint: str
    component: str
    precision: Precision
    allow_pickle: bool
    out: str
    overrides: Overrides = NO_OVERRIDES
    full: bool = False
    first: bool = False  # the first job of an export checks the weights of all components
    reference: str = ""

    @property
    def written(self) -> Precision:
        return "fp32" if self.full else self.precision


def run(job: ComponentJob) -> Iterator[Stage]:
    """Run the job, yielding its stages. Raises SdexportError, and sdruntime's OutOfSpace."""
    out = Path(job.out)
    if job.component == PROBE:
        from sdexport.precision.probe import PARTS, probe

        yield Stage(name="probe", total=PARTS)
        for done in probe(out):
            yield Stage(name="probe", done=done, total=PARTS)
        return
    with disk_full_as_error(out):
        checkpoint = read_checkpoint(
            Path(job.checkpoint),
            name=job.component,
            precision=job.precision,
            allow_pickle=job.allow_pickle,
            overrides=job.overrides,
        )
        table = components(checkpoint)
        component = next(component for component in table if component.name == job.component)
        if job.first:
            yield Stage(name="check")
            check_weights(checkpoint, table)
        yield from _export(component, checkpoint.parts[component.part].weights, job, out)


def check_weights(checkpoint: Checkpoint, table: Sequence[Component]) -> None:
    """Raise ExportError with the faults of all components whose weights do not fit their configs."""
    faults = []
    for component in table:
        try:
            match_weights(_shapes(component), checkpoint.parts[component.part].weights, where=component.name)
        except ExportError as error:
            faults.append(str(error))
    if faults:
        raise ExportError("\n".join(faults))


def _shapes(component: Component) -> Mapping[str, tuple[int, ...]]:
    """Return the names and shapes of a component's weights, from the cached trace or else from its module."""
    from sdexport.trace import to_onnx

    cached = load_trace(trace_key(component))
    if cached is None:
        return to_onnx.module_shapes(component)
    import onnx
    import onnx_ir as ir

    return to_onnx.weight_shapes(ir.from_proto(onnx.load_from_string(cached)), component)


def _export(component: Component, stored: Mapping[str, StoredTensor], job: ComponentJob, out: Path) -> Iterator[Stage]:
    key = trace_key(component)
    cached = load_trace(key)
    yield Stage(name="trace" if cached is None else "kept trace")
    import onnx
    import onnx_ir as ir

    from sdexport.trace import to_onnx
    from sdexport.trace.optional_inputs import add_optional_inputs

    if cached is None:
        # check that the weights fit before the long work
        with at_most(len(stored), where=component.name):
            shapes = to_onnx.module_shapes(component)
        match_weights(shapes, stored, where=component.name)
        model = to_onnx.onnx_from_component(component)
        store_trace(key, ir.to_proto(model).SerializeToString())
    else:
        model = ir.from_proto(onnx.load_from_string(cached))
    model.graph.name = component.name
    add_optional_inputs(model, component)
    if not job.reference:
        size = yield from _write(model, component, stored, job, out, frozenset())
        yield Stage(name="done", done=size, total=size)
        return
    from sdexport.errors import AuditError
    from sdexport.precision.audit import audit, confirm
    from sdexport.precision.probe import load_activations

    reference, traced = Path(job.reference) / component.name, ir.to_proto(model)
    activations, fault = load_activations(reference), None
    yield Stage(name="audit")
    for choice in audit(reference / MODEL, activations, job.precision):
        keep = frozenset(node.node for node in choice.kept)
        size = yield from _write(ir.from_proto(traced), component, stored, job, out, keep)
        yield Stage(name="confirm")
        try:
            confirm(out / MODEL, activations.feeds, job.precision, where=component.name)
        except AuditError as error:  # the next choice keeps more nodes
            fault = error
            yield Stage(name="audit")
            continue
        (out / AUDIT).write_text(json.dumps(json_from_record(choice)), encoding="utf-8")
        yield Stage(name="done", done=size, total=size)
        return
    assert fault is not None
    raise fault


def _write(
    model: ir.Model, component: Component, stored: Mapping[str, StoredTensor], job: ComponentJob, out: Path, keep: frozenset[str]
) -> Generator[Stage, None, int]:
    """Write the graph in its precision, except the nodes `keep`, and its weights; return the bytes read for them."""
    import onnx

    from sdexport.precision.rewrite import apply_precision
    from sdexport.trace import to_onnx
    from sdexport.trace.data_file import write_data
    from sdexport.trace.optional_inputs import add_defaults

    yield Stage(name="precision")
    precision_of = apply_precision(model, job.written, inputs=[spec.name for spec in component.engine_inputs], keep=keep)
    to_onnx.check(model, where=component.name)
    weights = match_weights(to_onnx.weight_shapes(model, component), stored, where=component.name)
    total, done = sum(tensor.size for tensor in weights.values()), 0
    yield Stage(name="weights", done=0, total=total)
    with (out / DATA).open("wb") as file:
        write = write_data(file, weights, precision_of)
        places = {}
        for name, place, size in write:
            places[name] = place
            done += size
            yield Stage(name="weights", done=done, total=total)
    to_onnx.attach_weights(model, places, data=DATA)
    add_defaults(model, component)
    to_onnx.save(model, out / MODEL)
    onnx.checker.check_model(str(out / MODEL), full_check=True)
    return done
