"""Find the fewest nodes of a component that must stay in float32, measured on real activations.

Nodes that must: those whose output overflows, those that take such an output, and those with a constant that the type cannot
represent. If the rest in half precision is still too far from float32 at the component's output, the nodes whose rounding costs
most are added until it is not. Then every node that the limits do not need is removed again. Overflows are checked in all
activations, errors in some of them. The search uses smaller images if they show the fault, and its result is checked on the full
ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from sdexport.checkpoint.weights.safetensors import Array
from sdexport.errors import AuditError
from sdexport.precision.activations import NOTHING, SAME, Activations, Feed, Likeness, likeness, session_of
from sdexport.precision.numbers import in_precision, largest
from sdexport.precision.rewrite import accepts_half, fill_value, free_nodes, logits, lower_constant
from sdexport.precision.rounding import Rounding
from sdruntime.bundle.audit import Audit, KeptNode
from sdruntime.bundle.manifest import Precision
from sdruntime.verification.tolerance import TOLERANCES

Reason = Literal["overflow", "takes", "constant", "loss"]
_HEADROOM = 0.5  # fraction of the type's largest number, as other prompts give other activations
_JUDGED = 8  # number of feeds on which errors are measured, about
_EACH = 128  # up to this many nodes are measured one by one; of more nodes, blocks are measured first
_FINEST = 64  # the smallest part of a choice that is removed at once is 1/64 of it
_WIDER = 6  # choices between the first one and the whole component
_DIGITS, _PLACES = 4, 7  # significant digits of reported numbers, and decimal places of a cosine


def audit(path: Path, seen: Activations, precision: Precision) -> Iterator[Audit]:
    """Yield the choices of nodes in the float32 graph `path` that stay in float32 under `precision`.

    The first choice has the fewest nodes. Each further one has more, for a caller whose graph of the previous choice exceeds the
    limits; the last one is the whole component. The result is deterministic.
    """
    graph = ir.load(path).graph
    needed = _needed(graph, seen.sizes, precision)
    sizes = {str(node.name): max(seen.sizes.get(str(output.name), 0.0) for output in node.outputs) for node in graph}
    rounding = Rounding(path, precision)
    search = _Search(rounding, seen.feeds, limit(precision), attention_cores(graph))
    everything = search.worst(frozenset())
    nodes = {str(node.name): node for node in graph}
    for kept in search.choices(frozenset(needed)):
        names = [name for name in search.names if name in kept]
        worst, costs, split = search.worst(kept), search.costs(names), _split(search.cores, kept)
        rounding.close()  # the caller needs the memory
        largest_half = max((name for name in search.names if name not in kept), key=sizes.__getitem__, default="")
        yield Audit(
            feeds=len(seen.feeds),
            nodes=len(search.names),
            kept=tuple(
                KeptNode(
                    node=name,
                    op=nodes[name].op_type,
                    reason=needed.get(name, "loss"),
                    largest=_rounded(sizes[name]),
                    cost=_rounded(costs[name]) if math.isfinite(costs.get(name, math.inf)) else None,
                    splits_attention=name in split,
                )
                for name in names
            ),
            largest=_rounded(sizes[largest_half]) if largest_half else 0.0,
            largest_node=largest_half,
            cosine=round(worst.cosine, _PLACES),
            psnr=_rounded(worst.psnr),
            all_cosine=None if everything == NOTHING else round(everything.cosine, _PLACES),
            all_psnr=None if everything == NOTHING else _rounded(everything.psnr),
        )


def limit(precision: Precision) -> Likeness:
    """Return the lower bounds for each output of a component in half precision, compared with float32."""
    tolerance = TOLERANCES[precision]
    return Likeness(cosine=tolerance.cosine, psnr=tolerance.psnr)


def select_feeds(feeds: Sequence[Feed]) -> Sequence[Feed]:
    """Return the feeds on which errors are measured. An odd stride covers all steps, with and without the prompt."""
    return feeds[:: max(1, len(feeds) // _JUDGED) | 1]


def confirm(path: Path, feeds: Sequence[Feed], precision: Precision, *, where: str) -> None:
    """Run the graph built from the audit's choice on the first and the last feed; bfloat16 is skipped, as it has no CPU kernels.

    This checks the casts and weights of the graph; ONNX Runtime rounds less than `Rounding` does. Raises AuditError if an output
    exceeds the limits.
    """
    if precision == "bf16":
        return
    session, worst = session_of(path), SAME
    for feed in (feeds[0], feeds[-1])[: len(feeds)]:
        worst = worst.worse(likeness(feed.outputs, session.run(None, dict(feed.arrays))))
    limits = limit(precision)
    if not worst.within(limits):
        raise AuditError(
            f"{where}: in {precision} cosine {worst.cosine:.6f} and PSNR {worst.psnr:.1f} dB against float32, where "
            f"{limits.cosine} and {limits.psnr:g} dB are the least: build with --precision bf16 or fp32"
        )


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


def attention_cores(graph: ir.Graph) -> list[frozenset[str]]:
    """Return the node names of each attention of a graph: from the product before a softmax to the product after it."""
    cores = []
    for softmax in graph:
        if softmax.op_type != "Softmax":
            continue
        core, value = [softmax], softmax.inputs[0]
        while value is not None and (node := value.producer()) is not None:
            core.append(node)
            if node.op_type not in ("Mul", "Div", "Add"):
                break
            value = node.inputs[0]
        core += [user for user, _ in softmax.outputs[0].uses()]
        if core[-1].op_type == "MatMul" and any(node.op_type == "MatMul" for node in core[1:-1]):
            cores.append(frozenset(str(node.name) for node in core))
    return cores


def _split(attentions: Sequence[frozenset[str]], kept: Collection[str]) -> set[str]:
    """Return the kept nodes that share an attention with nodes in half precision."""
    return {name for core in attentions for name in core if not core <= set(kept) and name in kept}


def _needed(graph: ir.Graph, sizes: Mapping[str, float], precision: Precision) -> dict[str, Reason]:
    """Return the nodes that must stay in float32 without further measurement, and why."""
    limit, masks = _HEADROOM * largest(precision), logits(graph)
    nodes = free_nodes(graph, precision)
    reasons: dict[str, Reason] = {}
    beyond = {
        str(value.name) for node in graph for value in (*node.inputs, *node.outputs) if value and _beyond(value, sizes, limit)
    }
    for node in nodes:
        inputs = [value for index, value in enumerate(node.inputs) if value is not None and accepts_half(node, index, precision)]
        if any(value.name in beyond for value in node.outputs):
            reasons[str(node.name)] = "overflow"
        elif any(value.name in beyond for value in inputs):
            reasons[str(node.name)] = "takes"
        elif any(_unrepresentable(value, precision, mask=value in masks) for value in inputs) or _fill_unrepresentable(
            node, precision, masks
        ):
            reasons[str(node.name)] = "constant"
    return reasons


def _beyond(value: ir.Value, sizes: Mapping[str, float], limit: float) -> bool:
    constant = value.const_value is not None and not value.is_graph_input()  # an optional input has a default
    return value.dtype == ir.DataType.FLOAT and not constant and sizes.get(str(value.name), 0.0) > limit


def _unrepresentable(value: ir.Value, precision: Precision, *, mask: bool) -> bool:
    """Return whether a constant or a weight has numbers that the precision cannot represent."""
    if value.const_value is None or value.dtype != ir.DataType.FLOAT:
        return False
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor):  # a weight: small numbers may become zero
        beyond = in_precision(tensor.numpy(), precision)[1] is not None
        tensor.release()  # the mapping of the whole file counts as memory
        return beyond
    return lower_constant(tensor.numpy(), precision, mask=mask)[1] is not None


def _fill_unrepresentable(node: ir.Node, precision: Precision, masks: Collection[ir.Value]) -> bool:
    if node.op_type != "ConstantOfShape":
        return False
    return lower_constant(fill_value(node), precision, mask=node.outputs[0] in masks)[1] is not None


class _Search:
    """Try sets of nodes, by name, on the feeds."""

    def __init__(self, rounding: Rounding, feeds: Sequence[Feed], limits: Likeness, attentions: list[frozenset[str]]) -> None:
        self.rounding, self.limits, self.cores = rounding, limits, attentions
        self.names = rounding.names
        self.inside = {name for core in attentions for name in core}
        self.feeds = list(select_feeds(feeds))
        self.small: dict[int, Feed] = {}  # index of a feed -> the same with a smaller image
        self.known: dict[tuple[int, frozenset[str]], Likeness] = {}
        self.hard: list[Feed] = []  # the feeds of the search, the newest last
        self.hardest = 0  # the index of the newest one in `feeds`

    def choices(self, needed: frozenset[str]) -> Iterator[frozenset[str]]:
        """Yield sets of nodes to keep in float32, from the fewest to all."""
        kept = self.fewest(needed)
        yield kept
        more = self._ranked([name for name in self.names if name not in kept])
        more.sort(key=self.inside.__contains__)
        for count in (2**power for power in range(_WIDER)):
            if count < len(more):
                yield kept | frozenset(more[:count])
        yield frozenset(self.names)  # the last resort

    def worst(self, kept: frozenset[str]) -> Likeness:
        """Return the worst likeness over all feeds with the nodes `kept` in float32."""
        worst = SAME
        for feed in self.feeds:
            worst = worst.worse(self._likeness(feed, kept))
            if worst == NOTHING:
                break
        return worst

    def fewest(self, needed: frozenset[str]) -> frozenset[str]:
        """Return the needed nodes and the fewest others with which every feed is within the limits."""
        kept = needed
        while True:
            results = [(self._likeness(feed, kept), index) for index, feed in enumerate(self.feeds)]
            failing = [(result.psnr, result.cosine, index) for result, index in results if not result.within(self.limits)]
            if not failing:
                return kept
            self.hardest = min(failing)[2]
            small = self._small(self.hardest)
            passes = self._likeness(small, kept).within(self.limits)  # the smaller image does not show the fault
            self.hard.append(self.feeds[self.hardest] if passes else small)
            kept = self._grow(needed)

    def costs(self, names: Sequence[str]) -> dict[str, float]:
        """Return the error at the component's output, for a smaller image, if one node alone is rounded; of `_EACH` nodes."""
        return {name: self._cost([name]) for name in names[:_EACH]}

    def _small(self, index: int) -> Feed:
        """Return the feed `index` with a smaller image."""
        if index not in self.small:
            feed = self.feeds[index]
            small = Feed(label=feed.label, arrays=_smaller(feed.arrays, self.rounding.model.graph), outputs=())
            outputs = tuple(self.rounding.run(small, ()))
            self.small[index] = Feed(label=feed.label, arrays=small.arrays, outputs=outputs)
        return self.small[index]

    def _likeness(self, feed: Feed, kept: Collection[str]) -> Likeness:
        key = id(feed), frozenset(self.names).difference(kept)
        if key not in self.known:
            self.known[key] = likeness(feed.outputs, self.rounding.run(feed, key[1]))
        return self.known[key]

    def _holds(self, kept: frozenset[str]) -> bool:
        return all(self._likeness(feed, kept).within(self.limits) for feed in reversed(self.hard))

    def _grow(self, needed: frozenset[str]) -> frozenset[str]:
        """Add nodes until the limits hold, then remove those that are not needed.

        Nodes outside attentions come first, and among them those with the highest cost.
        """
        order = self._ranked([name for name in self.names if name not in needed])
        outside = [name for name in order if name not in self.inside]
        for ranked in (outside, order):
            count = 1
            while True:
                chosen = ranked[:count]
                if self._holds(needed | set(chosen)):
                    return needed | frozenset(self._shrink(needed, chosen))
                if count >= len(ranked):
                    break
                count *= 2
        return frozenset(self.names)  # the last resort

    def _shrink(self, needed: frozenset[str], chosen: list[str]) -> list[str]:
        """Remove the nodes that the limits do not need, in shrinking runs: nodes in attentions first, then the cheapest."""
        left = chosen[::-1]
        left.sort(key=lambda name: name not in self.inside)
        size, least = len(left), max(1, len(left) // _FINEST)
        while True:
            size, before = max(least, size // 2), left
            for start in range(0, len(before), size):
                tried = before[start : start + size]
                rest = [name for name in left if name not in tried]
                if self._holds(needed | frozenset(rest)):
                    left = rest
            if size == least and left == before:
                return left

    def _ranked(self, names: list[str]) -> list[str]:
        """Return the nodes by cost, the highest first: measured, or estimated from their block's cost if that is low."""
        if len(names) <= _EACH:
            costs = {name: self._cost([name]) for name in names}
        else:
            size = math.isqrt(len(names))
            blocks = [names[start : start + size] for start in range(0, len(names), size)]
            of_block = [self._cost(block) for block in blocks]
            costs = {name: cost / math.sqrt(len(block)) for cost, block in zip(of_block, blocks, strict=True) for name in block}
            highest = sorted(range(len(blocks)), key=lambda index: -of_block[index])[: max(1, _EACH // size)]
            costs |= {name: self._cost([name]) for index in highest for name in blocks[index]}
        return sorted(names, key=lambda name: -costs[name])

    def _cost(self, half: Collection[str]) -> float:
        """Return the error at the component's output if only these nodes are rounded, for the hardest feed's smaller image."""
        small = self._small(self.hardest)
        return likeness(small.outputs, self.rounding.run(small, half)).error


def _smaller(arrays: Mapping[str, Array], graph: ir.Graph) -> dict[str, Array]:
    """Return the arrays with images of dynamic size cropped to a central quarter of each side, a multiple of 8."""
    smaller = dict(arrays)
    for value in graph.inputs:
        array = arrays.get(str(value.name))
        if array is not None and array.ndim == 4 and value.shape is not None and not value.shape.is_static(2):
            sides = [side // 4 // 8 * 8 or side for side in array.shape[2:]]
            tops = [(side - cut) // 2 for side, cut in zip(array.shape[2:], sides, strict=True)]
            middle = [slice(top, top + cut) for top, cut in zip(tops, sides, strict=True)]
            smaller[str(value.name)] = np.ascontiguousarray(array[:, :, middle[0], middle[1]])
    return smaller
