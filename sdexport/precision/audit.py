"""Which nodes of a component stay in float32: measured on real activations, the fewest that hold the limits.

First what must: a node whose output overflows and those that take it, and a node with a constant that the type cannot hold. Then,
where the rest in half precision is too far from float32 at the component's output, the nodes whose rounding costs most there are
added until it is not, and each is taken out again that the limits do not need. Overflows are looked for in all activations,
errors in some of them; a search is made on smaller images where the fault is seen in these, and what it finds is held to the
whole ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from sdexport.checkpoint.safetensors import Array
from sdexport.errors import AuditError
from sdexport.precision.activations import NOTHING, SAME, Activations, Feed, Likeness, likeness, session_of
from sdexport.precision.numbers import in_precision, largest
from sdexport.precision.rewrite import accepts_half, fill_value, free_nodes, logits, lower_constant
from sdexport.precision.rounding import Rounding
from sdruntime.bundle.audit import Audit, KeptNode
from sdruntime.bundle.manifest import Precision
from sdruntime.verification.tolerance import TOLERANCES

Reason = Literal["overflow", "takes", "constant", "loss"]
_HEADROOM = 0.5  # of the type's largest number: other prompts make other activations
_JUDGED = 8  # sets of activations that errors are measured on, about
_EACH = 128  # nodes whose cost is measured one by one; of more than these, blocks are measured first
_FINEST = 64  # parts of a choice that are taken out one by one
_WIDER = 6  # choices after the first one, before the whole component
_DIGITS, _PLACES = 4, 7  # what is told: significant digits, and places of a cosine


def audit(path: Path, seen: Activations, precision: Precision) -> Iterator[Audit]:
    """Find the nodes of the float32 graph in `path` that stay in float32 under `precision`.

    The first one is the fewest. Each further one has more, for a caller whose graph of the former does not hold; the last one is
    the whole component. The same activations give the same Audits.
    """
    graph = ir.load(path).graph
    needed = _needed(graph, seen.sizes, precision)
    sizes = {str(node.name): max(seen.sizes.get(str(each.name), 0.0) for each in node.outputs) for node in graph}
    rounding = Rounding(path, precision)
    search = _Search(rounding, seen.feeds, limit(precision), attention_cores(graph))
    everything = search.worst(frozenset())
    nodes = {str(node.name): node for node in graph}
    for kept in search.choices(frozenset(needed)):
        names = [name for name in search.names if name in kept]
        found, costs, split = search.worst(kept), search.costs(names), _split(search.cores, kept)
        rounding.close()  # its memory is the caller's now
        left = max((name for name in search.names if name not in kept), key=sizes.__getitem__, default="")
        yield Audit(
            feeds=len(seen.feeds),
            nodes=len(search.names),
            kept=tuple(
                KeptNode(
                    node=name,
                    op=nodes[name].op_type,
                    reason=needed.get(name, "loss"),
                    largest=_told(sizes[name]),
                    cost=_told(costs[name]) if math.isfinite(costs.get(name, math.inf)) else None,
                    splits_attention=name in split,
                )
                for name in names
            ),
            largest=_told(sizes[left]) if left else 0.0,
            largest_node=left,
            cosine=round(found.cosine, _PLACES),
            psnr=_told(found.psnr),
            all_cosine=None if everything == NOTHING else round(everything.cosine, _PLACES),
            all_psnr=None if everything == NOTHING else _told(everything.psnr),
        )


def limit(precision: Precision) -> Likeness:
    """The lower bounds that each output of a component in half precision must hold against float32."""
    held = TOLERANCES[precision]
    return Likeness(cosine=held.cosine, psnr=held.psnr)


def select_feeds(feeds: Sequence[Feed]) -> Sequence[Feed]:
    """Those that errors are measured on: with an odd stride they are of all steps, with and without the prompt."""
    return feeds[:: max(1, len(feeds) // _JUDGED) | 1]


def confirm(path: Path, feeds: Sequence[Feed], precision: Precision, *, where: str) -> None:
    """Run the graph that was made of the audit's choice, as it is, on the first and the last of the feeds. (bfloat16 has no CPU
    kernels.) That shows its casts and weights to be right; ONNX Runtime rounds less than `Rounding` did.

    Raises AuditError where it does not hold the limits.
    """
    if precision == "bf16":
        return
    made, worst = session_of(path), SAME
    for feed in (feeds[0], feeds[-1])[: len(feeds)]:
        worst = worst.worse(likeness(feed.outputs, made.run(None, dict(feed.arrays))))
    limits = limit(precision)
    if not worst.within(limits):
        raise AuditError(
            f"{where}: in {precision} cosine {worst.cosine:.6f} and PSNR {worst.psnr:.1f} dB against float32, where "
            f"{limits.cosine} and {limits.psnr:g} dB are the least: build with --precision bf16 or fp32"
        )


def _told(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


def attention_cores(graph: ir.Graph) -> list[frozenset[str]]:
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
        takes = [value for index, value in enumerate(node.inputs) if value is not None and accepts_half(node, index, precision)]
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
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor):  # a weight: what is small may become zero
        beyond = in_precision(tensor.numpy(), precision)[1] is not None
        tensor.release()  # its map of the whole file counts as memory
        return beyond
    return lower_constant(tensor.numpy(), precision, mask=mask)[1] is not None


def _unfillable(node: ir.Node, precision: Precision, ends: Collection[ir.Value]) -> bool:
    if node.op_type != "ConstantOfShape":
        return False
    return lower_constant(fill_value(node), precision, mask=node.outputs[0] in ends)[1] is not None


class _Search:
    """Sets of nodes tried on the feeds, by the nodes' names."""

    def __init__(self, rounding: Rounding, feeds: Sequence[Feed], limits: Likeness, attentions: list[frozenset[str]]) -> None:
        self.rounding, self.limits, self.cores = rounding, limits, attentions
        self.names = rounding.names
        self.inside = {name for core in attentions for name in core}
        self.feeds = list(select_feeds(feeds))
        self.twins: dict[int, Feed] = {}  # of these feeds, by their number: the same of a smaller image
        self.known: dict[tuple[int, frozenset[str]], Likeness] = {}
        self.hard: list[Feed] = []  # what a search is made on, the last one is the newest
        self.hardest = 0  # the number of the feed that this one is, or is the smaller image of

    def choices(self, needed: frozenset[str]) -> Iterator[frozenset[str]]:
        kept = self.fewest(needed)
        yield kept
        more = self._ranked([name for name in self.names if name not in kept])
        more.sort(key=self.inside.__contains__)
        for count in (2**power for power in range(_WIDER)):
            if count < len(more):
                yield kept | frozenset(more[:count])
        yield frozenset(self.names)  # the last resort

    def worst(self, kept: frozenset[str]) -> Likeness:
        worst = SAME
        for feed in self.feeds:
            worst = worst.worse(self._likeness(feed, kept))
            if worst == NOTHING:
                break
        return worst

    def fewest(self, needed: frozenset[str]) -> frozenset[str]:
        """The needed nodes and the fewest others with which every feed is within the limits."""
        kept = needed
        while True:
            found = [(self._likeness(feed, kept), number) for number, feed in enumerate(self.feeds)]
            failing = [(each.psnr, each.cosine, number) for each, number in found if not each.within(self.limits)]
            if not failing:
                return kept
            self.hardest = min(failing)[2]
            twin = self._twin(self.hardest)
            unseen = self._likeness(twin, kept).within(self.limits)
            self.hard.append(self.feeds[self.hardest] if unseen else twin)
            kept = self._grown(needed)

    def costs(self, names: Sequence[str]) -> dict[str, float]:
        """The error at the component's output where one node alone is rounded, of a smaller image; of the first `_EACH`."""
        return {name: self._cost([name]) for name in names[:_EACH]}

    def _twin(self, number: int) -> Feed:
        if number not in self.twins:
            feed = self.feeds[number]
            small = Feed(label=feed.label, arrays=_smaller(feed.arrays, self.rounding.model.graph), outputs=())
            outputs = tuple(self.rounding.run(small, ()))
            self.twins[number] = Feed(label=feed.label, arrays=small.arrays, outputs=outputs)
        return self.twins[number]

    def _likeness(self, feed: Feed, kept: Collection[str]) -> Likeness:
        key = id(feed), frozenset(self.names).difference(kept)
        if key not in self.known:
            self.known[key] = likeness(feed.outputs, self.rounding.run(feed, key[1]))
        return self.known[key]

    def _holds(self, kept: frozenset[str]) -> bool:
        return all(self._likeness(feed, kept).within(self.limits) for feed in reversed(self.hard))

    def _grown(self, needed: frozenset[str]) -> frozenset[str]:
        """Nodes outside attentions first, those that cost most first: as many as it takes, and then without those it does not."""
        order = self._ranked([name for name in self.names if name not in needed])
        outside = [name for name in order if name not in self.inside]
        for ranked in (outside, order):
            count = 1
            while True:
                chosen = ranked[:count]
                if self._holds(needed | set(chosen)):
                    return needed | frozenset(self._shrunk(needed, chosen))
                if count >= len(ranked):
                    break
                count *= 2
        return frozenset(self.names)  # the last resort

    def _shrunk(self, needed: frozenset[str], chosen: list[str]) -> list[str]:
        """Without whatever can go: what splits an attention first, then what costs least; runs of many, then one by one."""
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
        """By their cost, the dearest first: measured, or its share of a block's where the block costs little."""
        if len(names) <= _EACH:
            costs = {name: self._cost([name]) for name in names}
        else:
            size = math.isqrt(len(names))
            blocks = [names[start : start + size] for start in range(0, len(names), size)]
            whole = [self._cost(block) for block in blocks]
            costs = {name: cost / math.sqrt(len(block)) for cost, block in zip(whole, blocks, strict=True) for name in block}
            dearest = sorted(range(len(blocks)), key=lambda index: -whole[index])[: max(1, _EACH // size)]
            costs |= {name: self._cost([name]) for index in dearest for name in blocks[index]}
        return sorted(names, key=lambda name: -costs[name])

    def _cost(self, half: Collection[str]) -> float:
        """The error at the component's output where these nodes alone are rounded: of the hardest feed's smaller image."""
        twin = self._twin(self.hardest)
        return likeness(twin.outputs, self.rounding.run(twin, half)).error


def _smaller(arrays: Mapping[str, Array], graph: ir.Graph) -> dict[str, Array]:
    """The middle of images whose sides a call chooses; sides stay multiples of 8. Nodes' errors are ranked by these."""
    found = dict(arrays)
    for value in graph.inputs:
        array = arrays.get(str(value.name))
        if array is not None and array.ndim == 4 and value.shape is not None and not value.shape.is_static(2):
            sides = [side // 4 // 8 * 8 or side for side in array.shape[2:]]
            tops = [(side - cut) // 2 for side, cut in zip(array.shape[2:], sides, strict=True)]
            middle = [slice(top, top + cut) for top, cut in zip(tops, sides, strict=True)]
            found[str(value.name)] = np.ascontiguousarray(array[:, :, middle[0], middle[1]])
    return found
