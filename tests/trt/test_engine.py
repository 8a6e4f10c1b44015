"""TensorRT engines built and run from a bundle, on fakes that forbid what the real ones would punish. ONNX Runtime computes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from trt.conftest import FakeMachine, Machines
from trt.surface import Version

from sdruntime.build import Asked, build_engines
from sdruntime.bundle import Bundle
from sdruntime.pipeline import Pipeline

PROMPT = "a cat in the red and"


def with_engines(bundle: Path, place: Path, machine: FakeMachine, **asked: object) -> Path:
    copy = Path(shutil.copytree(bundle, place))
    for _ in build_engines(copy, Asked(backend=machine.backend, **asked)):  # type: ignore[arg-type]
        pass
    return copy


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def test_the_picture_is_the_ort_backends(version: Version, machines: Machines, sd1_bundle: Path, tmp_path: Path) -> None:
    machine = machines(version)
    folder = with_engines(sd1_bundle, tmp_path / "bundle", machine)
    for _ in build_engines(folder, Asked(backend="onnxruntime", target="cpu")):
        pass
    pictures = []
    for backend in (machine.backend, "onnxruntime"):
        with Pipeline.open(folder, backend=backend) as pipe:
            pictures.append(pipe([PROMPT, "a cat"], count=2, seed=7, steps=4).images)
    for ours, reference in zip(*pictures, strict=True):
        assert reference.std() >= 10
        assert psnr(ours, reference) >= 60
    assert Bundle.open(folder).manifest.engines[0].target == "sm86"
