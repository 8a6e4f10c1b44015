"""A component's float32 graph, run in ONNX Runtime with measurements built into it: memory stays that of the plain graph.

`magnitudes` adds a reduction behind every value, so that each leaves one number and no activation is kept. `Rounding` adds a
switch to every node: a run rounds the outputs, inputs and weights of just those nodes that are switched on, as the graph in half
precision would, and computes in float32, as the CPU's kernels do. So a set of nodes is tried without making a graph of it, in
bfloat16 too, which ONNX Runtime has no CPU kernels for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sdexport.errors import EnvironmentFault, ExportError
from sdexport.precision import TYPES, filler, free_nodes, logits, lowered, takes_half
from sdexport.weights import Array, largest
from sdruntime.manifest import Precision

_SWITCHES = "sdexport.switches"
_STATISTICS = "sdexport.statistics"


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """A component's inputs, and where they come from: a prompt and a step, for a person."""

    label: str
    arrays: Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How near outputs are to the reference's: the worst of them. NaN and infinities are as far as can be."""

    cosine: float
    psnr: float  # dB; the peak is the range of the reference's output

    def within(self, other: Likeness) -> bool:
        return self.cosine >= other.cosine and self.psnr >= other.psnr


NOTHING = Likeness(cosine=-1.0, psnr=-np.inf)
SAME = Likeness(cosine=1.0, psnr=200.0)  # the most that is told, also of equal outputs


def likeness(reference: Sequence[Array], found: Sequence[Array]) -> Likeness:
    """The worst likeness of a component's outputs."""
    worst = SAME
    for expected, output in zip(reference, found, strict=True):
        if not np.isfinite(output).all():
            return NOTHING
        one, other = expected.astype(np.float64).ravel(), output.astype(np.float64).ravel()
        error = float(np.sqrt(np.mean((one - other) ** 2)))
        if error == 0:
            continue
        span = float(one.max() - one.min()) or float(np.abs(one).max())
        lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
        cosine = float(one @ other) / lengths if lengths else 0.0
        psnr = 20 * float(np.log10(span / error)) if span else -np.inf
        worst = Likeness(cosine=min(worst.cosine, cosine), psnr=min(worst.psnr, psnr))
    return worst


def distance(reference: Sequence[Array], found: Sequence[Array]) -> float:
    """The relative error (root mean square) of the worst output; infinite where one is not finite."""
    worst = 0.0
    for expected, output in zip(reference, found, strict=True):
        if not np.isfinite(output).all():
            return float(np.inf)
        one, other = expected.astype(np.float64), output.astype(np.float64)
        scale = float(np.linalg.norm(one)) or 1.0
        worst = max(worst, float(np.linalg.norm(one - other)) / scale)
    return worst


