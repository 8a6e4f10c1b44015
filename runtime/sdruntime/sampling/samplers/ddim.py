"""DDIM and DDPM: mix the clean estimate and the estimated noise at the next level."""

from __future__ import annotations

import math

from sdruntime.sampling.grids import Path, ddim_grid, ddpm_grid
from sdruntime.sampling.samplers.keys import (
    CLIP,
    LEADING,
    TRAINED,
    ZERO_SNR,
)
from sdruntime.sampling.samplers.protocol import Draw, Solver, X, noise_of
from sdruntime.sampling.samplers.sampler import Sampler


def ddim(x: X, path: Path, noise: Draw, *, eta: float = 0.0) -> Solver:
    """DDIM, arXiv 2010.02502, equations 12 and 16; eta from 0 (deterministic) to 1 (DDPM's variance)."""
    for s, t in path:
        x, m = yield x, s
        std = eta * posterior_std(s.alpha, s.sigma, t.alpha, t.sigma)
        x = t.alpha * m + math.sqrt(max(t.sigma**2 - std**2, 0.0)) * noise_of(x, m, s)
        if eta > 0:
            x = x + std * noise()
    return x


def ddpm(x: X, path: Path, noise: Draw, *, variance_type: str = "fixed_small") -> Solver:
    """DDPM, arXiv 2006.11239, equation 7, over any subset of the timesteps; no noise after timestep 0.

    variance_type "fixed_small" is the posterior's variance, "fixed_large" that of the forward step. The "_log" types mean the
    same; in diffusers, "fixed_large_log" results in NaN.
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
    """Return the standard deviation of q(x_t | x_s, clean), arXiv 2006.11239, equation 7."""
    return sigma_t / sigma_s * math.sqrt(1 - (alpha_s / alpha_t) ** 2)


ROWS = (
    Sampler(
        name="ddim",
        solve=ddim,
        grid=ddim_grid,
        space="vp",
        order=1,
        reads={**TRAINED, **LEADING, **ZERO_SNR, **CLIP, "set_alpha_to_one": True, "eta": 0.0},
        options=("eta",),
        diffusers="DDIMScheduler",
        a1111=("DDIM",),
        about="Denoising diffusion implicit models (arXiv 2010.02502)",
    ),
    Sampler(
        name="ddpm",
        solve=ddpm,
        grid=ddpm_grid,
        space="vp",
        order=1,
        reads={**TRAINED, **LEADING, **ZERO_SNR, **CLIP, "variance_type": "fixed_small"},
        options=("variance_type",),
        diffusers="DDPMScheduler",
        about="Denoising diffusion probabilistic models (arXiv 2006.11239)",
    ),
)
