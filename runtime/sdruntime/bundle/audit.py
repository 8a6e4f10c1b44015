"""The nodes of a component that stay in float32 beside half precision, and the measurements that say so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptNode:
    """A node of a half precision graph that stays in float32, and why.

    "overflow": its output is beyond what the type should hold; "takes": it takes such a value; "constant": a number of its own
    that the type cannot hold; "loss": its rounding costs too much at the component's output.
    """

    node: str
    op: str
    reason: Literal["overflow", "takes", "constant", "loss"]
    largest: float  # magnitude of its output, of all activations that were looked at
    cost: float | None = None  # error at the component's output where this node alone is rounded, of its range; None: not finite
    splits_attention: bool = False  # it lies between an attention's two products, and casts there keep it from being fused


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What a component's half precision was measured to be: on real activations, against its own float32 graph.

    Every node's output, input and weight is rounded, and nothing is fused: an engine does no worse. `cosine` and `psnr` (dB, by
    the range of the reference's output) are the worst of all outputs, on some of the activations; `all_cosine` and `all_psnr` the
    same with every node in half precision (None: not finite).
    """

    feeds: int  # sets of activations
    nodes: int  # that have a choice
    kept: tuple[KeptNode, ...] = ()
    largest: float  # magnitude of what is in half precision
    largest_node: str
    cosine: float
    psnr: float
    all_cosine: float | None = None
    all_psnr: float | None = None

    @property
    def whole(self) -> bool:
        """Whether the whole component stays in float32: the last resort."""
        return len(self.kept) == self.nodes > 0
