"""Compare eight images through the queue with eight in sequence, and measure how long a new request waits.

python benchmarks/batcher.py BUNDLE [--rounds 9] [--output batcher.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.serving.batcher import Batcher, Progress

JOBS, STEPS, GUIDANCE = 8, 20, 2.0
SIZES = {(64, 64): 1, (128, 128): 3}  # size -> divisor of the rounds
RUNNING = (1, 2, 4, 8)
SAMPLERS = ("dpmpp_2m", "euler_a", "unipc", "ddim", "pndm", "lcm", "deis", "dpmpp_2m_sde")
ARRIVALS = 40
COLOURS = ("red", "green", "blue", "yellow")


def jobs(size: tuple[int, int]) -> list[Request]:
    return [
        Request(
            prompt=f"a large {COLOURS[seed % len(COLOURS)]} circle on a black background",
            seed=seed,
            steps=STEPS,
            sampler=SAMPLERS[seed],
            guidance=GUIDANCE,
            size=size,
        )
        for seed in range(JOBS)
    ]


def in_a_row(pipe: Pipeline, requests: list[Request]) -> float:
    begun = time.perf_counter()
    for request in requests:
        pipe(request)
    return time.perf_counter() - begun


def together(pipe: Pipeline, requests: list[Request], running: int) -> float:
    """Return the seconds from the first submission to the last image."""
    with Batcher(pipe, running=running) as batcher:
        begun = time.perf_counter()
        for future in [batcher.submit(request) for request in requests]:
            future.result()
        return time.perf_counter() - begun


def throughput(pipe: Pipeline, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Measure all variants in turn; `ratio` is the median of the ratios within each round."""
    requests = jobs(size)
    in_a_row(pipe, requests)
    alone: list[float] = []
    queued: dict[int, list[float]] = {running: [] for running in RUNNING}
    for _ in range(rounds):
        alone.append(in_a_row(pipe, requests))
        for running, times in queued.items():
            times.append(together(pipe, requests, running))
    ratios = {running: [one / other for one, other in zip(alone, times, strict=True)] for running, times in queued.items()}
    return {
        "size": list(size),
        "rounds": rounds,
        "in_a_row_s": statistics.median(alone),
        "queue_s": {str(running): statistics.median(times) for running, times in queued.items()},
        "ratio": {str(running): statistics.median(values) for running, values in ratios.items()},
        "ratio_range": {str(running): [min(values), max(values)] for running, values in ratios.items()},
    }


def waits(pipe: Pipeline) -> dict[str, Any]:
    """Submit requests at random times while four jobs run; measure the steps and seconds from submission to joining."""
    chance = random.Random(0)
    steps: list[int] = []
    seconds: list[float] = []
    done = [0]

    def first(progress: Progress) -> None:
        done[0] = progress.step

    with Batcher(pipe) as batcher:
        runners = [batcher.submit(Request(prompt="a circle", seed=k, steps=900), progress=None if k else first) for k in range(4)]
        while done[0] < 5:
            time.sleep(0.001)
        for number in range(ARRIVALS):
            time.sleep(chance.random() * 0.05)
            joined: list[tuple[int, float]] = []

            def record(progress: Progress, joined: list[tuple[int, float]] = joined) -> None:
                if progress.step == 0:
                    joined.append((done[0], time.perf_counter()))

            step, begun = done[0], time.perf_counter()
            batcher.submit(Request(prompt=f"circle {number}", seed=1, steps=1), progress=record).result()  # a new text
            steps.append(joined[0][0] - step)
            seconds.append(joined[0][1] - begun)
        for runner in runners:
            runner.cancel()
    return {
        "arrivals": ARRIVALS,
        "steps_most": max(steps),
        "steps_mean": statistics.mean(steps),
        "ms_median": 1e3 * statistics.median(seconds),
        "ms_most": 1e3 * max(seconds),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    with Pipeline.open(options.bundle, backend="onnxruntime") as pipe:
        result = {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "processor": platform.processor() or platform.machine(),
            "engine": pipe.engine("unet").spec.name,
            "jobs": JOBS,
            "steps": STEPS,
            "guidance": GUIDANCE,
            "throughput": [throughput(pipe, size, max(1, options.rounds // cost)) for size, cost in SIZES.items()],
            "newcomer": waits(pipe),
        }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
