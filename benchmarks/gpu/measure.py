"""Measurements that require a GPU: driver calls, a component, a loop. The others are in `sdexport.bench.timing`."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from sdexport.bench.timing import feeds_of, repeated
from sdruntime.backends.base.engine import Engine
from sdruntime.backends.registry import BACKENDS
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.system.cuda import Cuda


@contextmanager
def driver_calls() -> Iterator[Counter[str]]:
    """Count sdruntime's calls of each driver function; calls by the engines' own libraries are not counted."""
    counts: Counter[str] = Counter()
    real = Cuda.call

    @functools.wraps(real)
    def call(self: Cuda, name: str, *arguments: Any, **about: Any) -> None:
        counts[name] += 1
        real(self, name, *arguments, **about)

    with mock.patch.object(Cuda, "call", call):
        yield counts


def waits(counts: Mapping[str, int]) -> int:
    """Return how many calls waited for the device."""
    return sum(count for name, count in counts.items() if name.endswith("Synchronize"))


def component(engine: Engine, dims: Mapping[str, int], factor: int, *, seconds: float) -> dict[str, Any]:
    """Measure a component at one shape. `call`: arrays in, arrays out. `device`: TensorRT's run alone, from enqueue to end."""
    feeds = feeds_of(engine.component, dims, factor)
    figures: dict[str, Any] = {"dims": dict(dims), "call": repeated(lambda: engine(feeds), seconds=seconds)}
    if BACKENDS[engine.spec.backend].loop:
        from sdruntime.backends.trt.engine import TrtEngine

        assert isinstance(engine, TrtEngine)
        binding, stream = engine.bind(dims), engine.session.stream

        def run() -> None:
            binding.enqueue()
            stream.synchronize()

        figures["device"] = repeated(run, seconds=seconds)
    return figures


def loop(pipe: Pipeline, requests: Callable[[int], list[Request]], steps: int, *, on_device: bool) -> dict[str, Any]:
    """Measure the denoising loop alone, without text encoder and VAE, at two lengths: time per step, and waits of the host.

    `wall_ms` and `cpu_ms` are per step of the longer loop; `cpu_ms` is the CPU time of the calling thread. `waits_per_step` is
    the difference in waits divided by the difference in steps, so waits once per image do not count.
    """
    lengths = max(2, steps // 2), max(4, steps)
    figures: dict[str, Any] = {}
    counted: list[tuple[int, int]] = []
    for length in (lengths[1], *lengths):  # the first warms up
        stream = pipe.stream(requests(length), on_device=on_device)
        with driver_calls() as counts:
            wall, cpu, calls = time.perf_counter(), time.thread_time(), 0
            for _ in stream:
                calls += 1
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
        counted.append((calls, waits(counts)))
        figures = {"steps": calls, "wall_ms": round(1e3 * wall / calls, 4), "cpu_ms": round(1e3 * cpu / calls, 4)}
        figures["driver_calls"] = dict(sorted(counts.items()))
    (short, short_waits), (long, long_waits) = counted[-2:]
    return figures | {"waits": long_waits, "waits_per_step": (long_waits - short_waits) / (long - short)}
