"""Compare the nodes of a component with the float32 graph of its checkpoint, up to the first that leaves the tolerance.

Both graphs come from one trace, so a tensor has the same name in both. A few outputs are marked at a time, in the order of the
nodes: this bounds the memory, and the walk ends at the first output that leaves the tolerance.

Runs in a separate process, as `python -m sdexport.verification.walk`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.building import Stage
from sdruntime.backends.base.feeds import fill_optional_inputs
from sdruntime.backends.ort.weights import lending_onnx
from sdruntime.backends.trt.library import FLAVOURS
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.errors import OutOfSpace, SdruntimeError
from sdruntime.system.events import finish
from sdruntime.system.process import Message, serve
from sdruntime.verification.golden import Case, read_golden
from sdruntime.verification.metrics import Difference
from sdruntime.verification.tolerance import Tolerance, tolerance_name
from sdruntime.verification.verify import component_faults

if TYPE_CHECKING:
    from sdexport.verification.layers import EngineLayers, OnnxLayers

AT_ONCE = 48  # marked outputs per run
_LARGEST = {"fp16": 65504.0}  # larger values, such as the −inf of a mask, are clipped before the comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkJob:
    """What to walk: the ONNX of a component, or the `engine` of that name and `backend`.

    `reference` is the path of the float32 graph, and `case` the reference case whose inputs are used.
    """

    bundle: str
    reference: str
    component: str
    case: str
    engine: str = ""
    backend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The first of `count` nodes that leaves the tolerance; `output` is empty if none does."""

    component: str
    case: str
    count: int
    engine: str = ""
    node: str = ""
    op: str = ""
    output: str = ""
    place: int = 0
    reason: str = ""

    def line(self) -> str:
        where = " ".join(filter(None, (self.component, self.engine, self.case)))
        if self.output:
            return (
                f"{where}: node {self.place} of {self.count} is the first to leave the tolerance: "
                f"{self.op} {self.node} -> {self.output}: {self.reason}"
            )
        if self.engine:
            return (
                f"{where}: all {self.count} nodes match as outputs, which TensorRT does not fuse: "
                "the fault is probably in a fused kernel"
            )
        return f"{where}: all {self.count} nodes match"


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an output does not match. Always false, which is how Polygraphy marks such an output."""

    reason: str

    def __bool__(self) -> bool:
        return False


def has_layers(engine: EngineSpec) -> bool:
    """Return whether an engine can be rebuilt with inner tensors as outputs."""
    return engine.backend in FLAVOURS


def walk(job: WalkJob) -> Generator[Stage, None, Finding]:
    """Return the first node that leaves the tolerance; yield the number of nodes that match so far.

    Raises LibraryMissing, and what building an engine raises.
    """
    from sdexport.verification.layers import EngineLayers, OnnxLayers

    bundle = Bundle.open(job.bundle)
    golden, _ = read_golden(bundle)
    component = bundle.manifest.components[job.component]
    case = next(case for case in golden.cases if (case.component, case.name) == (job.component, job.case))
    feeds = fill_optional_inputs(component, case.dims, case.feeds(component))
    ours, reference = OnnxLayers(bundle.folder / component.onnx), OnnxLayers(Path(job.reference))
    shared = {name: node for name, node in ours.nodes.items() if name in reference.nodes}
    if not job.engine:
        limits = golden.tolerances[bundle.manifest.precision], bundle.manifest.precision
        return (yield from _compare(job, shared, ours, reference, feeds, *limits))
    engine = next(engine for engine in bundle.manifest.engines if engine.name == job.engine)
    profile, feeds = _call_of(engine, case, feeds)
    with lending_onnx(bundle, component.files) as path:
        layers = EngineLayers(bundle, engine, path, profile=profile)
        shared = {name: node for name, node in shared.items() if name in layers.nodes}
        limits = golden.tolerances[tolerance_name(engine)], engine.precision
        return (yield from _compare(job, shared, layers, reference, feeds, *limits))


def _compare(
    job: WalkJob,
    nodes: Mapping[str, Any],
    ours: OnnxLayers | EngineLayers,
    reference: OnnxLayers,
    feeds: Mapping[str, Array],
    tolerance: Tolerance,
    precision: str,
) -> Generator[Stage, None, Finding]:
    from polygraphy.comparator import Comparator

    def faults(one: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, Fault]:
        """Return the outputs that do not match: Polygraphy computes statistics for every output that it gets."""
        reasons = ((name, _mismatch(array, other[name], tolerance, precision)) for name, array in one.items())
        return {name: Fault(reason) for name, reason in reasons if reason}

    names = list(nodes)
    finding = Finding(component=job.component, case=job.case, engine=job.engine, count=len(names))
    for first in range(0, len(names), AT_ONCE):
        yield Stage(name=f"{job.component} {job.engine}".strip(), done=first, total=len(names))
        marked = names[first : first + AT_ONCE]
        results = Comparator.run([ours.runner(marked), reference.runner(marked)], data_loader=[feeds])
        (compared,) = Comparator.compare_accuracy(results, compare_func=faults)
        ((differing,),) = compared.values()  # one pair of runners, run once
        if differing:
            name = min(differing, key=names.index)
            node, place = nodes[name], names.index(name) + 1
            return dataclasses.replace(
                finding, node=node.name or name, op=node.op_type, output=name, place=place, reason=differing[name].reason
            )
    return finding


def _call_of(engine: EngineSpec, case: Case, feeds: Mapping[str, Array]) -> tuple[int, dict[str, Array]]:
    """Return the profile of an engine that admits a case's sizes, and the inputs repeated to a batch that it admits."""
    profile = engine.admitting(**{name: size for name, size in case.dims.items() if name != "batch"})[0]
    low, _, high = engine.profiles[profile]["batch"]
    rows = min(max(case.dims["batch"], low), high)
    return profile, {name: np.resize(array, (rows, *array.shape[1:])) for name, array in feeds.items()}


