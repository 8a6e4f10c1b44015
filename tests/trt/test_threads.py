"""A pipeline that is opened in one thread and used in another: the device's context is each thread's own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from trt.conftest import psnr, with_engines
from trt.machine import Machine
from trt.surface import Surface

from sdruntime.pipeline.pipeline import Pipeline


@pytest.mark.parametrize("name", ["tensorrt 10.3.0", "tensorrt_rtx 1.7.1.116"])
def test_a_pipeline_goes_from_thread_to_thread(
    machine: Callable[..., Machine], surfaces: dict[str, Surface], sd1_bundle: Path, tmp_path: Path, name: str
) -> None:
    here = machine(surfaces[name])
    folder = with_engines(sd1_bundle, tmp_path / "bundle", here)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        pipe = one.submit(Pipeline.open(folder, backend=here.backend).__enter__).result()
        pictures = [
            thread.submit(lambda: pipe("a cat in the red", seed=5, steps=3).pixels[0]).result() for thread in (other, one, other)
        ]
        other.submit(pipe.close).result()
    assert pictures[0].std() >= 10
    assert psnr(pictures[0], pictures[1]) >= 60
    assert psnr(pictures[0], pictures[2]) >= 60
