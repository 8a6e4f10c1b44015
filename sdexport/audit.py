"""Which nodes of a component stay in float32: measured on real activations, the fewest that hold the limits.

First what must: a node whose output overflows and those that take it, and a node with a constant that the type cannot hold. Then,
where the rest in half precision is too far from float32 at the component's output, the nodes whose rounding costs most there are
added until it is not, and each is taken out again that the limits do not need.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from sdexport.errors import AuditError
from sdexport.measure import NOTHING, SAME, Feed, Likeness, Rounding, distance, likeness, magnitudes, session_of
from sdexport.precision import filler, free_nodes, logits, lowered, takes_half
from sdexport.weights import Array, in_precision, largest
from sdruntime.manifest import Audit, KeptNode, Precision

Reason = Literal["overflow", "takes", "constant", "loss"]
# of each output against float32. bfloat16 has three bits fewer than float16: eight times the error
LIMITS: Mapping[Precision, Likeness] = {
    "fp16": Likeness(cosine=0.9999, psnr=40.0),
    "bf16": Likeness(cosine=0.9936, psnr=22.0),
}
_HEADROOM = 0.5  # of the type's largest number: other prompts make other activations
_EACH = 256  # nodes whose cost is measured one by one; of more than these, blocks are measured first
_DIGITS, _PLACES = 4, 7  # what is told: significant digits, and places of a cosine


def audit(path: Path, feeds: Sequence[Feed], precision: Precision, *, where: str) -> Audit:
    """Find the nodes of the float32 graph in `path` that stay in float32 under `precision`.

    The same inputs give the same Audit. Raises ExportError for numbers that are not finite in float32 already.
    """
    sizes = magnitudes(path, feeds, where=where)
    graph = ir.load(path).graph
    needed = _needed(graph, sizes, precision)
    with Rounding(path, precision) as rounding:
        search = _Search(rounding, feeds, LIMITS[precision], cores(graph))
        everything = search.worst(frozenset())
        kept = search.fewest(frozenset(needed))
        found = search.worst(kept)
        costs = search.costs([name for name in rounding.names if name in kept])
    out_sizes = {str(node.name): max(sizes.get(str(each.name), 0.0) for each in node.outputs) for node in graph}
    split = _split(search.cores, kept)
    left = max((name for name in rounding.names if name not in kept), key=out_sizes.__getitem__, default="")
    nodes = {str(node.name): node for node in graph}
    return Audit(
        feeds=len(feeds),
        nodes=len(rounding.names),
        kept=tuple(
            KeptNode(
                node=name,
                op=nodes[name].op_type,
                reason=needed.get(name, "loss"),
                largest=_told(out_sizes[name]),
                cost=_told(costs[name]) if math.isfinite(costs.get(name, math.inf)) else None,
                splits_attention=name in split,
            )
            for name in rounding.names
            if name in kept
        ),
        largest=_told(out_sizes[left]) if left else 0.0,
        largest_node=left,
        cosine=round(found.cosine, _PLACES),
        psnr=_told(found.psnr),
        all_cosine=None if everything == NOTHING else round(everything.cosine, _PLACES),
        all_psnr=None if everything == NOTHING else _told(everything.psnr),
    )


def confirm(path: Path, reference: Path, feeds: Sequence[Feed], precision: Precision, *, where: str) -> None:
    """Run the graph that was made of the audit's choice, as it is, beside its float32 one. (bfloat16 has no CPU kernels.)

    Raises AuditError where it does not hold the limits.
    """
    if precision == "bf16":
        return
    plain, made = session_of(reference), session_of(path)
    worst = SAME
    for feed in feeds:
        each = likeness(plain.run(None, dict(feed.arrays)), made.run(None, dict(feed.arrays)))
        worst = Likeness(cosine=min(worst.cosine, each.cosine), psnr=min(worst.psnr, each.psnr))
    limits = LIMITS[precision]
    if not worst.within(limits):
        raise AuditError(
            f"{where}: in {precision} cosine {worst.cosine:.6f} and PSNR {worst.psnr:.1f} dB against float32, where "
            f"{limits.cosine} and {limits.psnr:g} dB are the least: build with --precision bf16 or fp32"
        )


def _told(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


def cores(graph: ir.Graph) -> list[frozenset[str]]:
    """The attentions of a graph: from the product that a softmax follows to the product that takes it, by the nodes' names."""
    found = []
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
            found.append(frozenset(str(node.name) for node in core))
    return found


def _split(attentions: Sequence[frozenset[str]], kept: Collection[str]) -> set[str]:
    """The kept nodes that share an attention with nodes in half precision."""
    return {name for core in attentions for name in core if not core <= set(kept) and name in kept}


def _needed(graph: ir.Graph, sizes: Mapping[str, float], precision: Precision) -> dict[str, Reason]:
    """The nodes that no measurement is needed for, and why."""
    limit, ends = _HEADROOM * largest(precision), logits(graph)
    nodes = free_nodes(graph, precision)
    reasons: dict[str, Reason] = {}
    beyond = {
        str(value.name) for node in graph for value in (*node.inputs, *node.outputs) if value and _beyond(value, sizes, limit)
    }
    for node in nodes:
        takes = [value for index, value in enumerate(node.inputs) if value is not None and takes_half(node, index, precision)]
        if any(value.name in beyond for value in node.outputs):
            reasons[str(node.name)] = "overflow"
        elif any(value.name in beyond for value in takes):
            reasons[str(node.name)] = "takes"
        elif any(_unholdable(value, precision, mask=value in ends) for value in takes) or _unfillable(node, precision, ends):
            reasons[str(node.name)] = "constant"
    return reasons


