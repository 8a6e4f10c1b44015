"""An optional input of the UNet, used where a job has it and zeros elsewhere, in each engine library and in the GPU loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from trt.conftest import DRAWN, with_engines
from trt.machine import Machine
from trt.small import small_bundle

from sdruntime.arrays import Array
from sdruntime.backends.registry import BACKENDS
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request

SEEDS = (1, 2, 3)


def drawn(pipe: Pipeline, *, on_device: bool, residuals: dict[int, float]) -> list[Array]:
    jobs = pipe.jobs([Request(prompt="a cat", seed=seed, steps=5, sampler="ddim", size=(64, 64)) for seed in SEEDS])
    for seed, job in zip(SEEDS, jobs, strict=True):
        if seed in residuals:
            residual = np.full((4, 4, 4), residuals[seed], np.float32)
            job.rows = tuple({**row, "residual": residual} for row in job.rows)
    for _ in pipe.loop(jobs, pipe.device_steppers if on_device else pipe.steppers):
        pass
    return [job.run.x.copy() for job in jobs]


def test_jobs_with_and_without_it_share_a_loop(here: Machine, tmp_path: Path) -> None:
    small_bundle(tmp_path / "bare", residual=True)
    folder = with_engines(
        tmp_path / "bare", tmp_path / "bundle", here, components=DRAWN, size="64x64", batch="1:1:4", guidance="any"
    )
    for _ in build_engines(folder, BuildRequest(backend="onnxruntime", components=DRAWN[:3])):
        pass
    with Pipeline.open(folder, backend="onnxruntime") as pipe:
        some, none = (drawn(pipe, on_device=False, residuals=each) for each in ({2: 0.3}, {}))
    if BACKENDS["openvino"].here().version is not None:
        for _ in build_engines(folder, BuildRequest(backend="openvino", size="64x64", components=DRAWN[:3])):
            pass
        with Pipeline.open(folder, backend="openvino") as pipe:
            np.testing.assert_allclose(drawn(pipe, on_device=False, residuals={2: 0.3}), some, atol=1e-4)
    for changed, plain, seed in zip(some, none, SEEDS, strict=True):
        assert (np.abs(changed - plain).max() > 0.1) == (seed == 2)
    with Pipeline.open(folder, backend=here.backend) as pipe:
        for on_device in (False, True):
            for residuals, reference in (({2: 0.3}, some), ({}, none)):  # the second in the buffers of the first
                launches = here.gpus.counts["launches"]
                ours = drawn(pipe, on_device=on_device, residuals=residuals)
                np.testing.assert_allclose(ours, reference, atol=1e-4)
                assert (here.gpus.counts["launches"] > launches) == on_device
