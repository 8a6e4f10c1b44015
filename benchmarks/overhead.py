"""Measure the runtime's overhead outside the engines: a 512x512 image with engines that return at once, and samplers' tables.

python benchmarks/overhead.py BUNDLE [--output overhead.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.images.png import write_png
from sdruntime.pipeline.jobs import SCHEDULER
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.sampling.compile import compile_table

STEPS, SIZE, ROUNDS = 20, (512, 512), 30
SAMPLERS = ("ddim", "pndm", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "sa_solver")


def median_seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def steps_alone(pipe: Pipeline, sampler: str) -> float:
    """Return the median, over all rounds, of the mean seconds per step from the first state to the last."""
    times = []
    for _ in range(ROUNDS):
        stream = iter(pipe.stream("a prompt", sampler=sampler, size=SIZE, steps=STEPS, seed=0))
        next(stream)
        begun = time.perf_counter()
        for _state in stream:
            pass
        times.append((time.perf_counter() - begun) / (STEPS - 1))
    return statistics.median(times)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(shutil.copytree(options.bundle, Path(folder) / "bundle"))
        for _ in build_engines(bundle, BuildRequest(backend="fake", size="64x64:1024x1024")):
            pass
        schedule = Bundle.open(bundle).read_json(SCHEDULER)
        with Pipeline.open(bundle, backend="fake") as pipe:
            whole = median_seconds(lambda: pipe("a prompt", sampler="dpmpp_2m", size=SIZE, steps=STEPS, seed=0))
            image = pipe("a prompt", size=SIZE, seed=0).images[0]
            result = {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "processor": platform.processor() or platform.machine(),
                "picture_ms": 1e3 * whole,
                "png_ms": 1e3 * median_seconds(lambda: write_png(Path(folder) / "out.png", image.pixels, text=image.text())),
                "step_us": {sampler: 1e6 * steps_alone(pipe, sampler) for sampler in SAMPLERS},
                "table_ms": {
                    sampler: 1e3 * median_seconds(lambda sampler=sampler: compile_table(schedule, steps=50, sampler=sampler))  # type: ignore[misc]
                    for sampler in SAMPLERS
                },
            }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
