"""DDIM and DDPM: the clean estimate and the noise that is left, mixed anew for the next level."""

from __future__ import annotations

import math

from sdruntime.sampling.grids import Path
from sdruntime.sampling.samplers.protocol import Draw, Solver, X, noise_of


def ddim(x: X, path: Path, noise: Draw, *, eta: float = 0.0) -> Solver:
    """arXiv 2010.02502, equations 12 and 16; eta from 0 (deterministic) to 1 (DDPM's variance)."""
    for s, t in path:
        x, m = yield x, s
        std = eta * posterior_std(s.alpha, s.sigma, t.alpha, t.sigma)
        x = t.alpha * m + math.sqrt(max(t.sigma**2 - std**2, 0.0)) * noise_of(x, m, s)
        if eta > 0:
            x = x + std * noise()
    return x


def ddpm(x: X, path: Path, noise: Draw, *, variance_type: str = "fixed_small") -> Solver:
    """arXiv 2006.11239, equation 7, over any subset of the timesteps; no noise after timestep 0.

    variance_type "fixed_small" takes the posterior's variance, "fixed_large" that of the forward step; their logarithms
    ("_log") mean the same here, diffusers makes NaN of "fixed_large_log".
    """
    for s, t in path:
        x, m = yield x, s
        ratio = s.alpha / t.alpha
        beta = 1 - ratio**2
        std = math.sqrt(beta) if variance_type.startswith("fixed_large") else posterior_std(s.alpha, s.sigma, t.alpha, t.sigma)
        x = (t.alpha * beta * m + ratio * t.sigma**2 * x) / s.sigma**2
        if s.t > 0:
            x = x + std * noise()
    return x


def posterior_std(alpha_s: float, sigma_s: float, alpha_t: float, sigma_t: float) -> float:
    """Standard deviation of q(x_t | x_s, clean), arXiv 2006.11239, equation 7."""
    return sigma_t / sigma_s * math.sqrt(1 - (alpha_s / alpha_t) ** 2)