def _beyond(value: ir.Value, sizes: Mapping[str, float], limit: float) -> bool:
    return value.dtype == ir.DataType.FLOAT and value.const_value is None and sizes.get(str(value.name), 0.0) > limit


def _unholdable(value: ir.Value, precision: Precision, *, mask: bool) -> bool:
    """Whether a constant or a weight has numbers that the precision cannot hold."""
    if value.const_value is None or value.dtype != ir.DataType.FLOAT:
        return False
    numbers = value.const_value.numpy()
    if isinstance(value.const_value, ir.ExternalTensor):  # a weight: what is small may become zero
        return in_precision(numbers, precision)[1] is not None
    return lowered(numbers, precision, mask=mask)[1] is not None


def _unfillable(node: ir.Node, precision: Precision, ends: Collection[ir.Value]) -> bool:
    if node.op_type != "ConstantOfShape":
        return False
    return lowered(filler(node), precision, mask=node.outputs[0] in ends)[1] is not None


class _Search:
    """Sets of nodes tried on the feeds, by the nodes' names."""

    def __init__(self, rounding: Rounding, feeds: Sequence[Feed], limits: Likeness, attentions: list[frozenset[str]]) -> None:
        self.rounding, self.feeds, self.limits, self.cores = rounding, feeds, limits, attentions
        self.inside = {name for core in attentions for name in core}
        self.references: list[list[Array]] = [rounding.run(feed, ()) for feed in feeds]
        self.known: dict[tuple[int, frozenset[str]], Likeness] = {}
        self.hard: list[int] = []  # the feeds that a search is made on, the last one is the newest

    def likeness(self, feed: int, kept: frozenset[str]) -> Likeness:
        if (feed, kept) not in self.known:
            half = set(self.rounding.names) - kept
            self.known[feed, kept] = likeness(self.references[feed], self.rounding.run(self.feeds[feed], half))
        return self.known[feed, kept]

    def worst(self, kept: frozenset[str]) -> Likeness:
        found = [self.likeness(feed, kept) for feed in range(len(self.feeds))]
        return Likeness(cosine=min(each.cosine for each in found), psnr=min(each.psnr for each in found))

    def fewest(self, needed: frozenset[str]) -> frozenset[str]:
        """The needed nodes and the fewest others with which every feed is within the limits."""
        kept = needed
        while True:
            found = {feed: self.likeness(feed, kept) for feed in range(len(self.feeds))}
            failing = [feed for feed, each in found.items() if not each.within(self.limits)]
            if not failing:
                return kept
            self.hard.append(min(failing, key=lambda feed: (found[feed].psnr, found[feed].cosine, feed)))
            kept = self._grown(needed)

    def holds(self, kept: frozenset[str]) -> bool:
        return all(self.likeness(feed, kept).within(self.limits) for feed in reversed(self.hard))

    def _grown(self, needed: frozenset[str]) -> frozenset[str]:
        """Nodes outside attentions first, those that cost most first: as many as it takes, and then without those it does not."""
        candidates = [name for name in self.rounding.names if name not in needed]
        costs = self._ranked(candidates)
        order = sorted(candidates, key=lambda name: -costs[name])
        outside = [name for name in order if name not in self.inside]
        for ranked in (outside, order):
            count = 1
            while True:
                chosen = ranked[:count]
                if self.holds(needed | set(chosen)):
                    return needed | frozenset(self._shrunk(needed, chosen))
                if count >= len(ranked):
                    break
                count *= 2
        return frozenset(self.rounding.names)  # the last resort

    def _shrunk(self, needed: frozenset[str], chosen: list[str]) -> list[str]:
        """Without whatever can go: what splits an attention first, then what costs least; runs of many, then one by one."""
        left = chosen[::-1]
        left.sort(key=lambda name: name not in self.inside)
        size = len(left)
        while True:
            size, before = max(1, size // 2), left
            for start in range(0, len(before), size):
                tried = before[start : start + size]
                rest = [name for name in left if name not in tried]
                if self.holds(needed | frozenset(rest)):
                    left = rest
            if size == 1 and left == before:
                return left

    def costs(self, names: Sequence[str]) -> dict[str, float]:
        """The error at the component's output, of the hardest feed, where one node alone is rounded; of the first `_EACH`."""
        feed = self.hard[-1] if self.hard else 0
        return {name: self._cost(feed, [name]) for name in names[:_EACH]}

    def _cost(self, feed: int, half: Collection[str]) -> float:
        return distance(self.references[feed], self.rounding.run(self.feeds[feed], half))

    def _ranked(self, names: list[str]) -> dict[str, float]:
        """The cost of each: measured, or its share of a block's where the block costs little."""
        feed = self.hard[-1]
        if len(names) <= _EACH:
            return {name: self._cost(feed, [name]) for name in names}
        size = math.isqrt(len(names))
        blocks = [names[start : start + size] for start in range(0, len(names), size)]
        whole = {index: self._cost(feed, block) for index, block in enumerate(blocks)}
        costs = {name: whole[index] / math.sqrt(len(block)) for index, block in enumerate(blocks) for name in block}
        dearest = sorted(whole, key=lambda index: -whole[index])[: _EACH // size]
        return costs | {name: self._cost(feed, [name]) for index in dearest for name in blocks[index]}
