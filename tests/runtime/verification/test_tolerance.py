"""The table of limits: which row applies to an engine, and what passes and what fails."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sdruntime.bundle.manifest import EngineSpec
from sdruntime.verification.metrics import Difference
from sdruntime.verification.tolerance import TOLERANCES, tolerance_name
from sdruntime.verification.verify import component_faults


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """Numbers with so many significant bits: 11 in float16, 8 in bfloat16."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    return np.ldexp(np.round(mantissa * 2**bits) / 2**bits, exponent).astype(np.float32)


def test_what_openvino_measured_in_bf16_passes_and_would_fail_in_fp16() -> None:
    """A UNet at full size had a cosine of 0.99986 there: README and audit used to disagree about it."""
    reference = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    noise = np.random.default_rng(1).standard_normal(reference.size).astype(np.float32)
    ours = reference + noise * np.float32(np.sqrt(1 / 0.99986**2 - 1))
    found = Difference.of(ours, reference, float(np.abs(reference).max()))
    assert found.cosine == pytest.approx(0.99986, abs=2e-6)
    assert list(component_faults(found, TOLERANCES["bf16"])) == []
    assert any("cosine 0.9998" in fault for fault in component_faults(found, TOLERANCES["fp16"]))


def test_bf16_is_allowed_eight_times_the_error_of_fp16() -> None:
    values = np.random.default_rng(2).standard_normal(1 << 16).astype(np.float32)
    errors = [np.abs(rounded(values, bits) - values).mean() for bits in (8, 11)]
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.02)
    half, brain = TOLERANCES["fp16"], TOLERANCES["bf16"]
    assert half.psnr - brain.psnr == pytest.approx(20 * np.log10(8), abs=0.1)
    assert (1 - brain.cosine) / (1 - half.cosine) == pytest.approx(8**2, rel=1e-6)


def test_fp32_on_a_gpu_is_held_to_tf32_unless_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineSpec(
        component="unet",
        backend="tensorrt",
        version="11",
        target="sm90",
        precision="fp32",
        files=("engines/unet.plan",),
        profiles=({"batch": (1, 1, 1)},),
    )
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert tolerance_name(engine) == "tf32"
    assert tolerance_name(dataclasses.replace(engine, target="cpu")) == "fp32"
    assert tolerance_name(dataclasses.replace(engine, precision="fp16")) == "fp16"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert tolerance_name(engine) == "fp32"
