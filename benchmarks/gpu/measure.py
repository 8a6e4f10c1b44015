"""What is measured, and how: percentiles, likeness of pictures, calls of the driver, one component, one loop, a race."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from sdruntime.backends import BACKENDS
from sdruntime.cuda import Cuda
from sdruntime.engine import Engine, shape_of
from sdruntime.picture import Result
from sdruntime.pipeline import Pipeline
from sdruntime.request import Request

Array = NDArray[Any]
Draw = Callable[[int], list[Array]]  # a seed -> pictures, uint8 [H, W, 3]
ALIKE = 120.0  # dB: what equal pictures count as, so that a number stands in the JSON
WARM, LEAST, MOST = 2, 5, 40  # rounds


def psnr(one: Sequence[Array], other: Sequence[Array]) -> float:
    """The lowest of pairs of uint8 pictures, in dB; ALIKE for equal ones."""
    worst = ALIKE
    for a, b in zip(one, other, strict=True):
        error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)) if a.shape == b.shape else 255.0**2
        worst = min(worst, 10 * float(np.log10(255.0**2 / error)) if error else ALIKE)
    return round(worst, 2)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Milliseconds: median, 95th percentile, least; and of how many."""
    milliseconds = 1e3 * np.asarray(seconds)
    middle, high = np.percentile(milliseconds, [50, 95])
    return {"p50_ms": round(float(middle), 4), "p95_ms": round(float(high), 4), "min_ms": round(float(milliseconds.min()), 4)} | {
        "n": len(seconds)
    }


def repeated(call: Callable[[], object], *, seconds: float) -> dict[str, Any]:
    """`call` timed for about so long, after a warm-up."""
    for _ in range(WARM):
        call()
    taken: list[float] = []
    while len(taken) < LEAST or (sum(taken) < seconds and len(taken) < 10 * MOST):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return summary(taken)


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
    random = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for tensor in engine.component.inputs:
        shape = shape_of(tensor, dims, factor)
        integers = tensor.dtype.startswith("int")
        feeds[tensor.name] = (
            random.integers(0, 500, shape).astype(tensor.dtype) if integers else random.standard_normal(shape, dtype=np.float32)
        )
    if "timestep" in feeds:
        feeds["timestep"][:] = 500
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


def dims_of(engine: Engine, pipe: Pipeline, *, batch: int, guided: bool) -> dict[str, int]:
    """The dimensions of a call of this component for `batch` pictures of the model's own size."""
    model, texts = pipe.model, engine.spec.component.startswith("text_encoder")
    height, width = (side // model.vae_factor for side in model.default_size)
    rows = {"unet": batch * (1 + guided)}.get(engine.spec.component, (1 + guided) if texts else batch)
    known = {"batch": rows, "height": height, "width": width, "sequence": 77}
    return {name: known[name] for name in engine.component.dimensions}


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


def drawn(pipe: Pipeline, asked: list[Request], *, on_device: bool) -> list[Array]:
    """Whole pictures, from the prompt on."""
    if on_device:
        return pipe(asked).images
    stream = pipe.stream(asked)
    for _ in stream:
        pass
    result: Result = stream.result
    return result.images


def race(entries: Mapping[str, Draw], *, seconds: float, until: float = float("inf")) -> dict[str, Any]:
    """Contestants in turn, A B C A B C, so that a change of the machine strikes all alike.

    Each one: its times, or its `error`; and the PSNR of its pictures against the first one's, of the same seed. Each gets about
    `seconds`; no round begins after `until` (of time.monotonic), but one.
    """
    told: dict[str, Any] = {name: {} for name in entries}
    taken: dict[str, list[float]] = {name: [] for name in entries}
    reference: list[Array] = []
    for round_ in range(-WARM, MOST):
        for name, draw in entries.items():
            enough = round_ >= LEAST and sum(taken[name]) > seconds
            if "error" in told[name] or enough or (taken[name] and time.monotonic() > until):
                continue
            try:
                begun = time.perf_counter()
                pictures = draw(0)
                spent = time.perf_counter() - begun
            except Exception as error:  # recorded, and the others go on
                told[name] = {"error": text_of(error)}
                continue
            if round_ >= 0:
                taken[name].append(spent)
            else:
                reference = reference or pictures
                told[name] |= {"psnr": psnr(pictures, reference), "std": round(float(pictures[0].std()), 1)}
    return {name: each if "error" in each or not taken[name] else each | summary(taken[name]) for name, each in told.items()}


def ratio(of: Mapping[str, Any], to: Mapping[str, Any]) -> float | None:
    """How many times as long the second one takes; None where one has no time."""
    if "p50_ms" not in of or "p50_ms" not in to:
        return None
    return round(float(to["p50_ms"]) / float(of["p50_ms"]), 3)


def text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
