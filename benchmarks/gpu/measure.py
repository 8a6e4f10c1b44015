"""What is measured on a GPU alone: calls of the driver, one component, one loop. The rest is in `sdexport.bench.timing`."""

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
from sdruntime.pipeline.request import Request
from sdruntime.system.cuda import Cuda


@contextmanager
def driver_calls() -> Iterator[Counter[str]]:
    """How often each function of the driver is called by sdruntime (what the engines' libraries call themselves is not seen)."""
    counts: Counter[str] = Counter()
    real = Cuda.call

    @functools.wraps(real)
    def call(self: Cuda, name: str, *arguments: Any, **about: Any) -> None:
        counts[name] += 1
        real(self, name, *arguments, **about)

    with mock.patch.object(Cuda, "call", call):
        yield counts


def waits(counts: Mapping[str, int]) -> int:
    return sum(count for name, count in counts.items() if name.endswith("Synchronize"))


def component(engine: Engine, dims: Mapping[str, int], factor: int, *, seconds: float) -> dict[str, Any]:
    """One component at one shape. `call`: arrays in, arrays out; `device`: TensorRT's run alone, from its queueing to its end."""
    feeds = feeds_of(engine.component, dims, factor)
    told: dict[str, Any] = {"dims": dict(dims), "call": repeated(lambda: engine(feeds), seconds=seconds)}
    if BACKENDS[engine.spec.backend].loop:
        from sdruntime.backends.trt.engine import TrtEngine

        assert isinstance(engine, TrtEngine)
        binding, stream = engine.bind(dims), engine.session.stream

        def run() -> None:
            binding.enqueue()
            stream.synchronize()

        told["device"] = repeated(run, seconds=seconds)
    return told


def loop(pipe: Pipeline, asked: Callable[[int], list[Request]], steps: int, *, on_device: bool) -> dict[str, Any]:
    """The sampler's loop alone, text encoder and VAE apart, at two lengths: what a step costs the host, and waits of the host.

    `wall` and `cpu` are milliseconds a step of the longer one, `cpu` the calling thread's own work; `waits_per_step` is the
    difference of the two lengths' waits over that of their steps, so what is done once a picture is not in it.
    """
    lengths = max(2, steps // 2), max(4, steps)
    told: dict[str, Any] = {}
    counted: list[tuple[int, int]] = []
    for length in (lengths[1], *lengths):  # the first warms up
        stream = pipe.stream(asked(length), on_device=on_device)
        with driver_calls() as counts:
            wall, cpu, calls = time.perf_counter(), time.thread_time(), 0
            for _ in stream:
                calls += 1
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
        counted.append((calls, waits(counts)))
        told = {"steps": calls, "wall_ms": round(1e3 * wall / calls, 4), "cpu_ms": round(1e3 * cpu / calls, 4)}
        told["driver_calls"] = dict(sorted(counts.items()))
    (few, less), (many, more) = counted[-2:]
    return told | {"waits": more, "waits_per_step": (more - less) / (many - few)}
