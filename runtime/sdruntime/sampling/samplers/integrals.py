"""The two integrals of multistep samplers: a polynomial times an exponential, as Adams weights and as phi functions."""

from __future__ import annotations

import math

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(24)
POWERS = np.vander(1 + NODES, 4, increasing=True)  # of (u - start) / half


def adams_weights(nodes: list[float], start: float, end: float, rate: float = 0.0) -> list[float]:
    """Return w[j] = ∫ L_j(u)·exp(rate·(u - end)) du from `start` to `end`, L_j the Lagrange polynomials on `nodes`.

    At most four nodes. The weights are solved for so that they integrate 1, u, u², u³ exactly. The moments are by Gauss-Legendre
    quadrature with 24 points: exact for rate 0, and to float64 rounding for |rate|·(end - start) up to 20.
    """
    half = (end - start) / 2
    moments = half * (WEIGHTS * np.exp(rate * half * (NODES - 1))) @ POWERS[:, : len(nodes)]
    if len(nodes) == 1 or half == 0:
        return [float(moments[0]), *[0.0] * (len(nodes) - 1)]
    scaled = (np.array(nodes) - start) / half
    weights: list[float] = np.linalg.solve(np.vander(scaled, increasing=True).T, moments).tolist()
    return weights


def phi(k: int, z: float) -> float:
    """Return (exp(z) - its Taylor polynomial of degree k) / z^k = Σ z^i / (i + k)!, i ≥ 1; exp(z) - 1 for k = 0.

    These are the phi functions of exponential integrators, shifted to vanish at 0.
    """
    if abs(z) < 0.1:
        return sum(z**i / math.factorial(i + k) for i in range(1, 11))
    return math.expm1(z) if k == 0 else phi(k - 1, z) / z - 1 / math.factorial(k)
