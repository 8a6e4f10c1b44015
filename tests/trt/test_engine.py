"""TensorRT engines built and run from a bundle, on fakes that forbid what the real ones would punish. ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trt.conftest import psnr, with_engines
from trt.machine import Machine
from trt.surface import Surface

from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.pipeline import Pipeline

PROMPT = "a cat in the red and"


def test_the_picture_is_the_ort_backends(
    machine: Callable[..., Machine], surface: Surface, sd1_bundle: Path, tmp_path: Path
) -> None:
    here = machine(surface)
    folder = with_engines(sd1_bundle, tmp_path / "bundle", here)
    for _ in build_engines(folder, BuildRequest(backend="onnxruntime", target="cpu")):
        pass
    pictures = []
    for backend in (here.backend, "onnxruntime"):
        with Pipeline.open(folder, backend=backend) as pipe:
            pictures.append(pipe([PROMPT, "a cat"], count=2, seed=7, steps=4).pixels)
    for ours, reference in zip(*pictures, strict=True):
        assert reference.std() >= 10
        assert psnr(ours, reference) >= 60
    assert Bundle.open(folder).manifest.engines[0].target == "sm86"
