"""The arithmetic of adapters: the weight that each kind makes of a weight.

With the strength s, alpha a and rank r; the change Δ of each kind includes its own scale, which is a/r, and 1 if the file has no
alpha:

    lora     up @ down, also of convolutions (LoCon); with a middle tensor, a Tucker decomposition
    loha     (w1_a @ w1_b) * (w2_a @ w2_b)                                 https://arxiv.org/abs/2108.06098
    lokr     the Kronecker product of w1 and w2, either of which may be factored; scale 1 if neither is
    full     the change itself (LyCORIS "full" and "norm")

A weight becomes W + sΔ. With magnitudes m (DoRA, https://arxiv.org/abs/2402.09353), V = W + sΔ is rescaled; at strengths other
than 1 there are two rules, and the file's format decides: peft's m·V/‖V‖, and LyCORIS's V·(s(m/‖V‖ − 1) + 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from sdruntime.arrays import Array

Kind = Literal["lora", "loha", "lokr", "full"]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

UP, DOWN, MID, ALPHA = "up", "down", "mid", "alpha"
FULL = "full"
MAGNITUDE, DORA_SCALE = "magnitude", "dora_scale"  # of peft, and of LyCORIS
_EPSILON = float(np.finfo(np.float32).eps)  # added to norms, as in LyCORIS

# kind -> the sets of tensors of which one must be complete
_REQUIRED: Mapping[Kind, tuple[frozenset[str], ...]] = {
    "lora": (frozenset({UP, DOWN}),),
    "loha": (frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),),
    "lokr": tuple(frozenset(first + second) for first in (("k1",), ("k1_a", "k1_b")) for second in (("k2",), ("k2_a", "k2_b"))),
    "full": (frozenset({FULL}),),
}
_OPTIONAL: Mapping[Kind, frozenset[str]] = {
    "lora": frozenset({MID}),
    "loha": frozenset({"t1", "t2"}),
    "lokr": frozenset({"t2_k"}),
    "full": frozenset(),
}
_MARKS: Mapping[Kind, frozenset[str]] = {  # any of them tells the kind
    "lora": frozenset({UP, DOWN}),
    "loha": frozenset({"w1_a", "w2_a"}),
    "lokr": frozenset({"k1", "k1_a", "k2", "k2_a"}),
    "full": frozenset({FULL}),
}


def kind_of(tensors: Shapes) -> Kind:
    """Return the kind of a layer by its tensors. Raises ValueError for an incomplete or mixed set."""
    names = set(tensors) - {ALPHA, MAGNITUDE, DORA_SCALE}
    kinds = {kind for kind, marks in _MARKS.items() if marks & names}
    if len(kinds) != 1:
        raise ValueError(f"{', '.join(sorted(tensors))} {'belong to several kinds' if kinds else 'are not a whole layer'}")
    [kind] = kinds
    if not any(needed <= names <= needed | _OPTIONAL[kind] for needed in _REQUIRED[kind]):
        raise ValueError(f"a layer of {kind} with {', '.join(sorted(names))}, which is not complete")
    return kind


def rank_of(kind: Kind, shapes: Shapes) -> int | None:
    """Return the rank of a layer, or None if it is not factored."""
    if kind == "lora":
        return shapes[DOWN][0]
    if kind == "loha":
        return shapes["w1_b"][0]
    factored = next((shapes[name][0] for name in ("k1_b", "k2_b") if name in shapes), None)
    return factored if kind == "lokr" else None


def check_shapes(kind: Kind, shapes: Shapes, weight: Shape) -> None:
    """Raises ValueError if a layer's tensors cannot change a weight of this shape."""
    if not all(math.prod(shape) and (shape or name == ALPHA) for name, shape in shapes.items()):
        raise ValueError("a tensor without numbers or axes")
    shape = _shape(kind, shapes)
    if shape is None or math.prod(shape) != math.prod(weight) or shape[0] != weight[0]:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items() if name != ALPHA)
        raise ValueError(f"{listed}: does not fit the weight of {list(weight)}")
    count = math.prod(shapes.get(ALPHA, (1,)))
    if count != 1:
        raise ValueError(f"alpha has {count} numbers, not one")
    m = shapes.get(MAGNITUDE)
    if m is not None and math.prod(m) != weight[0]:
        raise ValueError(f"magnitudes {list(m)}: expected {weight[0]}")
    m = shapes.get(DORA_SCALE)
    if m is not None and _on_output(m, weight) is None:
        raise ValueError(f"dora_scale {list(m)}: expected {weight[0]} of the outputs or {weight[1]} of the inputs")


