"""Which node of a component's ONNX is the first whose output leaves the tolerance: it beside the float32 graph of its checkpoint.

Both graphs come of one trace, so a value has the same name in both. Outputs are marked some at a time, in the order of the nodes,
and both graphs are run by ONNX Runtime without its optimiser: memory is that of the marked outputs, and the walk ends where the
first one is too far away.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdexport.checkpoint.folder import Checkpoint
from sdexport.trace.component import MODEL, ComponentJob
from sdexport.trace.process import run_job
from sdruntime.arrays import Array
from sdruntime.backends.ort.build import library
from sdruntime.bundle.bundle import Bundle
from sdruntime.system.events import finish
from sdruntime.verification.golden import Case, read_golden
from sdruntime.verification.metrics import Difference
from sdruntime.verification.tolerance import Tolerance
from sdruntime.verification.verify import component_faults

AT_ONCE = 48  # marked outputs of a run
_LARGEST = {"fp16": 65504.0}  # beyond which a mask's −inf need not agree


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The first node that leaves the tolerance; `node` empty: none of `count` does."""

    component: str
    case: str
    count: int
    node: str = ""
    op: str = ""
    output: str = ""
    place: int = 0
    reason: str = ""

    def line(self) -> str:
        if not self.node:
            return f"{self.component} {self.case}: all of {self.count} nodes hold"
        return (
            f"{self.component} {self.case}: node {self.place} of {self.count} is the first to leave the tolerance: "
            f"{self.op} {self.node} -> {self.output}: {self.reason}"
        )


def bisect(bundle: Bundle, checkpoint: Checkpoint, component: str, *, allow_pickle: bool = False) -> Finding:
    """Walk the nodes of a component's ONNX. Raises LibraryMissing without ONNX Runtime."""
    library()
    golden, _ = read_golden(bundle)
    case = next(case for case in golden.cases if case.component == component)
    with tempfile.TemporaryDirectory() as scratch:
        job = ComponentJob(
            checkpoint=str(checkpoint.folder),
            component=component,
            precision="fp32",
            allow_pickle=allow_pickle,
            out=scratch,
        )
        finish(run_job(job))
        ours, reference = bundle.folder / bundle.manifest.components[component].onnx, Path(scratch) / MODEL
        tolerance, precision = golden.tolerances[bundle.manifest.precision], bundle.manifest.precision
        return _walked(ours, reference, case, case.feeds(bundle.manifest.components[component]), tolerance, precision)


def _walked(ours: Path, reference: Path, case: Case, feeds: dict[str, Array], tolerance: Tolerance, precision: str) -> Finding:
    import onnx

    models = [onnx.load(str(path), load_external_data=False) for path in (ours, reference)]
    known = {name for node in models[1].graph.node for name in node.output}
    nodes = [node for node in models[0].graph.node if node.output[0] in known]
    count = len(nodes)
    for first in range(0, count, AT_ONCE):
        marked = nodes[first : first + AT_ONCE]
        names = [node.output[0] for node in marked]
        found = [_outputs(model, path.parent, names, feeds) for model, path in zip(models, (ours, reference), strict=True)]
        for place, (node, one, other) in enumerate(zip(marked, *found, strict=True), start=first + 1):
            reason = _apart(one, other, tolerance, precision)
            if reason:
                return Finding(
                    component=case.component,
                    case=case.name,
                    count=count,
                    node=node.name,
                    op=node.op_type,
                    output=node.output[0],
                    place=place,
                    reason=reason,
                )
    return Finding(component=case.component, case=case.name, count=count)


def _outputs(model: Any, folder: Path, names: Sequence[str], feeds: dict[str, Array]) -> Iterator[Array]:
    """The values of these names in a graph."""
    import onnx

    ort = library()
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    del marked.graph.output[:]
    marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(marked.SerializeToString(), options, providers=["CPUExecutionProvider"])
    yield from session.run(list(names), feeds)


def _apart(one: Array, other: Array, tolerance: Tolerance, precision: str) -> str:
    if other.dtype.kind != "f" or one.dtype.kind != "f":
        return ""
    if one.shape != other.shape:
        return f"shape {list(one.shape)}, not {list(other.shape)}"
    limit = _LARGEST.get(precision, np.inf)
    ours, reference = (np.clip(each.astype(np.float64), -limit, limit) for each in (one, other))
    if not np.isfinite(reference).all():  # a mask of −inf; whatever follows from it is finite
        return ""
    if not np.isfinite(ours).all():
        return f"{np.count_nonzero(~np.isfinite(ours)):,} of {ours.size:,} numbers are NaN or infinite"
    if ours.size == 0:
        return ""
    return "; ".join(component_faults(Difference.of(ours, reference, float(np.abs(reference).max())), tolerance))
