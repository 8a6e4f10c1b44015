"""The nodes of a half-precision component that stay in float32, and the measurements behind that choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptNode:
    """A node of a half-precision graph that stays in float32, and why.

    "overflow": its output exceeds the safe range of the type; "takes": one of its inputs does; "constant": one of its constants
    cannot be represented in the type; "loss": rounding it causes too large an error at the component's output.
    """

    node: str
    op: str
    reason: Literal["overflow", "takes", "constant", "loss"]
    largest: float  # largest magnitude of its output in all activations
    cost: float | None = None  # output error if only this node is rounded, relative to the output's range; None: not finite
    splits_attention: bool = False  # it is between an attention's two matrix products, where casts prevent fusion


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The accuracy of a component's half precision, measured on real activations against its float32 graph.

    Every node's inputs, weights and output are rounded and nothing is fused, so an engine is at least as accurate. `cosine` and
    `psnr` (dB, relative to the range of the reference output) are the worst of all outputs, on some of the activations.
    `all_cosine` and `all_psnr` are the same with every node in half precision (None: not finite).
    """

    feeds: int  # number of sets of activations
    nodes: int  # number of nodes that can be in half precision
    kept: tuple[KeptNode, ...] = ()
    largest: float  # largest magnitude of the tensors in half precision
    largest_node: str
    cosine: float
    psnr: float
    all_cosine: float | None = None
    all_psnr: float | None = None

    @property
    def whole(self) -> bool:
        """Whether the whole component stays in float32, the last resort."""
        return len(self.kept) == self.nodes > 0