def change(kind: Kind, tensors: Mapping[str, Array], weight: Shape, scale: float) -> Array:
    """Return Δ, float32 in the weight's shape. `scale`: alpha / rank, or its replacement."""
    delta: Array
    if kind == "lora":
        delta = _lora(tensors)
    elif kind == "loha":
        delta = _half(tensors, "w1_a", "w1_b", "t1") * _half(tensors, "w2_a", "w2_b", "t2")
    elif kind == "lokr":
        first = tensors["k1"] if "k1" in tensors else _product(tensors["k1_a"], tensors["k1_b"])
        second = tensors["k2"] if "k2" in tensors else _half(tensors, "k2_a", "k2_b", "t2_k")
        delta = np.kron(first, second.reshape(len(second), -1))
    else:
        delta = tensors[FULL]
    delta = np.reshape(delta, weight)
    return delta if scale == 1 else delta * np.float32(scale)


def changed(weight: Array, delta: Array, strength: float, tensors: Mapping[str, Array]) -> Array:
    """Return the weight with a change at a strength, float32; with magnitudes among the `tensors`, as DoRA."""
    moved: Array = weight + np.float32(strength) * delta
    if MAGNITUDE in tensors:
        axes = tuple(range(1, moved.ndim))
        norms = _norms(moved, axes)
        return np.asarray(moved * (tensors[MAGNITUDE].reshape(norms.shape) / norms), np.float32)
    if DORA_SCALE in tensors:
        m = tensors[DORA_SCALE]
        kept = 0 if _on_output(m.shape, moved.shape) else 1
        norms = _norms(moved, tuple(axis for axis in range(moved.ndim) if axis != kept)) + np.float32(_EPSILON)
        factor = m.reshape(norms.shape) / norms
        return np.asarray(moved * (np.float32(strength) * (factor - 1) + 1), np.float32)
    return moved


def _lora(tensors: Mapping[str, Array]) -> Array:
    up, down = tensors[UP], tensors[DOWN]
    if MID not in tensors:
        return _product(up.reshape(len(up), -1), down.reshape(len(down), -1))
    return _tucker(tensors[MID], up.reshape(len(up), -1).T, down.reshape(len(down), -1))


def _half(tensors: Mapping[str, Array], first: str, second: str, core: str) -> Array:
    """Return a factored matrix, or with a core tensor its Tucker decomposition."""
    if core in tensors:
        return _tucker(tensors[core], tensors[first], tensors[second])
    return _product(tensors[first], tensors[second].reshape(len(tensors[second]), -1))


def _product(first: Array, second: Array) -> Array:
    return np.asarray(first @ second, np.float32)


def _tucker(core: Array, outputs: Array, inputs: Array) -> Array:
    """Return [out, in, h, w] of a core [r, s, h, w], outputs [r, out] and inputs [s, in]."""
    return np.asarray(np.einsum("rshw,ro,si->oihw", core, outputs, inputs, optimize=True), np.float32)


def _norms(weight: Array, axes: tuple[int, ...]) -> Array:
    return np.asarray(np.sqrt(np.sum(np.square(weight), axis=axes, keepdims=True)), np.float32)


def _on_output(m: Shape, weight: Shape) -> bool | None:
    """Return whether magnitudes belong to a weight's outputs, or False for its inputs; None if they fit neither."""
    if len(m) < 2 or len(weight) < 2:
        return None
    if m[0] == weight[0] and math.prod(m) == weight[0]:
        return True
    return False if m[1] == weight[1] and math.prod(m) == weight[1] else None


def _shape(kind: Kind, shapes: Shapes) -> Shape | None:
    """Return the shape that a layer's tensors make, with the axes after the first merged or not; None if they do not fit."""
    flat = {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items() if shape}
    if kind == "full":
        return shapes[FULL] or None
    if kind == "lora":
        (out, rank), (inner, columns) = flat[UP], flat[DOWN]
        if MID not in shapes:
            return (out, columns) if rank == inner else None
        return _tucker_shape(shapes[MID], (rank, out), (inner, columns))
    if kind == "loha":
        one, two = (_half_shape(shapes, flat, f"w{k}_a", f"w{k}_b", f"t{k}") for k in (1, 2))
        return one if one is not None and two is not None and math.prod(one) == math.prod(two) and one[0] == two[0] else None
    first = shapes["k1"] if "k1" in shapes else _half_shape(shapes, flat, "k1_a", "k1_b", "")
    second = flat.get("k2") or _half_shape(shapes, flat, "k2_a", "k2_b", "t2_k")
    if first is None or second is None or len(first) != 2:
        return None
    return first[0] * second[0], first[1] * math.prod(second[1:])


def _half_shape(shapes: Shapes, flat: Shapes, first: str, second: str, core: str) -> Shape | None:
    if core in shapes:
        return _tucker_shape(shapes[core], shapes[first], shapes[second])
    one, two = shapes[first], flat.get(second, ())
    return (one[0], two[1]) if len(one) == 2 and len(two) == 2 and one[1] == two[0] else None


def _tucker_shape(core: Shape, outputs: Shape, inputs: Shape) -> Shape | None:
    if len(core) != 4 or len(outputs) != 2 or len(inputs) != 2 or core[:2] != (outputs[0], inputs[0]):
        return None
    return outputs[1], inputs[1], *core[2:]
