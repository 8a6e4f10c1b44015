"""The limits on the errors of an engine of each precision, in one table.

`sdruntime verify` applies them to engines, `sdexport` to its audit of half precision, and docs/verification.md shows them
(`docs/generate.py`). bfloat16 has 8 significant bits where float16 has 11: its errors are up to 2³ = 8 times as large, 18 dB.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sdruntime.backends.base.engine import CPU
from sdruntime.bundle.manifest import EngineSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The limits of one precision.

    For a component, `relative` bounds the largest error and `digest` the error of the mean, standard deviation, minimum and
    maximum, both relative to the output's largest magnitude; `psnr` and `cosine` are lower bounds for each output. For an image
    of the whole pipeline, `picture_psnr` (uint8, peak 255) and `ssim` are lower bounds. Compared with diffusers' image, fp32
    reaches more than 60 dB with every sampler, and a scheduler that is off by one timestep reaches 48 to 55 dB.
    """

    relative: float
    psnr: float  # dB
    cosine: float
    digest: float
    picture_psnr: float  # dB
    ssim: float


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "fp32": Tolerance(relative=1e-4, psnr=80.0, cosine=0.999999, digest=1e-4, picture_psnr=55.0, ssim=0.99),
        "tf32": Tolerance(relative=1e-2, psnr=50.0, cosine=0.9999, digest=1e-2, picture_psnr=30.0, ssim=0.95),
        "fp16": Tolerance(relative=1.0, psnr=40.0, cosine=0.9999, digest=0.05, picture_psnr=30.0, ssim=0.95),
        "bf16": Tolerance(relative=1.0, psnr=22.0, cosine=0.9936, digest=0.2, picture_psnr=20.0, ssim=0.8),
    }
)


def tolerance_name(engine: EngineSpec) -> str:
    """Return the key of TOLERANCES that applies to an engine.

    On a GPU, fp32 computes in TF32 (10 bits of mantissa) unless NVIDIA_TF32_OVERRIDE=0 disables it.
    """
    if engine.precision == "fp32" and engine.target != CPU and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        return "tf32"
    return engine.precision