def magnitudes(path: Path, feeds: Sequence[Feed], *, where: str) -> dict[str, float]:
    """The largest magnitude of every float32 value of the graph in `path`, over all feeds; of logits and masks, the largest
    number (what is below does not matter to a softmax).

    Raises ExportError for numbers that are not finite: the first such node, and the feed.
    """
    model = ir.load(path)
    graph, ends = model.graph, logits(model.graph)
    inputs = [value for value in graph.inputs if value.dtype == ir.DataType.FLOAT]
    floats = inputs + [value for node in graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    build = _Builder(graph)
    rows = []
    for value in floats:
        sizes = value if value in ends else build.at(value, "Abs", [value])
        unsound = build.at(value, "Cast", [build.at(value, "IsNaN", [value], ir.DataType.BOOL)], to=ir.DataType.FLOAT)
        rows += [build.at(value, "ReduceMax", [each], keepdims=0) for each in (sizes, unsound)]
    columns = [build.last("Reshape", [row, build.constant(np.array([1]))]) for row in rows]
    graph.outputs.append(build.last("Concat", columns, name=_STATISTICS, axis=0))
    found: dict[str, float] = {}
    with _session(model, path) as session:
        for feed in feeds:
            numbers = session.run([_STATISTICS], dict(feed.arrays))[0].reshape(-1, 2)
            for value, (size, unsound) in zip(floats, numbers.tolist(), strict=True):
                wrong = size == np.inf or np.isnan(size)
                if unsound or wrong:
                    raise ExportError(_unsound(value, "NaN" if unsound else "infinity", where, feed.label))
                name = str(value.name)
                found[name] = max(found.get(name, -np.inf), size)
    return {name: max(size, 0.0) for name, size in found.items()}


def _unsound(value: ir.Value, what: str, where: str, label: str) -> str:
    producer = value.producer()
    node = f"input {value.name}" if producer is None else f"node {producer.name} ({producer.op_type})"
    return (
        f"{where}: {node} gives {what} in float32 already, at {label}: no precision mends that; "
        "check the checkpoint's weights (a damaged download, a broken merge)"
    )


class Rounding:
    """The graph of `path` with a switch for each node that has a choice, open in ONNX Runtime; a context."""

    def __init__(self, path: Path, precision: Precision) -> None:
        self.model = ir.load(path)
        self.precision, self.path = precision, path
        self.nodes = free_nodes(self.model.graph, precision)
        self.names = [str(node.name) for node in self.nodes]
        self.outputs = [str(value.name) for value in self.model.graph.outputs]
        self._switch()
        self._stack = contextlib.ExitStack()
        self._session: Any = None

    def __enter__(self) -> Rounding:
        self._session = self._stack.enter_context(_session(self.model, self.path))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._session = None
        self._stack.close()

    def run(self, feed: Feed, half: Collection[str]) -> list[Array]:
        """The outputs where the nodes of these names are in half precision, and no others."""
        switches = np.isin(self.names, list(half))
        return list(self._session.run(self.outputs, {**feed.arrays, _SWITCHES: switches}))

    def _switch(self) -> None:
        graph = self.model.graph
        switches = ir.Value(name=_SWITCHES, shape=ir.Shape([len(self.nodes)]), type=ir.TensorType(ir.DataType.BOOL))
        graph.inputs.append(switches)
        build, ends = _Builder(graph), logits(graph)
        on = {
            node: build.first("Gather", [switches, build.constant(np.array(index))], ir.DataType.BOOL)
            for index, node in enumerate(self.nodes)
        }
        makers = [value for node in list(graph) for value in node.outputs]
        weights = [value for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
        for value in [*graph.inputs, *weights, *makers]:
            producer = value.producer()
            users = [(user, index) for user, index in value.uses() if value.dtype == ir.DataType.FLOAT]
            own = None if producer is None else on.get(producer)
            switched = [(user, index) for user, index in users if user in on and takes_half(user, index, self.precision)]
            if own is None and not switched:
                continue
            rounded = self._rounded(build, value, mask=value in ends)
            plain = value
            if own is not None and (len(switched) < len(users) or value in graph.outputs):
                plain = build.at(value, "Where", [own, rounded, value])
            for user, index in users:
                if (user, index) not in switched:
                    user.replace_input_with(index, plain)
                    continue
                switch = on[user] if own is None else build.at(value, "Or", [own, on[user]], ir.DataType.BOOL)
                user.replace_input_with(index, build.at(value, "Where", [switch, rounded, value]))
            for index, output in enumerate(graph.outputs):
                if output is value and plain is not value:
                    plain.name, value.name = value.name, f"{value.name}.unrounded"
                    graph.outputs[index] = plain

    def _rounded(self, build: _Builder, value: ir.Value, *, mask: bool) -> ir.Value:
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor):
            numbers, _ = lowered(value.const_value.numpy(), self.precision, mask=mask)
            return build.constant(numbers.astype(np.float32))
        producer = value.producer()
        if producer is not None and producer.op_type == "ConstantOfShape":
            fill, _ = lowered(filler(producer), self.precision, mask=mask)
            if np.isfinite(fill).all():  # what is below the precision is filled in as its lowest
                least = build.constant(np.array(-largest(self.precision), np.float32))
                value = build.at(value, "Max", [value, least])
        low = build.at(value, "Cast", [value], TYPES[self.precision], to=TYPES[self.precision])
        return build.at(value, "Cast", [low], to=ir.DataType.FLOAT)


class _Builder:
    """Nodes put into a graph, each with one output of a name of its own.

    Places matter: the session runs the nodes in the order of the file, and frees a value after its last use.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.count = graph, 0
        self.order = {node: index for index, node in enumerate(graph)}
        self.anchors: dict[ir.Node, ir.Node] = {}  # what was put behind a node last

    def constant(self, numbers: Array) -> ir.Value:
        tensor = ir.tensor(numbers, name=self._name())
        value = ir.Value(name=tensor.name, shape=ir.Shape(numbers.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def at(self, value: ir.Value, op: str, inputs: Sequence[ir.Value], kind: Any = ir.DataType.FLOAT, **options: Any) -> ir.Value:
        """A node behind what makes `value`; for an input or a weight, before the first that takes it."""
        node, producer = self._node(op, inputs, kind, **options), value.producer()
        if producer is not None:
            self.graph.insert_after(self.anchors.get(producer, producer), node)
            self.anchors[producer] = node
        else:
            takers = [user for user, _ in value.uses() if user in self.order]
            self.graph.insert_before(min(takers, key=self.order.__getitem__, default=self.graph[-1]), node)
        return node.outputs[0]

    def first(self, op: str, inputs: Sequence[ir.Value], kind: Any) -> ir.Value:
        node = self._node(op, inputs, kind)
        self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]

    def last(self, op: str, inputs: Sequence[ir.Value], *, name: str | None = None, **options: Any) -> ir.Value:
        node = self._node(op, inputs, ir.DataType.FLOAT, **options)
        if name:
            node.outputs[0].name = name
        self.graph.append(node)
        return node.outputs[0]

    def _node(self, op: str, inputs: Sequence[ir.Value], kind: Any, **options: Any) -> ir.Node:
        name = self._name()
        attributes = [ir.AttrInt64(key, int(number)) for key, number in options.items()]
        out = ir.Value(name=name, type=ir.TensorType(kind))
        return ir.Node("", op, list(inputs), attributes, outputs=[out], name=name)

    def _name(self) -> str:
        self.count += 1
        return f"sdexport.measure.{self.count}"


@contextlib.contextmanager
def _session(model: ir.Model, beside: Path) -> Iterator[Any]:
    """The changed model, open: it refers to the same weights as `beside`, and runs node by node as it is written."""
    staged = beside.with_name("measured.onnx")
    onnx.save(ir.to_proto(model), str(staged))
    try:
        session = session_of(staged, plain=True)
        yield session
    finally:
        staged.unlink()


def session_of(path: Path, *, plain: bool = False) -> Any:
    """A CPU session. `plain`: no node is fused or moved, so that roundings stay where they are. Raises EnvironmentFault."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EnvironmentFault(MISSING.format(error)) from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # that of the file
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


MISSING = (
    "half precision is audited by running the graph in ONNX Runtime, which cannot be imported ({}): pip install onnxruntime, "
    "or build with --no-audit"
)
