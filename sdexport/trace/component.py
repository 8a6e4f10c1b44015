"""The making of one component: trace (or the trace kept from before), precision, weights; a folder with its ONNX.

A job is data, so that a process of its own can be given it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdexport.checkpoint.bounds import at_most
from sdexport.checkpoint.folder import Checkpoint, read_checkpoint
from sdexport.checkpoint.names import match_weights
from sdexport.checkpoint.safetensors import StoredTensor
from sdexport.checkpoint.unpickle import convert_pickles
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
    """`component` of the checkpoint in `checkpoint`, written to the existing folder `out`.

    `full`: in float32, of the weights that `precision` takes (a checkpoint may have others for fp16). `reference`: the bundle of
    such components that was probed, by which half precision is audited; "" for no audit.
    """

    checkpoint: str
    component: str
    precision: Precision
    allow_pickle: bool
    out: str
    full: bool = False
    first: bool = False  # of an export: the weights of all components are checked before anything is made
    reference: str = ""

    @property
    def written(self) -> Precision:
        return "fp32" if self.full else self.precision


def run(job: ComponentJob) -> Iterator[Stage]:
    """Make the component. Raises SdexportError, and sdruntime's OutOfSpace."""
    out = Path(job.out)
    if job.component == PROBE:
        from sdexport.precision.probe import probe

        yield Stage(name="probe")
        probe(out)
        return
    with disk_full_as_error(out):
        checkpoint = read_checkpoint(
            Path(job.checkpoint), name=job.component, precision=job.precision, allow_pickle=job.allow_pickle
        )
        table = components(checkpoint)
        component = next(component for component in table if component.name == job.component)
        if job.first:
            yield Stage(name="check")
            check_weights(checkpoint, table)
        part = checkpoint.parts[component.part]
        loose = out / "unpickled.safetensors"
        stored = convert_pickles(part.files, loose) if part.pickled else part.weights
        yield from _made(component, stored, job, out)
        loose.unlink(missing_ok=True)


def check_weights(checkpoint: Checkpoint, table: Sequence[Component]) -> None:
    """Raise ExportError where weights do not fit the configs, for all components at once.

    Pickled weights have no headers: the job of their component checks them.
    """
    faults = []
    for component in table:
        part = checkpoint.parts[component.part]
        if not part.pickled:
            try:
                match_weights(_shapes(component), part.weights, where=component.name)
            except ExportError as error:
                faults.append(str(error))
    if faults:
        raise ExportError("\n".join(faults))


def _shapes(component: Component) -> Mapping[str, tuple[int, ...]]:
    """What a component's weights are called and their shapes, of the trace that was kept, else of its module."""
    from sdexport.trace import to_onnx

    kept = load_trace(trace_key(component))
    if kept is None:
        return to_onnx.module_shapes(component)
    import onnx
    import onnx_ir as ir

    return to_onnx.weight_shapes(ir.from_proto(onnx.load_from_string(kept)), component)


def _made(component: Component, stored: Mapping[str, StoredTensor], job: ComponentJob, out: Path) -> Iterator[Stage]:
    key = trace_key(component)
    kept = load_trace(key)
    yield Stage(name="trace" if kept is None else "kept trace")
    import onnx
    import onnx_ir as ir

    from sdexport.trace import to_onnx

    if kept is None:
        # before the long work: do the weights fit?
        with at_most(len(stored), where=component.name):
            shapes = to_onnx.module_shapes(component)
        match_weights(shapes, stored, where=component.name)
        model = to_onnx.onnx_from_component(component)
        store_trace(key, ir.to_proto(model).SerializeToString())
    else:
        model = ir.from_proto(onnx.load_from_string(kept))
    if not job.reference:
        size = yield from _written(model, component, stored, job, out, frozenset())
        yield Stage(name="done", done=size, total=size)
        return
    from sdexport.errors import AuditError
    from sdexport.precision.audit import audit, confirm
    from sdexport.precision.probe import load_activations

    reference, traced = Path(job.reference) / component.name, ir.to_proto(model)
    seen, fault = load_activations(reference), None
    yield Stage(name="audit")
    for found in audit(reference / MODEL, seen, job.precision):
        keep = frozenset(node.node for node in found.kept)
        size = yield from _written(ir.from_proto(traced), component, stored, job, out, keep)
        yield Stage(name="confirm")
        try:
            confirm(out / MODEL, seen.feeds, job.precision, where=component.name)
        except AuditError as error:  # the next choice is wider
            fault = error
            yield Stage(name="audit")
            continue
        (out / AUDIT).write_text(json.dumps(json_from_record(found)), encoding="utf-8")
        yield Stage(name="done", done=size, total=size)
        return
    assert fault is not None
    raise fault


def _written(
    model: ir.Model, component: Component, stored: Mapping[str, StoredTensor], job: ComponentJob, out: Path, keep: frozenset[str]
) -> Generator[Stage, None, int]:
    """The graph in its precision, around the nodes of `keep`, and its weights. Returns the bytes that were read for them."""
    import onnx

    from sdexport.precision.rewrite import apply_precision
    from sdexport.trace import to_onnx
    from sdexport.trace.data_file import write_data

    yield Stage(name="precision")
    precision_of = apply_precision(model, job.written, inputs=[spec.name for spec in component.inputs], keep=keep)
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
    to_onnx.save(model, out / MODEL)
    onnx.checker.check_model(str(out / MODEL), full_check=True)
    return done
