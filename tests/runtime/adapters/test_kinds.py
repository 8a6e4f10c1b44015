"""What each kind of adapter makes of a weight, against its formula written out index by index."""

from __future__ import annotations

import numpy as np
import pytest

from sdruntime.adapters.kinds import DORA_SCALE, DOWN, FULL, MAGNITUDE, MID, UP, change, changed, check_shapes, kind_of, rank_of

RANDOM = np.random.default_rng(0)
LINEAR, CONVOLUTION = (6, 4), (6, 4, 3, 3)
Tensors = dict[str, np.ndarray]


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tensors.items()}


def delta(tensors: Tensors, weight: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    kind = kind_of(shapes_of(tensors))
    check_shapes(kind, shapes_of(tensors), weight)
    return change(kind, tensors, weight, scale)


def assert_equal(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


def tucker(core: np.ndarray, outputs: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Each number by its own sum; outputs [r, out], inputs [s, in]."""
    made = np.zeros((outputs.shape[1], inputs.shape[1], *core.shape[2:]))
    for o, i, h, w in np.ndindex(*made.shape):
        made[o, i, h, w] = outputs[:, o].astype(float) @ core[:, :, h, w].astype(float) @ inputs[:, i].astype(float)
    return made


def test_a_matrix() -> None:
    tensors = {UP: normal(6, 2), DOWN: normal(2, 4)}
    expected = [
        [sum(float(tensors[UP][o, r]) * float(tensors[DOWN][r, i]) for r in range(2)) for i in range(4)] for o in range(6)
    ]
    assert_equal(delta(tensors, LINEAR, 0.5), 0.5 * np.array(expected))


@pytest.mark.parametrize("up", [(6, 2), (6, 2, 1, 1)])
def test_a_convolution(up: tuple[int, ...]) -> None:
    tensors = {UP: normal(*up), DOWN: normal(2, 4, 3, 3)}
    expected = np.zeros(CONVOLUTION)
    for o, i, h, w in np.ndindex(*CONVOLUTION):
        expected[o, i, h, w] = tensors[UP].reshape(6, 2)[o].astype(float) @ tensors[DOWN][:, i, h, w].astype(float)
    assert_equal(delta(tensors, CONVOLUTION), expected)


@pytest.mark.parametrize("weight", [LINEAR, (6, 4, 1, 1)])
def test_a_projection_is_a_matrix_or_a_convolution(weight: tuple[int, ...]) -> None:
    flat = {UP: normal(6, 2), DOWN: normal(2, 4)}
    deep = {UP: flat[UP].reshape(6, 2, 1, 1), DOWN: flat[DOWN].reshape(2, 4, 1, 1)}
    assert np.array_equal(delta(flat, weight), delta(deep, weight))


def test_a_tucker_decomposition() -> None:
    tensors = {UP: normal(6, 2, 1, 1), DOWN: normal(3, 4, 1, 1), MID: normal(2, 3, 3, 3)}
    expected = tucker(tensors[MID], tensors[UP].reshape(6, 2).T, tensors[DOWN].reshape(3, 4))
    assert_equal(delta(tensors, CONVOLUTION), expected)


def test_loha() -> None:
    tensors = {"w1_a": normal(6, 2), "w1_b": normal(2, 36), "w2_a": normal(6, 3), "w2_b": normal(3, 36)}
    products = [tensors[f"w{k}_a"].astype(float) @ tensors[f"w{k}_b"].astype(float) for k in (1, 2)]
    assert_equal(delta(tensors, CONVOLUTION), (products[0] * products[1]).reshape(CONVOLUTION))


def test_loha_of_tucker_decompositions() -> None:
    tensors = {
        f"{name}{k}{end}": normal(*shape)
        for k in (1, 2)
        for name, end, shape in (("t", "", (2, 2, 3, 3)), ("w", "_a", (2, 6)), ("w", "_b", (2, 4)))
    }
    halves = [tucker(tensors[f"t{k}"], tensors[f"w{k}_a"], tensors[f"w{k}_b"]) for k in (1, 2)]
    assert_equal(delta(tensors, CONVOLUTION), halves[0] * halves[1])


@pytest.mark.parametrize("first", ["whole", "factored"])
@pytest.mark.parametrize("second", ["whole", "factored", "tucker"])
def test_lokr(first: str, second: str) -> None:
    tensors: Tensors = {}
    if first == "whole":
        one = tensors["k1"] = normal(2, 2)
    else:
        tensors |= {"k1_a": normal(2, 1), "k1_b": normal(1, 2)}
        one = tensors["k1_a"] @ tensors["k1_b"]
    if second == "whole":
        two = tensors["k2"] = normal(3, 2, 3, 3)
    elif second == "factored":
        tensors |= {"k2_a": normal(3, 1), "k2_b": normal(1, 18)}
        two = (tensors["k2_a"] @ tensors["k2_b"]).reshape(3, 2, 3, 3)
    else:
        tensors |= {"t2_k": normal(2, 2, 3, 3), "k2_a": normal(2, 3), "k2_b": normal(2, 2)}
        two = tucker(tensors["t2_k"], tensors["k2_a"], tensors["k2_b"])
    expected = np.zeros(CONVOLUTION)
    for a, b, c, d in np.ndindex(2, 2, 3, 2):
        expected[3 * a + c, 2 * b + d] = float(one[a, b]) * two[c, d].astype(float)
    assert_equal(delta(tensors, CONVOLUTION), expected)
    assert (rank_of("lokr", shapes_of(tensors)) is None) == ((first, second) == ("whole", "whole"))


def test_a_whole_difference() -> None:
    tensors = {FULL: normal(*CONVOLUTION)}
    assert np.array_equal(delta(tensors, CONVOLUTION), tensors[FULL])


@pytest.mark.parametrize("strength", [1.0, 0.4, -1.5])
def test_magnitudes_of_peft(strength: float) -> None:
    weight, difference, m = normal(*CONVOLUTION), normal(*CONVOLUTION), np.abs(normal(1, 6, 1, 1))
    moved = weight.astype(float) + strength * difference
    expected = [m.reshape(-1)[o] * moved[o] / np.sqrt((moved[o] ** 2).sum()) for o in range(6)]
    assert_equal(changed(weight, difference, strength, {MAGNITUDE: m}), np.array(expected))


@pytest.mark.parametrize("strength", [1.0, 0.4, -1.5])
@pytest.mark.parametrize("shape", [(6, 1, 1, 1), (1, 4, 1, 1)])
def test_magnitudes_of_lycoris(strength: float, shape: tuple[int, ...]) -> None:
    weight, difference, m = normal(*CONVOLUTION), normal(*CONVOLUTION), np.abs(normal(*shape))
    moved = weight.astype(float) + strength * difference
    axis = 0 if shape[0] == 6 else 1
    norms = np.array([np.sqrt((moved.take(k, axis) ** 2).sum()) for k in range(CONVOLUTION[axis])]).reshape(shape)
    assert_equal(changed(weight, difference, strength, {DORA_SCALE: m}), moved * (strength * (m / norms - 1) + 1))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({UP: (6, 2)}, "not complete"),
        ({"alpha": ()}, "not a whole layer"),
        ({UP: (6, 2), DOWN: (2, 4), FULL: (6, 4)}, "several kinds"),
        ({"w1_a": (6, 2), "w1_b": (2, 4)}, "not complete"),
        ({"k1": (2, 2)}, "not complete"),
    ],
)
def test_incomplete_layers(tensors: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind_of(tensors)


@pytest.mark.parametrize(
    "tensors",
    [
        {UP: (6, 2), DOWN: (3, 4)},
        {UP: (6, 2), DOWN: (2, 5)},
        {UP: (5, 2), DOWN: (2, 4)},
        {UP: (6, 0), DOWN: (0, 4)},
        {UP: (), DOWN: (2, 4)},
        {UP: (6, 2), DOWN: (2, 4), "alpha": (2,)},
        {UP: (6, 2), DOWN: (2, 4), MAGNITUDE: (4,)},
        {UP: (6, 2), DOWN: (2, 4), DORA_SCALE: (2, 3)},
        {UP: (6, 2), DOWN: (2, 4), MID: (2, 2, 3, 3)},
        {"w1_a": (6, 2), "w1_b": (2, 4), "w2_a": (4, 2), "w2_b": (2, 6)},
        {"w1_a": (6,), "w1_b": (2, 4), "w2_a": (6, 2), "w2_b": (2, 4)},
        {"k1": (3, 2), "k2": (3, 2)},
        {"k1": (3,), "k2": (2, 4)},
        {FULL: (4, 6)},
    ],
)
def test_shapes_that_do_not_fit(tensors: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"does not fit|without|alpha|magnitudes|dora_scale"):
        check_shapes(kind_of(tensors), tensors, LINEAR)
