"""Run a component's float32 graph in ONNX Runtime and measure its values, with the memory of the plain graph.

Each value gets reductions, which leave a few numbers, so no activation is kept. They read a value once and do not copy it: a run
takes little longer than the plain one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sdexport.checkpoint.weights.safetensors import Array
from sdexport.errors import EnvironmentFault, ExportError
from sdexport.precision.rewrite import logits
from sdruntime.verification.metrics import EQUAL, Difference

_SAME_NUMBERS = ("Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """The inputs of a component and its float32 outputs. `label` names their origin in messages (a prompt and a step)."""

    label: str
    arrays: Mapping[str, Array]
    outputs: tuple[Array, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """The recorded inputs of a component, and the `sizes` of its values.

    `sizes` has the largest magnitude of every float32 value of the graph; for logits and masks it is the largest number, as a
    softmax ignores numbers far below it.
    """

    feeds: tuple[Feed, ...]
    sizes: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How close outputs are to the reference, at worst. NaN and infinities count as `NOTHING`."""

    cosine: float
    psnr: float  # dB; the peak is the range of the reference's output

    def within(self, other: Likeness) -> bool:
        return self.cosine >= other.cosine and self.psnr >= other.psnr

    def worse(self, other: Likeness) -> Likeness:
        return Likeness(cosine=min(self.cosine, other.cosine), psnr=min(self.psnr, other.psnr))

    @property
    def error(self) -> float:
        """The root mean square error as a fraction of the range of the reference's output."""
        return 0.0 if self.psnr == EQUAL else float(10 ** (-self.psnr / 20))


NOTHING = Likeness(cosine=-1.0, psnr=-np.inf)
SAME = Likeness(cosine=1.0, psnr=EQUAL)


def likeness(reference: Sequence[Array], outputs: Sequence[Array]) -> Likeness:
    """Return the worst likeness of a component's outputs to the reference's."""
    worst = SAME
    for expected, output in zip(reference, outputs, strict=True):
        if not np.isfinite(output).all():
            return NOTHING
        span = float(expected.max() - expected.min()) or float(np.abs(expected).max())
        difference = Difference.of(output, expected, span)
        worst = worst.worse(Likeness(cosine=difference.cosine, psnr=difference.psnr))
    return worst


class MeasuredGraph:
    """The graph of `path`, open in ONNX Runtime, whose values are measured over all runs. `where` names it in errors."""

    def __init__(self, path: Path, *, where: str) -> None:
        model = ir.load(path)
        graph, self.where = model.graph, where
        self._logits = {str(value.name) for value in logits(graph)}
        inputs = [value for value in graph.inputs if value.dtype == ir.DataType.FLOAT]
        floats = [*inputs, *(value for node in graph for value in node.outputs if value.dtype == ir.DataType.FLOAT)]
        self._labels = {str(value.name): _label(value) for value in floats}
        self._same_numbers = {str(value.name): name for value in floats if (name := self._source_of_numbers(value)) is not None}
        self._outputs = [str(value.name) for value in graph.outputs]
        self._names: list[tuple[str, str]] = []
        proto = ir.to_proto(model)
        nodes: list[onnx.NodeProto] = [reduction for value in inputs for reduction in self._reductions(str(value.name))]
        for node in proto.graph.node:
            floats_of_node = [name for name in node.output if name in self._labels]
            nodes += [node, *(reduction for name in floats_of_node for reduction in self._reductions(name))]
        with_nodes(proto, nodes)
        proto.graph.output.extend(onnx.ValueInfoProto(name=f"{name}.{op}") for name, op in self._names)
        self._session = session_of(proto, path)
        self.feeds: list[Feed] = []
        self._sizes: dict[str, float] = {}

    def _source_of_numbers(self, value: ir.Value) -> str | None:
        """Return the value that has the same numbers in another shape, so that they are measured once; None if there is none."""
        node = value.producer()
        source = node.inputs[0] if node is not None and node.op_type in _SAME_NUMBERS else None
        alike = source is not None and (source.name in self._logits) == (value.name in self._logits)
        return str(source.name) if source is not None and alike and source.name in self._labels else None

    def _reductions(self, name: str) -> Iterator[onnx.NodeProto]:
        if name not in self._same_numbers:
            for op in ("ReduceMax", "ReduceSum") if name in self._logits else ("ReduceMax", "ReduceMin", "ReduceSum"):
                self._names.append((name, op))
                yield onnx.helper.make_node(op, [name], [f"{name}.{op}"], name=f"{name}.{op}", keepdims=0)

    def run(self, arrays: Mapping[str, Array], *, label: str) -> tuple[Array, ...]:
        """Return the outputs; inputs and outputs are added to `feeds`.

        Raises ExportError if a number is not finite, with the first such node and the label.
        """
        names = [*self._outputs, *(f"{name}.{op}" for name, op in self._names)]
        results = dict(zip(names, self._session.run(names, dict(arrays)), strict=True))
        for name, source in self._labels.items():
            if name in self._same_numbers:
                self._sizes[name] = self._sizes[self._same_numbers[name]]
                continue
            high, total = (float(results[f"{name}.{op}"]) for op in ("ReduceMax", "ReduceSum"))
            low = 0.0 if name in self._logits else float(results[f"{name}.ReduceMin"])
            if high == np.inf or low == -np.inf:
                raise ExportError(_not_finite(source, "infinity", self.where, label))
            if np.isnan(total):  # ReduceMax may ignore NaN
                raise ExportError(_not_finite(source, "NaN", self.where, label))
            self._sizes[name] = max(self._sizes.get(name, 0.0), high, -low)
        outputs = tuple(results[name] for name in self._outputs)
        self.feeds.append(Feed(label=label, arrays=dict(arrays), outputs=outputs))
        return outputs

    @property
    def activations(self) -> Activations:
        return Activations(feeds=tuple(self.feeds), sizes=dict(self._sizes))


def _label(value: ir.Value) -> str:
    node = value.producer()
    return f"input {value.name}" if node is None else f"node {node.name} ({node.op_type})"


def _not_finite(source: str, number: str, where: str, label: str) -> str:
    return (
        f"{where}: {source} gives {number} in float32 already, at {label}: no precision fixes that; "
        "check the checkpoint's weights (a damaged download, a broken merge)"
    )


def with_nodes(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Replace the nodes of a model by `nodes`, which may include its current ones."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def session_of(model: onnx.ModelProto | Path, beside: Path | None = None) -> Any:
    """Open a CPU session that runs the nodes in the order of the file without fusing any, and frees a value after its last use.

    `beside` is the file whose weights a changed model refers to. Raises EnvironmentFault if ONNX Runtime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EnvironmentFault(MISSING.format(error)) from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_pattern = False  # one block for a whole run takes more memory and is no faster
    if beside is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(beside.parent))
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


MISSING = (
    "half precision is audited by running the graph in ONNX Runtime, which cannot be imported ({}): pip install onnxruntime, "
    "or build with --no-audit"
)