def _mismatch(array: Array, reference: Array, tolerance: Tolerance, precision: str) -> str:
    """Return why an output leaves the tolerance; "" if it does not."""
    if array.dtype.kind != "f" or reference.dtype.kind != "f":
        return ""
    if array.shape != reference.shape:
        return f"shape {list(array.shape)}, not {list(reference.shape)}"
    limit = _LARGEST.get(precision, np.inf)
    ours, reference = (np.clip(values.astype(np.float64), -limit, limit) for values in (array, reference))
    if not np.isfinite(reference).all():  # a mask of −inf; the tensors that depend on it are finite
        return ""
    if not np.isfinite(ours).all():
        return f"{np.count_nonzero(~np.isfinite(ours)):,} of {ours.size:,} numbers are NaN or infinite"
    if ours.size == 0:
        return ""
    return "; ".join(component_faults(Difference.of(ours, reference, float(np.abs(reference).max())), tolerance))


def prepare_polygraphy(backend: str) -> None:
    """Set the environment that Polygraphy reads when it is imported: which TensorRT it uses, and where libcudart is.

    It searches LD_LIBRARY_PATH and the wheel of CUDA 12; the wheel of CUDA 13 has another folder.
    """
    flavour = FLAVOURS.get(backend)
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(flavour is not None and flavour.ahead))
    wheels = [str(folder) for place in sys.path for folder in sorted(Path(place).glob("nvidia/cu[0-9]*/lib"))]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (os.environ.get("LD_LIBRARY_PATH"), *wheels)))


def _work(job: Message, send: Callable[[Message], None]) -> Message:
    prepare_polygraphy(job["backend"])
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    return dataclasses.asdict(finish(walk(WalkJob(**job)), lambda stage: send(dataclasses.asdict(stage))))


if __name__ == "__main__":
    serve(_work, errors=(SdruntimeError,), memory=OutOfSpace("out of memory: free some, or verify on a larger machine"))
