"""A component's float32 graph, run in ONNX Runtime with its values measured: memory stays that of the plain graph.

Reductions stand behind every value, so that each leaves a few numbers and no activation is kept. They read a value once and make
no copy of it: a run takes little longer than the plain one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sdexport.checkpoint.safetensors import Array
from sdexport.errors import EnvironmentFault, ExportError
from sdexport.precision.rewrite import logits
from sdruntime.verification.metrics import EQUAL, Difference

_SAME_NUMBERS = ("Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """A component's inputs, where they come from (a prompt and a step, for a person), and what float32 makes of them."""

    label: str
    arrays: Mapping[str, Array]
    outputs: tuple[Array, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """What a component was fed. `sizes`: the largest magnitude of every float32 value of its graph; of logits and masks, the
    largest number (what is below does not matter to a softmax)."""

    feeds: tuple[Feed, ...]
    sizes: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How near outputs are to the reference's: the worst of them. NaN and infinities are as far as can be."""

    cosine: float
    psnr: float  # dB; the peak is the range of the reference's output

    def within(self, other: Likeness) -> bool:
        return self.cosine >= other.cosine and self.psnr >= other.psnr

    def worse(self, other: Likeness) -> Likeness:
        return Likeness(cosine=min(self.cosine, other.cosine), psnr=min(self.psnr, other.psnr))

    @property
    def error(self) -> float:
        """Root mean square, as a part of the range of the reference's output."""
        return 0.0 if self.psnr == EQUAL else float(10 ** (-self.psnr / 20))


NOTHING = Likeness(cosine=-1.0, psnr=-np.inf)
SAME = Likeness(cosine=1.0, psnr=EQUAL)


def likeness(reference: Sequence[Array], found: Sequence[Array]) -> Likeness:
    """The worst likeness of a component's outputs."""
    worst = SAME
    for expected, output in zip(reference, found, strict=True):
        if not np.isfinite(output).all():
            return NOTHING
        span = float(expected.max() - expected.min()) or float(np.abs(expected).max())
        apart = Difference.of(output, expected, span)
        worst = worst.worse(Likeness(cosine=apart.cosine, psnr=apart.psnr))
    return worst


class Measuring:
    """The graph of `path`, open in ONNX Runtime with its values measured over all runs. `where` names it in errors."""

    def __init__(self, path: Path, *, where: str) -> None:
        model = ir.load(path)
        graph, self.where = model.graph, where
        self._ends = {str(value.name) for value in logits(graph)}
        inputs = [value for value in graph.inputs if value.dtype == ir.DataType.FLOAT]
        floats = [*inputs, *(value for node in graph for value in node.outputs if value.dtype == ir.DataType.FLOAT)]
        self._makers = {str(value.name): _maker(value) for value in floats}
        self._twins = {str(value.name): twin for value in floats if (twin := self._twin(value)) is not None}
        self._outputs = [str(value.name) for value in graph.outputs]
        self._names: list[tuple[str, str]] = []
        proto = ir.to_proto(model)
        nodes: list[onnx.NodeProto] = [each for value in inputs for each in self._measured(str(value.name))]
        for node in proto.graph.node:
            nodes += [node, *(each for name in node.output if name in self._makers for each in self._measured(name))]
        with_nodes(proto, nodes)
        proto.graph.output.extend(onnx.ValueInfoProto(name=f"{name}.{op}") for name, op in self._names)
        self._session = session_of(proto, path)
        self.feeds: list[Feed] = []
        self._sizes: dict[str, float] = {}

    def _twin(self, value: ir.Value) -> str | None:
        """The value that has the same numbers in another shape."""
        node = value.producer()
        source = node.inputs[0] if node is not None and node.op_type in _SAME_NUMBERS else None
        alike = source is not None and (source.name in self._ends) == (value.name in self._ends)
        return str(source.name) if source is not None and alike and source.name in self._makers else None

    def _measured(self, name: str) -> Iterator[onnx.NodeProto]:
        if name not in self._twins:
            for op in ("ReduceMax", "ReduceSum") if name in self._ends else ("ReduceMax", "ReduceMin", "ReduceSum"):
                self._names.append((name, op))
                yield onnx.helper.make_node(op, [name], [f"{name}.{op}"], name=f"{name}.{op}", keepdims=0)

    def run(self, arrays: Mapping[str, Array], *, label: str) -> tuple[Array, ...]:
        """The outputs; they are kept, with the inputs, among `feeds`. Raises ExportError for numbers that are not finite: the
        first such node, and the label."""
        names = [*self._outputs, *(f"{name}.{op}" for name, op in self._names)]
        found = dict(zip(names, self._session.run(names, dict(arrays)), strict=True))
        for name, maker in self._makers.items():
            if name in self._twins:
                self._sizes[name] = self._sizes[self._twins[name]]
                continue
            high, total = (float(found[f"{name}.{op}"]) for op in ("ReduceMax", "ReduceSum"))
            low = 0.0 if name in self._ends else float(found[f"{name}.ReduceMin"])
            if high == np.inf or low == -np.inf:
                raise ExportError(_unsound(maker, "infinity", self.where, label))
            if np.isnan(total):  # a largest number may miss it
                raise ExportError(_unsound(maker, "NaN", self.where, label))
            self._sizes[name] = max(self._sizes.get(name, 0.0), high, -low)
        outputs = tuple(found[name] for name in self._outputs)
        self.feeds.append(Feed(label=label, arrays=dict(arrays), outputs=outputs))
        return outputs

    @property
    def activations(self) -> Activations:
        return Activations(feeds=tuple(self.feeds), sizes=dict(self._sizes))


def _maker(value: ir.Value) -> str:
    node = value.producer()
    return f"input {value.name}" if node is None else f"node {node.name} ({node.op_type})"


def _unsound(maker: str, what: str, where: str, label: str) -> str:
    return (
        f"{where}: {maker} gives {what} in float32 already, at {label}: no precision fixes that; "
        "check the checkpoint's weights (a damaged download, a broken merge)"
    )


def with_nodes(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Give a model these nodes, some of which it may have already."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def session_of(model: onnx.ModelProto | Path, beside: Path | None = None) -> Any:
    """A CPU session that runs node by node in the order of the file and fuses nothing: what is measured stays where it is, and a
    value is freed after its last use. `beside`: the file whose weights a changed model refers to. Raises EnvironmentFault."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EnvironmentFault(MISSING.format(error)) from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_pattern = False  # one block for a whole run is larger, and no quicker
    if beside is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(beside.parent))
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])


MISSING = (
    "half precision is audited by running the graph in ONNX Runtime, which cannot be imported ({}): pip install onnxruntime, "
    "or build with --no-audit"
)
